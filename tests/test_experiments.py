"""The matrix of an experiment: its runs, their states by their files, doing what is missing, its table by hand."""

import csv
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT
from scipy import stats
from test_scripts import load

from sdcl import checkpoints
from sdcl.runs import matrix, slurm
from sdcl.runs.atomic import claimed
from sdcl.runs.config import parse
from sdcl.runs.errors import UserError
from sdcl.runs.launch import Machine
from sdcl.scoring.comparison import Entry, make_rows, read_cases, write_table
from sdcl.scoring.tables import mean_of
from sdcl.scoring.viewer import read_viewer

TINY = (
    "--select last --patch_size 32 32 --batch_size 2 --pre_iterations 2 --self_iterations 3 --device cpu "
    "--pre_val_every 0 --self_val_every 0 --log_every 1 --save_every 1"
)
METHODS = ("supervised", "sdcl", "sdcl:kl_weight=0,mse_weight=0.1")
ON_CPU = "--device cpu --split val"


def header(models, root, **changes):
    given = {
        "name": "m", "data_set": "acdc", "root_path": root, "models_path": models, "methods": METHODS,
        "labelnums": (2,), "seeds": (1, 2), "flags": TINY, "test_flags": ON_CPU, "checkpoint": "last",
        "predictors": "answer", "reference": "sdcl", "slots": 0,
    }  # fmt: skip
    return SimpleNamespace(**(given | changes))


def start(action, models, root, *more):
    command = [sys.executable, str(ROOT / "code" / "experiments.py"), action, "--name", "m", "--root_path", str(root)]
    command += ["--models_path", str(models), "--methods", *METHODS, "--labelnums", "2", "--seeds", "1", "2"]
    command += [f"--flags={TINY}", f"--test_flags={ON_CPU}", *more]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace",
        start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def call(*arguments, status=0):
    process = start(*arguments)
    said, _ = process.communicate(timeout=500)
    assert process.returncode == status, said
    return said


def test_one_stage_1_serves_all_methods_of_a_seed(acdc_phantom, tmp_path):
    runs = matrix.plan(header(tmp_path, acdc_phantom), "acdc")
    assert [run.title for run in runs[:4]] == [
        "stage 1, 2 labelled, seed 1", "supervised, 2 labelled, seed 1", "sdcl, 2 labelled, seed 1",
        "sdcl:kl_weight=0,mse_weight=0.1, 2 labelled, seed 1",
    ]  # fmt: skip
    assert len(runs) == 8 and {run.needs for run in runs[1:4]} == {runs[0]}
    assert runs[3].folder == tmp_path / "acdc_m_sdcl-kl_weight-0-mse_weight-0.1_s1_2_labeled"


@pytest.mark.parametrize(
    "change",
    ["student_b=unet", "optimiser=muon", "pre_iterations=3", "pre_dice=whole", "foreground_prior=0.05", "recipe=fast"],
)
def test_what_changes_stage_1_has_one_of_its_own(change, acdc_phantom, tmp_path):
    runs = matrix.plan(header(tmp_path, acdc_phantom, methods=("sdcl", f"sdcl:{change}")), "acdc")
    first, own = (one.needs for one in runs if one.seed == runs[0].seed and one.needs)
    assert first.folder != own.folder
    field, value = change.split("=")
    assert str(getattr(own.header, field)) == value != str(getattr(first.header, field))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("sdlc",)}, "--methods sdlc: sdlc is no method: choose of bcp, cps"),
        ({"methods": ("sdcl:kl_weight",)}, "--methods sdcl:kl_weight: write sdcl:field=value"),
        ({"methods": ("sdcl:seed=3",)}, "--methods sdcl:seed=3: write sdcl:field=value, of another field than method"),
        ({"methods": ("sdcl:kl_wait=1",)}, "unknown argument --kl_wait: did you mean --kl_weight"),
        ({"methods": ("bcp", "bcp")}, "--methods names one thing twice"),
        ({"seeds": ()}, "--seeds names nothing: give at least one"),
        ({"methods": ("sdcl:",)}, "--methods sdcl:: leave the colon out"),
        ({"name": "a/b c"}, "--name a/b c is no folder's name"),
        ({"flags": "--seed 3"}, "--flags must not give --seed, which the matrix gives"),
        ({"flags": "--labelnum=3"}, "--flags must not give --labelnum=3"),
        ({"flags": "--select 'last"}, "--flags --select 'last: no closing quotation: close it"),
        (
            {"methods": ("sdcl:kl_weight=0,kl_weight=1",)},
            "--methods sdcl:kl_weight=0,kl_weight=1: kl_weight is given twice",
        ),
        ({"methods": ("sdcl:ema_warmup=maybe",)}, "--methods: ema_warmup=maybe is none of yes, true, no, false"),
        ({"flags": "--select last --select=val"}, "--flags gives --select twice: give it once"),
        ({"flags": "--shuffle --no-shuffle"}, "--flags gives --shuffle twice"),
        ({"flags": "--patch_size 30 30"}, "--patch_size is 30 30: every side must be a multiple of 16"),
    ],
)
def test_what_no_matrix_can_be_made_of_is_refused(changes, message, acdc_phantom, tmp_path):
    with pytest.raises(UserError, match=re.escape(message)):
        matrix.plan(header(tmp_path, acdc_phantom, **changes), "acdc")


