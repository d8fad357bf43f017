"""Ctrl-C while a script still imports what it needs."""

import sys
from pathlib import Path
from types import TracebackType


def end_quietly() -> None:
    """End a script of this repository without a traceback on Ctrl-C. The exit status does not change.

    Other programs that import the library keep their own way.
    """
    if not Path(sys.argv[0]).resolve().is_relative_to(Path(__file__).resolve().parents[3]):
        return
    earlier = sys.excepthook

    def tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not issubclass(kind, KeyboardInterrupt):
            earlier(kind, error, trace)

    sys.excepthook = tell
