"""An experiment on SLURM: an array of jobs that each do what is missing, and arrays that follow until nothing is."""

import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from sdcl.runs.atomic import write_text
from sdcl.runs.config import env_number
from sdcl.runs.errors import UserError
from sdcl.runs.folder import LOGGER
from sdcl.runs.matrix import words_of

NOT_FOR_JOBS = ("action", "jobs", "sbatch", "repeats", "signal_minutes", "dry_run", "wait")


def submit(config: Any, script: Path, is_dry: bool) -> None:
    """Write the batch script and submit it, and so many times again after whatever becomes of the one before.

    Args:
        config: experiments.py's header.
        script: experiments.py.
        is_dry: print what would be submitted instead.

    Raises:
        UserError: there is no SLURM, or it refuses the job; the message is its own.
    """
    taken = [
        w for w in words_of("sbatch", config.sbatch) if w.split("=")[0] in ("--array", "--output", "--signal", "-a")
    ]
    if taken:
        raise UserError(f"--sbatch must not give {taken[0]}, which the jobs need as it is: leave it out.")
    folder = (config.models_path / config.name / "slurm").resolve()
    jobs = config.jobs if is_dry else min(config.jobs, _most_jobs())
    if jobs < config.jobs:
        LOGGER.info(
            "NOTE: this cluster's arrays hold %d jobs at most, not %d: these share the work.", jobs, config.jobs
        )
    text, path = batch_script(config, script, folder, jobs), folder / "job.sh"
    if is_dry:
        print(f"{text}\n# {path}; then {config.repeats} times the same with --dependency=afterany:<the one before>")
        return
    write_text(path, text)
    before = ""
    for _ in range(config.repeats + 1):
        dependency = [f"--dependency=afterany:{before}"] if before else []
        before = _call("sbatch", "--parsable", *dependency, str(path)).split(";")[0]
        LOGGER.info("submitted %s%s: an array of %d", before, f", {dependency[0][2:]}" if dependency else "", jobs)
    LOGGER.info("logs go to %s; squeue shows the jobs, python code/experiments.py list the runs", folder)


def batch_script(config: Any, script: Path, folder: Path, jobs: int) -> str:
    """Return the script that each job runs.

    Python takes the place of the shell, so that signals reach it: it has its runs save and stop.

    Args:
        config: experiments.py's header.
        script: experiments.py.
        folder: of the jobs' logs.
        jobs: length of the array.
    """
    asked = [f"--job-name={config.name}", f"--array=0-{jobs - 1}", f"--output={folder}/%A_%a.log", "--open-mode=append"]
    asked += ["--requeue", f"--signal=B:USR1@{60 * config.signal_minutes}", *words_of("sbatch", config.sbatch)]
    command = shlex.join([sys.executable, str(script), "run", "--no-wait", *flags_of(config)])
    return "\n".join(["#!/bin/bash", *(f"#SBATCH {flag}" for flag in asked), f"exec {command}", ""])


def flags_of(config: Any) -> list[str]:
    """Return a header's fields that differ from their defaults as flags, paths made absolute."""
    flags = []
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name in NOT_FOR_JOBS or value == (None if field.default is MISSING else field.default):
            continue
        if isinstance(value, tuple):
            flags += [f"--{field.name}", *map(str, value)]
        else:
            flags.append(f"--{field.name}={value.resolve() if isinstance(value, Path) else value}")
    return flags


def nodes_of_job() -> int:
    """Return how many nodes this process's SLURM job has; 1 outside of one."""
    return env_number("SLURM_JOB_NUM_NODES", 1)


def check_processes(processes: int, slots: int) -> None:
    """Refuse processes that a job's nodes cannot share out.

    Args:
        processes: that train one run together.
        slots: runs at a time.

    Raises:
        UserError: names the flag.
    """
    nodes = nodes_of_job()
    if nodes > 1 and processes % nodes:
        raise UserError(f"--processes is {processes}, but this job has {nodes} nodes: give a multiple of {nodes}.")
    if nodes > 1 and slots > 1:
        raise UserError(f"--slots is {slots}, but on {nodes} nodes one run takes the whole job: leave it out.")


def in_processes(command: Sequence[str], processes: int) -> tuple[list[str], dict[str, str]]:
    """Return the command that starts a training in several processes, and what its environment needs beside.

    Within a SLURM job of several nodes srun starts them, on all of these, so that its signals reach each once; else
    torchrun does, on this machine.

    Args:
        command: the training's: Python, the script, its flags.
        processes: how many; see check_processes().
    """
    if processes == 1:
        return list(command), {}
    if nodes_of_job() == 1:
        start = [command[0], "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        return [*start, *command[1:]], {}
    nodes = nodes_of_job()
    share = [f"--nodes={nodes}", f"--ntasks={processes}", f"--ntasks-per-node={processes // nodes}"]
    with socket.socket() as server:  # the batch script, and so this, runs on the first node
        server.bind(("", 0))
        port = server.getsockname()[1]
    meeting = {"MASTER_ADDR": _first_address(), "MASTER_PORT": str(port)}
    return ["srun", *share, "--kill-on-bad-exit=1", *command], meeting


def _first_address() -> str:
    """Return the network address of the job's first node."""
    names = _call("scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).split()
    found = re.search(r"NodeAddr=(\S+)", _call("scontrol", "show", "node", names[0]))
    return found[1] if found else names[0]


def _most_jobs() -> int:
    """Return the length of the longest array that the cluster takes."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", _call("scontrol", "show", "config"), re.MULTILINE)
    return int(found[1]) if found else sys.maxsize


def _call(*command: str) -> str:
    """Return what a command of SLURM prints."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        raise UserError(f"there is no {command[0]} here: run this on a cluster's login node, or use run.") from None
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        said = "; ".join(line.removeprefix(f"{command[0]}: ").removeprefix("error: ") for line in lines).rstrip(".")
        way = "mend --sbatch" if command[0] == "sbatch" else "run this where a cluster answers"
        raise UserError(f"{command[0]}: {said}: {way}, or ask your cluster's administrators.")
    return done.stdout.strip()