@pytest.mark.parametrize(
    ("flags", "select"),
    [("", "last"), ("--patch_size 32 32", "last"), ("--select val", "val"), ("--select=val --patch_size 32 32", "val")],
)
def test_further_flags_leave_the_default_selection(flags, select, acdc_phantom, tmp_path):
    runs = matrix.plan(header(tmp_path, acdc_phantom, flags=flags), "acdc")
    assert {run.header.select for run in runs} == {select}
    assert all(run.flags.count("--select") + run.flags.count("--select=val") == 1 for run in runs)


def test_a_rows_recipe_wins_over_all_runs_recipe(acdc_phantom, tmp_path):
    given = {"methods": ("sdcl", "sdcl:recipe=published"), "flags": "--recipe fast", "seeds": (1,)}
    runs = {run.title: run.header for run in matrix.plan(header(tmp_path, acdc_phantom, **given), "acdc")}
    fast, published = (runs[f"{row}, 2 labelled, seed 1"] for row in given["methods"])
    assert (fast.recipe, fast.batch_size, published.recipe, published.batch_size) == ("fast", 6, "published", 12)


def test_a_switch_can_be_a_rows_change(acdc_phantom, tmp_path):
    rows = ("sdcl", "sdcl:ema_warmup=yes", "sdcl:shuffle=True,ema_buffers=no", "sdcl:teacher_dropout=no")
    runs = matrix.plan(header(tmp_path, acdc_phantom, methods=rows, seeds=(1,)), "acdc")
    found = [run.header for run in runs if run.spec]
    assert [one.ema_warmup for one in found] == [False, True, False, False]
    assert [one.shuffle for one in found] == [False, False, True, False]
    assert [one.ema_buffers for one in found] == [True, True, False, True] and found[3].teacher_dropout == "no"
    own = load("own_train.py").Config
    assert matrix.flag_of(own, "ema_buffers", "yes") == ["--ema_buffers", "True"]
    assert parse(own, ["--root_path", "x", *matrix.flag_of(own, "ema_buffers", "no")]).ema_buffers is False
    assert matrix.flag_of(own, "patch_size", "32 32") == ["--patch_size", "32", "32"]


@pytest.fixture(scope="module")
def whole(acdc_phantom, scratch):
    """A matrix that nothing interrupts."""
    assert "stage 1, 2 labelled, seed 2                                  absent, time unknown" in call(
        "list", scratch, acdc_phantom
    )
    said = call("run", scratch, acdc_phantom, "--slots", "2")
    assert "8 of 8 runs are to be done, 2 at a time" in said and "nothing is missing" in said
    return scratch


def test_settings_that_no_method_reads_are_refused_before_any_run(acdc_phantom, tmp_path):
    said = call("run", tmp_path, acdc_phantom, "--methods", "bcp:kl_weight=0", status=1)
    assert (
        said.endswith("leave it out, or choose one of these.\n") and "--kl_weight is not read by --method bcp" in said
    )
    assert not list(tmp_path.iterdir())


