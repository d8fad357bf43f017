import json
import math
from dataclasses import astuple, replace

import numpy as np
import pytest
import torch
from helpers import in_slabs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sdcl.checkpoints import save
from sdcl.metrics import case_metrics
from sdcl.runs.errors import UserError
from sdcl.scoring import report
from sdcl.scoring.evaluation import (
    PREDICTORS,
    STUDENTS,
    Case,
    CaseRow,
    Decision,
    Predictors,
    Task,
    evaluate,
    load_predictors,
)
from sdcl.scoring.figures import panel
from sdcl.scoring.report import best_median_worst, validator
from sdcl.scoring.tables import apply_protocol, format_cases, format_table, mean_dice, summarise

NAN = math.nan
ROLES = {"student_a": ("student_a",), "student_b": ("student_b",), "mean": ("student_a", "student_b")}


def row(case="c1", structure="LV", dice=1.0, hd95=2.0, empty=False, predictor="a"):
    return CaseRow(predictor, case, structure, dice, dice / 2, hd95, hd95 / 2, NAN, NAN, empty, 0, 0, NAN, NAN)


def cases(count=3):
    rng = np.random.default_rng(0)
    made = []
    for k in range(count):
        label = np.zeros((3, 8, 8), np.uint8)
        label[:, 2:5, 2:6], label[:, 5:7, 2:6] = 1, 2
        label = np.roll(label, k, axis=1)
        made.append(Case(f"case{k}", (label + 0.3 * rng.standard_normal(label.shape)).astype(np.float32), label))
    return made


def infer(networks, volume):
    """Network k says probability by distance to the class's intensity, and network 1 misses class 2."""
    near = np.stack([np.exp(-4 * (volume - c) ** 2) for c in range(3)])
    blind = near * np.array([1, 1, 0.1])[:, None, None, None]
    return [p / p.sum(0) for p in (near, blind)][: len(networks)]


def test_one_pass_scores_students_and_their_mean():
    calls, seen = [], []

    def counted(networks, volume):
        calls.append(len(networks))
        return infer(networks, volume)

    predictors = Predictors([nn.Identity(), nn.Identity()], {"a": (0,), "b": (1,), "mean": (0, 1)})
    rows = evaluate(
        predictors,
        cases(),
        Task("t", ("x", "y"), in_slabs(counted)),
        on_case=lambda case, maps, _: seen.append((case.name, set(maps))),
    )
    assert calls == [2, 2, 2] and len(rows) == 3 * 3 * 2
    assert seen == [(f"case{k}", {"a", "b", "mean"}) for k in range(3)]
    dice = mean_dice(rows)
    assert dice["b"] < 0.9 < dice["a"] < 1  # b takes much of class 2 for class 1
    by_hand = []
    for case in cases():
        near, blind = infer([None, None], case.image)
        decision = ((near + blind) / 2).argmax(0)
        overlap = [
            2 * np.sum((decision == c) & (case.label == c)) / np.sum((decision == c) * 1 + (case.label == c))
            for c in (1, 2)
        ]
        by_hand += overlap
    assert dice["mean"] == pytest.approx(np.mean(by_hand)) and dice["mean"] not in (dice["a"], dice["b"])


def test_means_are_over_cases_and_nan_distances_are_left_out_and_counted():
    rows = [
        row("c1", "LV", 0.8, 2.0),
        row("c1", "RV", 0.0, NAN, True),
        row("c2", "LV", 0.6, 4.0),
        row("c2", "RV", 0.4, 6.0),
    ]
    lv, rv, mean = summarise(rows)
    assert (lv.means["dice"], lv.deviations["dice"], lv.counts["dice"], lv.empty) == (
        pytest.approx(0.7),
        pytest.approx(0.1),
        2,
        0,
    )
    assert (rv.means["hd95"], rv.counts["hd95"], rv.empty, rv.means["dice"]) == (6.0, 1, 1, pytest.approx(0.2))
    assert mean.structure == "mean" and mean.means["dice"] == pytest.approx(0.45) and mean.means["hd95"] == 3.5
    text = format_table([lv, rv, mean])
    assert "6.00 ± 0.00 (n=1)" in text and "over 2 cases" in text and "distances are left out" in text


def test_the_papers_protocol_scores_an_empty_mask_zero_in_all_four():
    rows = [row("c1", "LV", 0.5, 3.0), row("c2", "LV", 0.0, NAN, True), row("c3", "LV", NAN, NAN, True)]
    (default,) = summarise(rows)
    (paper,) = summarise(rows, "paper")
    assert default.means["hd95"] == 3.0 and default.counts == {
        "dice": 2,
        "jaccard": 2,
        "hd95": 1,
        "asd": 1,
        "hd95_mm": 0,
        "asd_mm": 0,
    }
    assert paper.means["hd95"] == 1.0 and paper.means["dice"] == pytest.approx(0.5 / 3) and paper.empty == 2
    assert "flatters" in format_table([paper], "paper") and "[mm]" not in format_table([paper], "paper")


