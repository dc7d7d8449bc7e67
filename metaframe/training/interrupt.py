"""Ctrl-C and SIGTERM between two steps and not inside one, so that what is saved is whole."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

TERMINATED = 128 + signal.SIGTERM
"""The exit code of a process that SIGTERM ended, as shells have it."""


class Terminated(SystemExit):
    """The process is to end, and what it was in the middle of is done."""

    def __init__(self) -> None:
        super().__init__(TERMINATED)


class Interrupt:
    """True if Ctrl-C was pressed, or the process told to end."""

    def __init__(self) -> None:
        self.held = False
        self._terminated = False

    def hold(self, signum: int) -> None:
        """Take note of a signal."""
        self.held = True
        self._terminated = signum == signal.SIGTERM

    def raise_if_held(self) -> None:
        """The `KeyboardInterrupt` or `SystemExit` that was held back."""
        if self.held:
            raise Terminated if self._terminated else KeyboardInterrupt


@contextmanager
def held_interrupt(stop: Callable[[str], None], *, terminate: bool) -> Iterator[Interrupt]:
    """Call `stop` at the first Ctrl-C, with `terminate` at SIGTERM too; the next acts at once.

    Outside the main thread, which signals never reach, it does nothing.
    """
    interrupt = Interrupt()

    def hold(signum: int, frame: FrameType | None) -> None:
        del frame
        interrupt.hold(signum)
        release()
        stop("interrupted")

    def release() -> None:
        for signum, handler in previous.items():
            signal.signal(signum, handler)

    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    previous = {s: signal.getsignal(s) for s in _ours(terminate)}
    for signum in previous:
        signal.signal(signum, hold)
    try:
        yield interrupt
    finally:
        release()


def _ours(terminate: bool) -> Iterator[signal.Signals]:
    # A shell has its background jobs ignore Ctrl-C, and None is a handler that is not Python's.
    if signal.getsignal(signal.SIGINT) not in (signal.SIG_IGN, None):
        yield signal.SIGINT
    # Whoever handles or ignores SIGTERM has a reason.
    if terminate and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        yield signal.SIGTERM
