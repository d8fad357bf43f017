"""Runs that would train or score something else than was meant: refused, or told."""

import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from helpers import ROOT, write_h5
from test_scripts import load

from sdcl import checkpoints
from sdcl.networks import build_network, resnet, vnet
from sdcl.runs.config import check_common, header_groups, make_output_safe, parse
from sdcl.runs.costs import said_of
from sdcl.runs.errors import UserError
from sdcl.runs.folder import LOGGER, StopRequest, differing_tasks, read_config, start_selected_on, validated_among
from sdcl.scoring.evaluation import Case, CaseRow
from sdcl.scoring.scored import ScoredCases
from sdcl.scoring.tables import mean_dice, summarise

VOLUMES = ["--patch_size", "32", "16", "16", "--labelled_repeat", "2", "--unlabelled_repeat", "4", "--labelnum", "2",
           "--stride", "32", "16", "16", "--device", "cpu", "--log_every", "1"]  # fmt: skip
SCRIPTS = [*sorted((ROOT / "code").glob("*.py")), *sorted((ROOT / "code" / "pancreas").glob("*.py"))]
SCRIPTS += [path for path in sorted((ROOT / "dataloaders").glob("*.py")) if "run_script(main" in path.read_text()]
LIGHT = ["ACDC_train.py", "LA_train.py", "own_train.py", "pancreas/Pancreas_train.py", "test_LA.py", "test_own.py"]


def main(script, *arguments):
    """Run a script's main in this process and return what it logged."""
    module, said = load(script), io.StringIO()
    handler = __import__("logging").StreamHandler(said)
    LOGGER.addHandler(handler)
    try:
        module.main(parse(module.Config, [str(a) for a in arguments]))
    except UserError as error:
        raise UserError(f"{error}\n{said.getvalue()}") from None
    finally:
        LOGGER.removeHandler(handler)
    return said.getvalue()


@pytest.fixture(scope="module")
def la(scratch):
    from dataloaders.phantom import write_la

    return write_la(scratch / "la", cases=(5, 2), size=(40, 36, 32))


@pytest.fixture(scope="module")
def models(la, scratch):
    """One run of each stage, validated on a held-out case."""
    folder = scratch / "models"
    where = ["--root_path", la, "--models_path", folder, *VOLUMES, "--pre_iterations", 2, "--self_iterations", 1]
    main("LA_train.py", *where, "--select", "val", "--val_cases", 1, "--exp", "one")
    return folder


def start(la, models, exp, *more):
    where = ["--root_path", la, "--models_path", models, *VOLUMES, "--pre_iterations", 2, "--self_iterations", 1]
    return main("LA_train.py", *where, "--select", "last", "--exp", exp, "--pretrained", models / "one_copy", *more)


@pytest.fixture
def copy(models):
    yield shutil.copytree(models / "la_one_2_labeled", models / "one_copy")
    shutil.rmtree(models / "one_copy", ignore_errors=True)


def change(run, **content):
    kept = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(kept | content))


def test_an_unfinished_pretraining_is_refused(la, models, copy):
    change(copy, config=read_config(copy) | {"pre_iterations": 40})
    with pytest.raises(
        UserError, match="--pretrained .* has done 2 of its 40 iterations of pre-training: give its own"
    ):
        start(la, models, "unfinished")
    assert not (models / "la_unfinished_2_labeled").exists()


def test_a_pretraining_on_other_data_is_refused(la, models, copy):
    task = json.loads((copy / "config.json").read_text())["task"]
    change(copy, task=task | {"name": "pancreas"})
    with pytest.raises(UserError, match=r"was trained on other data \(name pancreas there, la now\)"):
        start(la, models, "other")


def test_a_wrong_folder_of_a_pretraining_is_named_with_those_there_are(la, models):
    with pytest.raises(UserError, match=r"--pretrained .*one_copy is no run's folder \(.* holds la_one_2_labeled\)"):
        start(la, models, "nowhere")


