"""The arrays that a function can reach, and a look at those that a call has changed.

A pure function changes nothing. What it could change is in its arguments, in the variables it
closes over, in its defaults, in the globals it names, and in the attributes of the objects found
there.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np

from metaframe.backend.registry import owner

DEPTH = 10
"""The depth, in attributes and items, to which to look."""

Found = Iterator[tuple[str, object]]


class Watch:
    """The values of all arrays that can be reached from some objects.

    >>> running = np.zeros(2)
    >>> def cost(x):
    ...     running[:] += x
    >>> watch = Watch({"cost": cost})
    >>> cost(1.0)
    >>> watch.changed()
    ['running of cost']
    """

    def __init__(self, roots: Mapping[str, object]) -> None:
        self._roots = dict(roots)
        self._before = self._values()

    def changed(self) -> list[str]:
        """The names of the arrays whose values are no longer what they were."""
        now = self._values()
        return sorted(
            name
            for name, value in self._before.items()
            if name in now and not _same(value, now[name])
        )

    def now(self) -> dict[str, np.ndarray[Any, Any]]:
        """The arrays that can be reached, by name."""
        return self._values()

    def appeared(self) -> list[str]:
        """The names of arrays that could not be reached before."""
        return sorted(set(self._values()) - set(self._before))

    def _values(self) -> dict[str, np.ndarray[Any, Any]]:
        seen: set[int] = set()
        found: dict[str, np.ndarray[Any, Any]] = {}
        for name, root in self._roots.items():
            for path, array in _arrays(root, "", seen, DEPTH):
                found[f"{path} of {name}" if path else name] = array
        return found


def _same(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> bool:
    return one.shape == other.shape and one.tobytes() == other.tobytes()


def _arrays(
    node: object, path: str, seen: set[int], depth: int
) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    if id(node) in seen or depth == 0:
        return
    seen.add(id(node))
    if isinstance(node, np.ndarray):
        yield path, node.copy()
        return
    backend = owner(node)
    if backend is not None:
        if not backend.is_traced(node):
            yield path, np.array(backend.to_numpy(node))
        return
    for name, child in _below(node):
        # Private names between the public ones, as of the tables in which a module keeps its
        # buffers, tell the reader nothing.
        shown = path if name.startswith("_") else f"{path}.{name}" if path else name
        yield from _arrays(child, shown, seen, depth - 1)


def _below(node: object) -> Found:
    if isinstance(node, FunctionType):
        yield from _of_function(node)
    elif isinstance(node, MethodType):
        yield from (("__self__", node.__self__), ("__func__", node.__func__))
    elif isinstance(node, functools.partial):
        parts = {"_func": node.func, "_args": node.args, "_keywords": node.keywords}
        yield from parts.items()
    elif isinstance(node, Mapping):
        yield from ((str(key), value) for key, value in node.items())
    elif isinstance(node, (list, tuple)):
        yield from ((str(i), value) for i, value in enumerate(node))
    elif not isinstance(node, (type, ModuleType, BuiltinFunctionType)):
        yield from vars(node).items() if hasattr(node, "__dict__") else ()


def _of_function(fn: FunctionType) -> Found:
    yield from zip(fn.__code__.co_freevars, map(_content, fn.__closure__ or ()), strict=True)
    yield from (("_defaults", x) for x in (fn.__defaults__, fn.__kwdefaults__))
    # A function names its module's globals, not those of the libraries it imports from there.
    names: Iterable[str] = fn.__code__.co_names
    for name in names:
        value = fn.__globals__.get(name)
        foreign = isinstance(value, FunctionType) and value.__globals__ is not fn.__globals__
        if not foreign:
            yield name, value
    if hasattr(fn, "__wrapped__"):
        yield "__wrapped__", fn.__wrapped__


def _content(cell: Any) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None