def test_given_again_nothing_is_done(whole, acdc_phantom):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file() and path.name != ".lock"}
    assert "0 of 8 runs are to be done" in call("run", whole, acdc_phantom)
    assert before == {path: path.stat().st_mtime_ns for path in before}
    listed = call("list", whole, acdc_phantom)
    assert listed.count(" tested") == 6 and listed.count(" trained") == 2 and "left: 0 s of training" in listed


def weights_of(folder):
    networks = checkpoints.load(folder / "self_train" / "last.pth")["networks"]
    return {f"{role} {name}": value for role, state in networks.items() for name, value in state.items()}


@pytest.mark.slow
def test_a_matrix_that_is_killed_ends_the_same(whole, acdc_phantom, tmp_path):
    """Its scripts go on for a while without it: their locks keep them and the next launcher's apart."""
    for number in (signal.SIGKILL, signal.SIGTERM):
        process = start("run", tmp_path, acdc_phantom)
        time.sleep(9)
        (os.killpg if number == signal.SIGKILL else os.kill)(process.pid, number)
        process.communicate(timeout=100)
        assert process.returncode in (-signal.SIGKILL, 128 + signal.SIGTERM)
    assert "nothing is missing" in call("run", tmp_path, acdc_phantom, "--slots", "2")
    for run in whole.glob("acdc_m_s*_labeled"):
        if "stage1" not in run.name:
            ours, theirs = weights_of(tmp_path / run.name), weights_of(run)
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs), run.name
            cases = [
                (folder / run.name / "test" / "self_train_val" / "cases.csv").read_bytes()
                for folder in (tmp_path, whole)
            ]
            assert cases[0] == cases[1]


@pytest.mark.slow
def test_a_run_that_fails_holds_back_no_other(whole, acdc_phantom, tmp_path):
    """One run's folder is spoilt, another is claimed by a process that lives on."""
    models = tmp_path / "models"
    shutil.copytree(whole, models)
    (models / "acdc_m_sdcl_s1_2_labeled" / "config.json").write_text("{")
    shutil.rmtree(models / "acdc_m_supervised_s2_2_labeled")
    said = call("run", models, acdc_phantom, status=1)
    assert "FAILED: sdcl, 2 labelled, seed 1" in said and "cannot be read: restore it from a copy" in said
    assert "error: 1 of 8 runs failed" in said
    listed = call("list", models, acdc_phantom)
    assert (
        listed.count(" tested") == 5 and "sdcl, 2 labelled, seed 1                                     broken" in listed
    )
    runs = {run.title: run for run in matrix.plan(header(models, acdc_phantom), "acdc")}
    run = runs["supervised, 2 labelled, seed 1"]
    os.utime(run.folder / "self_train" / "metrics.csv")  # as in a copy: the checkpoint tells that it is whole
    assert matrix.state_of(run, "self_train_val").kind == "tested"
    with claimed(run.folder):
        assert matrix.state_of(run, "self_train_val").kind == "running"
    (run.folder / "self_train" / "nonfinite_2.pth").touch()
    assert matrix.state_of(run, "self_train_val").kind == "broken"
    other = header(models, acdc_phantom, flags=TINY.replace("--self_iterations 3", "--self_iterations 2"))
    changed = {run.title: run for run in matrix.plan(other, "acdc")}["supervised, 2 labelled, seed 2"]
    assert "another configuration (self_iterations 3 there, 2 now)" in matrix.state_of(changed, "self_train_val").text