def test_a_pretraining_on_other_labelled_cases_is_refused(la, models, copy, tmp_path):
    """As many of them, the first of a list in another order: the labels of three cases would be in a run of two."""
    root = shutil.copytree(la, tmp_path / "la")
    names = (root / "data_split" / "train.txt").read_text().split()
    (root / "data_split" / "train.txt").write_text("\n".join([names[0], names[2], names[1], *names[3:]]))
    with pytest.raises(
        UserError, match="was trained on other labelled cases than these 2: choose another run, or restore"
    ):
        start(root, models, "other_cases")
    assert not (models / "la_other_cases_2_labeled").exists()


def test_a_pretraining_with_another_seed_or_patch_is_noted(la, models, copy, narrow, monkeypatch):
    monkeypatch.setattr("sdcl.runs.experiment.self_train", lambda *_, **__: None)
    said = start(la, models, "noted", "--seed", 3, "--patch_size", 32, 32, 16)
    assert "was trained with --seed 1337, not 3." in said and "--patch_size 32 16 16, not 32 32 16." in said
    change(copy, lists={})
    said = start(la, models, "unknown")
    assert "does not tell which labelled cases it was trained on" in said and "--seed" not in said.split("NOTE")[1]


def test_what_a_pretraining_was_trained_on_is_inherited_and_it_is_needed_no_more(la, models, copy):
    test_case = (la / "data_split" / "test.txt").read_text().split()[0]
    trained_on = [*json.loads((copy / "config.json").read_text())["trained_on"], test_case]
    change(copy, trained_on=trained_on)
    start(la, models, "heir")
    kept = json.loads((models / "la_heir_2_labeled" / "config.json").read_text())
    assert test_case in kept["trained_on"] and kept["pretrained"]["pre_iterations"] == 2
    shutil.rmtree(copy)
    last = models / "la_heir_2_labeled" / "self_train" / "last.pth"
    state = checkpoints.load(last)
    state["iteration"] = 0  # as if it had been stopped early
    torch.save(state, last)
    assert "self_train: iterations 1 to 1" in start(la, models, "heir")
    text = main("test_LA.py", "--root_path", la, "--models_path", models, "--exp", "heir", "--labelnum", 2,
                "--stride", 32, 16, 16, "--device", "cpu")  # fmt: skip
    assert f"NOTE: the run was TRAINED on 1 of these cases ({test_case})" in text


@pytest.fixture(scope="module")
def other_test_labels(la, scratch):
    """The same data, but for the labels of the test cases: foreground and background change places."""
    root = shutil.copytree(la, scratch / "other_labels")
    for name in (root / "data_split" / "test.txt").read_text().split():
        with h5py.File(next((root / "data").glob(f"*/{name}/*.h5")), "r+") as file:
            file["label"][...] = 1 - np.minimum(file["label"][()], 1)
    return root


def last_weights(run, stage="self_train"):
    networks = checkpoints.load(run / stage / "last.pth")["networks"]
    return {f"{role} {name}": value for role, state in networks.items() for name, value in state.items()}


@pytest.fixture
def narrow(monkeypatch):
    """Networks with few filters, which train in a tenth of the time."""
    for module in (resnet, vnet):
        monkeypatch.setattr(module, "WIDTHS", (2, 4, 8, 16, 32))


@pytest.mark.parametrize("select", [["--select", "last"], ["--select", "val", "--val_cases", 1]])
def test_test_labels_reach_no_weight(la, other_test_labels, select, narrow, tmp_path):
    short = [*VOLUMES, "--pre_iterations", 2, "--pre_val_every", 1, "--self_iterations", 1, *select]
    for root in (la, other_test_labels):
        main("LA_train.py", "--root_path", root, "--models_path", tmp_path / root.name, *short)
    runs = [tmp_path / root.name / "la_SDCL_2_labeled" for root in (la, other_test_labels)]
    ours, theirs = map(last_weights, runs)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    saved = [sorted(path.relative_to(run) for path in run.rglob("*.pth")) for run in runs]
    assert saved[0] == saved[1]


