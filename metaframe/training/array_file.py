"""A file of arrays by name and of plain values, whole or refused.

It is a safetensors file: arrays in C order, and a JSON text with everything that is no array.
Nothing in it is code, and nothing is unpickled. The SHA-256 of the whole file, with zeros in the
place of the digest, stands in its header, so that a file that lost or changed a single bit anywhere
is refused before it is parsed; safetensors alone would load many such files as other numbers. A
file is written under another name, flushed to the disk and then renamed, so that a process that
dies in the middle leaves the previous file as it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from metaframe.errors import CheckpointError, InputTypeError

_MARK = b'"sha256":"'
_DIGEST = 64
_AGAIN = "Use an earlier checkpoint, or a copy of this one from before it was damaged."


def encoded(arrays: Mapping[str, np.ndarray[Any, Any]], content: Any) -> bytes:
    """The bytes of a file with these arrays and this content, which JSON can hold.

    Raises:
        InputTypeError: an array of a dtype that the file has no name for.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save

    text = json.dumps(content, sort_keys=True)
    in_order = {name: _in_c_order(x) for name, x in arrays.items()}
    try:
        data = save(in_order, {"metaframe": text, "sha256": "0" * _DIGEST})
    except (SafetensorError, KeyError) as error:  # which of them depends on the version
        dtypes = sorted({x.dtype.name for x in in_order.values()})
        raise InputTypeError(
            f"arrays of dtypes {dtypes} cannot be written to a file: {error}. Convert them, "
            "complex numbers to their real and imaginary parts."
        ) from error
    at = _digest_at(data)
    assert at is not None, "the header has the place of the digest"
    return data[:at] + _digest(data, at) + data[at + _DIGEST :]


def decoded(data: bytes, name: str) -> tuple[Any, dict[str, np.ndarray[Any, Any]]]:
    """Content and arrays of the file `data`; `name` is what errors call it.

    Raises:
        CheckpointError: no file of metaframe, or a damaged one.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    at = _digest_at(data)
    if at is None:
        raise CheckpointError(f"{name} is no checkpoint of metaframe, or was cut off. {_AGAIN}")
    if _digest(data, at) != data[at : at + _DIGEST]:
        raise CheckpointError(f"{name} is damaged: its checksum does not match. {_AGAIN}")
    try:
        return json.loads(_header(data)["__metadata__"]["metaframe"]), load(data)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{name} cannot be read: {error}. {_AGAIN}") from error


def read_file(path: str | Path) -> bytes:
    """The bytes of a file.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read checkpoint {path}: {error.strerror}.") from error


def write_atomically(path: Path, data: bytes) -> None:
    """Write `path` so that at every moment it has its old content or all of the new.

    Any number of threads and processes may write the same file: one of them is the last.
    """
    # A name of its own for every writing, and short, whatever the length of the file's.
    temporary = path.with_name(f".{_HERE}-{os.getpid()}-{secrets.token_hex(8)}{_UNFINISHED}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_directory(path.parent)


_UNFINISHED = ".unfinished"
_HERE = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
"""This machine: process numbers of another one say nothing here."""


def clear_unfinished(folder: Path) -> None:
    """Remove what processes of this machine left unfinished when they died."""
    for file in folder.glob(f".{_HERE}-*{_UNFINISHED}"):
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


def _header(data: bytes) -> Any:
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def _digest_at(data: bytes) -> int | None:
    """Where the digest is. Inside a JSON string a quote is escaped, so the mark is unique."""
    end = 8 + int.from_bytes(data[:8], "little")
    at = data.find(_MARK, 8, end)
    return None if at < 0 or at + len(_MARK) + _DIGEST > len(data) else at + len(_MARK)


def _digest(data: bytes, at: int) -> bytes:
    whole = hashlib.sha256(data[:at])
    whole.update(b"0" * _DIGEST)
    whole.update(memoryview(data)[at + _DIGEST :])
    return whole.hexdigest().encode()


def _in_c_order(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    # safetensors writes the memory of any other layout as it lies; ascontiguousarray would make
    # a 0-d array 1-d.
    return np.array(x, dtype=x.dtype.newbyteorder("="), order="C", copy=True)


def _sync_directory(folder: Path) -> None:
    if os.name != "posix":  # directories cannot be opened elsewhere
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
