"""Damage to files: to bytes, to plain values, and under checksums that are made right again."""

from __future__ import annotations

import copy
import json
import random
import zlib
from collections.abc import Callable, Mapping
from typing import Any

from safetensors.numpy import save

from metaframe.training.array_file import _digest, _digest_at


def nested(depth: int) -> Any:
    """Lists in lists."""
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 2**31, 2**63 - 1, 2**63, 2**64, -(2**70), 10**400),
    *(0.5, -0.0, 1e308, float("inf"), float("nan"), "", "x", "x" * 300, "\0", "\udcff", "é\u2028"),
    *(list, dict, lambda: [1], lambda: {"x": 1}, lambda: nested(30)),
    *(lambda: nested(150), lambda: nested(300)),
)
"""Plain values, those that are structures each time anew."""


def signed(arrays: Mapping[str, Any], content: Any) -> bytes:
    """A file as `array_file.encoded` makes it, whatever its content, which is not checked."""
    words = content if isinstance(content, str) else json.dumps(content)
    data = save(dict(arrays), {"metaframe": words, "sha256": "0" * 64})
    return resigned(data)


def resigned(data: bytes) -> bytes:
    """The file with the right checksum in its place."""
    at = _digest_at(data)
    return data if at is None else data[:at] + _digest(data, at) + data[at + 64 :]


def mutated_value(rng: random.Random, value: Any) -> Any:
    """A copy of a plain value with one to three changes anywhere in it."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        holder = rng.choice(_holders(value) or [[]])
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        if not keys:
            continue
        key = rng.choice(keys)
        change = rng.random()
        if change < 0.6:
            odd = rng.choice(ODD)
            holder[key] = odd() if callable(odd) else odd
        elif change < 0.8:
            del holder[key]
        elif isinstance(holder, dict):
            holder[f"{key}{rng.choice(('', 'x', '/'))}"] = holder.pop(key)
        else:
            holder.append(holder[key])
    return value


def _holders(value: Any) -> list[Any]:
    """Every object and list in a plain value."""
    found, todo = [], [value]
    while todo:
        node = todo.pop()
        if isinstance(node, dict | list):
            found.append(node)
            todo += node.values() if isinstance(node, dict) else node
    return found


_WORDS = (b"\x00", b"\xff", b"\x00" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff", b"\x80" + b"\x00" * 3)
_TEXTS = (b'"', b"[" * 50, b"{" * 50, b"\\", b",", b"1e999", b"9" * 5000, b"\n", b"\xed\xa0\x80")


def mutated_bytes(rng: random.Random, data: bytes, other: bytes = b"") -> bytes:
    """One to four changes: bits, bytes, blocks, cuts, and pieces of `other`."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        rng.choice(_CHANGES)(rng, found, other)
    return bytes(found)


def _flip(rng: random.Random, data: bytearray, other: bytes) -> None:
    del other
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _overwrite(rng: random.Random, data: bytearray, other: bytes) -> None:
    del other
    word, at = rng.choice(_WORDS), rng.randrange(len(data) + 1)
    data[at : at + len(word)] = word


def _insert(rng: random.Random, data: bytearray, other: bytes) -> None:
    del other
    at = rng.randrange(len(data) + 1)
    data[at:at] = rng.choice(_TEXTS)


def _remove(rng: random.Random, data: bytearray, other: bytes) -> None:
    del other
    at = rng.randrange(len(data) + 1)
    del data[at : at + rng.choice((1, 4, 64))]


def _cut(rng: random.Random, data: bytearray, other: bytes) -> None:
    del other
    del data[rng.randrange(len(data) + 1) :]


def _repeat(rng: random.Random, data: bytearray, other: bytes) -> None:
    del other
    at = rng.randrange(len(data) + 1)
    data[at:at] = data[at : at + rng.choice((4, 64, 1024))]


def _splice(rng: random.Random, data: bytearray, other: bytes) -> None:
    at, start = rng.randrange(len(data) + 1), rng.randrange(len(other) + 1)
    data[at:] = other[start:]


_CHANGES: tuple[Callable[[random.Random, bytearray, bytes], None], ...] = (
    *(_flip, _flip, _overwrite, _overwrite, _insert, _remove, _cut, _repeat, _splice),
)


def right_checksums(png: bytes) -> bytes:
    """A PNG with the checksum of every chunk made right, as far as there are chunks."""
    found, at = bytearray(png), 8
    while at + 12 <= len(found):
        size = int.from_bytes(found[at : at + 4], "big")
        end = at + 8 + size
        if end + 4 > len(found):
            break
        found[end : end + 4] = zlib.crc32(found[at + 4 : end]).to_bytes(4, "big")
        at = end + 4
    return bytes(found)
