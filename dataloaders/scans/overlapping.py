"""Reading the next scan and writing the last one while this one is computed; what is logged keeps the scans' order."""

import logging
import threading
from collections import defaultdict
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from sdcl.runs.folder import LOGGER

Result = TypeVar("Result")


class InTurn(logging.Filter):
    """Lets through what is logged of the scan whose turn it is; what is logged of a later one waits for its turn.

    Scans are numbered from 0; what a thread logs is of the scan that it last named by of().
    """

    def __init__(self) -> None:
        super().__init__()
        self._thread, self._turn, self._lock = threading.local(), 0, threading.RLock()
        self._waiting: dict[int, list[logging.LogRecord]] = defaultdict(list)

    def __enter__(self) -> "InTurn":
        """Begin to filter."""
        LOGGER.addFilter(self)
        return self

    def __exit__(self, *_: object) -> None:
        """Let everything through again, what is still waiting first."""
        LOGGER.removeFilter(self)
        for number in sorted(self._waiting):
            self._handle(number)

    def of(self, number: int) -> None:
        """Say of which scan this thread logs from now on."""
        self._thread.number = number

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether a record is shown now; else keep it."""
        with self._lock:
            number = getattr(record, "scan_number", getattr(self._thread, "number", 0))
            if number > self._turn:
                record.scan_number = number
                self._waiting[number].append(record)
            return number <= self._turn

    def next(self) -> None:
        """Give the turn to the next scan, and show what waited for it."""
        with self._lock:
            self._turn += 1
            self._handle(self._turn)

    def _handle(self, number: int) -> None:
        for record in self._waiting.pop(number, ()):
            LOGGER.handle(record)


class Later(Generic[Result]):
    """The result of a function that a thread of its own computes; the program's end does not wait for it.

    Args:
        function: what to call.
        given: its arguments.
    """

    def __init__(self, function: Callable[..., Result], *given: Any):
        self._result: Result | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(function, given), daemon=True)
        self._thread.start()

    def _run(self, function: Callable[..., Result], given: tuple[Any, ...]) -> None:
        try:
            self._result = function(*given)
        except BaseException as error:  # raised again where somebody asks
            self._error = error

    def result(self) -> Result:
        """Wait for the result and hand it over; it is not kept.

        Raises:
            BaseException: what the function raised.
        """
        self._thread.join()
        result, error, self._result, self._error = self._result, self._error, None, None
        if error is not None:
            raise error
        return result