def test_case_lines():
    lines = format_cases([row("c1", "LV", 0.5), row("c1", "RV", 0.25), row("c2", "LV"), row("c2", "RV")]).splitlines()
    assert "Dice LV/RV" in lines[0] and "0.5000 0.2500" in lines[2] and len(lines) == 4


def test_validator_scores_without_distances_and_draws_the_first_case():
    validation = validator(cases(), Task("t", ("x", "y"), in_slabs(infer)))(
        Predictors.of({r: nn.Identity() for r in STUDENTS}, PREDICTORS)
    )
    assert set(validation.dice) == {"student_a", "student_b", "mean"}
    assert validation.panel.shape == (3, 8, 40) and 0 <= validation.panel.min() <= validation.panel.max() <= 1


def test_the_panel_marks_exactly_where_the_students_differ():
    case = Case("c", np.zeros((1, 4, 4), np.float32), np.eye(4, dtype=np.uint8)[None])
    a = np.zeros((1, 4, 4), np.uint8)
    b = a.copy()
    b[0, 1, 2] = 1
    picture = panel(case, {"student_a": a, "student_b": b}, 0)[:, :, 16:]
    assert np.argwhere(picture.any(0)).tolist() == [[1, 2]]


def test_best_median_worst():
    rows = [row(f"c{k}", s, dice) for k, dice in enumerate((0.5, 0.9, NAN, 0.7, 0.6)) for s in ("LV", "RV")]
    assert best_median_worst(rows, "a") == {"best": "c1", "median": "c4", "worst": "c2"}
    assert best_median_worst(rows[:4], "a") == {"best": "c1", "worst": "c0"}


def test_files_of_a_test(tmp_path):
    predictors = Predictors([nn.Identity(), nn.Identity()], {"a": (0,), "b": (1,), "mean": (0, 1)})
    report.test_report(
        tmp_path / "t",
        predictors,
        cases(),
        Task("t", ("x", "y"), in_slabs(infer)),
        {"split": "val", "protocol": "default"},
    )
    content = json.loads((tmp_path / "t" / "summary.json").read_text())
    assert content["split"] == "val" and content["protocol"] == "default" and len(content["summary"]) == 9
    lines = (tmp_path / "t" / "cases.csv").read_text().splitlines()
    metrics = "dice,jaccard,hd95,asd,hd95_mm,asd_mm,empty,voxels,reference_voxels,ml,reference_ml"
    assert lines[0] == f"method,predictor,case,structure,{metrics}" and len(lines) == 19
    for name in ("cases.png", "metrics.png"):
        assert (tmp_path / "t" / name).read_bytes().startswith(b"\x89PNG")


def test_predictors_load_each_network_once(tmp_path):
    def payload(roles, iteration):
        return {
            "networks": {r: {"weight": torch.full((1, 1), float(iteration))} for r in roles},
            "iteration": iteration,
        }

    both = ("student_a", "student_b")
    for name, roles, iteration in (
        ("best_student_a", both[:1], 3),
        ("best_student_b", both[1:], 5),
        ("best_mean", both, 5),
        ("last", both, 8),
    ):  # noqa: E501
        save(payload(roles, iteration), tmp_path / f"{name}.pth")
    asked = []

    def make(role):
        asked.append(role)
        return nn.Linear(1, 1, bias=False)

    predictors = load_predictors(tmp_path, make, "val", ROLES)
    assert asked == ["student_a", "student_b", "student_a", "student_b"] * 2
    assert [n.weight.item() for n in predictors.networks] == [3, 5, 5, 8, 8]
    assert predictors.members == {
        "student_a, best on val (3)": (0,),
        "student_b, best on val (5)": (1,),
        "mean, best on val (5)": (2, 1),
        "student_a, last (8)": (3,),
        "student_b, last (8)": (4,),
        "mean, last (8)": (3, 4),
    }
    (tmp_path / "best_mean.pth").unlink()
    with pytest.raises(UserError, match="best_mean.pth does not exist"):
        load_predictors(tmp_path, lambda role: nn.Linear(1, 1, bias=False), "val", ROLES)


