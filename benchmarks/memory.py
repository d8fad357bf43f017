"""What a large scan takes: the memory of a prediction and of a test, and the time that windows of air save."""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "code"))  # each measurement runs this file by itself
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import nibabel
import numpy as np
import torch
from torch import nn

from sdcl.inference import Slabs, Windows, window_slabs
from sdcl.networks import build_network
from sdcl.runs.devices import keep_freed_memory
from sdcl.scoring.evaluation import Case, Predictors, Task, evaluate
from sdcl.training import peak_memory_gib

SCAN = {False: (512, 512, 400), True: (128, 128, 96)}  # voxels of 1 mm; True: quick
VOLUME = {False: (512, 512, 300), True: (128, 128, 75)}
WINDOW = {False: 96, True: 32}  # of the test; the prediction's are 32 always
CLASSES = 14
# Of four networks: each student's and the mean's best and last.
MEMBERS = {
    "a, best": (0,),
    "b, best": (1,),
    "mean, best": (0, 1),
    "a, last": (2,),
    "b, last": (3,),
    "mean, last": (2, 3),
}


def memory_rows(quick: bool) -> list[dict[str, Any]]:
    """Measure a prediction with and without --skip_air, and a test of six predictors, each in a process of its own.

    Args:
        quick: of smaller scans.

    Returns:
        A row each: the process's peak in GiB, its seconds, and of the prediction the ratio of both ways' time.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_scan(Path(folder, "scans", "ct.nii.gz"), SCAN[quick])
        write_run(Path(folder, "run"))
        ours, without = (_measured("predict", folder, flag) for flag in ("--skip_air", "--no-skip_air"))
    ours |= {"case": f"predict {_times(SCAN[quick])}, 2 classes", "without_seconds": without["seconds"]}
    scored = _measured("score", str(int(quick)), "")
    scored["case"] = f"score {_times(VOLUME[quick])}, {CLASSES} classes, {len(MEMBERS)} predictors"
    return [ours | {"ratio": without["seconds"] / ours["seconds"]}, scored]


def memory_line(row: dict[str, Any]) -> str:
    """Show a row as text."""
    text = f"{row['case']:52s} peak {row['memory_gib']:.2f} GiB, {row['seconds']:.1f} s"
    if "ratio" in row:
        text += f", without --skip_air {row['without_seconds']:.1f} s, ratio {row['ratio']:.2f}"
    return text


def write_scan(path: Path, shape: tuple[int, ...]) -> None:
    """Write a synthetic CT: a body of soft tissue with an organ in it, and air round it, both with noise."""
    rng, (width, depth, height) = np.random.default_rng(0), shape
    x, y = np.ogrid[:width, :depth]
    body = ((x / width - 0.5) / 0.37) ** 2 + ((y / depth - 0.5) / 0.25) ** 2 < 1
    scan = np.empty(shape, np.int16, order="F")
    for k in range(height):
        organ = ((x / width - 0.4) / 0.1) ** 2 + ((y / depth - 0.5) / 0.08) ** 2 + ((k / height - 0.5) / 0.2) ** 2 < 1
        noise = rng.standard_normal((width, depth), np.float32)
        scan[:, :, k] = np.where(body, 40 + 80 * organ + 15 * noise, -1000 + 8 * noise)
    image = nibabel.Nifti1Image(scan, np.diag([-1.0, -1.0, 1.0, 1.0]))
    image.header.set_xyzt_units("mm")
    path.parent.mkdir()
    nibabel.save(image, path)


def write_run(folder: Path) -> None:
    """Write the folder of a run of untrained networks, windows of 32 voxels."""
    settings = {"student_a": "vnet", "student_b": "resvnet", "select": "last", "labelnum": 1, "patch_size": [32] * 3}
    how = {"normalise": "ct", "orientation": "LPS", "spacing_mm": [1.0] * 3}
    task = {"name": "mine", "class_names": ["organ"], "decision_rule": "argmax", "trained_on_crops": False}
    torch.manual_seed(0)
    networks = {f"student_{k}": build_network(name, 2).state_dict() for k, name in (("a", "vnet"), ("b", "resvnet"))}
    (folder / "self_train").mkdir(parents=True)
    torch.save({"networks": networks}, folder / "self_train" / "last.pth")
    (folder / "config.json").write_text(json.dumps({"config": settings, "task": task | {"preprocessing": how}}))


class Levels(nn.Module):
    """A network that takes an image's level for the class, and one that needs no time: volumes are what is measured."""

    def __init__(self, shift: float):
        super().__init__()
        self.classes = nn.Parameter(torch.arange(CLASSES).view(1, -1, 1, 1, 1) + shift)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, 1, *S) to logits (N, C, *S)."""
        return -((x - self.classes) ** 2)


def score(quick: bool) -> None:
    """Test six predictors of four networks on one volume of 13 balls."""
    shape, rng = VOLUME[quick], np.random.default_rng(0)
    label = np.zeros(shape, np.uint8)
    for c in range(1, CLASSES):
        centre, radius = [rng.integers(side // 5, side - side // 5) for side in shape], min(shape) // 8
        box = tuple(slice(max(0, m - radius), m + radius) for m in centre)
        places = np.ogrid[tuple(slice(part.start, min(part.stop, side)) for part, side in zip(box, shape, strict=True))]
        label[box][sum((place - m) ** 2 for place, m in zip(places, centre, strict=True)) < radius**2] = c
    image = label.astype(np.float32)
    image += 0.1 * rng.standard_normal(shape, np.float32)
    side = WINDOW[quick]

    def infer(networks: list[nn.Module], volume: np.ndarray) -> Slabs:
        return window_slabs(networks, volume, Windows((side,) * 3, (side // 2,) * 3, CLASSES))

    networks = [Levels(shift) for shift in (0.0, 0.1, 0.2, 0.3)]
    task = Task("t", [str(c) for c in range(1, CLASSES)], infer)
    evaluate(Predictors(networks, MEMBERS), [Case("c", image, label, (1.0,) * 3)], task)


def _measured(what: str, *given: str) -> dict[str, Any]:
    """Run one measurement in a process of its own and return its seconds and peak."""
    command = [sys.executable, __file__, what, *given]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def main() -> None:
    """Do what the command line names, and print the seconds that it took and the process's peak as JSON."""
    what, where, flag = sys.argv[1:]
    begin = time.perf_counter()
    if what == "score":
        keep_freed_memory()  # as the scripts do
        score(where == "1")
    else:
        import predict
        from sdcl.runs.config import parse

        paths = ["--run", f"{where}/run", "--input", f"{where}/scans", "--output", f"{where}/out"]
        predict.main(parse(predict.Config, [*paths, flag]))
    print(json.dumps({"seconds": time.perf_counter() - begin, "memory_gib": peak_memory_gib()}))


if __name__ == "__main__":
    main()
