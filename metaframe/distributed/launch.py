"""Several processes on this machine, for trying out what later runs on many.

torchrun does this for torch, and restarts what fails; JAX and TensorFlow have nothing like it.
Every process gets the variables that torchrun sets and METAFRAME_PEERS, which `session` reads.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType

from metaframe import arguments
from metaframe.distributed.session import PEERS

GRACE = 30.0
"""Seconds that the others have to end by themselves once one process failed."""
_POLL = 0.1


def launch(command: Sequence[str], processes: int, *, grace: float = GRACE) -> int:
    """Run `command` in several processes and wait for all of them.

    Args:
        command: the program and its arguments.
        processes: how many, at least 1.
        grace: seconds from the first failure until the rest is ended.

    Returns:
        0, or the exit code of the process that failed first; 128 plus its number for a signal.

    Raises:
        InputError: `processes` is out of range.
    """
    arguments.integer(processes, "processes", at_least=1)
    with started(command, environments(processes)) as running, _handing_on_signals(running):
        first = _first_failure(running)
        if first is None:
            return 0
        code = running[first].returncode
        said = f"signal {-code}" if code < 0 else f"exit code {code}"
        message = f"metaframe: process {first} ended with {said}"
        sys.stderr.write(f"{message}; the others have {grace:g} s to end\n")
        _wait(running, grace)
    return code if code > 0 else 128 - code


def environments(processes: int) -> list[dict[str, str]]:
    """The variables of each process: free ports of this machine, and its share of the cores."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(processes + 1)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        port, *peers = (each.getsockname()[1] for each in sockets)
    threads = max(1, (os.cpu_count() or 1) // processes)
    shared = {
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        PEERS: ",".join(f"127.0.0.1:{peer}" for peer in peers),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
    }
    return [{**shared, "RANK": str(i), "LOCAL_RANK": str(i)} for i in range(processes)]


@contextmanager
def started(
    command: Sequence[str], variables: Sequence[Mapping[str, str]]
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The running processes; on leaving none of them, nor any of their children, is left."""
    running: list[subprocess.Popen[bytes]] = []
    try:
        for own in variables:
            environment = {**os.environ, **own}
            # A session of its own makes it a group, which can be ended as a whole.
            running.append(subprocess.Popen(command, env=environment, start_new_session=True))
        yield running
    finally:
        # SIGTERM would not do: a stopped process does not see it, and JAX catches it.
        _signal_all(running, signal.SIGKILL)
        for process in running:
            process.wait()


def _first_failure(running: Sequence[subprocess.Popen[bytes]]) -> int | None:
    while True:
        codes = [process.poll() for process in running]
        for i, code in enumerate(codes):
            if code:
                return i
        if all(code == 0 for code in codes):
            return None
        time.sleep(_POLL)


def _wait(running: Sequence[subprocess.Popen[bytes]], seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(process.poll() is None for process in running):
        time.sleep(_POLL)


@contextmanager
def _handing_on_signals(running: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Ctrl-C and SIGTERM go to all; each process ends as it does."""

    def hand_on(signum: int, frame: FrameType | None) -> None:
        del frame
        _signal_all(running, signum)

    before = {s: signal.signal(s, hand_on) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _signal_all(running: Sequence[subprocess.Popen[bytes]], signum: int) -> None:
    for process in running:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signum)
