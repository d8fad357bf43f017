"""ACDC: from the challenge's NIfTI files to HDF5: `python dataloaders/preprocess_acdc.py --raw <folder>`."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "code"))  # this checkout's code, whichever is installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sdcl.runs.config import run_script  # first: from here on Ctrl-C ends without a traceback

# isort: split
from dataloaders.acdc import DATA_SET
from dataloaders.scans.convert import Job, Origin, convert, few, provenance, write_slices
from dataloaders.scans.preprocessing import prepare, prepare_label
from dataloaders.scans.reading import aligned_label, label_by_index, read_label, read_scan
from sdcl.runs.errors import UserError
from sdcl.runs.folder import LOGGER, start_logging

ROOT = Path(__file__).resolve().parents[1]
PREPROCESSING = DATA_SET.preprocessing
RULE = "published"
FRAME = re.compile(r"(patient\d+)_frame(\d+)\.nii(\.gz)?")


@dataclass
class Config:
    """Convert the annotated frames of the ACDC challenge, patientXXX/patientXXX_frameYY.nii.gz and ..._gt.nii.gz."""

    raw: Path  # folder that holds the patients' folders, at any depth
    root_path: Path = ROOT / "Datasets" / "acdc"  # the data set's folder; its data/ receives the files
    by_index: bool = False  # lay labels on by index, whatever their headers say
    workers: int = 2  # patients' frames at a time
    overwrite: bool = False  # convert frames that are there, too


def convert_frame(image_path: Path, label_path: Path, name: str, config: Config) -> None:
    """Write one frame's single slices, then its volume, their axes as the challenge's own, however it is stored."""
    image, label = read_scan(image_path), read_label(label_path, DATA_SET.num_classes)
    on_image = label_by_index(image, label) if config.by_index else aligned_label(image, label)
    mask = prepare_label(on_image, image, PREPROCESSING)
    case = prepare(image, PREPROCESSING)
    attributes = provenance(case, PREPROCESSING, Origin(RULE, config.raw, (image_path,), label_path))
    write_slices(config.root_path, name, case.array, mask, attributes)


def frame_names(files: list[Path]) -> dict[str, Path]:
    """Name a patient's frames frame01 (end-diastole) and frame02 (end-systole), whatever number the raw files have.

    Args:
        files: the patient's annotated frames, in one folder.

    Returns:
        <patient>_frame01 and so on to the file: as the folder's Info.cfg says, else in the order of their numbers.

    Raises:
        UserError: Info.cfg names a frame that is not there.
    """
    number = {path: int(FRAME.fullmatch(path.name)[2]) for path in files}
    patient = FRAME.fullmatch(files[0].name)[1]
    info = files[0].parent / "Info.cfg"
    text = info.read_text(encoding="utf-8", errors="replace") if info.exists() else ""
    phases = {key: int(value) for key, value in re.findall(r"^\s*(ED|ES)\s*:\s*(\d+)\s*$", text, re.MULTILINE)}
    ranked = sorted(files, key=lambda path: (number[path] != phases.get("ED"), number[path]))
    missing = [frame for frame in phases.values() if frame not in number.values()]
    if missing:
        raise UserError(f"{files[0].parent} lacks {patient}_frame{missing[0]:02d}, which its Info.cfg names: copy it.")
    return {f"{patient}_frame{k:02d}": path for k, path in enumerate(ranked, start=1)}


def label_of(path: Path) -> Path:
    """Return the label's file of a frame's."""
    stem = path.name.split(".")[0]
    found = [p for s in (".nii.gz", ".nii") if (p := path.with_name(f"{stem}_gt{s}")).exists()]
    return found[0] if found else path.with_name(f"{stem}_gt.nii.gz")


def tell_guesses(patients: dict[Path, list[Path]], raw: Path) -> None:
    """Say where the order of the frames is a guess, and which labels have no frame."""
    guessed = [folder.name for folder in patients if not (folder / "Info.cfg").exists()]
    if guessed:
        LOGGER.info("no Info.cfg, so that the frame of the lower number counts as end-diastole: %s", few(guessed))
    labels = {label_of(path) for files in patients.values() for path in files}
    alone = [path.name for path in sorted(raw.glob("**/patient*_frame*_gt.nii*")) if path not in labels]
    if alone:
        LOGGER.info("labels without a frame, left out: %s", few(alone))


def main(config: Config) -> None:
    """Find the frames and convert them."""
    start_logging()
    patients: dict[Path, list[Path]] = {}
    for path in sorted(config.raw.glob("**/patient*_frame*.nii*")):
        if FRAME.fullmatch(path.name):
            patients.setdefault(path.parent, []).append(path)
    if not patients:
        raise UserError(
            f"--raw {config.raw} holds no patientXXX_frameYY.nii.gz at any depth: give the challenge's folder."
        )
    tell_guesses(patients, config.raw)
    jobs: dict[str, Job] = {}
    for files in patients.values():
        for name, image in frame_names(files).items():
            if name in jobs:
                raise UserError(f"--raw {config.raw} holds {name} twice, once in {image.parent}: remove one of them.")
            run = lambda i=image, n=name: convert_frame(i, label_of(i), n, config)  # noqa: E731
            made_by = {"rule": RULE, "preprocessing": PREPROCESSING.to_json()}
            jobs[name] = Job(name, [config.root_path / "data" / f"{name}.h5"], run, (image,), label_of(image), made_by)
    convert(list(jobs.values()), config.workers, config.overwrite, (config.root_path / "data").glob("*.h5"))


if __name__ == "__main__":
    run_script(main, Config)
