"""What a run will take, said before it starts: memory, by the networks' layers, and what fits where it is short."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sdcl import ranks
from sdcl.methods import get
from sdcl.networks import build_network
from sdcl.runs.config import side_divisor
from sdcl.runs.devices import computes_bf16, records_passes
from sdcl.runs.folder import LOGGER
from sdcl.scoring.evaluation import Predictors

GIB = 2**30
BESIDE = 1.5  # times what a forward pass keeps: with gradients of activations, losses, working memory; measured
PER_PARAMETER = 16  # bytes: weight, gradient, Adam's two moments
SHARE = 0.9  # of what is free; the rest is other programs'


@dataclass(frozen=True)
class Plan:
    """What memory depends on.

    Attributes:
        students: architectures that one step of a stage trains together.
        copies: architectures of networks that no gradient reaches: the teacher's, the students' averages'.
        num_classes: number of classes C.
        shape: (N, channels, *S) of a process's batch.
        precision: "fp32", "tf32" or "bf16".
        divisor: of the sides of a patch that a run's networks take.
    """

    students: tuple[str, ...]
    copies: tuple[str, ...]
    num_classes: int
    shape: tuple[int, ...]
    precision: str
    divisor: int

    @property
    def gib(self) -> float:
        """The memory that training takes beside what the process holds before, in GiB."""
        kept = sum(kept_bytes(name, self.num_classes, self.shape, self.precision == "bf16") for name in self.students)
        weights = sum(PER_PARAMETER * parameters(name, self.num_classes, self.shape) for name in self.students)
        weights += sum(4 * parameters(name, self.num_classes, self.shape) for name in self.copies)
        return (BESIDE * kept + weights) / GIB

    def smaller(self) -> "list[tuple[str, Plan]]":
        """Return settings that take less, the nearest first, and the plans that they make."""
        count, (n, channels, *sides), batch = self.shape[0] * ranks.count(), self.shape, ()
        shapes: list[tuple[tuple[str, ...], tuple[int, ...]]] = [((), self.shape)]
        while n > 1:
            n = n // 2
            batch = (f"--batch_size {count * n // self.shape[0]}",)
            shapes.append((batch, (n, channels, *sides)))
        while max(sides) > 2 * self.divisor:
            sides = [s * 3 // 4 // self.divisor * self.divisor if s > 2 * self.divisor else s for s in sides]
            shapes.append(((f"--patch_size {' '.join(map(str, sides))}", *batch), (n, channels, *sides)))
        found = [
            ((*flags, *["--precision bf16"] * (precision != self.precision)), shape, precision)
            for flags, shape in shapes
            for precision in dict.fromkeys((self.precision, "bf16"))
        ]
        return [(" ".join(flags), replace(self, shape=shape, precision=p)) for flags, shape, p in found[1:]]


@lru_cache
def kept_bytes(name: str, num_classes: int, shape: tuple[int, ...], is_bf16: bool) -> int:
    """Return what a network's forward pass keeps for its backward pass, in bytes; nothing is computed for it.

    Args:
        name: of the architecture.
        num_classes: number of classes C.
        shape: (N, channels, *S) of the input.
        is_bf16: under autocast.
    """
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    with FakeTensorMode():
        network = build_network(name, num_classes, shape[1]).train()
        weights = {p.untyped_storage()._cdata for p in network.parameters()}
        image = torch.empty(shape)
        if len(shape) == 4:
            image = image.contiguous(memory_format=torch.channels_last)
        with (
            torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=is_bf16),
        ):
            network(image)
        return sum(size for storage, size in kept.items() if storage not in weights)


@lru_cache
def parameters(name: str, num_classes: int, shape: tuple[int, ...]) -> int:
    """Count a network's parameters; its input is (N, channels, *S)."""
    with FakeTensorMode():
        return sum(p.numel() for p in build_network(name, num_classes, shape[1]).parameters())


