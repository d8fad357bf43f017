"""What surrounds a run: files that appear whole, one process a folder, records, checksums, a halt, the same bits."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import ROOT, method

from dataloaders.cache import Decoding
from dataloaders.files import read_list
from dataloaders.slices import Slices
from dataloaders.streams import Order, Streams
from dataloaders.transforms import Augmentation
from sdcl import checkpoints
from sdcl.methods.sdcl import self_train_step
from sdcl.networks import build_network
from sdcl.runs.atomic import claimed, replacing, write_text
from sdcl.runs.config import processes, run_script
from sdcl.runs.distribution import places
from sdcl.runs.errors import UserError
from sdcl.runs.folder import Reads, open_run, read_config, trained_among
from sdcl.runs.records import StageRecord
from sdcl.runs.slurm import nodes_of_job
from sdcl.runs.written_files import RECORD
from sdcl.steps import add_teacher, make_learners
from sdcl.training import pretrain

CONFIG = {"labelnum": 2, "patch_size": [32, 32], "select": "val", "student_a": "unet", "student_b": "resunet"}
CPU = torch.device("cpu")


def test_a_file_is_the_old_one_or_the_new_one(tmp_path):
    path = tmp_path / "new" / "a.json"
    write_text(path, "old")
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old" and temporary.suffix == ".json"
    with replacing(path) as temporary:
        temporary.write_text("whole")
        assert path.read_text() == "old"
    assert path.read_text() == "whole" and {p.name for p in path.parent.iterdir()} == {"a.json", RECORD}


def test_a_folder_belongs_to_one_process_and_is_free_when_it_dies(tmp_path):
    hold = "import sys, pathlib; from sdcl.runs.atomic import claimed\nwith claimed(pathlib.Path(sys.argv[1])):\n  print(1, flush=True); input()"  # noqa: E501
    process = subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    process.stdout.readline()
    with pytest.raises(UserError, match="another process writes into .*: wait for its end, stop it, or choose"):
        claimed(tmp_path).__enter__()
    process.kill()
    process.communicate()
    with claimed(tmp_path):
        pass


def test_a_run_goes_on_with_the_same_cases_alone(tmp_path):
    lists = {"labelled": ["a", "b"], "validation": ["c"]}
    open_run(tmp_path, CONFIG, Reads(lists, {}), CPU)
    open_run(tmp_path, CONFIG, Reads(lists, {}), CPU)
    kept = json.loads((tmp_path / "config.json").read_text())
    assert len(kept["resumed"]) == 1 and kept["environment"]["command"] and kept["environment"]["system"]
    with pytest.raises(UserError, match="holds a run on other labelled cases: restore the lists in data_split/"):
        open_run(tmp_path, CONFIG, Reads(lists | {"labelled": ["b", "a"]}, {}), CPU)
    del kept["lists"]  # as before checksums were kept
    (tmp_path / "config.json").write_text(json.dumps(kept))
    open_run(tmp_path, CONFIG, Reads(lists, {}), CPU)
    assert read_config(tmp_path) == CONFIG
    assert json.loads((tmp_path / "config.json").read_text())["lists"]
    with pytest.raises(UserError, match="holds a run on data that were preprocessed in another way .*choose another"):
        open_run(tmp_path, CONFIG, Reads(lists, {"preprocessing": {"normalise": "ct"}}), CPU)


def test_going_on_with_another_machine_is_told(tmp_path, said):
    reads = Reads({"labelled": ["a"]}, {})
    open_run(tmp_path, CONFIG, reads, CPU)
    said()
    open_run(tmp_path, CONFIG, reads, CPU)
    assert "goes on with" not in said()
    kept = json.loads((tmp_path / "config.json").read_text())
    now = kept["resumed"][-1]
    torch_now, threads, device = now["packages"]["torch"], now["threads"], now["device"]
    for change, told in (
        ({"threads": 64}, f"threads {threads} instead of 64"),
        ({"packages": {"torch": "1.0"}}, f"PyTorch {torch_now} instead of 1.0"),
        ({"device": "Other GPU"}, f"device {device} instead of Other GPU"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(kept | {"resumed": [now | change]}))
        open_run(tmp_path, CONFIG, reads, CPU)
        assert f"NOTE: this run resumes with {told}: results may differ in the last digits." in said()
    for old in ({}, {"packages": None, "threads": None}):  # of an earlier version, which kept less
        (tmp_path / "config.json").write_text(json.dumps(kept | {"environment": old, "resumed": []}))
        open_run(tmp_path, CONFIG, reads, CPU)
        assert "goes on with" not in said()


def test_a_run_knows_what_it_was_trained_on(tmp_path):
    assert trained_among(tmp_path, ["p1"]) == []
    open_run(tmp_path, CONFIG, Reads({"labelled": ["p1_slice_1"]}, {}, ["p1", "p2"]), CPU)
    assert trained_among(tmp_path, ["p3", "p2", "p1", "p"]) == ["p2", "p1"]


def test_torn_and_repeated_rows_are_dropped(tmp_path):
    folder = tmp_path / "pre_train"
    record = StageRecord(folder, ["iteration", "loss"], 1)
    record.add([{"iteration": k, "loss": k / 2} for k in range(1, 13)])
    record.close()
    with open(folder / "metrics.csv", "a") as file:
        file.write("1")  # the beginning of "13,6.5"
    with open(folder / "log.txt", "a") as file:
        file.write("2026-01-01 00:00:00,000 pre_train: iterations 1 to 20 in x\n")
        file.writelines(f"2026-01-01 00:00:00,000 pre_train {k}: loss\n" for k in (3, 10, 11))
    StageRecord(folder, ["iteration", "loss"], 11).close()
    with open(folder / "metrics.csv", newline="") as file:
        assert [(row["iteration"], row["loss"]) for row in csv.DictReader(file)] == [
            (str(k), f"{k / 2:g}") for k in range(1, 11)
        ]
    told = [line.split()[2:4] for line in (folder / "log.txt").read_text().splitlines()]
    assert told == [["pre_train:", "iterations"], ["pre_train", "3:"], ["pre_train", "10:"]]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's disk that is always full")
def test_records_on_a_full_disk_end_in_a_sentence(tmp_path):
    record = StageRecord(tmp_path / "pre_train", ["iteration", "loss"], 1)
    record._csv.close()
    record._csv = open("/dev/full", "w")  # noqa: SIM115
    record._writer = csv.DictWriter(record._csv, ["iteration", "loss"])
    with pytest.raises(UserError, match="the records in .* cannot be written .*No space left.*: free some space"):
        record.add([{"iteration": 1, "loss": 1.0}])
    record.close()


def test_any_flipped_byte_of_a_checkpoint_is_found_or_harmless(tmp_path):
    path = tmp_path / "a.pth"
    payload = {"w": torch.arange(6.0), "n": 3}
    checkpoints.save(payload, path)
    whole, refused = path.read_bytes(), 0
    for place in range(len(whole)):
        raw = bytearray(whole)
        raw[place] ^= 1 << place % 8 if place % 2 else 0x10
        path.write_bytes(raw)
        try:
            read = checkpoints.load(path)
        except UserError:
            refused += 1
        else:
            assert torch.equal(read["w"], payload["w"]) and read["n"] == 3, place
    assert refused > 100


def test_the_last_two_checkpoints_are_kept(tmp_path):
    for k in range(3):
        checkpoints.save({"k": k}, tmp_path / "last.pth", previous=tmp_path / "last_previous.pth")
    assert checkpoints.load_last(tmp_path).payload == {"k": 2}
    (tmp_path / "last.pth").write_bytes(b"PK")
    last = checkpoints.load_last(tmp_path)
    assert last.payload == {"k": 1} and last.path.name == "last_previous.pth" and "last.pth is not a" in last.damaged
    (tmp_path / "last_previous.pth").write_bytes(b"")
    with pytest.raises(UserError, match="no checkpoint in .* can be read .*: restore a copy, or remove that folder"):
        checkpoints.load_last(tmp_path)
    assert checkpoints.load_last(tmp_path / "none") is None


class TwoBatches:
    """The same two labelled batches for ever."""

    def names(self, iteration):
        return {"x_a": ["one"]}

    def batches(self, start, stop):
        generator = torch.Generator().manual_seed(0)
        images = {f"x_{d}": torch.randn(2, 1, 32, 32, generator=generator) for d in "ab"}
        for _ in range(start, stop):
            yield images | {f"y_{d}": (images[f"x_{d}"][:, 0] > 0).to(torch.uint8) for d in "ab"}


def learners():
    torch.manual_seed(0)
    return make_learners(build_network("unet", 2), build_network("unet", 2), 1e-3)


def test_it_saves_by_the_clock_and_says_once_what_that_costs(tmp_path, monkeypatch):
    seconds = iter(range(0, 10**6, 20))
    monkeypatch.setattr(time, "perf_counter", lambda: next(seconds))
    saved = []
    monkeypatch.setattr(checkpoints, "save", lambda payload, path, previous=None: saved.append(payload["iteration"]))
    (tmp_path / "pre_train").mkdir()
    (tmp_path / "pre_train" / "last.pth").touch()
    monkeypatch.setattr(checkpoints, "load_last", lambda folder: None)
    common = {"validate": None, "validate_at": (), "validated_on": "val", "config": {}}
    settings = method(pre_iterations=5, save_every=1000, save_minutes=2.5, log_every=100)
    pretrain(learners(), TwoBatches(), tmp_path, settings, **common)
    assert 1 < len(saved) < 5 and saved[-1] == 5
    assert (tmp_path / "pre_train" / "log.txt").read_text().count("saving took") == 1


def test_the_gradients_norm_is_the_norm_of_the_gradient():
    ours = learners()
    add_teacher(ours)
    batch = next(TwoBatches().batches(0, 1))
    batch |= {"u_a": batch["x_a"], "u_b": batch["x_b"]}
    losses = self_train_step(ours, batch, torch.ones(32, 32).bool(), method())
    expected = torch.cat([p.grad.flatten() for p in ours.networks["student_b"].parameters()]).norm()
    assert losses["student_b/grad_norm"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_batches_are_the_same_bits_whatever_the_threads(acdc_phantom):
    names = read_list(acdc_phantom / "data_split" / "train_slices.list")
    labelled = Slices(acdc_phantom, names[:8], Decoding(4, True, 1.0), Augmentation((32, 32)))
    unlabelled = Slices(acdc_phantom, names[8:], Decoding(4, False, 1.0), Augmentation((32, 32)))

    def streams(workers=1):
        return Streams(labelled, unlabelled, Order(2, 2, 2, seed=3, workers=workers))

    one_by_one = [streams().batch(k) for k in range(12)]
    with ThreadPoolExecutor(6) as pool:
        at_once = list(pool.map(streams().batch, reversed(range(12))))[::-1]
    for first, second, third in zip(one_by_one, at_once, streams(workers=2).batches(0, 12), strict=True):
        assert all(torch.equal(first[key], second[key]) and torch.equal(first[key], third[key]) for key in first)
    assert len(list(streams().batches(3, 12))) == 9
    assert streams().names(0) == {
        "x_a": names[:2], "x_b": names[7:5:-1], "u_a": names[8:10], "u_b": names[15:13:-1],
    }  # fmt: skip


def test_an_operation_without_a_deterministic_kernel_is_named(monkeypatch):
    def main(config):
        raise RuntimeError(
            "max_unpooling2d_forward_out does not have a deterministic implementation, but you set "
            "'torch.use_deterministic_algorithms(True)'. You can turn off determinism just for this operation."
        )

    class Config:
        pass

    monkeypatch.setattr("sdcl.runs.config.parse", lambda *_: Config())
    with pytest.raises(SystemExit) as error:
        run_script(main, Config)
    assert str(error.value) == (
        "error: --deterministic: max_unpooling2d_forward_out does not have a deterministic implementation: "
        "run without it, or on --device cpu."
    )


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("CUDA error: device-side assert triggered\nCUDA kernel errors might be", "a check on the GPU failed, most of"),
        ("The NVIDIA driver on your system is too old (found version 1). Please, CUDA", "cannot use the GPU's driver"),
        ("DataLoader worker (pid 7) is killed by signal: Bus error.", "a process that prepares batches ended"),
        ("[pair.cc:537] gloo Read error: Connection reset by peer.", "another process of this run ended or is out of"),
        ("NCCL error in: x.cpp:1, unhandled system error", "another process of this run ended or is out of re"),
    ],
)
def test_what_devices_and_other_processes_say_ends_in_a_sentence(said, told, monkeypatch, capsys):
    ended = []

    def main(config):
        raise RuntimeError(said)

    monkeypatch.setattr("sdcl.runs.config.parse", lambda *_: None)
    with pytest.raises(SystemExit) as error:
        run_script(main, object)
    assert str(error.value).startswith("error: ") and told in str(error.value) and "\n" not in str(error.value)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr("os._exit", ended.append)  # at once, since the others are not waited for
    run_script(main, object)
    assert ended == [1] and capsys.readouterr().err == str(error.value).replace("error", "error in process 2", 1) + "\n"


@pytest.mark.parametrize("value", ["", " "])
def test_an_empty_variable_of_the_environment_is_none(value, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_NUM_TASKS", "SLURM_JOB_NUM_NODES", "SLURM_PROCID"):
        monkeypatch.setenv(name, value)
    assert processes() == nodes_of_job() == 1 and places() == (0, 1, 0)
    monkeypatch.setenv("WORLD_SIZE", "2")  # RANK is empty: nobody started two processes
    assert places() == (0, 1, 0)


def test_a_variable_that_is_no_number_is_named(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(SystemExit) as error:
        run_script(lambda config: None, object)
    assert str(error.value) == "error: the environment variable WORLD_SIZE is 'two', not a whole number: unset it."
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "x")
    with pytest.raises(UserError, match="the environment variable RANK is 'x'"):
        places()


def test_ctrl_c_while_a_script_imports_ends_without_a_traceback(tmp_path):
    """The slow import is made to send the signal itself."""
    slow = tmp_path / "tyro"
    slow.mkdir()
    (slow / "__init__.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(5)\n")
    script = ROOT / "code" / "LA_train.py"
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=60,
        env=os.environ | {"PYTHONPATH": path},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # which nohup ignores
    )  # fmt: skip
    assert done.returncode == 130 and not done.stderr


def test_other_errors_keep_their_traceback(monkeypatch):
    def main(config):
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr("sdcl.runs.config.parse", lambda *_: None)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        run_script(main, object)