def test_a_start_that_was_selected_on_the_test_cases_is_told(la, narrow, scratch):
    """The published way: self-training starts from stage 1's best on the test cases, which flatters its last too."""
    models = scratch / "published"
    where = ["--root_path", la, "--models_path", models, *VOLUMES, "--pre_iterations", 2, "--self_iterations", 1]
    main("LA_train.py", *where)
    run, said = models / "la_SDCL_2_labeled", scored(la, models)
    assert "'best on test' was selected on these very volumes, and stage 1's best" in said
    assert "which flatters both it and 'last'" in said and "'last' was not" not in said
    results = run / "test" / "self_train_test"
    facts = json.loads((results / "summary.json").read_text())
    assert facts["start_selected_on"] == "test" and facts["selected_here"] and facts["start_selected_here"]
    assert "which flatters both it and &#39;last&#39;" in (results / "report.html").read_text(encoding="utf-8")
    said = scored(la, models, "--stage", "pre_train")
    assert "'best on test' was selected on these very volumes, which flatters it; 'last' was not." in said
    main("LA_train.py", *where, "--select", "last", "--exp", "from_last", "--pretrained", run)
    assert "very volumes" not in scored(la, models, "--exp", "from_last")  # of stage 1's last nothing was selected
    config = json.loads((run / "config.json").read_text())
    assert config["validation_cases"] == (la / "data_split" / "test.txt").read_text().split()
    heir = {"select": "val"} | {"folder": str(run)}
    for content, expected in (
        ({"pretrained": None}, "test"), ({"pretrained": heir | {"select": "test"}}, "test"),
        ({"pretrained": heir}, "val"), ({"config": config["config"] | {"select": "last"}}, None),
        ({"config": config["config"] | {"select": "val"}}, "val"),
    ):  # fmt: skip
        (scratch / "one").mkdir(exist_ok=True)
        (scratch / "one" / "config.json").write_text(json.dumps(config | content))
        assert start_selected_on(scratch / "one") == expected
    del config["validation_cases"]  # of an earlier version, which kept a checksum alone
    (scratch / "one" / "config.json").write_text(json.dumps(config))
    names = (la / "data_split" / "test.txt").read_text().split()
    assert validated_among(scratch / "one", names) == names and validated_among(scratch / "one", names[:1]) == []


@pytest.mark.slow
def test_the_same_cases_under_another_name_are_these_very_volumes(la, narrow, tmp_path):
    """A val.txt that is a copy of test.txt."""
    root = shutil.copytree(la, tmp_path / "la")
    shutil.copy(root / "data_split" / "test.txt", root / "data_split" / "val.txt")
    where = ["--root_path", root, "--models_path", tmp_path, *VOLUMES, "--pre_iterations", 1, "--self_iterations", 1]
    main("LA_train.py", *where, "--select", "val")
    assert "'best on val' was selected on these very volumes, and stage 1's best" in scored(root, tmp_path)


