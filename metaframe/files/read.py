"""Reading files that may hold anything: regular ones alone, under limits of size and depth."""

from __future__ import annotations

import errno
import json
import os
import reprlib
import stat
from pathlib import Path
from typing import Any

DEPTH = 200
"""Levels of nesting in JSON. Python's own limit of recursion is 1,000 calls."""

_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = _SHOWN.maxlong = 80


def contents(path: str | Path, most: int | None = None) -> bytes:
    """The bytes of a regular file, which no device and no pipe is.

    Args:
        path: the file.
        most: the number of bytes that it may have; default: any.

    Raises:
        OSError: it cannot be read, is no regular file, or is larger.
    """
    # Before it is opened: opening a pipe waits for whoever writes into it.
    found = Path(path).stat()
    if stat.S_ISDIR(found.st_mode):
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    size = found.st_size
    if most is not None and size > most:
        raise OSError(errno.EFBIG, f"{size} bytes, expected at most {most}", str(path))
    with Path(path).open("rb") as file:
        data = file.read(size + 1)
    if len(data) > size:
        raise OSError(errno.EBUSY, "It grew while it was read", str(path))
    return data


def parsed(text: bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is none, is nested too deeply, or has a name twice in one object.
    """
    try:
        value = json.loads(text.decode(), object_pairs_hook=_named_once)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    _check_depth(value)
    return value


def _named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it has the name {shown(twice)} twice in one object")
    return found


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(DEPTH):
        level = [
            x
            for node in level
            if isinstance(node, dict | list)
            for x in (node.values() if isinstance(node, dict) else node)
        ]
        if not level:
            return
    raise ValueError(f"it is nested more than {DEPTH} levels deep")


def reason(error: Exception) -> str:
    """The reason in an error, without the number and the file that an `OSError` shows too."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def shown(value: Any) -> str:
    """A short text of any plain value, for errors."""
    try:
        return _SHOWN.repr(value)
    except (ValueError, RecursionError):  # Python prints no integer of over 4,300 digits
        return f"a {type(value).__name__} too large to show"
