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

ROOT = Path(__file__).resolve().parents[1]
COUNTING = ROOT / "tests" / "fake_gpu"  # the step on tensors of a GPU that is not there
STEPS = {"2D": ("unet", "resunet"), "3D": ("vnet", "resvnet")}
GOAL = 0.15  # at most so many beside the networks' own, as a share of these


def launch_rows() -> Iterator[dict[str, Any]]:
    """Count both steps, in fp32: each mix's passes of both students, the teacher's two, and all that is beside them."""
    if shutil.which(os.environ.get("CXX", "c++")) is None or shutil.which("ninja") is None:
        yield {"case": "launches", "not_measured": "no C++ compiler, or no ninja"}
        return
    counted = _counted()
    for dimensions, (student_a, student_b) in STEPS.items():
        once = {
            f"{name} {way}": sum(counted[f"{name} fp32 train {way}"].values())
            for name in (student_a, student_b)
            for way in ("forward", "backward")
        }
        own = 2 * sum(once.values()) + 2 * once[f"{student_a} forward"]
        step = sum(counted[f"sdcl {dimensions} fp32 self_train"].values())
        yield {"case": f"launches {dimensions} fp32", "step": step, "networks": own, "beside": step / own - 1}


def _counted() -> dict[str, dict[str, int]]:
    """Build the stub of a GPU's driver, run the real step on it, and return what was counted, by pass and kernel."""
    path = os.pathsep.join([str(ROOT / "code"), str(ROOT), str(ROOT / "tests")])
    with tempfile.TemporaryDirectory() as folder:
        build = (
            "from torch.utils import cpp_extension; cpp_extension.load('fake_device', "
            f"[{str(COUNTING / 'device.cpp')!r}], build_directory={folder!r}, is_python_module=False)"
        )
        for arguments in (("-c", build), (COUNTING / "checks.py", next_library)):
            words = [str(a(Path(folder)) if callable(a) else a) for a in arguments]
            done = subprocess.run(
                [sys.executable, "-W", "ignore", *words], env=os.environ | {"PYTHONPATH": path}, check=True,
                capture_output=True, encoding="utf-8",
            )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def next_library(folder: Path) -> Path:
    """Return the stub that was built into a folder."""
    return next(folder.glob("fake_device*.so"))


def launch_line(row: dict[str, Any]) -> str:
    """Show a row as text."""
    if "not_measured" in row:
        return f"{row['case']:36s} not measured: {row['not_measured']}"
    return (
        f"{row['case']:36s} {row['step']:,} kernels a step, {row['networks']:,} of them the networks' own: "
        f"{row['beside']:.0%} beside them (goal {GOAL:.0%})"
    )
