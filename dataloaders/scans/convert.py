"""What the preprocessing scripts share: cases in parallel, files that appear only when complete, their provenance."""

import glob
import io
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import nibabel
import numpy as np
from tqdm import tqdm

from dataloaders.datasets import SLICE
from dataloaders.scans.preprocessing import Box, Prepared, Preprocessing
from dataloaders.scans.sources import change_since, fingerprint
from sdcl.runs.atomic import replacing, temporary_of
from sdcl.runs.errors import UserError
from sdcl.runs.folder import LOGGER, start_logging
from sdcl.runs.written_files import check_replaceable, remove_written

FORMAT_VERSION = 1
FEW = 5  # names that a message gives before it says only how many more there are


@dataclass(frozen=True)
class Job:
    """One case to convert.

    Attributes:
        name: of the case.
        targets: the files that make it finished, the last one written last.
        run: writes them.
        images: the raw image that they are made of, or its channels.
        label: the raw label, or None.
        made_by: attributes that say how they are made; a file that has others is made again.
    """

    name: str
    targets: Sequence[Path]
    run: Callable[[], None]
    images: tuple[Path, ...]
    label: Path | None = None
    made_by: Mapping[str, str] = field(default_factory=dict)


def convert(jobs: Sequence[Job], workers: int, overwrite: bool, there: Iterable[Path] = ()) -> None:
    """Convert cases in parallel; those whose files are there, made of the same sources in the same way, are skipped.

    Args:
        jobs: the cases.
        workers: cases at a time.
        overwrite: convert those that are there, too.
        there: converted files; of which those are told that no case gives any longer, since they stay.

    Raises:
        UserError: some cases failed; every other one is finished, and each failure was printed.
    """
    start_logging()
    if workers < 1:
        raise UserError(f"--workers is {workers}: it must be above 0.")
    given = {target.resolve() for job in jobs for target in job.targets}
    others = sorted(str(path) for path in there if SLICE not in path.name and path.resolve() not in given)
    if others:
        LOGGER.info("converted earlier, not among the raw cases now, and left as they are: %s", few(others))
    waiting = list(jobs) if overwrite else _waiting(jobs, workers)
    if len(waiting) < len(jobs):
        LOGGER.info(
            "%d of %d cases are there already (--overwrite converts them again)", len(jobs) - len(waiting), len(jobs)
        )
    check_replaceable(*(target for job in waiting for target in job.targets))
    for job in waiting:
        for target in job.targets:
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary_of(target).unlink(missing_ok=True)  # left by a run that was killed
    failures = []
    is_main = threading.current_thread() is threading.main_thread()
    earlier = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number)) if is_main else None
    pool = ThreadPoolExecutor(workers, thread_name_prefix="convert")
    try:
        futures = {pool.submit(job.run): job for job in waiting}
        for future in tqdm(as_completed(futures), total=len(futures), unit="case", dynamic_ncols=True, disable=None):
            if isinstance(future.exception(), UserError):
                failures.append(str(future.exception()))
                LOGGER.info("%s: %s", futures[future].name, failures[-1])
            else:
                future.result()
    finally:
        pool.shutdown(cancel_futures=True)  # what has begun is finished
        if is_main:
            signal.signal(signal.SIGTERM, earlier)
    LOGGER.info("%d cases converted", len(waiting) - len(failures))
    if failures:
        raise UserError(
            f"{len(failures)} of {len(waiting)} cases were refused, the first: {failures[0]} The others are "
            "finished; when these are mended or moved away, give the same command again."
        )


def check_trust(trust: Sequence[str], names: Iterable[str]) -> None:
    """Refuse `--trust` of what is no labelled case, such as a misspelt name.

    Raises:
        UserError: names it.
    """
    names = set(names)
    unknown = next((name for name in trust if name != "all" and name not in names), None)
    if unknown is not None:
        raise UserError(f"--trust names {unknown}, which is no labelled case: give {few(sorted(names))}, or all.")


def few(names: Iterable[str]) -> str:
    """Name some things, and how many more there are."""
    names = list(names)
    return ", ".join(names[:FEW]) + (f" and {len(names) - FEW} more" if len(names) > FEW else "")


