"""Synthetic hearts, atria and pancreases in the file formats of the real data sets, for the demo and the tests.

`python dataloaders/phantom.py --dataset acdc --root_path demo/acdc` writes one set. The pictures imitate what makes the
real ones hard (neighbours of the same intensity, bias field, blur, noise), so that no intensity threshold solves them,
yet they are small enough to train on with a CPU.
"""

import string
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "code"))  # this checkout's code, whichever is installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sdcl.runs.config import run_script  # first: from here on Ctrl-C ends without a traceback

# isort: split
import nibabel
import numpy as np
from PIL import Image

from dataloaders.phantoms.anatomy import draw_atrium, draw_heart, draw_pancreas
from dataloaders.scans.convert import write_case
from sdcl.runs.atomic import replacing, write_text
from sdcl.runs.errors import UserError
from sdcl.runs.written_files import PHANTOM_MARKER, PHANTOM_TEXT

CASE_ALPHABET = [*string.ascii_uppercase, *string.digits]


@dataclass
class Config:
    """Write a synthetic data set in the real files' format, for the demo and for trying things out."""

    # Which data set's format; or raw files, as your own: nifti, channels (t1 and t2 of each scan), pictures (RGB).
    dataset: Literal["acdc", "la", "pancreas", "nifti", "channels", "pictures"]
    root_path: Path  # folder that receives data/ and data_split/, of raw files images/ and labels/
    seed: int = 0  # the same seed gives the same data


def write_acdc(
    root_path: Path | str,
    *,
    patients: tuple[int, int, int] = (12, 3, 3),
    labelled_patients: int = 2,
    size: tuple[int, int] = (72, 80),
    slices: int = 5,
    seed: int = 0,
) -> Path:
    """Write short-axis heart scans, two frames a patient, as volumes, single training slices and lists.

    Args:
        root_path: folder that receives `data/`, `data/slices/` and `data_split/*.list`.
        patients: how many for training, validation and test; they are numbered in this order.
        labelled_patients: how many of the training patients, from the first, have their slices in `train_lab.list`.
        size: height and width in pixels; each patient's differ from it by up to 2 pixels.
        slices: slices a volume, from base to apex.
        seed: any non-negative integer; patient k depends on `seed`, k, `size` and `slices` alone.

    Returns:
        `root_path`; images are float32 (slices, H, W) or (H, W), min-max to [0, 1] per volume, labels uint8 0 to 3.

    Raises:
        UserError: `root_path` holds data or lists that this module did not write.
        ValueError: more labelled than training patients.
    """
    train_patients, val_patients, _ = patients
    root = _claim(root_path, labelled_patients, train_patients)
    frames_of, slices_of = [], []
    for patient in range(sum(patients)):
        name = f"patient{patient + 1:03d}"
        volumes = draw_heart(_case_rng(seed, patient), size, slices)
        frames_of.append([f"{name}_frame{frame:02d}" for frame in (1, 2)])
        slices_of.append([f"{frame}_slice_{k + 1}" for frame in frames_of[-1] for k in range(slices)])
        for frame, (image, label) in zip(frames_of[-1], volumes, strict=True):
            write_case(root / "data" / f"{frame}.h5", image, label)
            for k in range(slices if patient < train_patients else 0):
                write_case(root / "data" / "slices" / f"{frame}_slice_{k + 1}.h5", image[k], label[k])
    first_test = train_patients + val_patients
    lists = {
        "train": frames_of[:train_patients],
        "val": frames_of[train_patients:first_test],
        "test": frames_of[first_test:],
        "train_slices": slices_of[:train_patients],
        "train_lab": slices_of[:labelled_patients],
        "train_unlab": slices_of[labelled_patients:train_patients],
    }
    _write_lists(root, ".list", {key: sum(names, []) for key, names in lists.items()})
    return root


