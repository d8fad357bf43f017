"""Ctrl-C while a script still imports what it needs."""

import sys
from types import TracebackType


def end_quietly() -> None:
    """Let Ctrl-C end this process without a traceback, wherever nothing catches it; the exit status is as ever."""
    earlier = sys.excepthook

    def tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not issubclass(kind, KeyboardInterrupt):
            earlier(kind, error, trace)

    sys.excepthook = tell
