"""One run in several processes, as torchrun starts them: who this one is, and what they decide together."""

import atexit
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed as dist

from sdcl import ranks
from sdcl.runs.errors import UserError

T = TypeVar("T")
PATIENCE = timedelta(minutes=30)  # for the others, before a process gives up


def places() -> tuple[int, int, int]:
    """Return this process's rank, the number of processes, and its number on its machine, from the environment.

    torchrun's variables count; of SLURM's those of an srun with several tasks, where MASTER_ADDR and MASTER_PORT say
    where the processes meet.

    Raises:
        UserError: srun started several tasks that do not know of each other.
    """
    given = os.environ
    if "RANK" in given and "WORLD_SIZE" in given:
        return int(given["RANK"]), int(given["WORLD_SIZE"]), int(given.get("LOCAL_RANK", 0))
    tasks = int(given.get("SLURM_STEP_NUM_TASKS", 1))
    if tasks == 1:
        return 0, 1, 0
    if not {"MASTER_ADDR", "MASTER_PORT"} <= set(given):
        raise UserError(
            f"srun starts {tasks} tasks, each of which would train this whole run: start torchrun once on each node "
            "(docs/scaling.md), or set MASTER_ADDR and MASTER_PORT."
        )
    return int(given["SLURM_PROCID"]), tasks, int(given["SLURM_LOCALID"])


def join(device_type: str) -> None:
    """Meet the run's other processes, if there are any; they part when the process ends.

    Args:
        device_type: where the run computes: "cuda" exchanges over NCCL, all else over gloo.

    Raises:
        UserError: they do not meet, or such a device cannot be shared by several processes.
    """
    rank, count, _ = places()
    if count == 1 or dist.is_initialized():
        return
    if device_type not in ("cpu", "cuda"):
        raise UserError(f"--device {device_type} knows one process alone: start the script without torchrun.")
    backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, rank=rank, world_size=count, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"the {count} processes do not meet ({reason}): check MASTER_ADDR and MASTER_PORT.") from error
    atexit.register(_part)


def _part() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def is_first() -> bool:
    """Tell whether this is the process that writes."""
    return ranks.rank() == 0


def first(work: Callable[[], T]) -> T:
    """Let the first process do something, and give all of them what came of it, its UserError included.

    Args:
        work: its result is pickled; the tensors in it are on the CPU.
    """
    if ranks.count() == 1:
        return work()
    said: list[Any] = [None, None]
    if is_first():
        try:
            said[0] = work()
        except UserError as error:
            said[1] = str(error)
    dist.broadcast_object_list(said, src=0, device=torch.device("cpu"))
    if said[1] is not None:
        raise UserError(said[1])
    return said[0]


def agree(*numbers: int) -> tuple[int, ...]:
    """Return the largest of all processes' numbers, place by place; the device is not waited for."""
    if ranks.count() == 1:
        return numbers
    largest = torch.tensor(numbers)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return tuple(largest.tolist())


def wait() -> None:
    """Wait until all processes are here."""
    agree(0)


def share(things: Sequence[T]) -> list[T]:
    """Return this process's part of things that any of them can do: every so many-th."""
    return list(things[ranks.rank() :: ranks.count()])


def collect(mine: Any) -> list[Any]:
    """Return what each process gives, in the order of their ranks, on all of them; pickled."""
    if ranks.count() == 1:
        return [mine]
    given: list[Any] = [None] * ranks.count()
    dist.all_gather_object(given, mine)
    return given


def check_share(batch_size: int) -> None:
    """Refuse a batch that the processes cannot share evenly.

    Raises:
        UserError: names the numbers that fit.
    """
    count = ranks.count()
    if batch_size % count:
        fitting = ", ".join(str(n) for n in range(1, batch_size + 1) if batch_size % n == 0)
        raise UserError(
            f"--batch_size {batch_size} is that of the whole batch, which {count} processes cannot share evenly: start "
            f"{fitting} of them, or give a multiple of {count}."
        )