def plan_of(config: Any, sizes: tuple[int, int], stage: str, device: torch.device) -> Plan:
    """Return what a stage's memory depends on, by a training script's header.

    Stage 1 moves one student after the other; stage 2 holds what both keep, where the method trains two, and so does a
    stage of recorded passes.

    Args:
        config: the header.
        sizes: number of classes C, and of the images' channels.
        stage: "pre_train" or "self_train".
        device: where it computes.
    """
    num_classes, channels = sizes
    method = get(config.method)
    names = [getattr(config, role) for role in ("student_a", "student_b")]
    shape = (config.batch_size // ranks.count(), channels, *config.patch_size)
    if stage == "pre_train" and not records_passes(config, device):
        heaviest = max(names, key=lambda name: kept_bytes(name, num_classes, shape, config.precision == "bf16"))
        return Plan((heaviest,), (), num_classes, shape, config.precision, side_divisor(names))
    if stage == "pre_train":
        return Plan(tuple(names), (), num_classes, shape, config.precision, side_divisor(names))
    students = tuple(getattr(config, role) for role in method.students)
    copies = (config.student_a,) * method.has_teacher + students * bool(config.average_decay)
    return Plan(students, copies, num_classes, shape, config.precision, side_divisor(names))


def free_gib(device: torch.device) -> float | None:
    """Return the memory that is free on a device, in GiB, within a container's bound; None where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / GIB
    if device.type != "cpu":
        return None
    found = []
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text("ascii").splitlines())
        found.append(int(lines["MemAvailable"].split()[0]) * 2**10)
        bound = Path("/sys/fs/cgroup/memory.max").read_text("ascii").strip()
        used = Path("/sys/fs/cgroup/memory.current").read_text("ascii").strip()
        found.append(int(bound) - int(used))
    except (OSError, ValueError, KeyError):
        pass
    return min(found) / GIB if found else None


def held_gib() -> float:
    """Return the memory that this process holds now, in GiB; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / GIB
    except (OSError, ValueError, IndexError):
        return 0.0


def tell_memory_of_test(
    predictors: Predictors, sizes: tuple[int, int], shape: Sequence[int], planes: int, device: torch.device
) -> None:
    """Say how much memory a test takes for its largest volume.

    That is the image, a label map of each predictor, and each network's probabilities of so many planes as windows or
    batches reach at a time, with as much as one's for what windows are made of; of predictors that are kept those of
    the whole volume.

    Args:
        predictors: the networks and what is made of them.
        sizes: number of classes C, and of channels.
        shape: S of the largest volume.
        planes: across the first axis.
        device: where the networks compute.
    """
    free = free_gib(torch.device("cpu"))
    (classes, channels), voxels = sizes, math.prod(shape)
    a_voxel = 4 * channels + 1 + len(predictors.members) + 4 * classes * len(predictors.kept)
    slab = 4 * classes * (len(predictors.networks) + 1) * min(planes, shape[0]) * math.prod(shape[1:])
    gib = (a_voxel * voxels + slab) / GIB + held_gib()
    of = "" if free is None else f" of {free + held_gib():.1f} GiB that are free"
    LOGGER.info("memory: about %.1f GiB for the largest volume%s, networks on %s", gib, of, device)
    if free is not None and gib > free + held_gib():
        LOGGER.warning(
            "WARNING: that is more than there is: score fewer predictors (--predictors), or where more memory is."
        )


def tell_memory(plans: Sequence[tuple[str, Plan]], device: torch.device, waiting_bytes: int = 0) -> None:
    """Say how much memory stages will take, and, where that is more than there is, which settings would fit.

    Args:
        plans: of each stage, by its name.
        device: where they compute.
        waiting_bytes: see sdcl.runs.data.Training; they lie in the memory of a CPU.
    """
    held = held_gib() if device.type == "cpu" else 0.0
    waiting = waiting_bytes / GIB if device.type == "cpu" else 0.0
    free = free_gib(device)
    told = ", ".join(f"{plan.gib + held + waiting:.1f} GiB in {stage}" for stage, plan in plans)
    LOGGER.info("memory: about %s%s", told, "" if free is None else f"; {free + held:.1f} GiB are free on {device}")
    heaviest = max((plan for _, plan in plans), key=lambda plan: plan.gib, default=None)
    if heaviest is not None and free is not None and heaviest.gib > free - waiting:
        LOGGER.warning("WARNING: that is more than there is: %s", what_fits(heaviest, free - waiting, device))


def what_fits(plan: Plan, free: float, device: torch.device) -> str:
    """Return the nearest settings that fit into so many GiB, as a sentence."""
    smaller = [(text, one) for text, one in plan.smaller() if "bf16" not in text or computes_bf16(device)]
    for text, one in smaller:
        if one.gib < SHARE * free:
            return f"{text} would take about {one.gib:.1f} GiB beside what the process holds."
    return "no batch or patch of these networks fits: use another device."


def out_of_memory(config: Any, sizes: tuple[int, int], stage: str, device: torch.device) -> str:
    """Return what a user is told whose training ran out of memory, the settings that would fit included."""
    plan = plan_of(config, sizes, stage, device)
    total = torch.cuda.mem_get_info(device)[1] / GIB if device.type == "cuda" else free_gib(device) or 0.0
    at_most = min(0.7 * plan.gib, total)  # what it took was too much, whatever was computed
    graphs = " --no_cuda_graphs takes less, too." if records_passes(config, device) else ""
    return f"the memory of {device} is full in {stage}: {what_fits(plan, at_most, device)}{graphs}"