def write_la(
    root_path: Path | str,
    *,
    cases: tuple[int, int] = (6, 2),
    labelled_cases: int = 2,
    size: tuple[int, int, int] = (56, 48, 40),
    classes: Literal[2, 3] = 2,
    seed: int = 0,
) -> Path:
    """Write left atria with their veins among other chambers, one folder a case, and lists.

    Args:
        root_path: folder that receives `data/2018LA_Seg_Training Set/<case>/mri_norm2.h5` and `data_split/*.txt`.
        cases: how many for training and for test.
        labelled_cases: how many of the training cases, from the first, `train_lab.txt` names.
        size: voxels along x, y and z.
        classes: 2 gives labels 0 and 1; 3 gives the veins label 2, for multi-class work in 3D.
        seed: any non-negative integer; case k (its name too) depends on `seed`, k, `size` and `classes` alone.

    Returns:
        `root_path`; images are float32 (X, Y, Z) of zero mean and unit variance, labels uint8.

    Raises:
        UserError: `root_path` holds data or lists that this module did not write.
        ValueError: more labelled than training cases.
    """

    def draw(rng: np.random.Generator, case: int) -> tuple[str, str, np.ndarray, np.ndarray]:
        name = "".join(rng.choice(CASE_ALPHABET, 20))
        return name, f"2018LA_Seg_Training Set/{name}/mri_norm2.h5", *draw_atrium(rng, size, classes)

    return _write_cases(root_path, cases, labelled_cases, seed, draw)


def write_pancreas(
    root_path: Path | str,
    *,
    cases: tuple[int, int] = (6, 2),
    labelled_cases: int = 2,
    size: tuple[int, int, int] = (56, 56, 48),
    seed: int = 0,
) -> Path:
    """Write pancreases among bowel and vessels, one file a case, and lists.

    Args:
        root_path: folder that receives `data/data0001.h5` and so on, and `data_split/*.txt`.
        train_cases, test_cases: how many cases each of the two has; training cases are numbered first.
        labelled_cases: how many of the training cases, from the first, `train_lab.txt` names.
        size: voxels along x, y and z.
        seed: any non-negative integer; case k depends on `seed`, k and `size` alone.

    Returns:
        `root_path`; images are float32 (X, Y, Z), [-125, 275] HU mapped to [0, 1], labels uint8 0 or 1.

    Raises:
        UserError: `root_path` holds data or lists that this module did not write.
        ValueError: more labelled than training cases.
    """

    def draw(rng: np.random.Generator, case: int) -> tuple[str, str, np.ndarray, np.ndarray]:
        name = f"data{case + 1:04d}"
        return name, f"{name}.h5", *draw_pancreas(rng, size)

    return _write_cases(root_path, cases, labelled_cases, seed, draw)


def write_nifti(
    root_path: Path | str,
    *,
    cases: int = 8,
    labelled_cases: int = 5,
    size: tuple[int, int, int] = (56, 48, 40),
    channels: tuple[str, ...] = (),
    seed: int = 0,
) -> Path:
    """Write atria as raw scans and labels in NIfTI, with voxels of 1.25 mm, as somebody's own data might be.

    Args:
        root_path: folder that receives `images/case_01.nii.gz` and so on, and `labels/` of the first ones.
        cases: how many there are.
        labelled_cases: how many of them have a label.
        size: voxels along x, y and z.
        channels: of several, each in a file of its name, `case_01_t1.nii.gz`; every second one is dark where the first
            is bright.
        seed: any non-negative integer; case k depends on `seed`, k and `size` alone.

    Returns:
        `root_path`; images are float32 (X, Y, Z), labels uint8 0 or 1.

    Raises:
        UserError: `root_path` holds files that this module did not write.
        ValueError: more labelled cases than cases.
    """
    root = _claim(root_path, labelled_cases, cases)
    affine = np.diag([-1.25, -1.25, 1.25, 1.0])
    for case in range(cases):
        image, label = draw_atrium(_case_rng(seed, case), size, 2)
        name = f"case_{case + 1:02d}"
        files = {f"images/{name}": image}
        if channels:
            files = {f"images/{name}_{c}": image if k % 2 == 0 else -image for k, c in enumerate(channels)}
        files |= {f"labels/{name}": label} if case < labelled_cases else {}
        for path, array in files.items():
            with replacing(root / f"{path}.nii.gz") as temporary:
                nibabel.save(nibabel.Nifti1Image(array, affine), temporary)
    return root