def test_the_table_says_what_the_cases_say(whole, acdc_phantom):
    """Recomputed by hand from cases.csv: patients' means over volumes and seeds, intervals, differences."""
    said = call("table", whole, acdc_phantom)
    rows = json.loads((whole / "m" / "table.json").read_text())
    (row,) = [r for r in rows if (r["method"], r["structure"], r["metric"]) == (METHODS[2], "mean", "dice")]
    (base,) = [r for r in rows if (r["method"], r["structure"], r["metric"]) == ("sdcl", "mean", "dice")]

    def by_hand(slug):
        values = {}
        for seed in (1, 2):
            path = whole / f"acdc_m_{slug}_s{seed}_2_labeled" / "test" / "self_train_val" / "cases.csv"
            cases = {}
            with open(path, newline="") as file:
                for line in csv.DictReader(file):
                    if line["predictor"].startswith("mean, ") and "last" in line["predictor"]:
                        cases.setdefault(line["case"], []).append(float(line["dice"]))
            for case, dice in cases.items():
                values.setdefault(case.split("_")[0], []).append(np.mean(dice))
        return np.array([np.mean(each) for each in values.values()])

    ours, theirs = by_hand("sdcl-kl_weight-0-mse_weight-0.1"), by_hand("sdcl")
    assert row["mean"] == pytest.approx(ours.mean(), abs=1e-6) and base["mean"] == pytest.approx(
        theirs.mean(), abs=1e-6
    )
    assert row["patients"] == len(ours) == 1 and row["low"] is None  # one validation patient: no interval
    assert row["difference"] == pytest.approx((ours - theirs).mean(), abs=1e-6)
    assert (row["seeds_done"], row["seeds_planned"], row["reference"], base["reference"]) == (2, 2, "sdcl/mean", "")
    assert "Differences are to sdcl/mean." in said
    assert "Last checkpoints: nothing was selected on these volumes." in said and "What a run costs" in said
    for name in ("table.csv", "table.md", "table.tex"):
        assert (whole / "m" / name).read_text(encoding="utf-8")
    with pytest.raises(
        AssertionError, match="--reference cps .* is no row of this table: choose of supervised/student_a"
    ):
        call("table", whole, acdc_phantom, "--reference", "cps")


def here(action, models, root, *more):
    """Do what call() does in this process."""
    script = load("experiments.py")
    flags = [action, "--name", "m", "--root_path", str(root), "--models_path", str(models), "--methods", *METHODS]
    flags += ["--labelnums", "2", "--seeds", "1", "2", f"--flags={TINY}", f"--test_flags={ON_CPU}", *more]
    script.main(parse(script.Config, flags))


@pytest.fixture
def copied(whole, tmp_path):
    """The matrix's folders without their checkpoints' weight: what a table reads."""
    models = tmp_path / "models"
    shutil.copytree(whole, models, ignore=shutil.ignore_patterns("*previous.pth", "best_*.pth", "events*"))
    return models


def of_run(models, slug, seed):
    return models / f"acdc_m_{slug}_s{seed}_2_labeled" / "test" / "self_train_val"


def edit_summary(folder, change):
    content = json.loads((folder / "summary.json").read_text())
    change(content)
    (folder / "summary.json").write_text(json.dumps(content))


def test_a_table_takes_no_foreign_files_place(copied, acdc_phantom):
    shutil.rmtree(copied / "m", ignore_errors=True)
    here("table", copied, acdc_phantom)
    names = sorted(path.name for path in (copied / "m").iterdir() if path.is_file() and not path.name.startswith("."))
    assert {"table.csv", "table.json", "table.md", "table.tex", "cases.csv"} <= set(names)
    for name in names:
        shutil.rmtree(copied / "m")
        (copied / "m").mkdir()
        (copied / "m" / name).write_bytes(b"somebody's own")
        with pytest.raises(UserError, match=f"{name} exists, and no record says that this project wrote it"):
            here("table", copied, acdc_phantom)
        assert (copied / "m" / name).read_bytes() == b"somebody's own"


