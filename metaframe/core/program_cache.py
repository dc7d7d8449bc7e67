"""The compiled programs of one function: a bounded number, and a warning when they pile up.

Each kind of call has a program of its own, so an argument that is another one at every call would
compile again and again and keep everything. The program that was not used for longest goes, and a
warning says which argument it is.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import numbers
import reprlib
import threading
import types
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from metaframe import tree
from metaframe.core.callers import warn_the_user

P = TypeVar("P")

PROGRAMS_KEPT = 64
"""Programs of one function."""
WARN_FROM = 16
"""Programs at which to warn for the first time; then whenever they have doubled."""
PARTS_NAMED = 3
VALUES_SHOWN = 3
DEPTH = 6
"""The depth to which the fields of a dataclass among the arguments are told apart."""


class Signature(NamedTuple):
    """The inputs that a program was made for."""

    structure: tree.TreeSpec
    """Of the arguments."""
    selection: Any
    ambient: Hashable
    """`Backend.ambient` of the arrays' framework, the settings of Keras, the attention's kernel."""
    leaves: tuple[Hashable, ...]
    keys: str = ""
    """The structure in words where it has keys that are no strings: 1 and True are equal."""


class ProgramCache(Generic[P]):
    """Programs by their signatures.

    Args:
        fn: the function, whose name and arguments the warning names.

    Attributes:
        traces: how many programs were added so far.
    """

    def __init__(self, fn: Callable[..., Any]) -> None:
        self._name = name_of(fn)
        self._arguments = _arguments(fn)
        self._entries: dict[Signature, _Entry[P]] = {}
        self._clock = itertools.count()
        self._lock = threading.Lock()
        self.traces = 0

    def get(self, signature: Signature) -> P | None:
        """The program of this signature, if it is kept. Every call of a function asks."""
        entry = self._entries.get(signature)
        if entry is None:
            return None
        entry.used = next(self._clock)
        return entry.program

    def add(self, program: P, signatures: Sequence[Signature], leaves: Sequence[Any]) -> None:
        """Keep a program under all of these signatures; `leaves` are what it was made for."""
        parts = _described(signatures[0], leaves, self._arguments)
        entry = _Entry(program, signatures[0], parts)
        with self._lock:
            entry.used = next(self._clock)
            self._entries.update(dict.fromkeys(signatures, entry))
            self.traces += 1
            kept = self._kept()
            if len(kept) > PROGRAMS_KEPT:
                oldest = min(kept, key=lambda e: e.used)
                self._entries = {s: e for s, e in self._entries.items() if e is not oldest}
        if self.traces >= WARN_FROM and self.traces & (self.traces - 1) == 0:
            warn_the_user(_warning(self._name, self.traces, kept))

    @property
    def programs(self) -> tuple[P, ...]:
        """Those that are kept, in the order in which they were made."""
        return tuple(entry.program for entry in self._kept())

    @property
    def signatures(self) -> tuple[Signature, ...]:
        """The signature of each program that is kept."""
        return tuple(entry.signature for entry in self._kept())

    def _kept(self) -> list[_Entry[P]]:
        return list({id(entry): entry for entry in list(self._entries.values())}.values())


class _Part(NamedTuple):
    """A property of an argument that a program depends on."""

    where: str
    kind: str
    """ "shape", "dtype", "function", or the name of a constant's type."""


class _Value(NamedTuple):
    """The value of such a property."""

    key: Hashable
    text: str
    advice: str


class _Entry(Generic[P]):
    def __init__(self, program: P, signature: Signature, parts: dict[_Part, _Value]) -> None:
        self.program, self.signature, self.parts = program, signature, parts
        self.used = 0


def name_of(fn: Callable[..., Any]) -> str:
    """The name of a function as messages have it."""
    return str(getattr(fn, "__name__", repr(fn)))