@pytest.mark.parametrize("last", [3, 5, 8])
def test_the_first_three_predictors_are_a_b_and_the_mean_whichever_best_is_the_last(tmp_path, last):
    """cases.png, the NIfTI files and best, median, worst are those of the first mean."""

    def payload(roles, iteration):
        state = {role: {"weight": torch.full((1, 1), float(iteration))} for role in roles}
        return {"networks": state, "iteration": iteration}

    both = ("student_a", "student_b")
    best = {"student_a": (both[:1], 3), "student_b": (both[1:], 5), "mean": (both, 8)}
    for name, (roles, iteration) in best.items():
        save(payload(roles, iteration), tmp_path / f"best_{name}.pth")
    save(payload(both, last), tmp_path / "last.pth")
    members = load_predictors(tmp_path, lambda role: nn.Linear(1, 1, bias=False), "val", ROLES).members
    assert [title.split(",")[0] for title in list(members)[:3]] == ["student_a", "student_b", "mean"]
    assert [len(indices) for indices in list(members.values())[:3]] == [1, 1, 2]
    both_in_one = [title for title in members if " and last (" in title]
    assert both_in_one == [f"{name}, best on val and last ({last})" for name, (_, at) in best.items() if at == last]
    assert len(members) == 6 - len(both_in_one)
    alone = load_predictors(tmp_path, lambda role: nn.Linear(1, 1, bias=False), "val", {"student_a": ("student_a",)})
    assert alone.shown == 1 and alone.pictured == alone.single == [next(iter(alone.members))]


def test_distances_in_mm_where_the_spacing_is_known():
    label = np.zeros((1, 1, 8), np.uint8)
    label[..., 2] = 1
    case = Case("c", np.roll(label, 3, axis=2).astype(np.float32), label, spacing=(1.0, 1.0, 0.5))
    task = Task("t", ("x",), in_slabs(lambda networks, volume: [np.stack([1 - volume, volume])]))
    (row,) = evaluate(Predictors([nn.Identity()], {"a": (0,)}), [case], task)
    assert (row.hd95, row.hd95_mm, row.asd, row.asd_mm) == (3, 1.5, 3, 1.5)
    assert "95HD [mm]" in format_table(summarise([row])) and "95HD [mm]" in format_cases([row])


def test_decisions():
    p = np.array([[0.5, 0.4, 0.7], [0.5, 0.6, 0.3]])[:, None]
    assert Decision("threshold")(p).tolist() == Decision("argmax")(p).tolist() == [[0, 1, 0]]
    p = np.array([[0.1, 0.9, 0.2, 0.2], [0.9, 0.1, 0.8, 0.8]])[:, None]
    assert Decision("argmax", largest_component=4)(p).tolist() == [[0, 0, 1, 1]]


def test_above_one_half_is_foreground_whatever_the_other_class_has():
    """Sums of windows leave probabilities that do not add up to 1 to the last digit."""
    p = np.array([[0.45, 0.4], [0.49, 0.51]])
    assert Decision("threshold")(p).tolist() == [0, 1] and Decision("argmax")(p).tolist() == [1, 1]


@pytest.mark.parametrize(("classes", "dtype"), [(2, np.uint8), (256, np.uint8), (257, np.uint16)])
def test_decisions_are_bytes_while_bytes_can_count_the_classes(classes, dtype):
    p = np.eye(classes)[:, [0, classes - 1]]
    assert Decision()(p).dtype == dtype and Decision()(p).tolist() == [0, classes - 1]


@pytest.mark.parametrize(
    ("given", "expected", "dtype"),
    [((), [0, 1, 2], np.uint8), ((5, 7), [0, 5, 7], np.uint8), ((7, 255), [0, 7, 255], np.uint8),
     ((256, 3), [0, 256, 3], np.uint16)],
)  # fmt: skip
def test_label_values_are_those_of_the_original_files(given, expected, dtype):
    values = Task("t", ("x", "y"), in_slabs(infer), label_values=given).original(np.array([0, 1, 2], np.uint8))
    assert values.tolist() == expected and values.dtype == dtype