def test_a_table_of_unlike_tests_is_refused_by_name(copied, acdc_phantom, capsys):
    """Another label or image, a case that is missing in a seed, a longer list; each is named with its run."""
    folder, newest = of_run(copied, "sdcl", 1), of_run(copied, "supervised", 2)

    def table(message):
        os.utime(newest / "summary.json", (later := time.time() + 60, later))
        with pytest.raises(UserError, match=message):
            here("table", copied, acdc_phantom)

    kept = {path: path.read_text() for path in (folder / "summary.json", folder / "cases.csv")}
    for name, title in (("references", "reference"), ("images", "image")):
        edit_summary(
            folder, lambda c, name=name: c["fingerprint"][name].update({next(iter(c["fingerprint"][name])): "0"})
        )
        table(rf"not like the newest, supervised, 2 labelled, seed 2: sdcl, 2 labelled, seed 1 \(another {title} of ")
        (folder / "summary.json").write_text(kept[folder / "summary.json"])
    case = next(iter(json.loads(kept[folder / "summary.json"])["fingerprint"]["references"]))
    lines = kept[folder / "cases.csv"].splitlines(keepends=True)
    (folder / "cases.csv").write_text("".join(line for line in lines if f",{case}," not in line))
    table(rf"sdcl, 2 labelled, seed 1 \({case} is missing\)")
    edit_summary(folder, lambda c: c.pop("fingerprint"))  # an earlier version's test: its cases.csv tells as much
    table(rf"sdcl, 2 labelled, seed 1 \({case} is missing\)")
    (folder / "cases.csv").write_text("".join([*lines, *(line.replace(case, "p99") for line in lines[1:])]))
    table(r"sdcl, 2 labelled, seed 1 \(p99 is not in the other\)")
    other = kept[folder / "cases.csv"].splitlines()
    cells = [line.split(",") for line in other]
    place = cells[0].index("reference_voxels") - len(cells[0])
    changed = [",".join([*row[:place], str(int(row[place]) + 1), *row[place + 1 :]]) for row in cells[1:]]
    (folder / "cases.csv").write_text("\n".join([other[0], *changed]) + "\n")
    table(rf"sdcl, 2 labelled, seed 1 \(another reference of {case}")
    (folder / "cases.csv").write_text(kept[folder / "cases.csv"])
    here("table", copied, acdc_phantom)
    said = capsys.readouterr().out
    assert "1 of 6 tests, of an earlier version, have no checksums of their references." in said
    assert "n = 2 volumes of 1 patients; test flags --device cpu --split val; cases and references" in said
    rows = json.loads((copied / "m" / "table.json").read_text())
    assert len({row["fingerprint"] for row in rows}) == 1 and len(rows[0]["fingerprint"]) == 16


def test_what_a_table_lacks_is_told(copied, acdc_phantom, capsys):
    with pytest.raises(
        UserError, match="no run of m is tested; supervised, 2 labelled, seed 1: broken: another config"
    ):
        here("table", copied, acdc_phantom, f"--flags={TINY.replace('--patch_size 32 32', '--patch_size 64 64')}")
    with pytest.raises(UserError, match="--test_flags gives --split twice: give it once"):
        here("table", copied, acdc_phantom, "--test_flags=--split val --split val")
    (copied / "acdc_m_sdcl_s1_2_labeled" / "config.json").write_text("{")
    here("table", copied, acdc_phantom, "--labelnums", "2", "3")
    said = capsys.readouterr().out
    assert (
        "3 labelled: no run is tested yet." in said
        and "WARNING: 1 of 12 runs are left out; sdcl, 2 labelled, seed 1" in said
    )
    assert "3 labelled: no run is tested yet." in (copied / "m" / "table.md").read_text(encoding="utf-8")


def test_tests_with_other_flags_are_told_and_done_again(copied, acdc_phantom, said):
    flags = f"--test_flags={ON_CPU} --precision bf16"
    with pytest.raises(UserError, match="supervised, 2 labelled, seed 1: trained; tested with other settings "):
        here("table", copied, acdc_phantom, flags)
    said()
    here("list", copied, acdc_phantom, flags)
    assert said().count("trained; tested with other settings (precision fp32 there, bf16 now), its test is left") == 6
    edit_summary(of_run(copied, "sdcl", 2), lambda c: c["config"].update(precision="bf16"))
    with pytest.raises(UserError, match=r"sdcl, 2 labelled, seed 2: .* \(precision bf16 there, fp32 now\): give the"):
        here("table", copied, acdc_phantom)
    edit_summary(of_run(copied, "sdcl", 2), lambda c: c["config"].pop("precision"))  # before there was such a setting
    here("table", copied, acdc_phantom, "--test_flags=--split val --device cpu --batch_size 1")