def test_a_tables_head_tells_where_self_training_started(tmp_path):
    def run(name, select, **facts):
        folder = tmp_path / name
        (folder / "test" / "r").mkdir(parents=True)
        config = {"patch_size": [32, 32], "labelnum": 2, "student_a": "unet", "student_b": "resunet", "select": select}
        (folder / "config.json").write_text(json.dumps({"config": config}))
        summary = {"selected_on": "test", "trained_on": [], "split": "test"} | facts
        (folder / "test" / "r" / "summary.json").write_text(json.dumps(summary))
        return SimpleNamespace(folder=folder)

    def head(checkpoint, *runs):
        config = SimpleNamespace(name="m", data_set="la", checkpoint=checkpoint, flags="")
        runs = [SimpleNamespace(folder=one.folder) for one in runs]
        return " ".join(said_of(config, [Folder(one.folder) for one in runs], "r", "test"))

    Folder = dataclasses.make_dataclass("Folder", ["folder"], frozen=True)  # noqa: N806
    one, two, three = run("a", "test"), run("b", "last", selected_on=None), run("c", "val", selected_on="val")
    assert "all 1 runs started self-training from stage 1's best, SELECTED ON THESE VERY VOLUMES (test)" in head(
        "last", one
    )
    assert "but 1 of 2 runs started" in head("last", one, two)
    assert "Last checkpoints: nothing was selected on these volumes." in head("last", two)
    assert "from stage 1's best, selected on val." in head("last", two, three)
    assert "Checkpoints SELECTED ON THESE VERY VOLUMES (test)" in head("best", one)
    assert "flags --select last." in head("last", two)
    here = run("d", "val", selected_on="val", start_selected_here=True, selected_here=False)
    assert "In all 1 runs self-training started from stage 1's best, SELECTED ON" in head("best", here)


def scored(la, models, *more):
    return main("test_LA.py", "--root_path", la, "--models_path", models, "--labelnum", 2, "--device", "cpu",
                "--stride", 32, 16, 16, *more)  # fmt: skip


def test_given_weights_are_tested_as_they_were_trained_each_in_a_folder_of_its_own(la, models):
    stage = models / "la_one_2_labeled" / "self_train"
    pairs = [(stage / "best_student_a.pth", stage / "best_student_b.pth"), (stage / "last.pth", stage / "last.pth")]
    for a, b in pairs:
        text = scored(la, models, "--student_a_weights", a, "--student_b_weights", b)
        assert "NOTE: patch_size is the checkpoint's own, [32, 16, 16], not this script's [112, 112, 80]" in text
        assert "networks vnet and resvnet, patch_size [32, 16, 16]" in text
    assert len(list((stage / "test").glob("weights_*_test"))) == 2


@pytest.mark.slow
def test_the_same_architecture_twice_can_be_tested_by_its_files(la, models):
    where = ["--root_path", la, "--models_path", models, *VOLUMES, "--pre_iterations", 1, "--self_iterations", 0]
    main("LA_train.py", *where, "--select", "last", "--exp", "twins", "--student_b", "vnet")
    last = models / "la_twins_2_labeled" / "pre_train" / "last.pth"
    text = scored(la, models, "--student_a_weights", last, "--student_b_weights", last)
    by_run = scored(la, models, "--exp", "twins", "--stage", "pre_train")
    tables = [
        [line.split()[-12:] for line in out.splitlines() if line.startswith("student_")] for out in (text, by_run)
    ]
    numbers = [[cells[-4:] for cells in table] for table in tables]
    assert numbers[0] == numbers[1] and numbers[0]


def test_data_prepared_in_another_way_are_not_scored(la, models, tmp_path):
    root = shutil.copytree(la, tmp_path / "la")
    other = {"normalise": "minmax", "orientation": "LPS", "spacing_mm": None, "trust_slice_spacing": True,
             "layout": "volume", "slice_axis": None}  # fmt: skip
    for path in (root / "data").rglob("*.h5"):
        with h5py.File(path, "r+") as file:
            file.attrs["preprocessing"] = json.dumps(other)
    with pytest.raises(UserError, match=r"prepared in another way .*normalise zscore there, minmax now"):
        scored(root, models, "--exp", "one")


def test_tasks_differ_in_what_both_tell():
    old = {"name": "x", "class_names": ["a"], "preprocessing": {"normalise": "ct", "orientation": None}}
    new = {"name": "x", "class_names": ["a"], "label_values": [5], "decision_rule": "argmax"}
    new["preprocessing"] = {"normalise": "ct", "orientation": "LPS", "slice_axis": "z"}
    assert differing_tasks(old, new) == differing_tasks(new, old) == ""
    assert "label_values [5] there, [7] now" in differing_tasks(new, new | {"label_values": [7]})
    assert "spacing_mm None there, [1, 1, 1] now" in differing_tasks(
        {**old, "preprocessing": {"spacing_mm": None}}, {**old, "preprocessing": {"spacing_mm": (1, 1, 1)}}
    )


