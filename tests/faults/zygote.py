"""Import everything once, then fork a process for each run that standard input asks for (POSIX alone).

A line of JSON asks for a run: its script, arguments, the file for its output and the file that tells its phase. The
answer is two lines: the process's id when it starts, its exit status when it ends.
"""

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from sdcl import checkpoints
from sdcl.networks import resnet, unet, vnet
from sdcl.runs.config import run_script
from sdcl.scoring import report

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = {"acdc": "ACDC_train.py", "la": "LA_train.py", "pancreas": "pancreas/Pancreas_train.py"}
NARROW = (4, 8, 16, 32, 64)  # a quarter of the networks' widths, so that a run takes seconds


def load(path: Path):
    """Import a script as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def traced(function: Callable, phase: bytes, file: int) -> Callable:
    """Return the function, which notes when it begins and ends."""

    def noting(*args, **kwargs):
        os.write(file, phase)
        try:
            return function(*args, **kwargs)
        finally:
            os.write(file, b"t")

    return noting


def run(script, request: dict) -> int:
    """Do one run in this process and return its exit status."""
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    phases = os.open(request["phases"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    checkpoints.save = traced(checkpoints.save, b"s", phases)
    report.evaluate = traced(report.evaluate, b"v", phases)
    sys.argv = [request["script"], *request["arguments"]]
    try:
        run_script(script.main, script.Config)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return 1 if isinstance(end.code, str) else end.code or 0
    return 0


def main() -> None:
    """Serve until standard input ends."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(False)  # imports what the scripts would
    vnet.WIDTHS = resnet.WIDTHS = unet.WIDTHS = NARROW
    scripts = {name: load(ROOT / "code" / path) for name, path in SCRIPTS.items()}
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            status = 99
            try:
                status = run(scripts[request["script"]], request)
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
