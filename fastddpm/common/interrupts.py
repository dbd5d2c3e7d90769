"""Ctrl-C at a point of our choosing: between two steps of a run, not within one."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def hold_interrupt() -> Iterator[None]:
    """Let a Ctrl-C that comes within the block take effect at its end.

    What the block changes is then changed wholly. Does nothing outside the main thread, where Python delivers no
    signals, or where something other than a Python function handles SIGINT.
    """
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(previous):
        yield
        return
    held: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: held.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if held:
        previous(*held[0])
