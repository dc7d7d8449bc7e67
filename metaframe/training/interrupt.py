"""Ctrl-C between two steps and not inside one, so that what is saved is whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupt:
    """Whether Ctrl-C was pressed."""

    def __init__(self) -> None:
        self.held = False

    def raise_if_held(self) -> None:
        """The `KeyboardInterrupt` that was held back."""
        if self.held:
            raise KeyboardInterrupt


@contextmanager
def held_interrupt(stop: Callable[[str], None]) -> Iterator[Interrupt]:
    """Call `stop` at the first Ctrl-C; a second one interrupts at once, as usual.

    Outside the main thread, which signals never reach, it does nothing.
    """
    interrupt = Interrupt()

    def hold(signum: int, frame: FrameType | None) -> None:
        del signum, frame
        interrupt.held = True
        signal.signal(signal.SIGINT, previous)
        stop("interrupted")

    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    previous = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, hold)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, previous)