@pytest.mark.parametrize(("value", "is_refused"), [(0, True), (2, False)])
def test_classes_that_no_labelled_case_has(tmp_path, value, is_refused):
    from dataloaders.phantom import write_la

    root = write_la(tmp_path / "la", cases=(4, 1), size=(40, 36, 32), classes=3)
    description = {"name": "la3", "class_names": ["body", "veins"], "preprocessing": {"normalise": "zscore"}}
    own = tmp_path / "own"
    for name in (root / "data_split" / "train.txt").read_text().split()[:4]:
        with h5py.File(next((root / "data").glob(f"*/{name}/*.h5"))) as file:
            image, label = file["image"][()], file["label"][()]
        write_h5(own / "data" / f"{name}.h5", image=image, label=np.where(label == value, label, 0).astype(np.uint8))
    names = sorted(path.stem for path in (own / "data").glob("*.h5"))
    (own / "data_split").mkdir()
    for key, part in {"train": names[:3], "train_lab": names[:2], "train_unlab": names[2:3], "test": names[3:]}.items():
        (own / "data_split" / f"{key}.txt").write_text("\n".join(part))
    (own / "dataset.json").write_text(json.dumps(description))
    short = ["--pre_iterations", 1, "--self_iterations", 0, "--select", "last", "--models_path", tmp_path / "m"]
    arguments = ["--root_path", own, *VOLUMES, *short]
    if is_refused:
        with pytest.raises(UserError, match="no labelled training case has any of the classes body, veins"):
            main("own_train.py", *arguments)
    else:
        assert "no labelled training case has the class body: it cannot be learned" in main("own_train.py", *arguments)


def test_held_out_cases_without_labels_are_named(la, tmp_path):
    root = shutil.copytree(la, tmp_path / "la")
    name = (root / "data_split" / "train.txt").read_text().split()[-1]
    with h5py.File(next((root / "data").glob(f"*/{name}/*.h5")), "r+") as file:
        del file["label"]
    where = ["--root_path", root, "--models_path", tmp_path / "m", *VOLUMES, "--select", "val", "--val_cases", 1]
    with pytest.raises(UserError, match=f"--val_cases 1 holds out {name}, which has no label to score against"):
        main("LA_train.py", *where)


def test_headers_and_the_library_know_the_same_networks():
    from sdcl import networks
    from sdcl.runs import folder

    assert set(folder.NETWORKS) == set(networks.NETWORKS)


def test_nothing_to_train_is_refused():
    with pytest.raises(UserError, match="--pre_iterations and --self_iterations are both 0, which trains nothing"):
        parse(load("LA_train.py").Config, ["--pre_iterations", "0", "--self_iterations", "0"])


def test_what_selects_is_the_tables_mean():
    """A class that is in neither mask of a case is not scored: the mean over cases weighs the others' rows anew."""
    nan = float("nan")

    def row(case, structure, dice):
        return CaseRow("mean", case, structure, dice, dice, nan, nan, nan, nan, dice != dice, 0, 0, nan, nan)

    rows = [row("one", "a", 0.9), row("one", "b", nan), row("two", "a", 0.5), row("two", "b", 0.3)]
    assert mean_dice(rows)["mean"] == pytest.approx((0.9 + (0.5 + 0.3) / 2) / 2)  # not (0.9 + 0.5 + 0.3) / 3
    table = {(r.predictor, r.structure): r.means["dice"] for r in summarise(rows)}
    assert mean_dice(rows)["mean"] == table["mean", "mean"]


