"""Runs of the real training scripts on tiny phantoms, killed and resumed, and what tells two of them apart."""

import json
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dataloaders.phantom import write_acdc, write_la, write_pancreas
from sdcl import checkpoints
from sdcl.runs.resume import DAMAGED

HERE = Path(__file__).resolve().parent
STAGES = ("pre_train", "self_train")
ITERATIONS = 6  # of each stage
COMMON = ["--device", "cpu", "--exp", "fault", "--labelnum", "2", "--log_every", "3", "--save_every", "2",
          "--pre_iterations", str(ITERATIONS), "--self_iterations", str(ITERATIONS)]  # fmt: skip
VOLUMES = ["--patch_size", "32", "16", "16", "--stride", "32", "16", "16", "--labelled_repeat", "2",
           "--unlabelled_repeat", "4", "--select", "val", "--val_cases", "1", "--pre_val_every", "3",
           "--self_val_every", "3"]  # fmt: skip
ARGUMENTS = {
    "acdc": ["--patch_size", "32", "32", "--batch_size", "2", "--pre_val_from", "3", "--pre_val_every", "3",
             "--self_val_every", "3"],
    "la": VOLUMES,
    "pancreas": VOLUMES,
}  # fmt: skip
PHASES = {"t": "training", "s": "saving", "v": "validating"}
DEADLINE_S = 300.0  # for one run, which takes seconds
LAST_CHARACTERS = 1500  # of a run's output, in the message of one that failed


def write_data(name: str, root: Path) -> Path:
    """Write a data set's phantom, as small as a run can do with."""
    if name == "acdc":
        return write_acdc(root, patients=(4, 1, 1), size=(36, 40), slices=2)
    size = (40, 36, 32) if name == "la" else (40, 40, 32)
    return {"la": write_la, "pancreas": write_pancreas}[name](root, cases=(5, 1), size=size)


def answer(zygote: subprocess.Popen) -> int:
    """Read a number that the process that forks the runs answers with.

    Raises:
        RuntimeError: it has ended.
    """
    line = zygote.stdout.readline()
    if not line:
        raise RuntimeError(f"the process that forks the runs has ended, with the exit status {zygote.poll()}")
    return int(line)


@dataclass
class Run:
    """One process that trains.

    Attributes:
        process: its id.
        output: file with what it prints, and what earlier runs of the folder printed.
        phases: file whose last letter tells what it is doing.
    """

    process: int
    output: Path
    phases: Path
    zygote: subprocess.Popen

    def wait(self) -> int:
        """Wait for its end and return its exit status, negative for a signal.

        Raises:
            RuntimeError: it did not end in time; it is killed, and the message has its last lines.
        """
        if not select.select([self.zygote.stdout], [], [], DEADLINE_S)[0]:
            os.kill(self.process, signal.SIGKILL)
            raise RuntimeError(f"a run did not end within {DEADLINE_S:.0f} s, and said last: {self.last_words()}")
        return answer(self.zygote)

    def check_not_crashed(self, status: int) -> None:
        """Refuse the exit status of a run that came to its end, or to a signal, by itself.

        Raises:
            RuntimeError: it failed; the message has its last lines.
        """
        if status not in (0, -signal.SIGKILL):
            raise RuntimeError(f"a run ended with the exit status {status}, and said last: {self.last_words()}")

    def last_words(self) -> str:
        """Return the end of what it printed."""
        text = self.output.read_text(encoding="utf-8", errors="replace") if self.output.exists() else ""
        return text[-LAST_CHARACTERS:]

    def phase(self) -> str:
        """Say what it is doing: starting, training, saving or validating."""
        text = self.phases.read_text() if self.phases.exists() else ""
        return PHASES[text[-1]] if text else "starting"

    def stop(self, delay_s: float = 0.0, at: str = "", count: int = 1, number: int = signal.SIGKILL) -> str:
        """Send a signal after a delay, counted from the start or from a phase's count-th beginning.

        Returns:
            What it was doing. The number 0 sends nothing.
        """
        begin = time.monotonic()
        letter = {name: key for key, name in PHASES.items()}.get(at, "")
        while letter and time.monotonic() - begin < DEADLINE_S and not self.is_over():
            if self.phases.exists() and self.phases.read_text().count(letter) >= count:
                break
            time.sleep(0.0005)
        time.sleep(delay_s)
        phase = self.phase()
        if number and not self.is_over():
            os.kill(self.process, number)
        return phase

    def is_over(self) -> bool:
        """Tell whether it has ended."""
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return True
        return False


