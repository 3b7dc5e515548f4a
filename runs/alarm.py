"""A limit on the seconds that a block of code may take, also where that code never looks at a clock."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class OutOfTime(BaseException):
    """The block ran into its limit. Not an `Exception`, so that nobody on the way takes it for a failure of its own."""


@contextlib.contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Raise `OutOfTime` in the block after `seconds`; no effect outside the main thread or where no alarm exists."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
