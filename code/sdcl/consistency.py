"""What consistency methods share: the ramp, the noise, and sure places."""

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sdcl.runs.config import ramp_length
from sdcl.steps import TEACHER, Learners, Settings
from sdcl.teacher import growing_decay, update_teacher

NOISE_BOUND = 2.0  # of the noise, in its standard deviations


def ramp(iteration: int, length: int) -> float:
    """Return exp(-5 (1 - min(t, T) / T)^2), the weight of what unlabelled images say, rising to 1.

    Args:
        iteration: t, iterations of self-training that are done.
        length: T; 0: the weight is 1 from the start.

    Source: Tarvainen and Valpola, NeurIPS 2017; docs/methods.md.
    """
    return math.exp(-5 * (1 - min(iteration, length) / length) ** 2) if length else 1.0


def risen(learners: Learners, settings: Settings) -> float:
    """Return the ramp's weight at a step, by the header's `rampup` and `self_iterations`."""
    return ramp(learners.iteration, ramp_length(settings.rampup, settings.self_iterations))


def move_teacher(learners: Learners, settings: Settings) -> None:
    """Move the teacher towards student a after a step, by growing_decay()."""
    decay = growing_decay(learners.iteration, settings.ema_decay)
    teacher, student = learners.networks[TEACHER], learners.networks["student_a"]
    update_teacher(teacher, student, decay, settings.ema_buffers, learners.halted)


def exact(logits: Tensor) -> Tensor:
    """Return logits in float32 at least, in which softmax and sums are taken."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def noisy(images: Tensor, deviation: float) -> Tensor:
    """Add to each voxel a draw of N(0, deviation^2), clipped to two deviations, from torch's own generator."""
    noise = torch.randn_like(images).mul_(deviation)
    return images + noise.clamp_(-NOISE_BOUND * deviation, NOISE_BOUND * deviation)


@contextlib.contextmanager
def unnoticed(*networks: nn.Module) -> Iterator[None]:
    """Leave BatchNorm's running statistics as they are while networks see noise.

    Evaluation uses these statistics, on images without noise: those of noisy ones would spoil it. Within the block a
    pass still normalises by its own batch.
    """
    layers = [layer for network in networks for layer in network.modules() if isinstance(layer, _BatchNorm)]
    momenta = [layer.momentum for layer in layers]
    try:
        for layer in layers:
            layer.momentum = 0.0
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum


def see_noise(learners: Learners, settings: Settings) -> contextlib.AbstractContextManager[None]:
    """Do what unnoticed() does, for student a, and for a teacher whose statistics are an average of student a's."""
    teacher = [learners.networks[TEACHER]] if settings.ema_buffers else []
    return unnoticed(learners.networks["student_a"], *teacher)