def write_pictures(
    root_path: Path | str, *, cases: int = 20, labelled_cases: int = 12, side: int = 64, seed: int = 0
) -> Path:
    """Write slices through atria as RGB pictures and palette masks, as somebody's own true 2D data might be.

    Args:
        root_path: folder that receives `images/case_01.png` and so on, and `labels/` of the first ones.
        cases: how many there are.
        labelled_cases: how many of them have a mask.
        side: of the pictures, in pixels.
        seed: any non-negative integer; case k depends on `seed`, k and `side` alone.

    Returns:
        `root_path`; pictures are RGB (side, side), masks hold 0 and 1.

    Raises:
        UserError: `root_path` holds files that this module did not write.
        ValueError: more labelled cases than cases.
    """
    root = _claim(root_path, labelled_cases, cases)
    for case in range(cases):
        image, label = draw_atrium(_case_rng(seed, case), (side, side, side // 2), 2)
        k = int(np.argmax(label.sum(axis=(0, 1))))
        grey = np.clip(255 * (image[:, :, k].T - image.min()) / np.ptp(image), 0, 255)
        colours = np.stack([grey, 0.6 * grey, 255 - grey], -1).round().astype(np.uint8)  # (side, side, 3)
        mask = Image.fromarray(label[:, :, k].T.copy(), "L")
        mask.putpalette([0, 0, 0, 214, 39, 40])
        for folder, picture in (("images", Image.fromarray(colours)), ("labels", mask))[: 1 + (case < labelled_cases)]:
            with replacing(root / folder / f"case_{case + 1:02d}.png") as temporary:
                picture.save(temporary)
    return root


def _case_rng(seed: int, case: int) -> np.random.Generator:
    """Return a case's own generator, so that no case depends on the others."""
    return np.random.default_rng(np.random.SeedSequence([seed, case]))


def _claim(root_path: Path | str, labelled: int, train: int) -> Path:
    """Check the split, mark the folder as synthetic, and refuse one that holds somebody's data or lists."""
    if not 0 <= labelled <= train:
        raise ValueError(f"{labelled} labelled of {train} training cases is not possible.")
    root = Path(root_path)
    # A link may lead to a folder of real data, so it counts; empty folders do not.
    found = (path for part in ("data", "data_split", "images", "labels") for path in (root / part).rglob("*"))
    taken = next((path for path in found if path.is_symlink() or not path.is_dir()), None)
    if taken and not (root / PHANTOM_MARKER).exists():
        raise UserError(f"{taken} is there already and is not synthetic; choose another --root_path.")
    write_text(root / PHANTOM_MARKER, f"{PHANTOM_TEXT}, which may overwrite it.\n")
    return root


def _write_cases(
    root_path: Path | str, cases: tuple[int, int], labelled: int, seed: int, draw: Callable[..., tuple]
) -> Path:
    """Write a 3D data set; `draw(rng, case)` gives a case's name, its file below `data`, image and label."""
    train = cases[0]
    root = _claim(root_path, labelled, train)
    names = []
    for case in range(sum(cases)):
        name, file, image, label = draw(_case_rng(seed, case), case)
        write_case(root / "data" / file, image, label)
        names.append(name)
    lists = {
        "train": names[:train],
        "train_lab": names[:labelled],
        "train_unlab": names[labelled:train],
        "test": names[train:],
    }
    _write_lists(root, ".txt", lists)
    return root


def _write_lists(root: Path, suffix: str, lists: dict[str, list[str]]) -> None:
    """Write each list as `data_split/<key><suffix>`, one name a line."""
    folder = root / "data_split"
    for key, names in lists.items():
        write_text(folder / f"{key}{suffix}", "".join(f"{name}\n" for name in names))


def main(config: Config) -> None:
    """Write the data set that the command line names and say so in one line."""
    if config.dataset in ("nifti", "channels", "pictures"):
        if config.dataset == "pictures":
            root = write_pictures(config.root_path, seed=config.seed)
        else:
            channels = ("t1", "t2") if config.dataset == "channels" else ()
            root = write_nifti(config.root_path, channels=channels, seed=config.seed)
        print(f"Wrote synthetic scans and labels (seed {config.seed}) to {root}/images and {root}/labels.")
        return
    write = {"acdc": write_acdc, "la": write_la, "pancreas": write_pancreas}[config.dataset]
    root = write(config.root_path, seed=config.seed)
    lists = [file for file in (root / "data_split").iterdir() if file.stem in ("train", "val", "test")]
    count = sum(len(file.read_text().splitlines()) for file in lists)
    print(f"Wrote {count} synthetic {config.dataset} volumes (seed {config.seed}) and their lists to {root}.")


if __name__ == "__main__":
    run_script(main, Config)
