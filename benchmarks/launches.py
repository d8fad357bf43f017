"""Kernels that a self-training step would launch on a GPU, beside those of its networks' own passes; needs no GPU."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
COUNTING = ROOT / "tests" / "fake_gpu"  # the step on tensors of a GPU that is not there
STEPS = {"2D": ("unet", "resunet"), "3D": ("vnet", "resvnet")}
GOAL = 0.15  # at most so many beside the networks' own, as a share of these


def launch_rows() -> Iterator[dict[str, Any]]:
    """Count both steps, in fp32: each mix's passes of both students, the teacher's two, and all that is beside them."""
    if missing := lacking():
        yield {"case": "launches", "not_measured": missing}
        return
    with tempfile.TemporaryDirectory() as folder:
        counted = count(build_device(Path(folder)))
    for dimensions, (student_a, student_b) in STEPS.items():
        once = {
            f"{name} {way}": sum(counted[f"{name} fp32 train {way}"].values())
            for name in (student_a, student_b)
            for way in ("forward", "backward")
        }
        own = 2 * sum(once.values()) + 2 * once[f"{student_a} forward"]
        step = sum(counted[f"sdcl {dimensions} fp32 self_train"].values())
        yield {"case": f"launches {dimensions} fp32", "step": step, "networks": own, "beside": step / own - 1}


def lacking() -> str:
    """Say what build_device() and count() would need that is not there; nothing is lacking: an empty text."""
    if torch.backends.cuda.is_built():  # as PyPI's is on Linux
        return (
            "this PyTorch is built for CUDA, whose driver leaves the stub no place; one built for CPUs counts the same"
        )
    if shutil.which(os.environ.get("CXX", "c++")) is None or shutil.which("ninja") is None:
        return "no C++ compiler, or no ninja"
    return ""


def run_python(*arguments: Any) -> subprocess.CompletedProcess[str]:
    """Run Python on this checkout's code in a process of its own, to its end."""
    path = os.pathsep.join([str(ROOT / "code"), str(ROOT), str(ROOT / "tests")])
    return subprocess.run(
        [sys.executable, *map(str, arguments)], env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True, encoding="utf-8", errors="replace", timeout=300,
    )  # fmt: skip


def build_device(folder: Path) -> Path:
    """Build the stub of a GPU's driver in a folder.

    Raises:
        RuntimeError: the compiler failed; with what it said.
    """
    done = run_python(
        "-c",
        "from torch.utils import cpp_extension; cpp_extension.load('fake_device', "
        f"[{str(COUNTING / 'device.cpp')!r}], build_directory={str(folder)!r}, is_python_module=False)",
    )
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    return next(folder.glob("fake_device*.so"))


def count(device: Path) -> dict[str, Any]:
    """Run the real code on the stub, and return what was counted: of each pass and step its kernels.

    Raises:
        RuntimeError: a check failed; with what it said.
    """
    done = run_python(COUNTING / "checks.py", device)
    if done.returncode:
        raise RuntimeError(done.stderr[-5000:])
    return json.loads(done.stdout.splitlines()[-1])


def launch_line(row: dict[str, Any]) -> str:
    """Show a row as text."""
    if "not_measured" in row:
        return f"{row['case']:36s} not measured: {row['not_measured']}"
    return (
        f"{row['case']:36s} {row['step']:,} kernels a step, {row['networks']:,} of them the networks' own: "
        f"{row['beside']:.0%} beside them (goal {GOAL:.0%})"
    )
