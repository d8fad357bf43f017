"""The four streams of the published order: two readers of each list, one forwards and one backwards."""

import signal
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from dataloaders.files import sample_rng
from sdcl import ranks
from sdcl.runs.errors import UserError
from sdcl.runs.folder import STOP_SIGNALS

PREFETCHED = 2  # batches prepared ahead, of each process that prepares


class TrainingSet(Protocol):
    """What a stream reads: augmented or cropped samples of one size."""

    def __len__(self) -> int:
        """Count the cases."""
        ...

    def name(self, index: int) -> str:
        """Return a case's name, for messages."""
        ...

    def sample(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray | None]:
        """Return image (channels, *S) float32 and label (*S) uint8 of a case; all randomness comes from rng."""
        ...


@dataclass(frozen=True)
class Order:
    """In which order lists are read; a script's header has the same fields and serves as well.

    Attributes:
        batch_size: samples in each of the two or four batches of an iteration.
        labelled_repeat: how often the labelled list is repeated in an epoch.
        unlabelled_repeat: the same for the unlabelled list.
        seed: of the crops and augmentations, and of the order with shuffle.
        shuffle: read each list in a random order, new in each epoch, instead of the published one.
        workers: what prepares batches ahead: 1: a thread; more: so many processes. The batches are the same.
        device: where the run computes; batches for a GPU wait in memory that it copies from by itself.
    """

    batch_size: int
    labelled_repeat: int
    unlabelled_repeat: int = 1
    seed: int = 1337
    shuffle: bool = False
    workers: int = 1
    device: str = "auto"


class _Prepared(Dataset):
    """Batches by iteration, for other processes; a UserError comes as its text, which no traceback is put around."""

    def __init__(self, streams: "Streams"):
        self._streams = streams

    def __getitem__(self, iteration: int) -> dict[str, torch.Tensor] | str:
        try:
            return self._streams.batch(iteration)
        except UserError as error:
            return str(error)


def _leave_signals_to_the_run(_: int) -> None:
    """Let a process that prepares batches go on when somebody asks to stop; it ends with the run."""
    for name in STOP_SIGNALS:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


