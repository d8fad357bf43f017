"""An experiment on a real SLURM of one node and of two: jobs requeued and killed, the table of an undisturbed run."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from cluster import ask, cluster, is_there

ROOT = Path(__file__).resolve().parents[2]
TINY = (
    "--select last --patch_size 32 32 --batch_size 2 --pre_iterations 20 --self_iterations 20 --device cpu "
    "--pre_val_every 0 --self_val_every 0 --log_every 1 --save_every 2"
)
pytestmark = [pytest.mark.skipif(not is_there(), reason="no SLURM, or not root"), pytest.mark.timeout(900)]


def experiments(environment, action, models, root, *more):
    command = [sys.executable, str(ROOT / "code" / "experiments.py"), action, "--name", "m", "--root_path", str(root)]
    command += ["--models_path", str(models), "--methods", "bcp", "sdcl", "--labelnums", "2", "--seeds", "1", "2"]
    command += [f"--flags={TINY}", "--test_flags=--device cpu --split val", *more]
    done = subprocess.run(
        command, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=800
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def undisturbed(acdc_phantom, scratch):
    experiments(dict(os.environ), "run", scratch, acdc_phantom, "--slots", "2")
    return scratch


def rows(models):
    """What the tests wrote, by run."""
    return {path.parents[2].name: path.read_bytes() for path in models.glob("acdc_*/test/self_train_val/cases.csv")}


def wait_for(is_so, seconds, environment):
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, ask(environment, "squeue", "-l")
        time.sleep(0.3)


@pytest.mark.parametrize("nodes", [1, 2])
def test_jobs_that_are_requeued_and_killed_end_in_the_same_table(nodes, undisturbed, acdc_phantom, tmp_path):
    models = tmp_path / "models"
    with cluster(tmp_path / "slurm", nodes) as environment:
        said = experiments(
            environment, "slurm", models, acdc_phantom, "--jobs", "4", "--repeats", "3", "--sbatch=--cpus-per-task=1"
        )
        assert "arrays hold 3 jobs at most, not 4" in said and said.count("submitted ") == 4

        def running():
            listed = ask(environment, "squeue", "-h", "-t", "R", "-o", "%A %F_%K")
            return [line.split() for line in listed.splitlines()]

        wait_for(lambda: list(models.glob("*/self_train/last.pth")), 200, environment)
        requeued = running()[0][1]
        ask(environment, "scontrol", "requeue", requeued)
        ask(environment, "scontrol", "update", f"JobId={requeued}", "StartTime=now")
        wait_for(lambda: len(list(models.glob("*/self_train/last.pth"))) > 1 and running(), 200, environment)
        victims = [
            int(pid) for pid in ask(environment, "pgrep", "-f", f"experiments.py run --no-wait.*{models}").split()
        ]
        os.kill(victims[0], signal.SIGKILL)
        wait_for(lambda: not ask(environment, "squeue", "-h"), 600, environment)
    assert "left: 0 h 00 min" in experiments(dict(os.environ), "list", models, acdc_phantom)
    assert rows(models) == rows(undisturbed) and len(rows(models)) == 4
    experiments(dict(os.environ), "table", models, acdc_phantom)


def test_what_sbatch_refuses_is_told(acdc_phantom, tmp_path):
    with (
        cluster(tmp_path / "slurm", 1) as environment,
        pytest.raises(AssertionError, match="sbatch: .*nowhere.*: mend --sbatch"),
    ):
        experiments(environment, "slurm", tmp_path / "models", acdc_phantom, "--sbatch=--partition=nowhere")