def test_distances_are_nan_where_they_are_not_known_or_not_asked_for():
    (case,) = cases(1)
    spaced = Case(case.name, case.image, case.label, spacing=(5.0, 1.0, 1.0))
    predictors, task = Predictors([nn.Identity()], {"a": (0,)}, kept=("a",)), Task("t", ("x", "y"), in_slabs(infer))
    given = []
    rows = {}
    for name, one, wanted in (("unknown", case, True), ("known", spaced, True), ("without", spaced, False)):
        rows[name] = evaluate(
            predictors, [one], task, distances=wanted, on_case=lambda _, maps, p: given.append((maps, p))
        )
    assert all(row.empty is False and row.dice > 0.5 for found in rows.values() for row in found)
    assert all(
        not math.isnan(row.hd95) and math.isnan(row.hd95_mm) and math.isnan(row.asd_mm) for row in rows["unknown"]
    )
    assert all(not math.isnan(row.hd95_mm) for row in rows["known"])
    assert all(math.isnan(value) for row in rows["without"] for value in (row.hd95, row.asd, row.hd95_mm, row.asd_mm))
    np.testing.assert_array_equal(given[0][1]["a"].argmax(0), given[0][0]["a"])


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.02, 0.3]))
@settings(max_examples=25, deadline=None)
def test_a_class_is_scored_in_its_box_as_in_the_whole_volume(seed, share):
    """Few voxels or many, in both maps, in one of them or in none."""
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, 9, 3))
    found, label = (rng.integers(0, 4, shape) * (rng.random(shape) < share) for _ in range(2))
    probabilities = np.stack([found == c for c in range(4)]).astype(np.float32)
    case = Case("c", np.zeros(shape, np.float32), label.astype(np.uint8), spacing=(3.0, 1.0, 0.5))
    task = Task("t", ("x", "y", "z"), in_slabs(lambda networks, volume: [probabilities]))
    for row in evaluate(Predictors([nn.Identity()], {"a": (0,)}), [case], task):
        number = "xyz".index(row.structure) + 1
        voxels = case_metrics(found == number, label == number)
        mm = case_metrics(found == number, label == number, case.spacing)
        expected = (*astuple(voxels), mm.hd95, mm.asd, np.sum(found == number), np.sum(label == number))
        got = (row.dice, row.jaccard, row.hd95, row.asd, row.empty, row.hd95_mm, row.asd_mm, row.voxels,
               row.reference_voxels)  # fmt: skip
        np.testing.assert_array_equal(got, expected)


def test_the_papers_protocol_leaves_what_is_not_empty_and_distances_in_mm():
    full, empty = row(dice=0.5), replace(row(dice=NAN, hd95=NAN, empty=True), hd95_mm=4.0)
    assert apply_protocol(full, "paper") is full and apply_protocol(empty, "default") is empty
    counted = apply_protocol(empty, "paper")
    assert (counted.dice, counted.jaccard, counted.hd95, counted.asd, counted.hd95_mm) == (0, 0, 0, 0, 4)


def test_the_mean_row_is_over_each_cases_own_structures():
    dice = {"c1": (0.9, 0.7), "c2": (0.5, NAN), "c3": (0.1, 0.3)}
    rows = [row(case, s, value) for case, values in dice.items() for s, value in zip("xy", values, strict=True)]
    mean = summarise(rows)[-1]
    assert mean.means["dice"] == pytest.approx((0.8 + 0.5 + 0.2) / 3) and mean.counts["dice"] == 3
    assert mean.deviations["dice"] == pytest.approx(np.std([0.8, 0.5, 0.2]))


@pytest.mark.filterwarnings("error")
def test_what_cannot_be_scored_is_nan_without_a_warning():
    (only,) = summarise([row(dice=NAN, hd95=NAN, empty=True)])
    assert math.isnan(only.means["dice"]) and math.isnan(only.deviations["hd95"]) and only.counts["dice"] == 0
    assert format_table([only]).splitlines()[-1].startswith("mean ± standard deviation over 0 cases")
    assert format_table([]).splitlines()[-1].startswith("mean ± standard deviation over 0 cases")


def test_tables_by_hand():
    rows = [row("c1", "LV", 0.5), row("c1", "RV", 0.25), row("c22", "LV", 1.0, NAN, True), row("c22", "RV", 0.75)]
    assert format_cases(rows) == "\n".join(
        [
            "case  predictor  Dice LV/RV     Jaccard LV/RV  95HD [voxel] LV/RV  ASD [voxel] LV/RV",
            "----  ---------  -------------  -------------  ------------------  -----------------",
            "c1    a          0.5000 0.2500  0.2500 0.1250  2.00 2.00           1.00 1.00",
            "c22   a          1.0000 0.7500  0.5000 0.3750  nan 2.00            nan 1.00",
        ]
    )
    assert format_table(summarise(rows)[:1]) == "\n".join(
        [
            "predictor  structure  Dice             Jaccard          95HD [voxel]       ASD [voxel]        empty",
            "---------  ---------  ---------------  ---------------  -----------------  -----------------  -----",
            "a          LV         0.7500 ± 0.2500  0.3750 ± 0.1250  2.00 ± 0.00 (n=1)  1.00 ± 0.00 (n=1)  1",
            "mean ± standard deviation over 2 cases; an empty mask scores Dice 0 and its distances are left out.",
        ]
    )
    assert format_table(summarise(rows, "paper")[:1], "paper").splitlines()[-1] == (
        "mean ± standard deviation over 2 cases; the paper's protocol: an empty mask scores 0 in all four, which "
        "flatters the distances."
    )


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 6), st.integers(0, 100))
def test_the_likeliest_class_is_decided_class_by_class(classes, seed):
    """The first of equally likely ones, as argmax has it."""
    probabilities = np.random.default_rng(seed).integers(0, 3, (classes, 3, 4, 5)).astype(np.float32)
    np.testing.assert_array_equal(Decision("argmax").labels(probabilities), probabilities.argmax(0))
