"""Ctrl-C while a script still imports what it needs."""

import multiprocessing
import os
import signal
import sys
import threading
from pathlib import Path


def end_on_interrupt() -> None:
    """End a script of this repository on Ctrl-C at once and without a traceback, until allow_interrupts().

    An exception would not do: some libraries swallow it while they are imported. Other programs that import the
    library, and processes that a script starts, keep their own way.
    """
    if _is_own_script() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))


def allow_interrupts() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again, now that something catches it."""
    if _is_own_script() and signal.getsignal(signal.SIGINT) not in (signal.SIG_IGN, signal.default_int_handler):
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _is_own_script() -> bool:
    is_here = Path(sys.argv[0]).resolve().is_relative_to(Path(__file__).resolve().parents[3])
    is_main = threading.current_thread() is threading.main_thread() and multiprocessing.parent_process() is None
    return is_here and is_main
