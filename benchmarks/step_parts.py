"""Where an iteration of self-training spends its time, on random data: `python benchmarks/step_parts.py`.

On a GPU without CUDA graphs, whose passes this could not tell apart.
"""

import dataclasses
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "code"))  # this checkout's code, whichever is installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from bench import matmul_peak, step_tflop
from cases import ACDC, LA, Work
from torch.profiler import ProfilerActivity, profile

from sdcl import steps
from sdcl.methods import get, sdcl
from sdcl.mixing import box_size, copy_paste_mask
from sdcl.networks import build_network
from sdcl.pseudo_labels import PendingLabels
from sdcl.runs.config import run_script
from sdcl.runs.devices import keep_freed_memory, place
from sdcl.training import peak_memory_gib

OPERATORS = 14  # that take most


@dataclass
class Config:
    """Time the parts of a step: medians over the repeats, the first one left out."""

    data_set: Literal["acdc", "la"] = "la"  # whose networks, sizes and settings
    shape: tuple[int, ...] = ()  # spatial size; empty: the published one
    batch_size: int | None = None  # None: the published one
    precision: Literal["fp32", "bf16"] = "fp32"  # of the networks
    optimiser: Literal["adam", "muon"] = "adam"  # of the students
    device: str = "cpu"  # or cuda
    repeats: int = 4  # steps that are timed, after one that is not


class Clock:
    """Adds up the time of the functions that it wraps, by name."""

    def __init__(self, device: str):
        self.device, self.seconds = device, defaultdict(float)

    def wrap(self, name: str, function: Callable) -> Callable:
        """Return the function, timed under a name."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = self.now()
            result = function(*args, **kwargs)
            self.seconds[name] += self.now() - begin
            return result

        return timed

    def now(self) -> float:
        """Return the time when all work so far is done."""
        if self.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter()


def main(config: Config) -> None:
    """Run the steps with each part wrapped in a clock, and print the table."""
    keep_freed_memory()
    work = {"acdc": ACDC, "la": LA}[config.data_set]
    shape, size = config.shape or work.shape, config.batch_size or work.batch_size
    work = dataclasses.replace(work, precision=config.precision, device=config.device, shape=shape, batch_size=size)
    torch.manual_seed(0)
    device = torch.device(config.device)
    students = (place(build_network(n, work.classes), device) for n in work.networks)
    learners = steps.make_learners(*students, 1e-3, optimiser=config.optimiser)
    steps.add_teacher(learners)
    batch = {key: torch.randn(size, 1, *shape) for key in ("x_a", "x_b", "u_a", "u_b")}
    batch |= {key: torch.randint(work.classes, (size, *shape), dtype=torch.uint8) for key in ("y_a", "y_b")}
    batch = {key: value.to(device) for key, value in batch.items()}
    mask = copy_paste_mask(shape, box_size(shape, 2 / 3)).to(device)

    rows = []
    for _ in range(config.repeats + 1):
        clock = Clock(config.device)
        with ExitStack() as stack:
            parts = {name: steps for name in ("PendingLabels", "mixed_losses", "update_teacher", "mix")}
            for name, module in (parts | {"discrepancy": sdcl}).items():
                stack.enter_context(mock.patch.object(module, name, clock.wrap(name, getattr(module, name))))
            waiting = clock.wrap("waiting for labels", PendingLabels.result)
            stack.enter_context(mock.patch.object(PendingLabels, "result", waiting))
            for role, network in learners.networks.items():
                stack.enter_context(
                    mock.patch.object(network, "forward", clock.wrap(f"{role} forward", network.forward))
                )
            for optimiser in learners.optimisers.values():
                stack.enter_context(mock.patch.object(optimiser, "step", clock.wrap("optimisers", optimiser.step)))
            backward = clock.wrap("backward", torch.Tensor.backward)
            stack.enter_context(mock.patch.object(torch.Tensor, "backward", backward))
            begin = clock.now()
            get("sdcl").self_train_step(learners, batch, mask, work)
            total = clock.now() - begin
        rows.append(dict(clock.seconds) | {"other": total - sum(clock.seconds.values()), "total": total})

    print(f"{config.data_set}, self-training, {'x'.join(map(str, shape))}, batch {size}, {config.precision}, "
          f"{config.device}, {torch.get_num_threads()} threads, torch {torch.__version__}; "
          f"median of {config.repeats}")  # fmt: skip
    for name in rows[-1]:
        values = [row[name] for row in rows[1:]]
        print(f"  {name:20s} {np.median(values):9.3f} s   ({min(values):.3f} to {max(values):.3f})")
    peak = torch.cuda.max_memory_reserved() / 2**30 if config.device != "cpu" else peak_memory_gib()
    print(f"  peak memory          {peak:9.2f} GiB")
    if config.device == "cpu":
        tell_operators(lambda: get("sdcl").self_train_step(learners, batch, mask, work), work)


def tell_operators(step: Callable[[], Any], work: Work) -> None:
    """Profile one more step, and print what its operators take and how near its convolutions come to the peak."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        step()
    seconds = {event.key: event.self_cpu_time_total / 1e6 for event in found.key_averages()}
    total = sum(seconds.values())
    print("operators, of one more step, in a profile:")
    for name in sorted(seconds, key=seconds.__getitem__, reverse=True)[:OPERATORS]:
        print(f"  {name:40s} {seconds[name]:9.3f} s   {seconds[name] / total:5.1%}")
    convolutions = sum(taken for name, taken in seconds.items() if "convolution" in name)
    peak, tflop = matmul_peak(torch.device("cpu"), work.precision), step_tflop(work)
    print(f"  the networks' {tflop:.2f} TFLOP: {tflop / convolutions / peak:.0%} of the peak of matrix products "
          f"({peak:.3f} TFLOP/s) in convolutions, {tflop / total / peak:.0%} in the step")  # fmt: skip


if __name__ == "__main__":
    run_script(main, Config)
