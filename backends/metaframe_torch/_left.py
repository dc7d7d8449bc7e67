"""Tensors that a model leaves in its attributes, taken away again at the end of a transform.

A loss may read them there, such as activations. Outside of the `vmap` or the trace in which they
were made they are no tensors any more: the model's next call would crash on a mask or a table of
positions that it keeps from its first.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from metaframe_torch import _tape

OF_TORCH = frozenset(vars(nn.Module()))
"""Attributes of every module, in which layers, parameters, buffers and hooks are registered."""


class Place(NamedTuple):
    """The attributes of a module, or a dict or a list among these."""

    held: Any
    before: Any
    """A copy of it."""


class _Left(threading.local):
    def __init__(self) -> None:
        self.ways_back: list[Callable[[], None]] = []


_left = _Left()


def places(modules: Iterable[nn.Module]) -> list[Place]:
    """The places where `modules` may leave tensors; none without a transform to escape from."""
    if not _tape.transforming():
        return []
    found = []
    for module in modules:
        attributes = vars(module)
        own = [x for name, x in attributes.items() if name not in OF_TORCH]
        found += [Place(x, x.copy()) for x in (attributes, *own) if type(x) in (dict, list)]
    return found


def note(places: Iterable[Place]) -> None:
    """Keep in mind what was left in `places` since they were found."""
    for held, before in places:
        if isinstance(held, list):
            known = set(map(id, before))
            if any(isinstance(x, Tensor) and id(x) not in known for x in held):
                _left.ways_back.append(partial(_refill, held, before))
            continue
        for key, value in held.items():
            if isinstance(value, Tensor) and before.get(key) is not value:
                _left.ways_back.append(partial(_reset, held, before, key, value))


def _refill(held: list[Any], before: list[Any]) -> None:
    held[:] = before


def _reset(held: dict[Any, Any], before: dict[Any, Any], key: Any, value: Tensor) -> None:
    if held.get(key) is not value:
        return
    if key in before:
        held[key] = before[key]
    else:
        del held[key]


@contextmanager
def taken_away() -> Iterator[None]:
    """A block at whose end, if it is that of the outermost transform, nothing is left."""
    try:
        yield
    finally:
        if not _tape.transforming():
            while _left.ways_back:
                _left.ways_back.pop()()
