"""What many cases cost: a start by content, the next start, and an iteration's batch, records and validation."""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from dataloaders import acdc, la
from dataloaders.cache import Cache, Cases, Decoding
from dataloaders.phantom import write_acdc, write_la
from dataloaders.slices import SliceData, Slices
from dataloaders.streams import Order, Streams
from dataloaders.transforms import Augmentation
from dataloaders.volumes import VolumeData
from sdcl.runs.folder import run_folder
from sdcl.runs.records import StageRecord
from sdcl.scoring.evaluation import Predictors, Task, evaluate

COUNTS, QUICK = (10, 1_000, 10_000), (10, 100, 1_000)  # cases; the first is what the others are compared with
SLICE_SIDE, VOLUME = (36, 40), (24, 20, 16)  # tiny, so that what is counted is not the arrays
ITERATIONS = 100  # that a cost is the mean of

Measured = Callable[[], float]  # seconds of one


def scale_rows(repeats: int, is_quick: bool = False) -> Iterator[dict[str, Any]]:
    """Time a start and an iteration's parts for few and many cases, copies of one phantom's.

    Args:
        repeats: that are counted, after one that is not; of a start one is measured.
        is_quick: a tenth of the cases.

    Yields:
        Of a start: seconds of the first, by content, and of the second; else seconds by the number of cases.
    """
    counts = QUICK if is_quick else COUNTS
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        slices, volumes = many_slices(root / "slices", counts[-1]), many_volumes(root / "volumes", counts[-1])
        for data in (SliceData(acdc.DATA_SET, _header(slices)), VolumeData(la.DATA_SET, _header(volumes))):
            yield {"case": f"scale start {data.name}, {counts[-1]} files"} | _starts(data)
        parts = {"batch": _batch, "shuffled batch": _shuffled, "validation a case": _validation, "records": _records}
        for name, prepare in parts.items():
            where = volumes if prepare is _validation else slices
            runs = {count: prepare(where, count) for count in counts}
            found: dict[int, list[float]] = {count: [] for count in counts}
            for _ in range(repeats + 1):
                for count, run in runs.items():  # in turns
                    found[count].append(run())
            yield {"case": f"scale {name}", "seconds": {n: float(np.median(s[1:])) for n, s in found.items()}}


def scale_line(row: dict[str, Any]) -> str:
    """Show a row as text."""
    if "first" in row:
        ratio = row["first"] / row["second"]
        return f"{row['case']:36s} {row['first']:9.2f} s, the second {row['second']:.2f} s, ratio {ratio:.1f}"
    least, *_ = row["seconds"].values()
    told = [f"{seconds:.6f} s with {n} ({seconds / least:.2f})" for n, seconds in row["seconds"].items()]
    return f"{row['case']:36s} {', '.join(told)}"


def many_slices(root: Path, count: int) -> Path:
    """Write ACDC's layout with so many training slices, copies of one, ten a patient."""
    write_acdc(root, patients=(1, 1, 1), labelled_patients=1, size=SLICE_SIDE, slices=2)
    content = next((root / "data" / "slices").iterdir()).read_bytes()
    names = [f"many{k // 10:05d}_frame01_slice_{k % 10 + 1}" for k in range(count)]
    for name in names:
        (root / "data" / "slices" / f"{name}.h5").write_bytes(content)
    (root / "data_split" / "train_slices.list").write_text("\n".join(names))
    return root


def many_volumes(root: Path, count: int) -> Path:
    """Write LA's layout with so many training volumes, copies of one."""
    write_la(root, cases=(2, 1), size=VOLUME)
    folder = root / "data" / la.FOLDER
    content = next(folder.rglob("*.h5")).read_bytes()
    names = [f"MANY{k:05d}" for k in range(count)]
    for name in names:
        (folder / name).mkdir()
        (folder / name / "mri_norm2.h5").write_bytes(content)
    (root / "data_split" / "train.txt").write_text("\n".join(names))
    return root


def _header(root: Path) -> SimpleNamespace:
    """Return what data ask of a training script's header."""
    return SimpleNamespace(
        root_path=root, models_path=root / "models", exp="scale", labelnum=2, select="test", val_cases=0,
        self_iterations=1, cache_gb=8.0, cache_dtype="float32", patch_size=(16, 16), unlabelled_crop="random",
        augment_probability=0.5, max_angle_deg=20, intensity=0.0, stride=(16, 16, 16), window_batch=4, precision="fp32",
        decision_rule="argmax", batch_size=4, labelled_repeat=10, unlabelled_repeat=10, seed=1, shuffle=False,
        workers=1, device="cpu",
    )  # fmt: skip


def _starts(data: SliceData | VolumeData) -> dict[str, float]:
    """Time what a start does with its data, without a record of an earlier one and with it."""
    config, found = data._config, {}
    folder = run_folder(config.models_path, data.name, config.exp, config.labelnum)
    for which in ("first", "second"):
        begin = time.perf_counter()
        data.check_root()
        given = data.training()
        folder.mkdir(parents=True, exist_ok=True)
        given.keep(folder)
        found[which] = time.perf_counter() - begin
    return found


def _batch(root: Path, count: int, is_shuffled: bool = False) -> Measured:
    names = (root / "data_split" / "train_slices.list").read_text().split()[:count]
    cases = Slices(root, names, Decoding(4, True, 8.0), Augmentation((16, 16)))
    streams = Streams(cases, cases, Order(4, 10, 10, seed=1, shuffle=is_shuffled, device="cpu"))
    first = iter(range(0, 10**9, ITERATIONS))

    def run() -> float:
        begin, start = time.perf_counter(), next(first)
        for iteration in range(start, start + ITERATIONS):
            streams.batch(iteration)
        return (time.perf_counter() - begin) / ITERATIONS

    return run


def _shuffled(root: Path, count: int) -> Measured:
    return _batch(root, count, is_shuffled=True)


def _validation(root: Path, count: int) -> Measured:
    names = (root / "data_split" / "train.txt").read_text().split()[:count]
    decoding = Decoding(2, True, 8.0, needs_geometry=True)
    cases = Cases(names, Cache([la.path_of(root, name) for name in names], "volumes", 3, decoding))
    half = np.full((2, *VOLUME), 0.5, np.float32)

    def infer(networks: Sequence[Any], volume: np.ndarray) -> Iterator[tuple[slice, list[np.ndarray]]]:
        yield slice(0, VOLUME[0]), [half]

    task, predictors = Task("la", ("LA",), infer), Predictors([None], {"student_a": (0,)}, 1)

    def run() -> float:
        begin = time.perf_counter()
        evaluate(predictors, cases, task, distances=False)
        return (time.perf_counter() - begin) / count

    return run


def _records(root: Path, count: int) -> Measured:
    """Return what times the records of an iteration after so many."""
    columns = ["iteration", *(f"loss_{k}" for k in range(8))]
    numbers = iter(range(count + 1, 10**9))
    record = StageRecord(root / f"records_{count}", columns, 1)
    record.add([dict.fromkeys(columns, number) for number in range(1, count + 1)])

    def run() -> float:
        begin = time.perf_counter()
        for _ in range(ITERATIONS):
            record.add([dict.fromkeys(columns, next(numbers))])
        return (time.perf_counter() - begin) / ITERATIONS

    return run
