"""The learning rate, a function of the iteration's number alone: constant, as published, or falling to 0."""

import math
from typing import Literal

Schedule = Literal["constant", "linear", "cosine"]


def share(iteration: int, length: int, schedule: Schedule, warmup: int) -> float:
    """Return what share of --base_lr an iteration of a stage trains with.

    Args:
        iteration: t, from 1.
        length: T, the stage's iterations.
        schedule: "constant"; "linear" or "cosine", which fall over what follows the warm-up, to 0 behind the end.
        warmup: W, iterations over which the rate rises, from 1 / (W + 1).

    Returns:
        t / (W + 1) while t <= W; then 1, 1 - x or (1 + cos(pi x)) / 2, where x = (t - W - 1) / (T - W).

    Source: Loshchilov and Hutter, ICLR 2017 (the cosine); Goyal et al., arXiv 1706.02677 (the warm-up).
    """
    if iteration <= warmup:
        return iteration / (warmup + 1)
    if schedule == "constant":
        return 1.0
    done = (iteration - warmup - 1) / (length - warmup)
    return 1 - done if schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
