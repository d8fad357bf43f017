"""Where one iteration's time goes, part by part, in the real step on random data: `python benchmarks/step_parts.py`."""

import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal
from unittest import mock

import numpy as np
import torch

from sdcl import steps
from sdcl.config import keep_freed_memory, run_script
from sdcl.mixing import box_size, copy_paste_mask
from sdcl.networks import build_network
from sdcl.training import peak_memory_gib

SETTINGS = {
    "acdc": {"names": ("unet", "resunet"), "shape": (256, 256), "batch": 12, "classes": 4, "connectivity": 8,
             "pseudo_label_rule": "argmax", "dice": "batch", "pre_dice": "regions", "ema_buffers": True},
    "la": {"names": ("vnet", "resvnet"), "shape": (112, 112, 80), "batch": 2, "classes": 2, "connectivity": 26,
           "pseudo_label_rule": "threshold", "dice": "sample", "pre_dice": "whole", "ema_buffers": False},
}  # fmt: skip


@dataclass
class Config:
    """Time the parts of a step: medians over the repeats, the first one left out."""

    data_set: Literal["acdc", "la"] = "la"  # whose networks, sizes and settings
    stage: Literal["pre_train", "self_train"] = "self_train"  # which step
    shape: tuple[int, ...] = ()  # spatial size; empty: the published one
    batch_size: int = 0  # 0: the published one
    precision: Literal["fp32", "bf16"] = "fp32"  # of the networks
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


@dataclass
class Method:
    """What the steps read of a header, beside the data set's settings."""

    precision: str
    dice: str
    pre_dice: str
    pseudo_label_rule: str
    connectivity: int
    ema_buffers: bool
    u_weight: float = 0.5
    mse_weight: float = 0.5
    kl_weight: float = 0.05
    ema_decay: float = 0.99


def main(config: Config) -> None:
    """Run the steps with each part wrapped in a clock, and print the table."""
    keep_freed_memory()
    chosen = SETTINGS[config.data_set]
    shape, batch_size = config.shape or chosen["shape"], config.batch_size or chosen["batch"]
    keys = ("dice", "pre_dice", "pseudo_label_rule", "connectivity", "ema_buffers")
    method = Method(precision=config.precision, **{key: chosen[key] for key in keys})
    torch.manual_seed(0)
    learners = steps.make_learners(
        *(build_network(n, chosen["classes"]).to(config.device) for n in chosen["names"]), 1e-3
    )
    steps.add_teacher(learners)
    batch = {key: torch.randn(batch_size, 1, *shape) for key in ("x_a", "x_b", "u_a", "u_b")}
    batch |= {key: torch.randint(chosen["classes"], (batch_size, *shape), dtype=torch.uint8) for key in ("y_a", "y_b")}
    batch = {key: value.to(config.device) for key, value in batch.items()}
    mask = copy_paste_mask(shape, box_size(shape, 2 / 3)).to(config.device)
    step = {"pre_train": steps.pretrain_step, "self_train": steps.self_train_step}[config.stage]

    rows = []
    for _ in range(config.repeats + 1):
        clock = Clock(config.device)
        with ExitStack() as stack:
            for name in ("pseudo_label", "mixed_losses", "discrepancy", "update_teacher", "mix"):
                stack.enter_context(mock.patch.object(steps, name, clock.wrap(name, getattr(steps, name))))
            for role, network in learners.networks.items():
                stack.enter_context(
                    mock.patch.object(network, "forward", clock.wrap(f"{role} forward", network.forward))
                )
            for optimiser in learners.optimisers.values():
                stack.enter_context(mock.patch.object(optimiser, "step", clock.wrap("optimisers", optimiser.step)))
            backward = clock.wrap("backward", torch.Tensor.backward)
            stack.enter_context(mock.patch.object(torch.Tensor, "backward", backward))
            begin = clock.now()
            step(learners, batch, mask, method)
            total = clock.now() - begin
        rows.append(dict(clock.seconds) | {"other": total - sum(clock.seconds.values()), "total": total})

    print(f"{config.data_set} {config.stage} {'x'.join(map(str, shape))}, batch {batch_size}, {config.precision}, "
          f"{config.device}, {torch.get_num_threads()} threads, torch {torch.__version__}; "
          f"median of {config.repeats}")  # fmt: skip
    for name in rows[-1]:
        values = [row[name] for row in rows[1:]]
        print(f"  {name:20s} {np.median(values):9.3f} s   ({min(values):.3f} to {max(values):.3f})")
    peak = torch.cuda.max_memory_allocated() / 2**30 if config.device != "cpu" else peak_memory_gib()
    print(f"  peak memory          {peak:9.2f} GiB")


if __name__ == "__main__":
    run_script(main, Config)