def test_a_stopped_test_goes_on_with_the_cases_that_are_left(la, models, monkeypatch):
    from sdcl.scoring import report

    whole = scored(la, models, "--exp", "one")
    results = models / "la_one_2_labeled" / "test" / "self_train_test"
    expected = (results / "cases.csv").read_text()
    evaluate, calls = report.evaluate, []

    def stopping(predictors, cases, task, **how):
        calls.append(len(cases))
        if len(calls) == 1:
            evaluate(predictors, cases[:1], task, **how)
            raise KeyboardInterrupt
        return evaluate(predictors, cases, task, **how)

    monkeypatch.setattr(report, "evaluate", stopping)
    with pytest.raises(KeyboardInterrupt):
        scored(la, models, "--exp", "one")
    first = (results / "cases.csv").read_text()
    assert expected.startswith(first) and 1 < len(first.splitlines()) < len(expected.splitlines())
    assert not (results / "summary.json").exists() and not (results / "report.html").exists()  # of the earlier test
    assert not list(results.glob("*.png"))
    again = scored(la, models, "--exp", "one")
    assert calls == [2, 1] and "going on with a test that was stopped: 1 of 2 volumes are scored" in again
    assert (results / "cases.csv").read_text() == expected and (results / "report.html").exists()
    assert whole.split("mean ± ")[1].split("written")[0] == again.split("mean ± ")[1].split("written")[0]


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-30], lambda b: b[:40], lambda b: b"", lambda b: b[:200] + b"!" + b[201:]]
)
def test_a_damaged_kept_case_is_scored_again(tmp_path, damage):
    case = Case("c", np.zeros((2, 3, 3), np.float32), np.ones((2, 3, 3), np.uint8))
    kept = ScoredCases(tmp_path, "key")
    rows = [CaseRow("mean", "c", "a", 0.5, 0.4, *[float("nan")] * 4, False, 0, 0, *[float("nan")] * 2)]
    kept.save(case, rows, {"mean": case.label})
    found, maps = kept.load(case)
    assert found[0].dice == 0.5 and np.array_equal(maps["mean"], case.label)
    assert ScoredCases(tmp_path, "other").load(case) is None
    assert kept.load(dataclasses.replace(case, image=case.image + 1)) is None
    (path,) = tmp_path.glob("*.npz")
    path.write_bytes(damage(path.read_bytes()))
    assert kept.load(case) is None


def test_runs_of_earlier_versions_are_taken_over_and_tested_with_a_note(la, models, copy):
    change(copy, task=None)
    assert "does not tell on which data it was trained" in start(la, models, "from_old")
    run = models / "la_from_old_2_labeled"
    change(run, task=None)
    assert "does not tell how the data were prepared" in scored(la, models, "--exp", "from_old")


def test_a_foreign_config_beside_given_weights_is_none_of_theirs(la, models, tmp_path):
    (tmp_path / "model" / "weights").mkdir(parents=True)
    (tmp_path / "model" / "config.json").write_text('{"architecture": "something else"}')
    files = []
    for role, network in (("student_a", "vnet"), ("student_b", "resvnet")):
        files += [f"--{role}_weights", tmp_path / "model" / "weights" / f"{role}.pth"]
        torch.save(build_network(network, 2).state_dict(), files[-1])
    text = scored(la, models, *files, "--patch_size", 32, 16, 16)
    assert "NOTE: these files do not tell which cases they were trained on" in text


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "0.001", "1"])
def test_a_mask_that_is_no_fraction_is_refused(value):
    with pytest.raises(UserError, match="--mask_fraction is .*: a mask of .* of .*choose a fraction inside"):
        parse(load("LA_train.py").Config, ["--mask_fraction", value])


def test_a_mask_of_0_means_no_pasting():
    assert parse(load("LA_train.py").Config, ["--mask_fraction", "0"]).mask_fraction == 0


def test_an_edited_default_is_refused_like_the_flag():
    header = load("LA_train.py").Config
    for name in ("base_lr", "batch_size", "log_every"):
        edited = dataclasses.make_dataclass("Config", [(name, type(getattr(header, name)), 0)], bases=(header,))
        with pytest.raises(UserError, match=f"--{name} is 0: it must be above 0"):
            check_common(edited())