@dataclass
class Runner:
    """Starts runs of one data set in fresh folders.

    Args:
        name: of the data set.
        folder: for the phantom and the runs.
        command: what to put before the interpreter, such as what mounts a small disk.
    """

    name: str
    folder: Path
    command: tuple[str, ...] = ()
    count: int = field(default=0, init=False)

    def __enter__(self) -> "Runner":
        """Write the phantom and start the process that forks the runs."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.data = self.folder / "data"
        if not self.data.exists():
            write_data(self.name, self.data)
        threads = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS")}
        self.zygote = subprocess.Popen(
            [*self.command, sys.executable, str(HERE / "zygote.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, env=os.environ | threads,
        )  # fmt: skip
        if self.zygote.stdout.readline() != b"ready\n":
            raise RuntimeError("the process that starts the runs could not start")
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        self.zygote.stdin.close()
        self.zygote.wait()

    def fresh(self) -> Path:
        """Return a new folder for models."""
        self.count += 1
        models = self.folder / f"models{self.count}"
        shutil.rmtree(models, ignore_errors=True)
        models.mkdir()
        return models

    def start(self, models: Path, *arguments: str) -> Run:
        """Start a run, or go on with it."""
        output, phases = self.folder / f"{models.name}.txt", self.folder / f"{models.name}.phases"
        phases.unlink(missing_ok=True)
        request = {
            "script": self.name, "output": str(output), "phases": str(phases),
            "arguments": ["--root_path", str(self.data), "--models_path", str(models), *COMMON,
                          *ARGUMENTS[self.name], *arguments],
        }  # fmt: skip
        self.zygote.stdin.write(f"{json.dumps(request)}\n".encode())
        return Run(answer(self.zygote), output, phases, self.zygote)

    def run_of(self, models: Path) -> Path:
        """Return the run's folder."""
        return models / f"{self.name}_fault_2_labeled"


def differences(one: Path, two: Path, is_asked: bool = False) -> list[str]:
    """List what differs between two finished runs: checkpoints to the bit, metrics.csv, what log.txt says.

    Args:
        one, two: the runs' folders.
        is_asked: the second was asked to stop, so that it saved once more and logged that: its checkpoint before the
            last may be of another iteration, and log.txt may say more, but nothing twice.
    """
    found = []
    for stage in STAGES:
        names = [sorted({path.name for path in (run / stage).glob("*.pth")} - {DAMAGED}) for run in (one, two)]
        if names[0] != names[1]:
            found.append(f"{stage}: {names[0]} and {names[1]}")
            continue
        for name in [name for name in names[0] if not is_asked or name != checkpoints.PREVIOUS]:
            payloads = [checkpoints.load(run / stage / name) for run in (one, two)]
            for payload in payloads:
                payload.pop("config")  # has the folder's name
            if not same(*payloads):
                found.append(f"{stage}/{name}")
        if (one / stage / "metrics.csv").read_bytes() != (two / stage / "metrics.csv").read_bytes():
            found.append(f"{stage}/metrics.csv")
        lines, others = told(one / stage / "log.txt"), told(two / stage / "log.txt")
        if lines != ([line for line in others if line in lines] if is_asked else others) or len(set(others)) < len(
            others
        ):
            found.append(f"{stage}/log.txt")
    return found


def same(one, two) -> bool:
    """Tell whether two payloads are equal to the bit."""
    if isinstance(one, dict):
        return isinstance(two, dict) and one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(two) and len(one) == len(two) and all(map(same, one, two))
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and one.shape == two.shape and torch.equal(one, two)
    return one == two


def told(log: Path) -> list[str]:
    """Return what log.txt says of iterations, without times."""
    lines = re.findall(r"(?:pre|self)_train \d+: .*", log.read_text(encoding="utf-8"))
    return [line.split("; ")[0] for line in lines]


def saved_iteration(run: Path) -> tuple[str, int]:
    """Return the stage and iteration after which a run was last saved."""
    for stage in reversed(STAGES):
        last = checkpoints.load_last(run / stage)
        if last is not None:
            return stage, last.payload["iteration"]
    return STAGES[0], 0


def kill_and_resume(runner: Runner, whole: Path, seconds: float, rng: random.Random, at: str = "") -> dict:
    """Kill a run at a random instant, maybe again after it was resumed, let it end, and compare.

    Args:
        runner: of the data set.
        whole: the folder of the run never interrupted.
        seconds: that it took.
        rng: draws the instants.
        at: aim at a phase, "saving" or "validating"; "": at any instant.

    Returns:
        Where each kill came, whether each resume was at the next iteration, and what differs in the end.
    """
    models = runner.fresh()
    run, phases, late = runner.run_of(models), [], []
    for _ in range(1 + (rng.random() < 1 / 3)):
        process = runner.start(models)
        if at:
            phase = process.stop(rng.random() * 0.03, at, rng.randint(1, 8))
        else:
            phase = process.stop(rng.random() * seconds)
        stage = "self_train" if (run / "self_train").exists() else "pre_train"
        status = process.wait()
        process.check_not_crashed(status)
        if status == -signal.SIGKILL:
            phases.append((stage, phase) if (run / "pre_train").exists() else ("start", "starting"))
        if not phases:
            break
        stage, iteration = saved_iteration(run)
        process = None
        late.append((stage, iteration))
    process = runner.start(models)
    status = process.wait()
    text = process.output.read_text(encoding="utf-8")
    resumed_at = re.findall(r"(\w+_train): iterations (\d+) to", text)
    is_next = not late or late[-1][1] in (0, ITERATIONS) or (late[-1][0], str(late[-1][1] + 1)) in resumed_at
    found = differences(whole, run) if status == 0 else [f"exit status {status}: {text[-300:]}"]
    shutil.rmtree(models)
    return {"kills": phases, "is_next": is_next, "differences": found}
