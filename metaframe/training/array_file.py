"""A file of arrays by name and of plain values, whole or refused.

It is a safetensors file: arrays in C order, and a JSON text with everything that is no array.
Nothing in it is code, and nothing is unpickled. The SHA-256 of the whole file, with zeros in the
place of the digest, stands in its header, so that a file that lost or changed a single bit anywhere
is refused before it is parsed; safetensors alone would load many such files as other numbers. A
checksum proves no origin, so whatever stands in a file is checked before it is used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from metaframe.errors import CheckpointError, InputError, InputTypeError
from metaframe.files import read
from metaframe.files.schema import integer, many, record, table, text

_MARK = b'"sha256":"'
_DIGEST = 64
_AGAIN = "Use an earlier checkpoint, or a copy of this one from before it was damaged."
_ARRAY = record({"dtype": text, "shape": many(integer), "data_offsets": many(integer)})
_HEADER = record({"__metadata__": record({"metaframe": text, "sha256": text})})
_UNREADABLE = (  # what safetensors raises for a header that is none of its own
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    TypeError,
    ValueError,
)


def encoded(arrays: Mapping[str, np.ndarray[Any, Any]], content: Any) -> bytes:
    """The bytes of a file with these arrays and this content, which JSON can hold.

    Raises:
        InputTypeError: an array of a dtype that the file has no name for.
        InputError: content that is no JSON, or could not be read again.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save

    try:
        words = json.dumps(content, sort_keys=True)
        read.parsed(words.encode())
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"what is to be saved could not be read again: {error}.") from error
    in_order = {name: _in_c_order(x) for name, x in arrays.items()}
    try:
        data = save(in_order, {"metaframe": words, "sha256": "0" * _DIGEST})
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
        return read.parsed(_content(data)), load(data)
    except (SafetensorError, *_UNREADABLE) as error:
        raise CheckpointError(f"{name} cannot be read: {error}. {_AGAIN}") from error


def read_file(path: str | Path) -> bytes:
    """The bytes of a file.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return read.contents(path)
    except OSError as error:
        raise CheckpointError(f"cannot read checkpoint {path}: {error.strerror}.") from error


def _content(data: bytes) -> bytes:
    """The JSON text of what is no array, from a header that is checked.

    Raises:
        ValueError: the header is none.
    """
    header = read.parsed(data[8 : 8 + int.from_bytes(data[:8], "little")])
    _HEADER(header, "its header")
    held = {name: entry for name, entry in header.items() if name != "__metadata__"}
    table(_ARRAY)(held, "its header")
    found: str = header["__metadata__"]["metaframe"]
    return found.encode()


def _digest_at(data: bytes) -> int | None:
    """The place of the digest. A JSON string escapes quotes, so the mark before it is unique."""
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
