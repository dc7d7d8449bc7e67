"""The lock on a folder that one process at a time writes into.

It is a lock of the operating system on the file `.lock` in the folder, which ends with the process
that holds it, however that ends; what the file says of the holder is for people.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from metaframe.errors import InputError
from metaframe.files.read import parsed
from metaframe.files.schema import integer, record, text

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
_HOLDER = record({"pid": integer, "host": text, "since": text})
_SIZE = 4096
_held: set[int] = set()
"""Descriptors of this process's locks."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock on `folder`, which exists, for a block of code.

    Threads of one process keep each other away too. The file of a dead process is taken over. Where
    the file system or the operating system has no such locks it warns, and keeps nobody away.

    Raises:
        InputError: somebody else holds it: who, since when, and how to take it over.
        OSError: the file cannot be made.
    """
    descriptor, process = _taken(folder), os.getpid()
    _held.add(descriptor)
    try:
        yield
    finally:
        if os.getpid() == process:  # and not in a forked child, which holds nothing
            _held.discard(descriptor)
            _released(folder / LOCK, descriptor)


def _forget() -> None:
    # Otherwise a child that outlives this process would hold its locks. Closing ends none here.
    while _held:
        os.close(_held.pop())


if fcntl is not None:
    os.register_at_fork(after_in_child=_forget)


def _taken(folder: Path) -> int:
    path = folder / LOCK
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(descriptor, folder)
            if _is_at(descriptor, path):
                _sign(descriptor)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # whoever held it removed it just now; the next one is another file


def _lock(descriptor: int, folder: Path) -> None:
    try:
        if fcntl is None:
            raise OSError(errno.ENOTSUP, "this operating system has no such locks")
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(
            f"{folder} is in use by {_holder(descriptor)}. Wait for it, or end that process: its "
            "lock ends with it. If its machine is gone and the lock is not, remove "
            f"{folder / LOCK} to take the folder over."
        ) from None
    except OSError as error:
        warnings.warn(
            f"{folder} cannot be locked ({error.strerror}); see to it that no other process writes "
            "into it.",
            stacklevel=2,
        )


def _holder(descriptor: int) -> str:
    """The holder that the file names; it may hold anything."""
    try:
        found = parsed(os.read(descriptor, _SIZE))
        _HOLDER(found, "the lock")
    except ValueError:
        return "another process"
    return f"process {found['pid']} on {found['host']!r}, since {found['since']!r}"


def _sign(descriptor: int) -> None:
    now = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    signature = {"pid": os.getpid(), "host": platform.node(), "since": now}
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"{json.dumps(signature)}\n".encode())


def _released(path: Path, descriptor: int) -> None:
    """Remove the file, unless somebody took the folder over, and end the lock."""
    with suppress(OSError):
        if _is_at(descriptor, path):
            path.unlink()
    os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False
