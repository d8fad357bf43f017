"""The first second: how long a script takes to answer what needs no training, beside `import torch` alone."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = str(ROOT / "code" / "ACDC_train.py")
IMPORT = [sys.executable, "-c", "import torch"]
ANSWERS = {
    "--help": ["--help"],
    "a wrong flag": ["--labelnun", "3"],
    "a wrong value": ["--precision", "bf17"],
    "a missing folder": ["--root_path", str(ROOT / "no such folder")],
}


def seconds(command: list[str]) -> float:
    """Run a command to its end and return the wall time in seconds."""
    begin = time.perf_counter()
    subprocess.run(command, capture_output=True)
    return time.perf_counter() - begin


def start_rows(repeats: int) -> list[dict[str, Any]]:
    """Time each answer and the import in turns, after one of each that is not counted.

    Args:
        repeats: times that each is run.

    Returns:
        A row an answer: its median, the import's and their ratio.
    """
    rows = []
    for name, arguments in ANSWERS.items():
        pairs = [(seconds([sys.executable, SCRIPT, *arguments]), seconds(IMPORT)) for _ in range(repeats + 1)][1:]
        ours, torch_alone = np.median(pairs, axis=0)
        row = {"case": f"start {name}", "seconds": float(ours), "import_torch_seconds": float(torch_alone)}
        rows.append(row | {"ratio": float(np.median([one / other for one, other in pairs]))})
    return rows


def start_line(row: dict[str, Any]) -> str:
    """Show a row as text."""
    return (
        f"{row['case']:36s} {row['seconds']:9.4f} s, `import torch` alone {row['import_torch_seconds']:.4f} s, "
        f"ratio {row['ratio']:.3f}"
    )
