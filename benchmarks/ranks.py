"""A self-training step in one process or several, on random data: time, bytes sent, share of the time spent waiting.

`python benchmarks/ranks.py`, and `torchrun --standalone --nproc_per_node 2 benchmarks/ranks.py` beside it.
"""

import dataclasses
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "code"))  # this checkout's code, whichever is installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from cases import ACDC, LA
from torch import distributed as dist

from sdcl import ranks
from sdcl.methods import get
from sdcl.mixing import box_size, copy_paste_mask
from sdcl.networks import build_network
from sdcl.runs.config import run_script
from sdcl.runs.devices import keep_freed_memory, place
from sdcl.runs.distribution import check_share, is_first, join
from sdcl.steps import add_teacher, make_learners


@dataclass
class Config:
    """Time a step of SDCL; the batch is the whole one, which the processes share."""

    data_set: Literal["acdc", "la"] = "acdc"  # whose networks and settings
    shape: tuple[int, ...] = ()  # spatial size; empty: the published one
    batch_size: int | None = None  # None: the published one
    precision: Literal["fp32", "bf16"] = "fp32"  # of the networks
    repeats: int = 4  # steps that are timed, after one that is not


class Sent:
    """Counts what the collectives of a process send and how long it is in them."""

    def __init__(self) -> None:
        self.seconds = self.calls = self.bytes = 0

    def wrap(self, name: str, payload: int) -> None:
        """Count a collective of torch.distributed, whose tensor is its argument of that place."""
        function = getattr(dist, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds += time.perf_counter() - begin
            self.bytes += args[payload].numel() * args[payload].element_size()
            self.calls += 1
            return result

        setattr(dist, name, counted)


def main(config: Config) -> None:
    """Print one line of JSON."""
    join("cpu")
    keep_freed_memory()
    work = ACDC if config.data_set == "acdc" else LA
    shape, size = config.shape or work.shape, config.batch_size or work.batch_size
    check_share(size)
    torch.manual_seed(0)
    students = [place(build_network(name, work.classes), torch.device("cpu")) for name in work.networks]
    learners = make_learners(*students, 1e-3)
    add_teacher(learners)
    for network in learners.networks.values():
        network.train()
    settings = dataclasses.replace(work, shape=tuple(shape), precision=config.precision)
    batch = {k: torch.randn(size // ranks.count(), 1, *shape) for k in ("x_a", "x_b", "u_a", "u_b")}
    batch |= {k: torch.randint(2, (size // ranks.count(), *shape), dtype=torch.uint8) for k in ("y_a", "y_b")}
    sent, seconds = Sent(), []
    for name, payload in (("all_reduce", 0), ("all_gather", 1)):
        sent.wrap(name, payload)
    for repeat in range(config.repeats + 1):
        if repeat == 1:
            sent.seconds = sent.calls = sent.bytes = 0
        mask = copy_paste_mask(shape, box_size(shape, 2 / 3))
        begin = time.perf_counter()
        get("sdcl").self_train_step(learners, batch, mask, settings)
        seconds.append(time.perf_counter() - begin)
    if is_first():
        median = float(np.median(seconds[1:]))
        print(json.dumps({
            "data_set": config.data_set, "shape": shape, "batch_size": size, "precision": config.precision,
            "processes": ranks.count(), "threads": torch.get_num_threads(), "seconds": round(median, 3),
            "MiB_given_a_step": round(sent.bytes / config.repeats / 2**20, 1),
            "collectives_a_step": sent.calls // config.repeats,
            "waiting": round(sent.seconds / sum(seconds[1:]), 3),
        }))  # fmt: skip


if __name__ == "__main__":
    run_script(main, Config)