def test_the_report_shows_every_row_and_leads_to_every_run(whole, acdc_phantom):
    said = call("report", whole, acdc_phantom)
    assert "cases.csv, report.html, training.png" in said
    page = whole / "m" / "report.html"
    data, text = read_viewer(page), page.read_text(encoding="utf-8")
    assert data["names"] == ["supervised/student_a", "sdcl/mean", f"{METHODS[2]}/mean"]
    assert all(set(case["maps"]) == set(data["names"]) for case in data["cases"]) and len(data["cases"]) == 2
    links = re.findall(r'href="(\.\./[^"]+)"', text)
    assert len(links) == 6 and all((page.parent / link).is_file() for link in links)
    assert "The pictures are of seed 1." in text
    with open(whole / "m" / "cases.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["row"], row["seed"]) for row in rows} == {(name, seed) for name in METHODS for seed in "12"}
    of_run = whole / "acdc_m_sdcl_s1_2_labeled" / "test" / "self_train_val"
    with open(of_run / "cases.csv", newline="") as file:
        ours = [row for row in csv.DictReader(file)]
    theirs = [row for row in rows if (row["row"], row["seed"]) == ("sdcl", "1")]
    assert [row["dice"] for row in ours] == [row["dice"] for row in theirs]
    assert (of_run / "training.png").read_bytes().startswith(b"\x89PNG") and (of_run / "report.html").exists()


def test_what_has_no_pictures_is_told(whole, acdc_phantom, tmp_path):
    models = tmp_path / "models"
    shutil.copytree(whole, models)
    (models / "acdc_m_supervised_s1_2_labeled" / "test" / "self_train_val" / "report.html").unlink()
    call("report", models, acdc_phantom)
    page = models / "m" / "report.html"
    assert read_viewer(page)["names"] == ["sdcl/mean", f"{METHODS[2]}/mean"]
    assert "No pictures of supervised/student_a: the page of its run" in page.read_text(encoding="utf-8")


@pytest.mark.slow
def test_one_run_in_two_processes(acdc_phantom, tmp_path):
    """torchrun starts each training; tests and the table are as ever."""
    only = ("--methods", "bcp", "--seeds", "1", "--reference", "bcp")
    assert "nothing is missing" in call("run", tmp_path, acdc_phantom, "--processes", "2", *only)
    for log in (tmp_path / "m" / "logs").glob("*.log"):
        text = log.read_text(encoding="utf-8")
        assert "2 processes share each batch of 2" in text and "torch.distributed.run" in text
    assert "1 of 1" in call("table", tmp_path, acdc_phantom, *only)


def test_processes_on_a_jobs_nodes(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_NUM_NODES", raising=False)
    assert slurm.in_processes(["python", "a.py"], 1) == (["python", "a.py"], {})
    slurm.check_processes(3, 2)
    assert Machine(2, 4, True, 2).gpus_of(1) == "2,3" and Machine(1, 1, True).gpus_of(0) == "0"
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    monkeypatch.setattr(slurm, "_call", lambda *given: "n1\nn2" if "hostnames" in given else " NodeAddr=10.0.0.7 x")
    command, more = slurm.in_processes(["python", "a.py", "--x"], 4)
    assert command[:4] == ["srun", "--nodes=2", "--ntasks=4", "--ntasks-per-node=2"]
    assert command[-3:] == ["python", "a.py", "--x"] and more["MASTER_ADDR"] == "10.0.0.7"
    for processes, slots, message in ((3, 1, "--processes is 3, but this job has 2 nodes"), (2, 2, "--slots is 2")):
        with pytest.raises(UserError, match=message):
            slurm.check_processes(processes, slots)


# --- tables by hand ---


def entry(method, values, planned=(1, 2), empty=0):
    """values: seed to case to Dice of one structure."""
    scores = {seed: {("dice", "x"): cases} for seed, cases in values.items()}
    return Entry(method, 7, "mean", scores, {seed: {"x": empty} for seed in values}, planned)


def patient(case):
    return case.split("_")[0]


def test_the_unit_is_the_patient():
    """Two volumes of p1 and one of p2, two seeds: p1 0.25, p2 0.75; the seeds' means 0.4 and 0.6."""
    row = make_rows(
        [entry("a", {1: {"p1_a": 0.1, "p1_b": 0.3, "p2_a": 0.6}, 2: {"p1_a": 0.2, "p1_b": 0.4, "p2_a": 0.9}})],
        patient,
        "b/mean",
    )[0]
    assert row.patients == 2 and row.mean == pytest.approx(0.5)
    half = stats.t.ppf(0.975, 1) * 0.25
    assert (row.low, row.high) == pytest.approx((0.5 - half, 0.5 + half))
    assert row.seed_sd == pytest.approx(np.std([0.4, 0.6], ddof=1)) and (row.seed_low, row.seed_high) == pytest.approx(
        (0.4, 0.6)
    )
    assert math.isnan(row.difference)


def test_a_row_with_missing_seeds_is_no_number(tmp_path):
    cases = {f"p{k}": 0.5 + 0.01 * k for k in range(7)}
    better = {name: value + 0.1 + 0.001 * i for i, (name, value) in enumerate(cases.items())}
    whole = entry("best", {1: better, 2: better}, empty=1)
    rows = make_rows([entry("base", {1: cases, 2: cases}), entry("half", {1: better}), whole], patient, "base/mean")
    half, best = rows[1:]
    assert math.isnan(half.mean) and half.missing == "2" and half.seeds_done == 1 and math.isnan(half.p_holm)
    assert best.p_permutation == best.p_wilcoxon == 2 / 2**7 and best.empty == 2
    assert best.p_holm == 2 * 2 / 2**7  # the row that is not done yet counts
    text = write_table(tmp_path, rows, ["head"], [])
    assert "1 of 2 (missing: 2)" in text
    marked = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "| half | mean | 1 of 2 (missing: 2) | – |" in marked
    assert re.search(r"\| best \| mean \| 2 of 2 \| \*\*0\.63", marked)  # bold: Holm's p below 0.05, nothing missing
    assert r"\textbf{0.63" in (tmp_path / "table.tex").read_text(encoding="utf-8")


def distances(method, values, seeds=(1,)):
    """values: structure to case to 95HD, the same of each seed."""
    scores = {("hd95", s): cases for s, cases in values.items()}
    names = list(next(iter(values.values())))
    scores["hd95", "mean"] = {n: mean_of([values[s][n] for s in values]) for n in names}
    empty = {s: sum(math.isnan(v) for v in cases.values()) for s, cases in values.items()}
    empty["mean"] = sum(empty.values())
    return Entry(method, 7, "mean", dict.fromkeys(seeds, scores), dict.fromkeys(seeds, empty), tuple(seeds))


def test_a_structure_that_a_row_does_not_predict_wins_nothing(tmp_path):
    """The reference finds an easy and a hard structure, the other row only the easy one, no nearer."""
    names, rng = [f"p{k}" for k in range(10)], np.random.default_rng(0)
    easy = {name: 2 + 0.1 * k for k, name in enumerate(names)}
    hard = {name: value + 8 for name, value in easy.items()}
    missed = {"easy": {n: v + rng.normal(0, 0.01) for n, v in easy.items()}, "hard": dict.fromkeys(names, math.nan)}
    entries = [distances("base", {"easy": easy, "hard": hard}), distances("missing", missed)]
    rows = {(r.method, r.structure): r for r in make_rows(entries, patient, "base/mean")}
    mean, nothing = rows["missing", "mean"], rows["missing", "hard"]
    assert abs(mean.difference) < 0.02 and mean.p_permutation > 0.05 and not mean.is_bold
    assert (mean.patients, mean.values, mean.left_out, mean.difference_values) == (10, 10, 10, 10)
    assert math.isnan(nothing.difference) and nothing.difference_patients == 0 and not nothing.is_bold
    assert rows["base", "mean"].values == 20 and mean.more_left_out and not rows["base", "mean"].more_left_out
    text = write_table(tmp_path, list(rows.values()), [], [])
    assert "(n = 10; 10 of 20 values)" in text and " n " in text and "*2.4" not in text


def test_more_empty_predictions_are_never_bold(tmp_path):
    """Nearer in every patient that both have, but with one empty mask more; without it the same row is bold."""
    names = [f"p{k}" for k in range(10)]
    base = {name: 5 + 0.1 * k for k, name in enumerate(names)}
    near = {name: value - 1 - 0.01 * k for k, (name, value) in enumerate(base.items())}
    for empty, is_bold in ((math.nan, False), (near["p0"], True)):
        rows = make_rows(
            [distances("base", {"x": base}), distances("near", {"x": near | {"p0": empty}})], patient, "base/mean"
        )
        row = next(r for r in rows if (r.method, r.structure) == ("near", "x"))
        assert row.p_holm < 0.01 and row.is_bold == is_bold
        write_table(tmp_path, rows, [], [])
        lines = (tmp_path / "table.md").read_text(encoding="utf-8").splitlines()
        line = next(x for x in lines if x.startswith("| near"))
        assert ("**" in line) == is_bold


def test_what_is_nan_in_one_row_is_left_out_of_both_by_hand():
    """p1: seeds 1 and 2, structures x and y; p2 is nan in one of them. By hand: p1 differs by 1, p2 by 2."""

    def of(method, table):
        scores = {seed: {("asd", s): dict(cases) for s, cases in by.items()} for seed, by in table.items()}
        return Entry(method, 7, "mean", scores, {seed: {} for seed in table}, tuple(table))

    nan = math.nan
    ours = {1: {"x": {"p1_a": 3, "p2_a": nan}, "y": {"p1_a": 5, "p2_a": 6}},
            2: {"x": {"p1_a": 4, "p2_a": 7}, "y": {"p1_a": nan, "p2_a": 9}}}  # fmt: skip
    theirs = {1: {"x": {"p1_a": 2, "p2_a": 9}, "y": {"p1_a": 4, "p2_a": 4}},
              2: {"x": {"p1_a": 3, "p2_a": 5}, "y": {"p1_a": 50, "p2_a": nan}}}  # fmt: skip
    for table in (ours, theirs):
        for each in table.values():
            each["mean"] = {case: mean_of([each["x"][case], each["y"][case]]) for case in each["x"]}
    rows = make_rows([of("base", theirs), of("other", ours)], patient, "base/mean")
    row = next(r for r in rows if (r.method, r.structure) == ("other", "mean"))
    assert row.difference == 1.5 and (row.difference_patients, row.difference_values) == (2, 5)
    x = next(r for r in rows if (r.method, r.structure) == ("other", "x"))
    assert x.difference == 1.5 and (x.values, x.left_out, x.difference_values) == (3, 1, 3)


def test_a_p_value_is_never_zero(tmp_path):
    cases = {f"p{k}": 0.5 + 0.001 * k for k in range(30)}
    better = {name: value + 0.1 + 0.0001 * k for k, (name, value) in enumerate(cases.items())}
    rows = make_rows([entry("base", {1: cases}, (1,)), entry("best", {1: better}, (1,))], patient, "base/mean")
    text = write_table(tmp_path, rows, [], [])
    assert "< 0.0001" in text and "0.0000 " not in text.split("difference")[1].split("best")[1]
    assert "$<$ 0.0001" in (tmp_path / "table.tex").read_text() and rows[1].p_permutation < 1e-4


def test_best_and_last_are_found_where_one_row_says_both(tmp_path):
    lines = ["method,predictor,case,structure,dice,jaccard,hd95,asd,hd95_mm,asd_mm,empty"]
    for predictor, dice in (
        ("mean, best on val (5)", 0.7),
        ("mean, last (9)", 0.6),
        ("student_a, best on val and last (9)", 0.5),
    ):
        lines += [f'sdcl,"{predictor}",c1,{s},{dice + more},0,1,1,,,{s == "y"}' for s, more in (("x", 0.1), ("y", 0.0))]
    path = Path(tmp_path, "cases.csv")
    path.write_text("\n".join(lines) + "\n")
    for name, kind, dice in (
        ("mean", "best", 0.7),
        ("mean", "last", 0.6),
        ("student_a", "best", 0.5),
        ("student_a", "last", 0.5),
    ):
        scores, empty = read_cases(path, name, kind)
        assert scores["dice", "x"]["c1"] == pytest.approx(dice + 0.1) and scores["dice", "mean"]["c1"] == pytest.approx(
            dice + 0.05
        )
        assert math.isnan(scores["hd95_mm", "mean"]["c1"]) and empty == {"x": 0, "y": 1, "mean": 1}
    assert read_cases(path, "teacher", "last") is None


def test_patients_of_ones_own_data_are_the_unit_too(tmp_path):
    content = {
        "name": "mine", "class_names": ["x"], "preprocessing": {"normalise": "zscore"},
        "patients": {"day1": "anna", "day2": "anna", "day3": "bert"},
    }  # fmt: skip
    (tmp_path / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
    script = load("experiments.py")
    of = script.patient_of(script.Config(action="table", data_set="own", root_path=tmp_path))
    assert [of(name) for name in ("day1", "day2", "day3")] == ["anna", "anna", "bert"]
