"""One process's part in a run of many: joining them, and ending together.

A failure in one process has to end all of them, soon and with the same message. The one that fails
leaves a last word with the engine, if that keeps any, and goes; the others then lose it in the
middle of an exchange and look for that word.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from metaframe.backend.contract import Backend
from metaframe.backend.registry import load_backend, version_of
from metaframe.backend.selection import current_selection
from metaframe.backend.workers import ALONE, Place, Workers
from metaframe.distributed.agreement import agree
from metaframe.errors import BackendError, DistributedError

TIMEOUT = 300.0
"""Seconds, where nothing else is said."""
PEERS = "METAFRAME_PEERS"
"""Environment variable: "host:port" of every process, separated by commas."""


def place(timeout: float = TIMEOUT, environment: Mapping[str, str] = os.environ) -> Place | None:
    """The place of this process, by the variables that torchrun sets; None if it runs alone.

    They are RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, for every framework, and
    METAFRAME_PEERS for TensorFlow. `metaframe launch` sets all of them.

    Args:
        timeout: seconds after which a process that does not answer is given up.
        environment: the variables to look at. Default: those of the process.

    Returns:
        The place, or None.

    Raises:
        BackendError: some of them are missing, or are no numbers.

    >>> place(environment={})
    >>> variables = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node0", "MASTER_PORT": "2000"}
    >>> found = place(environment=variables)
    >>> found.process, found.processes, found.address
    (1, 2, 'node0:2000')
    """
    if "WORLD_SIZE" not in environment:
        return None
    try:
        return Place(
            process=int(environment["RANK"]),
            processes=int(environment["WORLD_SIZE"]),
            local_process=int(environment.get("LOCAL_RANK", "0")),
            address=f"{environment['MASTER_ADDR']}:{int(environment['MASTER_PORT'])}",
            peers=tuple(filter(None, environment.get(PEERS, "").split(","))),
            timeout=timeout,
        )
    except (KeyError, ValueError) as error:
        raise BackendError(
            f"WORLD_SIZE is set, and of what goes with it this is missing or no number: {error}. "
            "Start the processes with torchrun or `metaframe launch`, or set RANK, WORLD_SIZE, "
            "MASTER_ADDR and MASTER_PORT in each."
        ) from None


def is_first(environment: Mapping[str, str] = os.environ) -> bool:
    """True if this process writes files and reports; also True if it runs alone.

    Args:
        environment: the variables to look at. Default: those of the process.

    Returns:
        True in the process with RANK 0, and where RANK is not set.

    >>> is_first({"RANK": "0"}), is_first({"RANK": "1"}), is_first({})
    (True, False, True)
    """
    return int(environment.get("RANK", "0")) == 0


def is_restarted(environment: Mapping[str, str] = os.environ) -> bool:
    """True if torchrun started this process after others failed, to go on where they were.

    >>> is_restarted({"TORCHELASTIC_RESTART_COUNT": "1"}), is_restarted({})
    (True, False)
    """
    return int(environment.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


@contextmanager
def session(backend: str | None = None, *, timeout: float = TIMEOUT) -> Iterator[Workers]:
    """Join the processes that this one was started with, for a block of code.

    In a process that was started alone it does nothing. Enter it before any array is made: JAX
    and TensorFlow take part in a run only from the beginning.

    Args:
        backend: whose engine; default: the selected backend.
        timeout: seconds after which a process that does not answer is given up. What that means
            for each engine is in docs/scaling.md.

    Yields:
        The workers.

    Raises:
        DistributedError: another process failed, is gone, does not answer, or has another version
            of metaframe, the framework, NumPy or Python.
        BackendError: no backend, or one without an engine; or an incomplete environment.

    >>> with session("torch") as workers:
    ...     workers.processes
    1
    """
    here, chosen = place(timeout), _chosen(backend)
    if here is None:
        yield chosen.workers() if chosen else ALONE
        return
    if chosen is None:
        raise BackendError("session() needs a backend: name one, or select it first.")
    with chosen.join(here):
        workers = chosen.workers()
        try:
            agree(chosen, versions=_versions(chosen.name))
            yield workers
            workers.tell("done")  # nobody leaves while others still need the engine
        except Exception as error:
            raise _for_everyone(error, chosen, workers, timeout) from error


def _versions(framework: str) -> dict[str, str]:
    """The versions that have to be the same everywhere, up to how they were built."""
    names = ("metaframe", framework, "numpy")
    return {"python": platform.python_version()} | {
        name: version_of(name).partition("+")[0] for name in names
    }


def _chosen(name: str | None) -> Backend | None:
    if name is not None:
        return load_backend(name)
    selection = current_selection()
    return None if selection is None else selection.backend


def _for_everyone(
    error: Exception, backend: Backend, workers: Workers, timeout: float
) -> Exception:
    """The ending of this process, after telling the others or hearing from them."""
    who = f"process {workers.process} of {workers.processes}"
    if not backend.lost_others(error):
        workers.leave_word(f"{who} failed: {type(error).__name__}: {error}")
        return error
    word = workers.last_word()
    if word is not None:
        return DistributedError(word)
    return DistributedError(
        f"{who} lost another one, which ended, or did not answer for {timeout:g} s. Its own output "
        f"says why. Here it showed as: {error}"
    )
