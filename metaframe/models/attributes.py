"""Plain attributes of a model, which decide its results besides its arrays and its code.

A compiled program has them built in, so one that was made under others must not be used again.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager

PLAIN = frozenset({bool, int, float, str})
Parts = Callable[[], Iterable[object]]
"""The layers of a model, itself included."""


class Flags:
    """The classes of a model's layers, and their public attributes that are numbers or strings.

    Those that the model changes itself, such as a count of its calls, are left out: a compiled
    program changes them no more, and each would be another program.

    >>> import torch
    >>> layer, flags = torch.nn.Dropout(0.5), Flags()
    >>> before = flags.of(layer.modules)
    >>> layer.p = 0.1
    >>> flags.of(layer.modules) == before
    False
    """

    def __init__(self) -> None:
        self._moving: frozenset[tuple[int, str]] | None = None

    def of(self, parts: Parts) -> Hashable:
        """The attributes at this moment: equal if one program serves."""
        moving, flags = self._moving, list[object]()
        for i, part in enumerate(parts()):
            flags.append(type(part))
            for name, value in vars(part).items():
                if type(value) in PLAIN and name[0] != "_" and not (moving and (i, name) in moving):
                    # With the type: True, 1 and 1.0 are equal and compile to different programs.
                    flags += name, type(value), value
        return tuple(flags)  # flat, since every call of a compiled step hashes and compares it

    @contextmanager
    def called(self, parts: Parts) -> Iterator[None]:
        """Around a call of the model, the first of which tells what it changes itself."""
        if self._moving is not None:
            yield
            return
        before = _plain(parts)
        yield
        self._moving = frozenset(key for key, _ in before ^ _plain(parts))


def _plain(parts: Parts) -> set[tuple[tuple[int, str], object]]:
    return {
        ((i, name), value)
        for i, part in enumerate(parts())
        for name, value in vars(part).items()
        if type(value) in PLAIN
    }
