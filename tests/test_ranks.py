"""One run in several processes: the same numbers as in one, the same files, and an end when one of them ends."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT

from sdcl import checkpoints
from sdcl.runs import distribution
from sdcl.runs.errors import UserError

WORKER = Path(__file__).parent / "ranks_worker.py"
CASES = [  # the first one with three processes too
    ("sdcl", 2, "float64"), ("sdcl", 3, "float64"), ("sdcl", 2, "float32"), ("sdcl", 3, "float32"),
    ("bcp", 2, "float64"), ("cps", 2, "float64"), ("ua_mt", 2, "float64"), ("mean_teacher", 2, "float64"),
    ("supervised", 2, "float64"),
]  # fmt: skip
OF_THREE = 1


def environment(**more):
    path = os.pathsep.join([str(ROOT / "code"), str(ROOT), str(Path(__file__).parent)])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | more


@pytest.fixture(scope="module")
def trained(scratch):
    """What each of one, two and three processes end with, by their number."""
    results = {}
    for count in (1, 2, 3):
        cases = json.dumps(CASES[:OF_THREE] if count == 3 else CASES)
        outputs = [scratch / f"{count}_{rank}.pt" for rank in range(count)]
        processes = [
            subprocess.Popen(
                [sys.executable, WORKER, str(rank), str(count), scratch / f"meeting{count}", output, cases],
                env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace",
            )
            for rank, output in enumerate(outputs)
        ]  # fmt: skip
        for process in processes:
            said, _ = process.communicate(timeout=300)
            assert process.returncode == 0, said
        results[count] = [torch.load(output) for output in outputs]
    return results


def pairs(one, other):
    for role, state in one["weights"].items():
        for name, value in state.items():
            yield f"{role} {name}", value, other["weights"][role][name]


@pytest.mark.parametrize(
    ("count", "case"), [(2, case) for case in range(len(CASES))] + [(3, case) for case in range(OF_THREE)]
)
def test_several_processes_train_as_one(trained, count, case):
    """In float64 all of it, in float32 the first step's losses, since Adam's first step takes the sign of noise."""
    one, many = trained[1][0][case], [rank[case] for rank in trained[count]]
    for other in many[1:]:  # to the bit: they never drift apart
        assert other["losses"] == many[0]["losses"]
        assert all(torch.equal(mine, theirs) for _, mine, theirs in pairs(other, many[0]))
    is_exact = CASES[case][2] == "float64"
    for mine, theirs in zip(many[0]["losses"], one["losses"], strict=True):
        named = {key: value for key, value in theirs.items() if is_exact or not key.endswith("grad_norm")}
        assert {key: mine[key] for key in named} == pytest.approx(named, rel=1e-10 if is_exact else 3e-7)
        if not is_exact:
            break
    else:
        for name, mine, theirs in pairs(many[0], one):
            assert (mine - theirs).abs().max() <= 1e-8 * theirs.abs().max() + 1e-12, name


# --- the scripts, as torchrun starts them ---


def flags(root, models, *more):
    return [
        "--root_path", str(root), "--models_path", str(models), "--labelnum", "2", "--device", "cpu", "--patch_size",
        "32", "32", "--batch_size", "2", "--pre_val_from", "3", "--pre_val_every", "3", "--self_val_every", "3",
        "--save_every", "2", "--log_every", "1", *more,
    ]  # fmt: skip


def torchrun(count, script, *arguments):
    """Start a script in so many processes, in a process group of its own, so that nothing of it outlives a test."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    command += [str(ROOT / "code" / f"{script}.py"), *arguments]
    return subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8",
        errors="replace", start_new_session=True,
    )  # fmt: skip


def finish(process, timeout=300):
    """Return what it said, and its status."""
    try:
        said, _ = process.communicate(timeout=timeout)
        return said, process.returncode
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def children(process):
    """The processes that torchrun started, in the order of their ranks."""
    listed = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, encoding="utf-8", errors="replace"
    )
    return sorted(map(int, listed.stdout.split()))


def wait_for(path, rows, process):
    """Wait until metrics.csv has so many rows."""
    for _ in range(600):
        if path.exists() and len(path.read_text().splitlines()) > rows:
            return
        assert process.poll() is None, finish(process)[0]
        time.sleep(0.1)
    raise AssertionError(f"{path} never had {rows} rows")


def weights(folder, stage="self_train"):
    return checkpoints.load(folder / stage / "last.pth")["networks"]


def same(one, other):
    return all(torch.equal(value, other[role][name]) for role in one for name, value in one[role].items())


@pytest.fixture(scope="module")
def whole(acdc_phantom, scratch):
    """A run of two processes that nothing interrupts."""
    done = torchrun(2, "ACDC_train", *flags(acdc_phantom, scratch, "--pre_iterations", "6", "--self_iterations", "3"))
    said, status = finish(done)
    assert status == 0, said
    assert said.count("2 processes share each batch of 2") == 1  # one of them tells
    return scratch / "acdc_SDCL_2_labeled"


