"""Try every fault on tiny runs and keep the table in docs/reliability.md: `make faults` (about an hour)."""

import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import fuzz
import h5py
import numpy as np
from harness import ITERATIONS, Runner, differences, kill_and_resume, saved_iteration

from dataloaders.files import read_list
from sdcl import checkpoints

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"
KILLS = 30  # killed runs of a data set; one in six is aimed at saving, one in six at validating
TRIALS = 5  # tried at most for one that counts: a run may have ended before its kill comes
SMALL_DISK = "mkdir -p {0} && mount -t tmpfs -o size={1}k tmpfs {0} && exec "


@dataclass
class Outcome:
    """What came of a kind of fault.

    Attributes:
        fault: what was done.
        tried: how often.
        survived: how often everything ended as it must.
        lost: what was lost or differed, "nothing" in words.
    """

    fault: str
    tried: int
    survived: int
    lost: str = "nothing"


class Tally:
    """Counts the trials of one kind of fault."""

    def __init__(self, fault: str):
        self.fault, self.tried, self.problems = fault, 0, []

    def add(self, problems: list[str]) -> None:
        """Count one trial, with what went wrong."""
        self.tried += 1
        if problems:
            self.problems.append("; ".join(problems))

    def outcome(self) -> Outcome:
        """Return the row of the table."""
        lost = " / ".join(self.problems) or "nothing"
        return Outcome(self.fault, self.tried, self.tried - len(self.problems), lost)


def whole_run(runner: Runner) -> tuple[Path, float]:
    """Train without any interruption; return the run's folder and the seconds that it took."""
    models, begin = runner.fresh(), time.monotonic()
    process = runner.start(models)
    process.check_not_crashed(process.wait())
    return runner.run_of(models), time.monotonic() - begin


def finish(runner: Runner, models: Path, whole: Path, words: str = "", is_asked: bool = False) -> list[str]:
    """Give the same command again, to the end; return what differs, and whether it did not say some words."""
    process = runner.start(models)
    status = process.wait()
    text = process.output.read_text(encoding="utf-8")
    if status:
        return [f"exit status {status}: {text[-300:]}"]
    return differences(whole, runner.run_of(models), is_asked) + (
        [] if words in text else [f"it did not say {words!r}"]
    )


def refused(runner: Runner, models: Path, words: str, *arguments: str) -> list[str]:
    """Give the command and expect one sentence and the exit status 1."""
    process = runner.start(models, *arguments)
    status = process.wait()
    text = process.output.read_text(encoding="utf-8")
    # Python 3.14's resource tracker remarks on the forks of the harness, after everything else.
    said = [line for line in text.splitlines() if "resource_tracker" not in line and "warnings.warn" not in line]
    is_clean = status == 1 and re.search(words, said[-1]) and "Traceback" not in text
    return [] if is_clean else [f"exit status {status}: {text[-300:]}"]


def kills(runner: Runner, whole: Path, seconds: float, count: int, rng: random.Random) -> Outcome:
    """Kill runs with SIGKILL at random instants, and resume each to its end."""
    aims = ["", "", "saving", "", "", "validating"]
    tally, phases = Tally(""), Counter()
    for trial in range(TRIALS * count):
        found = kill_and_resume(runner, whole, seconds, rng, aims[trial % len(aims)])
        if found["kills"]:  # else it had ended before the instant came
            phases.update(f"{stage}, {phase}" for stage, phase in found["kills"])
            tally.add(found["differences"] + ([] if found["is_next"] else ["it did not resume at the next iteration"]))
        if tally.tried == count:
            break
    else:
        raise RuntimeError(f"only {tally.tried} of {count} runs could be killed in {TRIALS * count} trials")
    parts = ", ".join(f"{n} in {phase}" for phase, n in sorted(phases.items()))
    tally.fault = f"{runner.name}: killed (kill -9), {sum(phases.values())} kills: {parts}"
    return tally.outcome()


def signals(runner: Runner, whole: Path, seconds: float, count: int, rng: random.Random) -> Outcome:
    """Ask runs to stop, by SIGTERM and SIGINT in turn, at random instants of their training."""
    tally = Tally(f"{runner.name}: asked to stop (SIGTERM, SIGINT) while training")
    for trial in range(count):
        models, number = runner.fresh(), (signal.SIGTERM, signal.SIGINT)[trial % 2]
        process = runner.start(models)
        process.stop(rng.random() * seconds * 0.3, at="validating", number=number)
        status = process.wait()
        text = process.output.read_text(encoding="utf-8")
        problems = []
        if saved_iteration(runner.run_of(models))[1] < ITERATIONS:  # else it was between the stages, or at its end
            problems += [] if status == 128 + number else [f"exit status {status}"]
            problems += [] if "stopped and saved after iteration" in text else ["it did not say so"]
        tally.add(problems + finish(runner, models, whole, is_asked=True))
        shutil.rmtree(models)
    return tally.outcome()