class Streams:
    """Batches of both stages, each a function of its iteration's number alone.

    A list of n cases is repeated; stream `a` reads it forwards and stream `b` backwards. The shortest stream ends the
    epoch, incomplete batches are dropped, and each epoch begins at the lists' beginning again.

    Args:
        labelled: the labelled cases.
        unlabelled: the unlabelled cases; None for pre-training.
        order: a script's header, or an Order.
        stage: "pre_train" or "self_train", which draws anew; None: the second where there are unlabelled cases.

    Raises:
        UserError: a repeated list is shorter than a batch.

    Source: docs/method.md, "Order of the data".
    """

    def __init__(self, labelled: TrainingSet, unlabelled: TrainingSet | None, order: Order, stage: str | None = None):
        self._sets = {"x": (labelled, order.labelled_repeat)}
        if unlabelled is not None:
            self._sets["u"] = (unlabelled, order.unlabelled_repeat)
        self._batch_size, self._shuffle, self._workers = order.batch_size, order.shuffle, order.workers
        # Of processes that share the batch this one's places; asked here, since those that prepare know of no ranks.
        share = order.batch_size // ranks.count()
        self._mine = slice(ranks.rank() * share, (ranks.rank() + 1) * share)
        self._is_pinned = order.device not in ("cpu", "mps", "xpu") and torch.cuda.is_available()
        self._seed = (order.seed, stage or ("pre_train" if unlabelled is None else "self_train"))
        self._orders: dict[str, tuple[int, np.ndarray]] = {}
        lengths = [len(cases) * repeat // order.batch_size for cases, repeat in self._sets.values()]
        self.iterations_per_epoch = min(lengths)
        if self.iterations_per_epoch == 0:
            kind = "labelled" if lengths[0] == 0 else "unlabelled"
            cases, repeat = self._sets["x" if kind == "labelled" else "u"]
            raise UserError(
                f"--batch_size {order.batch_size} is more than the {len(cases)} {kind} cases repeated {repeat} times: "
                f"lower it or raise --{kind}_repeat."
            )

    def batches(self, start: int, stop: int) -> Iterator[dict[str, torch.Tensor]]:
        """Yield the batches of iterations start to stop - 1 (from 0), prepared ahead by other threads.

        Yields:
            "x_a", "x_b" (and "u_a", "u_b") float32 (N, channels, *S); "y_a", "y_b" uint8 (N, *S).
        """
        if self._workers > 1:
            yield from self._from_processes(start, stop)
            return
        with ThreadPoolExecutor(1, thread_name_prefix="streams") as pool:
            ahead: deque = deque()
            for iteration in range(start, stop):
                ahead.append(pool.submit(self._pinned, iteration))
                if len(ahead) > PREFETCHED:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()

    def _pinned(self, iteration: int) -> dict[str, torch.Tensor]:
        batch = self.batch(iteration)
        return {name: t.pin_memory() for name, t in batch.items()} if self._is_pinned else batch

    def _from_processes(self, start: int, stop: int) -> Iterator[dict[str, torch.Tensor]]:
        """Yield what batches() yields, from processes: several threads would wait for each other's interpreter."""
        has_fork = sys.platform.startswith("linux")  # what is decoded is then shared, not copied
        loader = DataLoader(
            _Prepared(self), batch_size=None, sampler=range(start, stop), num_workers=self._workers,
            prefetch_factor=PREFETCHED, pin_memory=self._is_pinned, worker_init_fn=_leave_signals_to_the_run,
            multiprocessing_context="fork" if has_fork else None,
        )  # fmt: skip
        for batch in loader:
            if isinstance(batch, str):
                raise UserError(batch)
            yield batch

    def batch(self, iteration: int) -> dict[str, torch.Tensor]:
        """Prepare one iteration's batch, of several processes this one's samples of it; see batches()."""
        batch = {}
        for kind, (cases, _) in self._sets.items():
            for direction in "ab":
                chosen = list(enumerate(self._chosen(iteration, kind, direction)))[self._mine]
                samples = [
                    cases.sample(int(index), sample_rng(*self._seed, kind + direction, iteration, place))
                    for place, index in chosen
                ]
                batch[f"{kind}_{direction}"] = torch.from_numpy(np.stack([image for image, _ in samples]))
                if kind == "x":
                    batch[f"y_{direction}"] = torch.from_numpy(np.stack([label for _, label in samples]))
        return batch

    def names(self, iteration: int) -> dict[str, list[str]]:
        """Return the names of the cases in an iteration's batch, by stream, such as "x_a"."""
        return {
            f"{kind}_{direction}": [cases.name(int(index)) for index in self._chosen(iteration, kind, direction)]
            for kind, (cases, _) in self._sets.items()
            for direction in "ab"
        }

    def _chosen(self, iteration: int, kind: str, direction: str) -> np.ndarray:
        """Return the indices of the cases that a stream reads for an iteration."""
        epoch, position = divmod(iteration, self.iterations_per_epoch)
        cases, repeat = self._sets[kind]
        places = np.arange(position * self._batch_size, (position + 1) * self._batch_size)
        if self._shuffle:
            return self._shuffled(len(cases) * repeat, epoch, kind + direction)[places] % len(cases)
        return (places if direction == "a" else len(cases) * repeat - 1 - places) % len(cases)

    def _shuffled(self, count: int, epoch: int, stream: str) -> np.ndarray:
        """Return a stream's order of an epoch; the last one is kept, which the next iterations read too."""
        if self._orders.get(stream, (None, None))[0] != epoch:
            self._orders[stream] = epoch, sample_rng(*self._seed, stream, epoch).permutation(count)
        return self._orders[stream][1]