def _waiting(jobs: Sequence[Job], workers: int) -> list[Job]:
    """Return the jobs whose files are missing, or no longer what would be made; say which are made again, and why."""

    def reason(job: Job) -> str:
        if not all(target.exists() for target in job.targets):
            return "missing"
        return change_since(job.targets[-1], job.images, job.label, job.made_by)

    with ThreadPoolExecutor(workers) as pool:
        reasons = list(pool.map(reason, jobs))
    names: dict[str, list[str]] = {}
    for job, why in zip(jobs, reasons, strict=True):
        names.setdefault(why, []).append(job.name)
    for why in sorted(set(names) - {"", "missing", "unknown"}):
        LOGGER.info("%s changed since the conversion of %s: made again", why, few(names[why]))
    if "unknown" in names:
        LOGGER.info(
            "of what these files were made they do not say, and they stay (--overwrite makes them again): %s",
            few(names["unknown"]),
        )
    return [job for job, why in zip(jobs, reasons, strict=True) if why not in ("", "unknown")]


def write_case(
    path: Path, image: np.ndarray, label: np.ndarray | None, attributes: Mapping[str, Any] | None = None
) -> None:
    """Write one HDF5 file that appears only when complete.

    Args:
        path: the file; its folder is made.
        image: (*S), written as float32.
        label: (*S), written as uint8; None: the file holds none.
        attributes: of the file.

    Raises:
        UserError: the image holds nan or infinite values, which no script would take.
    """
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite and is refused
        image = image.astype(np.float32, copy=False)
    if not np.isfinite(image).all():
        raise UserError(f"{path} would hold nan or infinite values and is not written: look at the scan's own values.")
    memory = io.BytesIO()
    with h5py.File(memory, "w") as file:
        file.create_dataset("image", data=image, compression="gzip", shuffle=True)
        if label is not None:
            file.create_dataset("label", data=label.astype(np.uint8, copy=False), compression="gzip")
        file.attrs.update(attributes or {})
    with replacing(path, any_content=True) as temporary:
        temporary.write_bytes(memory.getvalue())  # made in memory, so that a kill seldom finds it half-written


def write_slices(
    root_path: Path, name: str, image: np.ndarray, label: np.ndarray | None, attributes: Mapping[str, Any]
) -> None:
    """Write a case's single slices, then its volume, into a data set's data/.

    Args:
        root_path: the data set's folder.
        name: of the case.
        image: (D, H, W), or (channels, D, H, W) of several.
        label: (D, H, W), or None.
        attributes: from provenance(); the slices get those that do not speak of the volume.
    """
    folder = root_path / "data" / "slices"
    volume = root_path / "data" / f"{name}.h5"
    earlier = sorted(folder.glob(f"{glob.escape(name)}{SLICE}*.h5"))  # left by a conversion that gave more slices
    check_replaceable(volume, *earlier)
    remove_written(volume)  # it says that its slices are complete
    for path in earlier:
        remove_written(path)
    kept = ("source", "label_source", "orientation", "rule", "preprocessing", "version")
    of_slices = {key: attributes[key] for key in kept} | ({"hu": attributes["hu"]} if "hu" in attributes else {})
    for k, picture in enumerate(image if image.ndim == 3 else image.swapaxes(0, 1), start=1):
        write_case(folder / f"{name}{SLICE}{k}.h5", picture, None if label is None else label[k - 1], of_slices)
    write_case(volume, image, label, attributes)


@dataclass(frozen=True)
class Origin:
    """Where a case comes from.

    Attributes:
        rule: by which a script made it.
        raw: the folder that image and label lie in, somewhere.
        images: the raw image, or its channels.
        label: the raw label, where there is one.
    """

    rule: str
    raw: Path
    images: tuple[Path, ...]
    label: Path | None


def provenance(case: Prepared, how: Preprocessing, origin: Origin, box: Box | None = None) -> dict[str, Any]:
    """Return the attributes that say where a file comes from and where its voxels lie.

    Args:
        case: the preprocessed image, cropped.
        how: what was done to it.
        origin: of what it was made.
        box: what was cropped out of the preprocessed scan.
    """
    steps = case.affine[:3, :3]
    sides = np.linalg.norm(steps, axis=0)
    return {
        "source": ", ".join(_relative(image, origin.raw) for image in origin.images),
        "label_source": "" if origin.label is None else _relative(origin.label, origin.raw),
        "source_fingerprint": fingerprint(*origin.images),
        "label_fingerprint": fingerprint(*([] if origin.label is None else [origin.label])),
        "spacing": sides,  # mm, along the array's axes
        "origin": case.affine[:3, 3],  # mm, RAS+: of the first voxel's centre
        "direction": (steps / sides).ravel(),  # row by row; column k is where the array's axis k points, RAS+
        "orientation": "".join(nibabel.aff2axcodes(case.affine)),
        "crop_box": np.ravel(box if box is not None else [(0, side) for side in case.shape]),
        "rule": origin.rule,
        "preprocessing": how.to_json(),
        "version": FORMAT_VERSION,
    }


def _relative(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.name