def damage(rng: random.Random) -> dict[str, Callable[[Path], object]]:
    """Return ways in which a file gets damaged."""

    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[rng.randrange(len(content) // 4, len(content) * 3 // 4)] ^= 1 << rng.randrange(8)
        path.write_bytes(content)

    return {
        "one bit flipped": flip,
        "cut short": lambda path: path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)]),
        "emptied": lambda path: path.write_bytes(b""),
        "zeros at its end": lambda path: path.write_bytes(path.read_bytes()[:-4096] + bytes(4096)),
        "removed": lambda path: path.unlink(),
    }


def stopped(runner: Runner, rng: random.Random) -> tuple[Path, Path]:
    """Kill a run in the midst of a stage, after two saves or more; return the models' folder and the stage's.

    Raises:
        RuntimeError: a run failed by itself, or none could be killed in time.
    """
    for _ in range(10 * TRIALS):
        models = runner.fresh()
        process = runner.start(models)
        process.stop(rng.random() * 0.3, at="saving", count=rng.choice((6, 7, 8, 16, 17)))
        process.check_not_crashed(process.wait())
        stage, iteration = saved_iteration(runner.run_of(models))
        folder = runner.run_of(models) / stage
        if iteration < ITERATIONS and (folder / checkpoints.PREVIOUS).exists() and (folder / checkpoints.LAST).exists():
            return models, folder
        shutil.rmtree(models)
    raise RuntimeError(f"none of {10 * TRIALS} runs could be killed in the midst of a stage")


def damaged_last(runner: Runner, whole: Path, rounds: int, rng: random.Random, count: int = 5) -> Outcome:
    """Damage the last checkpoint of a stopped run: it goes on from the one before."""
    tally = Tally(f"{runner.name}: the last checkpoint {', '.join(damage(rng))}")
    for how in list(damage(rng).values())[:count] * rounds:
        models, folder = stopped(runner, rng)
        how(folder / checkpoints.LAST)
        tally.add(finish(runner, models, whole, f"Going on from {checkpoints.PREVIOUS}"))
        shutil.rmtree(models)
    return tally.outcome()


def lost_best(runner: Runner, whole: Path, rng: random.Random, count: int) -> Outcome:
    """Damage or remove a best checkpoint of a stopped run: refused; the way out that it names gives the same run."""
    tally = Tally(f"{runner.name}: a best checkpoint {', '.join(damage(rng))}")
    for how in list(damage(rng).values())[::-1][:count]:
        models, folder = stopped(runner, rng)
        how(folder / "best_mean.pth")
        problems = refused(runner, models, r"best_mean.pth is (missing|damaged).*restore a copy, or remove the folder")
        shutil.rmtree(folder)
        tally.add(problems + finish(runner, models, whole))
        shutil.rmtree(models)
    return tally.outcome()


def two_at_once(first: Runner, folder: Path, whole: Path, count: int) -> Outcome:
    """Start a second process in the folder of a running one: refused, and the first ends as if alone."""
    tally = Tally(f"{first.name}: two processes in one folder")
    with Runner(first.name, folder) as second:
        second.data = first.data
        for _ in range(count):
            models = first.fresh()
            process = first.start(models)
            process.stop(at="saving", number=0)
            problems = refused(second, models, "another process writes into .*: wait for its end")
            status = process.wait()
            tally.add(problems + ([f"exit status {status}"] if status else differences(whole, first.run_of(models))))
            shutil.rmtree(models)
    return tally.outcome()


def size_kib(folder: Path) -> int:
    """Return the size of a folder's files."""
    return sum(path.stat().st_size for path in folder.rglob("*")) // 1024


