"""The quick part of the fault table: kills, damage, two processes, nan, hostile files; `make faults` does all."""

import os
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

import faults  # noqa: E402
import fuzz  # noqa: E402
from harness import Runner  # noqa: E402

from sdcl.runs.atomic import claimed  # noqa: E402

POSIX = pytest.mark.skipif(os.name == "nt", reason="forks and kills as POSIX systems do")


@pytest.fixture(scope="module")
def folder(scratch):
    return scratch


@pytest.fixture(scope="module")
def runner(folder):
    with Runner("acdc", folder / "acdc") as runner:
        yield runner


@pytest.fixture(scope="module")
def whole(runner):
    return faults.whole_run(runner)


def check(outcome):
    assert outcome.tried == outcome.survived, outcome.lost
    assert outcome.tried


@POSIX
def test_killed_runs_end_as_if_never_interrupted(runner, whole):
    check(faults.kills(runner, *whole, 2, random.Random(5)))


@POSIX
@pytest.mark.parametrize("loop", [faults.stopped, lambda runner, rng: faults.kills(runner, Path(), 1.0, 1, rng)])
def test_a_run_that_fails_by_itself_ends_the_trials_with_its_last_lines(runner, monkeypatch, loop):
    monkeypatch.setattr(runner, "data", runner.folder / "nowhere")
    with pytest.raises(RuntimeError, match="exit status 1, and said last: (?s:.*)nowhere"):
        loop(runner, random.Random(5))


@POSIX
def test_a_damaged_last_checkpoint_is_replaced_by_the_one_before(runner, whole):
    check(faults.damaged_last(runner, whole[0], 1, random.Random(5), 1))


@POSIX
def test_a_lost_best_checkpoint_is_not_made_up_for(runner):
    models, folder = faults.stopped(runner, random.Random(5))
    (folder / "best_mean.pth").unlink()
    assert not faults.refused(runner, models, "best_mean.pth is missing .*restore a copy, or remove the folder")


@POSIX
def test_a_finished_stage_that_lost_a_best_checkpoint_is_told_of(runner, whole):
    run = whole[0]
    lost = run / "pre_train" / "best_mean.pth"
    kept = lost.rename(lost.with_suffix(".kept"))
    process = runner.start(run.parent)
    status = process.wait()
    kept.rename(lost)
    text = process.output.read_text(encoding="utf-8")
    assert status == 0
    assert f"WARNING: {lost} is missing although the run selected it" in text


@POSIX
def test_two_processes_in_one_folder(runner):
    models = runner.fresh()
    with claimed(runner.run_of(models)):
        assert not faults.refused(runner, models, "another process writes into .*: wait for its end")


@POSIX
def test_a_case_that_makes_the_loss_nan(runner, folder):
    check(faults.not_finite(runner, folder))


def test_hostile_files_end_in_a_sentence(folder):
    for result in fuzz.try_all(folder / "fuzz", fuzz.FEW):
        assert not result.failures
        assert result.tried == fuzz.FEW == result.accepted + result.refused
        assert result.refused > fuzz.FEW / 10
