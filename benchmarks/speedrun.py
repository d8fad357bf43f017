"""Seconds from a training's start to a fixed Dice, over seeds: `sh runs/*_speedrun.sh`; docs/speedrun.md."""

import contextlib
import csv
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "code"))  # this checkout's code, whichever is installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from bench import cpu_name

from sdcl.runs.config import run_script
from sdcl.runs.devices import fastest_precision, select_device
from sdcl.runs.errors import UserError
from sdcl.runs.folder import environment, write_csv
from sdcl.runs.matrix import SCRIPTS
from sdcl.runs.written_files import remove_written_folder

ROOT = Path(__file__).resolve().parents[1]
# What a training says at the end of each validation, of the mean of both students.
SCORED = re.compile(r"(?P<stage>pre_train|self_train) (?P<number>\d+): Dice on .*\bmean (?P<dice>[\d.]+) \(best")
LATE = 2.0  # times the mean: a seed that takes longer has failed


@dataclass
class Config:
    """Train once for each seed until the mean of both students reaches a Dice, and say how long that took.

    A seed's time runs from the start of its process to the end of the validation that reaches the target; the training
    is ended there, unless --finish asks for its end as well. Runs go one after the other; nothing else should be at
    work on the machine.
    """

    name: str  # of this row: what it changes
    data_set: Literal["acdc", "la"] = "acdc"  # whose training script
    root_path: Path | None = None  # the data set's folder; None: Datasets/<data set>
    flags: str = ""  # of the training, quoted as one word: --flags="--recipe fast"
    precision: Literal["fp32", "bf16", "fastest"] = "fp32"  # of the training; fastest: that of this processor or GPU
    target: float = 0.7  # mean Dice of the mean of both students
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)  # of the trainings
    limit_s: float = 3600.0  # seconds after which a seed has failed
    finish: bool = False  # let each training go on to its end, whose Dice is kept too
    models_path: Path = ROOT / "speedrun"  # where runs go; each is removed when it has ended
    output: Path = ROOT / "speedrun" / "rows.csv"  # receives a line a seed, behind those that are there


def main(config: Config) -> None:
    """Run every seed, write its line, and say what the row took."""
    config = replace(config, flags=f"{config.flags} --precision {precision_of(config)}".strip())
    begun = read(config.output)
    if config.name in {row["name"] for row in begun}:
        raise UserError(f"{config.output} has a row {config.name} already: give another --name, or remove its lines.")
    config.output.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for seed in config.seeds:
        rows.append(run(config, seed))
        write_csv(config.output, [*begun, *rows], is_known=True)
        print(f"{config.name}, seed {seed}: {told(rows[-1])}", flush=True)
    seconds = [row["seconds"] for row in rows if row["reached"] == "yes"]
    mean = float(np.mean(seconds)) if seconds else float("nan")
    failed = len(rows) - sum(second <= LATE * mean for second in seconds)
    print(f"{config.name}: {mean:.0f} s in the mean of {len(seconds)} seeds, {failed} of {len(rows)} failed")


def precision_of(config: Config) -> str:
    """Return the training's precision, and tell it where it is chosen here.

    Raises:
        UserError: --flags has something to say of it, too.
    """
    given = {word.split("=")[0] for word in shlex.split(config.flags)}
    if "--precision" in given:
        raise UserError("--flags holds --precision: give it to this script instead, beside --flags.")
    if config.precision != "fastest":
        return config.precision
    if "--device" in given:
        raise UserError("--precision fastest looks at what --device auto takes: give fp32 or bf16 with a --device.")
    found = fastest_precision(select_device("auto", 0))
    print(f"{config.name}: in {found}, which is the faster one here")
    return found


def run(config: Config, seed: int) -> dict[str, Any]:
    """Train with a seed until the target or the limit, and return its line."""
    folder = config.models_path / f"{config.name}_{seed}"
    remove_written_folder(folder)
    root = config.root_path or ROOT / "Datasets" / config.data_set
    where = ["--root_path", root, "--models_path", folder, "--seed", seed]
    command = [sys.executable, ROOT / "code" / SCRIPTS[config.data_set][0], *where, *shlex.split(config.flags)]
    begin = time.perf_counter()
    child = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace",
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    clock = threading.Timer(config.limit_s, child.kill)
    clock.start()
    best: dict[str, Any] = {"dice": 0.0, "stage": "", "iteration": 0, "seconds": 0.0}
    now, is_reached = best, False
    said: list[str] = []
    for line in child.stdout:
        said.append(line)
        if scored := SCORED.search(line):
            now = {"dice": float(scored["dice"]), "stage": scored["stage"], "iteration": int(scored["number"])}
            now |= {"seconds": time.perf_counter() - begin}
            if not is_reached and now["dice"] > best["dice"]:
                best = now
            is_reached = best["dice"] >= config.target
            if is_reached and not config.finish:
                break
    is_ended = not config.finish or child.wait() == 0  # else what was scored last is no end
    clock.cancel()
    child.kill()
    child.communicate()
    with contextlib.suppress(OSError):
        shutil.rmtree(folder)
    if not is_reached and not best["stage"]:
        raise UserError(f"the training of seed {seed} ended without a validation: {''.join(said[-3:]).strip()}")
    return {
        "name": config.name, "data_set": config.data_set, "seed": seed, "reached": "yes" if is_reached else "no",
        "seconds": round(best["seconds"], 1), "stage": best["stage"], "iteration": best["iteration"],
        "dice": best["dice"], **{f"end_{name}": now[name] if is_ended else "" for name in ("iteration", "dice")},
        "end_seconds": round(now["seconds"], 1) if is_ended else "",
        "threads": torch.get_num_threads(), "processor": cpu_name(), "torch": torch.__version__,
        "commit": environment(torch.device("cpu"))["commit"], "flags": config.flags,
    }  # fmt: skip


def told(row: dict[str, Any]) -> str:
    """Show a line as text."""
    what = "reached" if row["reached"] == "yes" else "not reached; the best was"
    return f"{what} {row['dice']:.4f} at {row['stage']} {row['iteration']}, after {row['seconds']:.0f} s"


def read(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a table; none where it is not there."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    run_script(main, Config)