def _arguments(fn: Callable[..., Any]) -> dict[str, str]:
    """The names of positional arguments, by their numbers."""
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):  # it tells nothing of them
        return {}
    positional = (p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))
    return {str(i): p.name for i, p in enumerate(positional)}


def _described(
    signature: Signature, leaves: Sequence[Any], arguments: Mapping[str, str]
) -> dict[_Part, _Value]:
    chains = tree.chains(signature.structure)
    found: list[tuple[_Part, _Value]] = []
    for chain, leaf, kind in zip(chains, leaves, signature.leaves, strict=True):
        # The first part of a chain says whether it was a positional or a keyword argument.
        by_keyword, name, *rest = chain.split("/")
        name = name if by_keyword == "1" else arguments.get(name, name)
        found += _parts("/".join((name, *rest)), leaf, kind)
    return dict(found)


def _parts(where: str, x: Any, kind: Hashable, depth: int = 0) -> Iterator[tuple[_Part, _Value]]:
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        shape, dtype = tuple(x.shape), str(x.dtype)
        yield _Part(where, "shape"), _Value(shape, str(shape), _PAD)
        yield _Part(where, "dtype"), _Value(dtype, dtype, _CONVERT)
        yield _Part(where, "device or layout"), _Value(None, "", _CONVERT)
    elif isinstance(x, types.FunctionType):
        yield _Part(where, "function"), _Value(id(x), x.__qualname__, _SAME)
    elif dataclasses.is_dataclass(x) and not isinstance(x, type) and depth < DEPTH:
        for field in dataclasses.fields(x):
            value = getattr(x, field.name)
            yield from _parts(f"{where}.{field.name}", value, _own_key(value), depth + 1)
    else:
        number = isinstance(x, numbers.Number)
        advice = _ARRAY if number else _ONCE
        yield _Part(where, type(x).__name__), _Value(kind, reprlib.repr(x), advice)


def _own_key(x: Any) -> Hashable:
    return (type(x), x) if isinstance(x, Hashable) else id(x)


_PAD = "pad to a few sizes"
_CONVERT = "convert it before the call"
_SAME = "pass the same function object each time"
_ARRAY = "pass an array for a number that changes"
_ONCE = "make it once and pass the same one"


def _warning(name: str, count: int, entries: Sequence[_Entry[Any]]) -> str:
    found = [*_changing_parts(entries), *_changing_state(entries)]
    changing = "; ".join(found[:PARTS_NAMED]) or "the devices or the types of the arguments"
    return (
        f"{name} was compiled {count} times. What changes between its calls: {changing}. Each "
        f"combination is a program of its own, and the {PROGRAMS_KEPT} used last are kept."
    )


def _changing_parts(entries: Sequence[_Entry[Any]]) -> list[str]:
    structure = entries[-1].signature.structure
    values: dict[_Part, dict[Hashable, _Value]] = {}
    for entry in entries:
        if entry.signature.structure == structure:
            for part, value in entry.parts.items():
                values.setdefault(part, {})[value.key] = value
    changing = {part: list(each.values()) for part, each in values.items() if len(each) > 1}
    often = sorted(changing, key=lambda part: -len(changing[part]))
    return [
        f"the {part.kind} of argument {part.where!r} ({_listed(v.text for v in changing[part])}): "
        f"{changing[part][0].advice}"
        for part in often
    ]


def _changing_state(entries: Sequence[_Entry[Any]]) -> list[str]:
    of: dict[str, Callable[[Signature], object]] = {
        "the structure of the arguments": lambda s: (s.structure, s.keys),
        "the selected backend or dtype": lambda s: s.selection,
        "the state of the framework, such as a default dtype": lambda s: s.ambient,
    }
    signatures = [entry.signature for entry in entries]
    return [what for what, get in of.items() if len(set(map(get, signatures))) > 1]


def _listed(texts: Iterable[str]) -> str:
    each = list(dict.fromkeys(texts))
    return ", ".join(each[:VALUES_SHOWN]) + (", ..." if len(each) > VALUES_SHOWN else "")