def test_a_completion_script_is_no_mistake():
    done = call(ROOT / "code" / "LA_train.py", "--tyro-print-completion", "bash")
    assert done.returncode == 0 and "complete" in done.stdout and not done.stderr


def test_a_terminal_without_utf8_gets_plain_letters():
    code = "from sdcl.runs.config import make_output_safe; make_output_safe(); print('0.9 ± 0.1, 3×3 ✓')"
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT / "code")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout == "0.9 +- 0.1, 3x3 ?\n" and done.returncode == 0, done.stderr
    assert callable(make_output_safe)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"])
def test_each_signal_to_end_asks_to_stop(name):
    number = getattr(signal, name)
    earlier = signal.signal(number, signal.SIG_DFL)  # under nohup the suite itself has SIGHUP ignored
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), number)
            for _ in range(100):
                if stop.code:
                    break
                time.sleep(0.01)
            assert stop.code == 128 + number
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, earlier)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signal")
def test_nohup_is_respected():
    earlier = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.05)
            assert not stop.code
    finally:
        signal.signal(signal.SIGHUP, earlier)


def call(script, *arguments, **how):
    command = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, encoding="utf-8", **how)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_help_keeps_the_headers_groups(script):
    done = call(script, "--help", env=os.environ | {"COLUMNS": "100", "PYTHONIOENCODING": "utf-8"})
    assert done.returncode == 0, done.stderr
    header = load_path(script).Config
    for (title, _), fields in header_groups(header).items():
        assert not title or title.split(",")[0].split("'")[0].replace(" ", "_") in done.stdout
        assert all(f"--{name}" in done.stdout or name == "action" for name in fields)  # the one that is positional
    assert {name for fields in header_groups(header).values() for name in fields} == {
        field.name for field in dataclasses.fields(header)
    }


def load_path(path):
    import importlib.util

    spec = importlib.util.spec_from_file_location(f"header_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("script", LIGHT)
def test_a_header_needs_no_pytorch(script, tmp_path):
    """Help, a wrong flag, a wrong value and a missing folder are answered before anything that takes seconds."""
    required = ["--root_path", str(tmp_path / "none")]
    mistakes = [["--help"], [*required, "--labelnnum", "3"], [*required, "--precision", "bf17"], required]
    code = (
        "import runpy, sys\n"
        "sys.argv = sys.argv[1:]\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end:\n    print(end.code)\n"
        "print('imported', sorted({'torch', 'scipy', 'nibabel', 'SimpleITK', 'matplotlib'} & set(sys.modules)))\n"
    )
    for arguments in mistakes:
        path = ROOT / "code" / script
        command = [sys.executable, "-c", code, str(path), *arguments]
        environment = os.environ | {"PYTHONPATH": str(path.parent), "PYTHONIOENCODING": "utf-8"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, encoding="utf-8")
        assert done.stdout.endswith("imported []\n"), done.stdout[-300:] + done.stderr[-300:]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--precision", "bf17"], "error: invalid choice 'bf17' for argument '--precision'"),
     (["--labelnum", "x"], "error: --labelnum: invalid literal for int"),
     (["--patch_size", "32"], "error: missing value for argument '--patch_size'"),
     (["--labelnun", "3"], "error: unknown argument --labelnun: did you mean --labelnum?"),
     (["--labelnum", "-3"], "error: --labelnum is -3: it must be above 0.")],
)  # fmt: skip
def test_every_mistake_on_the_command_line_has_one_form(arguments, message):
    done = call(ROOT / "code" / "LA_train.py", *arguments)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(message) and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_uses_its_own_checkouts_code(script, tmp_path):
    """Where another checkout is installed, or named first on the path, its code is not taken."""
    for package in ("sdcl", "dataloaders"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise RuntimeError('the other checkout')")
    done = call(script, "--help", env=os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONIOENCODING": "utf-8"})
    assert done.returncode == 0, done.stderr
