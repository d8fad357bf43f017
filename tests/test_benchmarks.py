"""Both ways of each benchmark do the same work: the figures that they return are the same."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bench import Config, line, name_of, step_tflop, works
from cases import ACDC, CASES, LA
from memory import memory_line, write_run, write_scan
from start import ANSWERS, start_line, start_rows
from torch.utils.flop_counter import FlopCounterMode

from dataloaders.scans.prediction import Run
from dataloaders.scans.preprocessing import prepare
from dataloaders.scans.reading import read_scan
from sdcl.networks import build_network

TINY = {
    "acdc": replace(ACDC, shape=(32, 32), batch_size=2, volume=(2, 40, 36), files=(40, 36)),
    "la": replace(LA, shape=(32, 32, 16), batch_size=2, volume=(40, 32, 20), stride=(8, 8, 4), files=(40, 36, 24)),
}


@pytest.mark.parametrize(
    ("case", "data_set"), [(case, name) for case in CASES for name in TINY if (case, name) != ("metrics", "acdc")]
)
def test_ours_is_the_textbooks(case, data_set):
    ours, theirs = (CASES[case](TINY[data_set], is_ours)() for is_ours in (True, False))
    assert ours == pytest.approx(theirs, rel=1e-3 if case == "evaluation" else 1e-5)


def test_every_case_is_listed_in_both_sizes():
    full, quick = ([name_of(*each) for each in works(Config(quick=is_quick))] for is_quick in (False, True))
    assert len(full) == len(quick) == 15 and "step la 112x112x80 bf16" in full and "step la 48x48x32 fp32" in quick


def test_a_step_counts_the_teacher_and_four_passes_there_and_back():
    """Twice the teacher's forward pass; for both students and mixes nearly three, since no image needs a gradient."""
    work = replace(TINY["acdc"], networks=("unet", "unet"))
    with FlopCounterMode(display=False) as counter:
        build_network("unet", work.classes)(torch.empty(work.batch_size, 1, *work.shape))
    passes = step_tflop(work) * 1e12 / counter.get_total_flops()
    assert 2 + 4 * 2.9 < passes < 2 + 4 * 3


def test_a_row_that_was_not_measured_says_why():
    assert "not measured: no arithmetic" in line({"case": "step", "not_measured": "no arithmetic"})


@pytest.mark.slow
def test_a_steps_parts_are_all_seen():
    """In a process of its own, whose memory and profiler are its own."""
    script = Path(__file__).resolve().parents[1] / "benchmarks" / "step_parts.py"
    given = ["--data_set", "acdc", "--shape", "32", "32", "--batch_size", "2", "--repeats", "1"]
    done = subprocess.run([sys.executable, script, *given], capture_output=True, text=True, timeout=120, check=True)
    said = done.stdout
    parts = ["mixed_losses", "discrepancy", "update_teacher", "PendingLabels", "backward", "student_b forward", "total"]
    assert all(re.search(rf"^  {part} +0\.\d+ s", said, re.MULTILINE) for part in parts), said
    assert "aten::convolution_backward" in said and "of the peak of matrix products" in said


@pytest.mark.slow
def test_the_start_is_timed_beside_the_import_of_pytorch():
    rows = start_rows(1)
    assert {row["case"] for row in rows} == {f"start {name}" for name in ANSWERS}
    assert all(row["seconds"] > 0 and row["ratio"] > 0 and f"{row['ratio']:.3f}" in start_line(row) for row in rows)


def test_the_large_scan_is_a_ct_that_its_run_takes(tmp_path):
    write_run(tmp_path / "run")
    write_scan(tmp_path / "scans" / "ct.nii.gz", (32, 32, 8))
    run = Run.read(tmp_path / "run", False)
    prepared = prepare(read_scan(tmp_path / "scans" / "ct.nii.gz"), run.preprocessing)
    assert run.is_3d and run.num_classes == 2 and prepared.shape == (32, 32, 8)
    assert 0.6 < (prepared.array == 0).mean() < 0.8  # air, whose noise is clipped away
    row = {"case": "predict", "memory_gib": 1.5, "seconds": 20.0, "without_seconds": 60.0, "ratio": 3.0}
    assert "peak 1.50 GiB, 20.0 s, without --skip_air 60.0 s, ratio 3.00" in memory_line(row)
    assert memory_line({"case": "score", "memory_gib": 1.5, "seconds": 20.0}).endswith("peak 1.50 GiB, 20.0 s")