def can_mount() -> bool:
    """Tell whether this process may mount a small disk of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["unshare", "-rm", "sh", "-c", SMALL_DISK.format(folder, 64) + "true"]
        try:
            return subprocess.run(command, capture_output=True).returncode == 0
        except OSError:
            return False


def full_disk(runner: Runner, whole: Path, sizes_kib: list[int]) -> Outcome:
    """Train on disks that fill up (each a tmpfs of some size); resume where there is room."""
    tally = Tally(f"{runner.name}: a full disk (tmpfs of {sizes_kib[0] / 1024:.0f} to {sizes_kib[-1] / 1024:.0f} MiB)")
    for size in sizes_kib:
        disk = runner.folder / "disk"
        command = ("unshare", "-rm", "sh", "-c", SMALL_DISK.format(disk, size) + '"$@"', "sh")
        models = runner.fresh()
        with Runner(runner.name, runner.folder, command) as inside:
            inside.count = 1000 + size
            problems = refused(inside, disk, "cannot be written .*free some space")
            mounted = Path(f"/proc/{inside.zygote.pid}/root{disk}")
            shutil.rmtree(models)
            shutil.copytree(mounted, models)
        for stage in ("pre_train", "self_train"):
            for name in (checkpoints.LAST, checkpoints.PREVIOUS):
                if (runner.run_of(models) / stage / name).exists():
                    checkpoints.load(runner.run_of(models) / stage / name)  # both are whole
        tally.add(problems + finish(runner, models, whole))
        shutil.rmtree(models)
    return tally.outcome()


def not_finite(runner: Runner, folder: Path) -> Outcome:
    """Train on a case whose values are so large that the networks overflow: it stops, and says on which case."""
    tally = Tally(f"{runner.name}: a case that makes the loss nan")
    data = shutil.copytree(runner.data, folder / "huge")
    train = data / "data_split" / ("train_slices.list" if runner.name == "acdc" else "train.txt")
    name = read_list(train)[0]  # a labelled one
    first = next(path for path in sorted(data.rglob("*.h5")) if name in str(path))
    with h5py.File(first, "r+") as file:
        image = np.full(file["image"].shape, 3e38, np.float32)  # near the largest number of float32
        image.flat[0] = 0
        file["image"][...] = image
        file.attrs["alignment"] = "trusted"  # else Pancreas's guard refuses it before any training
    models = runner.fresh()
    words = r"became nan or infinite at iteration \d+ of pre_train, on the cases x_a: .*: lower --base_lr or check"
    problems = refused(runner, models, words, "--root_path", str(data), "--log_every", "6", "--save_every", "6")
    stage = runner.run_of(models) / "pre_train"
    kept = list(stage.glob("nonfinite_*.pth"))
    problems += [] if kept and checkpoints.load(kept[0])["cases"] else ["the state was not kept"]
    problems += [f"{path.name} was written" for path in stage.glob("best_*.pth")]
    tally.add(problems)
    return tally.outcome()


def try_all(name: str, folder: Path, rng: random.Random) -> list[Outcome]:
    """Try every fault on one data set."""
    with Runner(name, folder) as runner:
        whole, seconds = whole_run(runner)
        again, _ = whole_run(runner)
        tally = Tally(f"{name}: nothing, twice (the same seed gives the same bits)")
        tally.add(differences(whole, again))
        rows = [tally.outcome(), kills(runner, whole, seconds, KILLS, rng), signals(runner, whole, seconds, 4, rng)]
        rows += [damaged_last(runner, whole, 1, rng), lost_best(runner, whole, rng, 5)]
        rows += [two_at_once(runner, folder / "second", whole, 2), not_finite(runner, folder)]
        if can_mount():
            need = size_kib(whole)
            rows += [full_disk(runner, whole, [need * part // 10 for part in (2, 4, 6, 8)])]
    return rows


def table(rows: list[Outcome]) -> str:
    """Return the rows as a table of Markdown."""
    lines = ["| fault | tried | survived | lost or different |", "|---|---|---|---|"]
    lines += [f"| {row.fault} | {row.tried} | {row.survived} | {row.lost} |" for row in rows]
    return "\n".join(lines)


def keep(part: str, text: str) -> None:
    """Put a table between its marks in docs/reliability.md."""
    page = PAGE.read_text(encoding="utf-8")
    begin, end = f"<!-- {part} -->\n", f"<!-- end of {part} -->"
    before, rest = page.split(begin)
    PAGE.write_text(f"{before}{begin}\n{text}\n\n{end}{rest.split(end)[1]}", encoding="utf-8")


def main() -> None:
    """Try the faults of the data sets named on the command line, or of all; then the fuzzing."""
    names = sys.argv[1:] or ["acdc", "la", "pancreas", "fuzz"]
    rng = random.Random(1)
    rows: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="faults") as folder:
        for name in [name for name in names if name != "fuzz"]:
            rows = try_all(name, Path(folder) / name, rng)
            print(table(rows), flush=True)
            keep(name, table(rows))
        if "fuzz" in names:
            text = fuzz.table(fuzz.try_all(Path(folder), fuzz.MANY))
            print(text)
            keep("fuzz", text)
    if any(row.survived < row.tried for row in rows):
        sys.exit("some faults were not survived, see the table.")


if __name__ == "__main__":
    main()
