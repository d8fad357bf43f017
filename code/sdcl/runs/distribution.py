"""One run in several processes, as torchrun starts them: who this one is, and what they decide together."""

import struct
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed as dist
from torch import nn

from sdcl import ranks
from sdcl.runs.config import env_number, env_text, processes
from sdcl.runs.errors import UserError

T = TypeVar("T")
MEETING = timedelta(minutes=5)  # for all processes to come
# For the others, before a process gives up: over gloo a dead one is seen at once, and a test may have one long case.
PATIENCE = {"cpu": timedelta(days=1), "cuda": timedelta(hours=2)}


def places() -> tuple[int, int, int]:
    """Return this process's rank, the number of processes, and its number on its machine, from the environment.

    torchrun's variables count; of SLURM's those of an srun with several tasks, where MASTER_ADDR and MASTER_PORT say
    where the processes meet.

    Raises:
        UserError: srun started several tasks that do not know of each other.
    """
    count = processes()
    if count == 1:
        return 0, 1, 0
    if env_text("RANK"):
        return env_number("RANK", 0), count, env_number("LOCAL_RANK", 0)
    if not (env_text("MASTER_ADDR") and env_text("MASTER_PORT")):
        raise UserError(
            f"srun starts {count} tasks, each of which would train this whole run: set MASTER_ADDR and MASTER_PORT "
            "(docs/scaling.md), or for runs that are not one RANK=0 and WORLD_SIZE=1."
        )
    return env_number("SLURM_PROCID", 0), count, env_number("SLURM_LOCALID", 0)


def join(device_type: str) -> None:
    """Meet the run's other processes, if there are any.

    Args:
        device_type: where the run computes: "cuda" exchanges over NCCL, all else over gloo.

    Raises:
        UserError: they do not all come, or such a device cannot be shared by several processes.
    """
    rank, count, _ = places()
    if count == 1 or dist.is_initialized():
        return
    if device_type not in ("cpu", "cuda"):
        raise UserError(f"--device {device_type} knows one process alone: start the script without torchrun.")
    backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
    try:
        store, rank, count = next(iter(dist.rendezvous("env://", rank, count, timeout=MEETING)))
        store.set(f"here {rank}", "")
        store.wait([f"here {k}" for k in range(count)], MEETING)
        patience = PATIENCE[device_type]
        store.set_timeout(patience)
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=patience)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"the {count} processes do not meet ({reason}): see what the others say, and check MASTER_ADDR and "
            "MASTER_PORT."
        ) from error


def part() -> None:
    """Leave the group when all of them are done; after an error nobody waits for the others."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def check_same(what: dict[str, Any]) -> None:
    """Refuse a run whose processes were not given the same.

    Args:
        what: by name, what must be the same in all of them.

    Raises:
        UserError: names the first that differs.
    """
    given = collect({name: repr(value) for name, value in what.items()})
    for name in what:
        values = [each.get(name) for each in given]
        if len(set(values)) > 1:
            shown = " and ".join(sorted({str(value)[:100] for value in values}))
            raise UserError(f"the processes of this run differ in {name} ({shown}): give all of them the same.")


@torch.no_grad()
def share_weights(networks: Iterable[nn.Module]) -> None:
    """Give all processes the first one's parameters and buffers: other processors may have drawn other ones."""
    if ranks.count() == 1:
        return
    for tensor in (t for network in networks for t in (*network.parameters(), *network.buffers())):
        copy = tensor.detach().contiguous()
        dist.broadcast(copy, src=0)
        tensor.copy_(copy)


def check_weights(networks: Iterable[nn.Module]) -> None:
    """Refuse to go on where the processes' weights have come apart.

    Raises:
        UserError: they have.
    """
    if ranks.count() == 1:
        return
    total = sum(float(p.detach().double().sum()) for network in networks for p in network.parameters())
    mine = int.from_bytes(struct.pack(">d", total), "big") >> 2  # of all bits but two, to compare as whole numbers
    largest, smallest = agree(mine, -mine)
    if largest != -smallest:
        raise UserError(
            "the weights of the run's processes have come apart, which is a fault of a machine or of this code: start "
            "it again from its last save, with fewer machines."
        )


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


def share(things: Sequence[T]) -> Sequence[T]:
    """Return this process's part of things that any of them can do: every so many-th."""
    return things[ranks.rank() :: ranks.count()]


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
