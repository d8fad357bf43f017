"""How fast batches are prepared: by a thread, and by several processes."""

import tempfile
import time
from typing import Any

import numpy as np

from dataloaders.cache import Decoding
from dataloaders.datasets import find_file
from dataloaders.files import read_list
from dataloaders.phantom import write_acdc
from dataloaders.slices import Slices
from dataloaders.streams import Order, Streams
from dataloaders.transforms import Augmentation

WORKERS = (1, 2, 4)
BATCHES, SIZE = 60, (256, 256)  # the published size; slices are as large as the real ones


def worker_rows(repeats: int) -> list[dict[str, Any]]:
    """Time ACDC's batches of self-training (4 times 12 slices) by a thread and by several processes, in turns.

    Args:
        repeats: that are counted, after one that is not.

    Returns:
        A row a number: its median batches a second, and the ratio to the thread's.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = write_acdc(folder, patients=(6, 1, 1), size=(216, 256), slices=10)
        names = [n for n in read_list(root / "data_split" / "train_slices.list") if find_file(root, n).exists()]
        how = Augmentation(SIZE)
        sets = [
            Slices(root, part, Decoding(4, is_labelled, 8.0), how)
            for part, is_labelled in ((names[:60], True), (names[60:], False))
        ]
        paces: dict[int, list[float]] = {workers: [] for workers in WORKERS}
        for _ in range(repeats + 1):
            for workers in WORKERS:
                streams = Streams(*sets, Order(12, 10, 10, seed=1, workers=workers, device="cpu"))
                batches = streams.batches(0, BATCHES + 10)
                for _ in range(10):  # while processes start
                    next(batches)
                begin = time.perf_counter()
                for _ in batches:
                    pass
                paces[workers].append(BATCHES / (time.perf_counter() - begin))
    medians = {workers: float(np.median(pace[1:])) for workers, pace in paces.items()}
    return [
        {"case": f"streams acdc, {workers} workers", "batches_per_second": pace, "ratio": pace / medians[1]}
        for workers, pace in medians.items()
    ]


def worker_line(row: dict[str, Any]) -> str:
    """Show a row as text."""
    return (
        f"{row['case']:36s} {row['batches_per_second']:9.1f} batches a second, ratio to the thread {row['ratio']:.2f}"
    )
