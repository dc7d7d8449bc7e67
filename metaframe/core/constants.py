"""The identity of a constant of a compiled program: its type and its bits.

A constant is an argument that is no array. Python's `==` is not enough: 0.0 equals -0.0, 1 equals
True, NaN does not equal itself, and an object that is changed in place equals itself before and
after. The rule, for constants and for everything in them:

- numbers, strings, NumPy arrays, tuples, lists, sets and dicts count by their values;
- dataclasses and other objects by the values of their attributes, and those that are compared by
  identity by that too;
- functions, classes, modules and arrays of a framework by identity. What a function closes over,
  its globals and its defaults are taken to stay as they are, as by `jax.jit`.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import logging
import os
import struct
import types
from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from metaframe.backend.registry import owner
from metaframe.errors import InputTypeError

PARTS_AT_MOST = 10_000
"""Parts of one constant, which every call looks at."""

_EQUAL = frozenset({bool, int, str, bytes, types.NoneType, types.EllipsisType})
"""Their `==` tells everything, within one type."""
_IDENTITY = (
    types.FunctionType,
    types.BuiltinFunctionType,
    types.ModuleType,
    type,
    np.ufunc,
    enum.Enum,
    logging.Logger,
)


class Settled:
    """Base of immutable values whose own `==` tells everything, and which are not looked into."""


def constant(x: object) -> Hashable:
    """A value that is equal for two constants if one compiled program serves for both.

    Raises:
        InputTypeError: `x` has too many parts.

    >>> constant(0.0) == constant(-0.0), constant(1) == constant(True)
    (False, False)
    >>> constant(float("nan")) == constant(float("nan"))
    True
    """
    kind = type(x)
    if kind in _EQUAL or kind is types.FunctionType:
        return kind, x
    return _Look().at(x)


class Same:
    """Equal to the same object only, and keeps it."""

    def __init__(self, x: object) -> None:
        self._x = x

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other._x is self._x

    def __hash__(self) -> int:
        return id(self._x)

    def __repr__(self) -> str:
        return f"<{type(self._x).__qualname__} at {id(self._x):#x}>"


class _Look:
    """One look at a constant, which goes into every object once."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[int, object]] = {}

    def at(self, x: Any) -> Hashable:
        kind = type(x)
        if kind in _EQUAL:
            return kind, x
        if kind is float:
            return kind, _bits(x)
        if isinstance(x, _IDENTITY):
            return kind, x
        if isinstance(x, np.generic):
            return kind, x.dtype, x.tobytes()
        if isinstance(x, Settled):
            return kind, x
        if id(x) in self._seen:
            return "seen", self._seen[id(x)][0]
        # With the object: what a property made would be gone, and another get its number.
        self._seen[id(x)] = len(self._seen), x
        if len(self._seen) > PARTS_AT_MOST:
            raise InputTypeError(_too_large(x))
        return kind, *self._parts(x)

    def _parts(self, x: Any) -> Iterator[Hashable]:
        if isinstance(x, np.ndarray):
            yield from (x.shape, x.dtype)
            yield self.at(x.tolist()) if x.dtype.hasobject else _digest(x)
        elif owner(x) is not None:
            yield Same(x)
        else:
            yield from self._of_object(x)

    def _of_object(self, x: Any) -> Iterator[Hashable]:
        contents = self._contents(x)
        attributes = dict(_attributes(x))
        yield from self._each(attributes)
        yield from self._each(attributes.values())
        if contents is not None:
            yield contents
        elif type(x).__eq__ is object.__eq__:  # type: ignore[comparison-overlap]
            yield Same(x)
        elif not attributes:
            # Written in C: `==` and what it says of itself is all there is to see.
            yield Same(x) if type(x).__hash__ is None else x
            yield repr(x)

    def _contents(self, x: Any) -> Hashable:
        """The contents of `x` as a value of a built-in type, or of one derived from it."""
        if isinstance(x, types.MethodType):
            return x.__func__, self.at(x.__self__)
        if isinstance(x, functools.partial):
            return tuple(self._each((x.func, x.args, x.keywords)))
        if isinstance(x, Mapping):
            return tuple((self.at(key), self.at(value)) for key, value in x.items())
        if isinstance(x, (set, frozenset)):
            return frozenset(self._each(x))
        if isinstance(x, (tuple, list, deque)):
            return tuple(self._each(x))
        if isinstance(x, os.PathLike):
            return os.fspath(x)  # type: ignore[no-any-return]
        if isinstance(x, (float, complex)):
            return _bits(x.real), _bits(x.imag)
        for kind in (int, str, bytes, bytearray):
            if isinstance(x, kind):
                return bytes(x) if kind is bytearray else kind(x)  # type: ignore[arg-type, return-value]
        return None

    def _each(self, parts: Iterable[Any]) -> Iterator[Hashable]:
        return map(self.at, parts)


def _bits(x: float) -> str | bytes:
    # Readable, in a message about what made another program; NaN has a sign and a payload.
    return repr(float(x)) if x == x else struct.pack("d", x)


def _attributes(x: Any) -> Iterator[tuple[str, Any]]:
    names = [name for cls in type(x).__mro__ for name in _slots(cls)]
    yield from ((name, getattr(x, name)) for name in names if hasattr(x, name))
    yield from getattr(x, "__dict__", {}).items()


def _slots(cls: type) -> tuple[str, ...]:
    found = cls.__dict__.get("__slots__", ())
    names = (found,) if isinstance(found, str) else tuple(found)
    return tuple(_mangled(name, cls) for name in names if name not in ("__dict__", "__weakref__"))


def _mangled(name: str, cls: type) -> str:
    private = name.startswith("__") and not name.endswith("__")
    return f"_{cls.__name__.lstrip('_')}{name}" if private else name


def _digest(x: np.ndarray[Any, Any]) -> bytes:
    return hashlib.blake2b(x.tobytes()).digest()


def arrays_in(x: object) -> Iterator[Any]:
    """The arrays of frameworks that a constant holds, those that a function closes over included.

    >>> import torch
    >>> scale = torch.tensor(2.0)
    >>> list(arrays_in(lambda x, scale=scale: scale * x))
    [tensor(2.)]
    """
    ahead, seen = [x], dict[int, object]()
    while ahead and len(seen) < PARTS_AT_MOST:
        part = ahead.pop()
        if id(part) in seen or isinstance(part, (str, bytes, int, float, np.ndarray, type)):
            continue
        seen[id(part)] = part
        if owner(part) is not None:
            yield part
        else:
            ahead.extend(_held(part))  # `+=` asks its right side first, which may be a proxy


def _held(x: Any) -> Iterable[Any]:
    if isinstance(x, types.FunctionType):
        cells = [cell.cell_contents for cell in x.__closure__ or () if cell != types.CellType()]
        return [*cells, *(x.__defaults__ or ()), *(x.__kwdefaults__ or {}).values()]
    if isinstance(x, types.MethodType):
        return x.__func__, x.__self__
    if isinstance(x, functools.partial):
        return x.func, *x.args, *x.keywords.values()
    if isinstance(x, _IDENTITY):
        return ()
    if isinstance(x, Mapping):
        return x.values()
    if isinstance(x, (set, frozenset, tuple, list, deque)):
        return x
    return [value for _, value in _attributes(x)]


def _too_large(x: object) -> str:
    return (
        f"a compiled function received a constant with more than {PARTS_AT_MOST} parts, the last "
        f"of them a {type(x).__qualname__}. Every call would look at all of them. Pass what is "
        "needed of it: arrays, numbers, or a function that closes over it."
    )
