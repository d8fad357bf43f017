"""What the runs of an experiment cost, and what its table must say of them."""

import json
import re
import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdcl.methods import get
from sdcl.networks import build_network
from sdcl.runs.folder import commits_of, known_task, read_config, sizes_of, start_selected_on
from sdcl.runs.matrix import Run, pace, training_flags

PEAK = re.compile(r"peak memory (?P<gib>[\d.]+) GiB")


def costs_of(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return a row for each method and labelled count: parameters, passes, time and memory, as far as runs tell."""
    rows = []
    for spec, labelnum in dict.fromkeys((run.spec, run.labelnum) for run in runs if run.spec is not None):
        mine = [
            run
            for run in runs
            if (run.spec, run.labelnum) == (spec, labelnum) and (run.folder / "config.json").exists()
        ]
        paces = [found for run in mine if (found := pace(run.folder, "self_train")) is not None]
        if not paces:
            continue
        method, config = get(spec.method), read_config(mine[0].folder)
        first = [found for run in mine if (found := pace(run.needs.folder, "pre_train")) is not None]
        hours = statistics.median(paces) * config["self_iterations"] / 3600
        hours += statistics.median(first) * config["pre_iterations"] / 3600 if first else 0
        parameters = _parameters(mine[0].folder, config, method.students)
        rows.append({
            "method": spec.text, "labelnum": labelnum, "parameters": parameters,
            "passes": method.passes, "seconds_an_iteration": round(statistics.median(paces), 3),
            "hours_with_stage_1": round(hours, 3), "peak_GiB": max(map(_peak, mine)),
        })  # fmt: skip
    return rows


def said_of(config: Any, tested: Sequence[Run], results: str, split: str) -> list[str]:
    """Return the sentences above a table: volumes, selection, commits.

    Args:
        config: experiments.py's header.
        tested: the runs that the table is of.
        results: the name of their tests' folders.
        split: the volumes' name.
    """
    summaries = [json.loads((r.folder / "test" / results / "summary.json").read_text("utf-8")) for r in tested]
    selected = sorted({str(one["selected_on"]) for one in summaries})
    flags = shlex.join(training_flags(config))
    lines = [f"{config.name}: {config.data_set}, the volumes of {split}, flags {flags}."]
    starts = {run: start_selected_on(run.folder) for run in tested}
    started_here = [
        run
        for run, one in zip(tested, summaries, strict=True)
        if one.get("start_selected_here", starts[run] == split)  # absent in tests of earlier versions
    ]
    if config.checkpoint == "last":
        on = sorted({text for text in starts.values() if text})
        if started_here:
            lines.append(
                f"Last checkpoints, but {_of_runs(started_here, tested)} started self-training from stage 1's best, "
                f"SELECTED ON THESE VERY VOLUMES ({split}), which flatters them."
            )
        elif on:
            cases = " and ".join(on)
            lines.append(f"Last checkpoints; self-training started from stage 1's best, selected on {cases}.")
        else:
            lines.append("Last checkpoints: nothing was selected on these volumes.")
    elif split in selected or any(one.get("selected_here") for one in summaries):
        lines.append(f"Checkpoints SELECTED ON THESE VERY VOLUMES ({split}), which flatters all rows.")
    else:
        lines.append(f"Checkpoints selected on {' and '.join(selected)}.")
        if started_here:
            lines.append(
                f"In {_of_runs(started_here, tested)} self-training started from stage 1's best, SELECTED ON THESE "
                f"VERY VOLUMES ({split}), which flatters them."
            )
    trained_on = sorted({name for one in summaries for name in one["trained_on"]})
    if trained_on:
        lines.append(f"WARNING: {len(trained_on)} of these volumes were TRAINED ON ({trained_on[0]} ...).")
    commits = sorted({commit for run in tested for commit in commits_of(run.folder)})
    if len(commits) == 1 and not commits[0].endswith("-dirty"):
        lines.append(f"Trained with commit {commits[0]}.")
    else:
        lines.append(f"WARNING: trained with code that no one commit holds: {', '.join(commits)}.")
    return lines


def _of_runs(some: Sequence[Run], runs: Sequence[Run]) -> str:
    return f"{len(some)} of {len(runs)} runs" if len(some) < len(runs) else f"all {len(runs)} runs"


def _parameters(folder: Path, config: dict[str, Any], students: Sequence[str]) -> int:
    sizes = sizes_of(known_task(folder) or {})
    networks = [build_network(config[role], *sizes) for role in students]
    return sum(p.numel() for network in networks for p in network.parameters())


def _peak(run: Run) -> float:
    """Return the largest peak memory that self-training's log tells of, in GiB; 0 without one."""
    text = (run.folder / "self_train" / "log.txt").read_text(encoding="utf-8", errors="replace")
    return max((float(match["gib"]) for match in PEAK.finditer(text)), default=0.0)
