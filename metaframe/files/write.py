"""Writing files so that a process that dies in the middle leaves the previous ones."""

from __future__ import annotations

import hashlib
import os
import platform
import secrets
from contextlib import suppress
from pathlib import Path

UNFINISHED = ".unfinished"


def _here() -> str:
    """The machine and, on Linux, the namespace of its process numbers; others say nothing here."""
    namespace = ""
    with suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    return hashlib.sha256(f"{platform.node()} {namespace}".encode()).hexdigest()[:8]


HERE = _here()


def write_atomically(path: Path, data: bytes) -> None:
    """Write `path` so that at every moment it has its old content or all of the new.

    Its folder is made if it does not exist. Any number of threads and processes may write the same
    file: one of them is the last.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own for every writing, and short, whatever the length of the file's.
    temporary = path.with_name(f".{HERE}-{os.getpid()}-{secrets.token_hex(8)}{UNFINISHED}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_directory(path.parent)


def clear_unfinished(folder: Path) -> None:
    """Remove what processes of this machine left unfinished when they died."""
    for file in folder.glob(f".{HERE}-*{UNFINISHED}"):
        number = file.name.split("-")[1]
        if number.isdecimal() and not _is_alive(int(number)):
            file.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    if os.name != "posix":  # signal 0 would end it there
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return True


def _sync_directory(folder: Path) -> None:
    if os.name != "posix":  # directories cannot be opened elsewhere
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
