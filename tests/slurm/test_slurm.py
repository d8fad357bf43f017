"""An experiment on a real SLURM of one node and of two: jobs requeued and killed, the table of an undisturbed run."""

import os
import re
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
        command,
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=800,
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
    assert "left: 0 s of" in experiments(dict(os.environ), "list", models, acdc_phantom)
    assert rows(models) == rows(undisturbed) and len(rows(models)) == 4
    experiments(dict(os.environ), "table", models, acdc_phantom)


def test_one_run_of_two_tasks_saves_on_slurms_signal_and_queues_itself_again(acdc_phantom, tmp_path):
    """The script of docs/scaling.md, on two nodes without GPUs."""
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    (text,) = [block for block in re.findall(r"^```\n(.*?)^```", page, re.M | re.S) if "srun python" in block]
    flags = (
        f"--root_path {acdc_phantom} --models_path {tmp_path / 'models'} --labelnum 2 --device cpu --save_every 1000"
    )
    flags += " --patch_size 32 32 --batch_size 2 --pre_iterations 60 --self_iterations 2 --log_every 1 --select last"
    flags += " --pre_val_every 0 --self_val_every 0"
    text = text.replace(" --gpus-per-task=1 --cpus-per-task=8", "").replace(
        "--ntasks-per-node=2", "--ntasks-per-node=1"
    )
    text = text.replace("srun python code/ACDC_train.py", f"srun {sys.executable} {ROOT}/code/ACDC_train.py {flags}")
    text = re.sub(r"MASTER_ADDR=\$\(.*\) ", "MASTER_ADDR=127.0.0.1 ", text)  # these nodes' names are no hosts'
    script = tmp_path / "job.sh"
    script.write_text(text.replace("OMP_NUM_THREADS=8", "OMP_NUM_THREADS=1"))
    losses = tmp_path / "models" / "acdc_SDCL_2_labeled" / "pre_train" / "metrics.csv"
    with cluster(tmp_path / "slurm", 2) as environment:
        job = ask(environment, "sbatch", "--parsable", f"--output={tmp_path}/job.log", str(script)).strip()
        wait_for(lambda: losses.exists() and len(losses.read_text().splitlines()) > 5, 120, environment)
        ask(environment, "scancel", "--signal=USR1", job)
        wait_for(lambda: ask(environment, "squeue", "-h", "-t", "PD", "-j", job), 120, environment)
        time.sleep(5)  # started within the second it would be of the job before, and refused
        ask(environment, "scontrol", "update", f"JobId={job}", "StartTime=now")  # it waits two minutes else
        log = tmp_path / "job.log"
        wait_for(lambda: "done: " in log.read_text(), 300, environment)
    said = log.read_text()
    assert "2 processes share each batch of 2" in said and "pre_train: stopped and saved after iteration" in said
    assert said.count("done: ") == 1 and said.count("pre_train: iterations ") == 2


def test_one_run_takes_both_nodes_of_a_job(acdc_phantom, tmp_path):
    """Each training is started by srun, a process a node; the job that is asked to stop has it save, and it goes on."""
    models = tmp_path / "models"
    with cluster(tmp_path / "slurm", 2) as environment:
        both = "--sbatch=--nodes=2 --ntasks-per-node=1 --cpus-per-task=1"
        given = ["--jobs", "1", "--repeats", "1", "--processes", "2", both]
        experiments(environment, "slurm", models, acdc_phantom, *given)
        wait_for(lambda: list(models.glob("*/self_train/last.pth")), 300, environment)
        job = ask(environment, "squeue", "-h", "-t", "R", "-o", "%A").split()[0]
        ask(environment, "scancel", "--batch", "--signal=USR1", job)
        wait_for(lambda: not ask(environment, "squeue", "-h"), 600, environment)
    assert "left: 0 s of" in experiments(dict(os.environ), "list", models, acdc_phantom) and len(rows(models)) == 4
    said = "".join(path.read_text() for path in (models / "m" / "logs").glob("*.log"))
    assert said.count("2 processes share each batch of 2") >= 6 and "stopped and saved after iteration" in said
    assert "srun --nodes=2 --ntasks=2" in said


def test_what_sbatch_refuses_is_told(acdc_phantom, tmp_path):
    with (
        cluster(tmp_path / "slurm", 1) as environment,
        pytest.raises(AssertionError, match="error: sbatch: invalid partition specified: nowhere; .*: mend --sbatch"),
    ):
        experiments(environment, "slurm", tmp_path / "models", acdc_phantom, "--sbatch=--partition=nowhere")