@pytest.mark.slow
@pytest.mark.parametrize(("number", "to"), [("SIGKILL", "last"), ("SIGUSR1", "last"), ("SIGTERM", "torchrun and all")])
def test_a_run_that_loses_a_process_goes_on_to_the_same_end(number, to, whole, acdc_phantom, tmp_path):
    """The others end within seconds; after a signal to one of them, or to all and torchrun (its echo), all save."""
    number = getattr(signal, number)
    arguments = flags(acdc_phantom, tmp_path, "--pre_iterations", "6", "--self_iterations", "3")
    run = tmp_path / "acdc_SDCL_2_labeled"
    process = torchrun(2, "ACDC_train", *arguments)
    wait_for(run / "pre_train" / "metrics.csv", 3, process)
    begin = time.monotonic()
    for victim in children(process)[-1:] if to == "last" else [*children(process), process.pid]:
        os.kill(victim, number)
    said, status = finish(process, timeout=60)
    assert status != 0 and time.monotonic() - begin < 30
    if number != signal.SIGKILL and "all 3 iterations" not in said:
        assert "stopped and saved after iteration" in said
    said, status = finish(torchrun(2, "ACDC_train", *arguments))
    assert status == 0, said
    assert same(weights(run), weights(whole)) and same(weights(run, "pre_train"), weights(whole, "pre_train"))
    columns = [line.split(",")[:9] for line in (run / "pre_train" / "metrics.csv").read_text().splitlines()]
    assert columns == [line.split(",")[:9] for line in (whole / "pre_train" / "metrics.csv").read_text().splitlines()]


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes_and_is_tested_by_any(whole, acdc_phantom, tmp_path):
    """Stage 1 in two processes, stage 2 in one; a test in two of them writes what one writes, to the bit."""
    stage1 = ["--exp", "second", "--pretrained", str(whole), "--pre_iterations", "6", "--self_iterations", "2"]
    command = [sys.executable, str(ROOT / "code" / "ACDC_train.py"), *flags(acdc_phantom, whole.parent, *stage1)]
    done = subprocess.run(
        command, env=environment(), capture_output=True, encoding="utf-8", errors="replace", timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    where = ["--root_path", str(acdc_phantom), "--models_path", str(whole.parent), "--labelnum", "2", "--device", "cpu"]
    results, written = whole / "test" / "self_train_test", {}
    for count in (1, 2):
        said, status = finish(torchrun(count, "test_ACDC", *where))
        assert status == 0, said
        written[count] = [(results / name).read_bytes() for name in ("cases.csv", "cases.png", "metrics.png")]
        summary = json.loads((results / "summary.json").read_text())
        assert summary["environment"]["processes"] == count
    assert written[1] == written[2]


def test_a_batch_that_cannot_be_shared_is_refused(acdc_phantom, tmp_path):
    said, status = finish(torchrun(2, "ACDC_train", *flags(acdc_phantom, tmp_path, "--batch_size", "3")))
    assert (
        status
        and "--batch_size 3 is that of the whole batch, which 2 processes cannot share evenly: start 1, 3 of" in said
    )
    assert not list(tmp_path.iterdir())


def test_processes_that_were_given_other_settings_are_refused(acdc_phantom, tmp_path):
    """As on two machines, a torchrun on each: one command with another learning rate."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    started = []
    for rank, lr in enumerate(("0.001", "0.01")):
        command = [sys.executable, str(ROOT / "code" / "ACDC_train.py")]
        command += flags(acdc_phantom, tmp_path, "--pre_iterations", "2", "--self_iterations", "0", "--base_lr", lr)
        given = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8"}
        started.append(subprocess.Popen(command, env=environment(**given), **pipes))
    for process in started:
        said, status = finish(process)
        assert status == 1 and "the processes of this run differ in --base_lr (0.001 and 0.01): give all" in said
    assert not list(tmp_path.iterdir())


def test_a_prediction_is_one_processs(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    command = [
        sys.executable,
        str(ROOT / "code" / "predict.py"),
        "--run",
        str(tmp_path),
        "--input",
        "x",
        "--output",
        "y",
    ]
    done = subprocess.run(
        command,
        env=environment(RANK="0", WORLD_SIZE="2"),
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=100,
    )
    assert done.returncode == 1 and "predict.py runs in one process: start it without torchrun" in done.stderr


def test_tasks_of_srun_that_do_not_know_of_each_other_are_refused(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert distribution.places() == (0, 1, 0)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    monkeypatch.setenv("SLURM_PROCID", "3")
    monkeypatch.setenv("SLURM_LOCALID", "1")
    with pytest.raises(UserError, match="srun starts 4 tasks, each of which would train this whole run"):
        distribution.places()
    monkeypatch.setenv("MASTER_ADDR", "node1")
    monkeypatch.setenv("MASTER_PORT", "1234")
    assert distribution.places() == (3, 4, 1)
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert distribution.places() == (5, 8, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"compile": True}, "--compile does not know several processes"),
        ({"method": "own"}, "--method own does not say"),
    ],
)
def test_what_several_processes_cannot_do_is_refused(change, message, monkeypatch):
    from sdcl.runs import experiment

    monkeypatch.setattr(experiment.ranks, "count", lambda: 2)
    monkeypatch.setattr(experiment, "get", lambda name: SimpleNamespace(spans_ranks=name == "sdcl"))
    config = SimpleNamespace(batch_size=4, compile=False, method="sdcl")
    experiment._check_processes(config)
    with pytest.raises(UserError, match=message):
        experiment._check_processes(SimpleNamespace(**{**vars(config), **change}))
