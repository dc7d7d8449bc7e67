"""A clause: one promise of the backend contract, with the check that it is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from metaframe import tree
from metaframe.backend.contract import Backend
from metaframe.backend.selection import use_backend

Values = np.ndarray[Any, Any]
NO_FLOAT64 = "dtype/float64"
"""The gap that makes every other clause run in float32."""


@dataclass(frozen=True)
class Bench:
    """A backend under examination, selected, in the widest precision it has."""

    backend: Backend
    dtype: str = "float64"

    @property
    def exact(self) -> float:
        """The largest error of rounding against a closed form, as a part of its norm."""
        return 1e-12 if self.dtype == "float64" else 2e-6

    def arr(self, structure: Any, dtype: str | None = None) -> Any:
        """The NumPy leaves, numbers and lists of numbers of a structure as arrays.

        Floating leaves get `dtype`, by default the widest; others keep theirs.
        """
        leaves, spec = tree.flatten(structure, is_leaf=lambda node: isinstance(node, list))
        return tree.unflatten(spec, [self._array(leaf, dtype) for leaf in leaves])

    def _array(self, leaf: Any, dtype: str | None) -> Any:
        value = np.asarray(leaf)
        floating = self.dtype if value.dtype.kind == "f" else None
        return self.backend.asarray(value, dtype or floating)

    def to_np(self, structure: Any) -> Any:
        """The leaves that belong to the backend as NumPy arrays, others unchanged."""

        def convert(leaf: Any) -> Any:
            return self.backend.to_numpy(leaf) if self.backend.owns(leaf) else leaf

        return tree.map(convert, structure)

    def gradient(self, fn: Callable[..., Any], *xs: Any) -> list[Any]:
        """The gradients of the sum of `fn`, an array function, with respect to all of `xs`."""
        backend = self.backend
        run = backend.value_and_grad(lambda v: (backend.ops.sum(fn(*v)), ()))
        return list(run(tuple(xs))[2])


Check = Callable[[Bench], None]
"""Raises AssertionError where the promise is broken."""


@contextmanager
def on_the_bench(backend: Backend) -> Iterator[Bench]:
    """A block in which `backend` is selected, with 64-bit types unless it declares it has none."""
    dtype = "float32" if NO_FLOAT64 in backend.conformance_gaps else "float64"
    with backend.double_precision(), use_backend(backend.name, dtype=dtype):
        yield Bench(backend, dtype)


@dataclass(frozen=True)
class Clause:
    """One promise and its check.

    >>> from metaframe.testing.conformance import CLAUSES
    >>> clause = next(c for c in CLAUSES if c.id == "arrays/devices")
    >>> clause.promise
    'Every listed device takes arrays and is what `device_of` names; another is an error.'
    """

    id: str
    """Its name, such as "arrays/devices"."""
    promise: str
    """The promise, in a sentence."""
    check: Check = field(repr=False)
    """`check(bench)` raises `AssertionError` where the promise is not kept."""
    compiles: bool = False
    """True if the check calls the backend's compiler, which may be slow."""
    heavy: bool = False
    """True if the check takes more than a second or two on any backend."""

    def run(self, backend: Backend) -> None:
        """Check the promise.

        Args:
            backend: the backend to check.

        Raises:
            AssertionError: it is not kept, with the promise and what was found instead.
        """
        try:
            with on_the_bench(backend) as bench:
                self.check(bench)
        except AssertionError as error:
            raise AssertionError(
                f"backend {backend.name!r} breaks {self.id}: {self.promise}\n{error}"
            ) from error


class Chapter:
    """The clauses about one part of the contract, in the order in which they were written."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.clauses: list[Clause] = []

    def clause(self, name: str, *, compiles: bool = False) -> Callable[[Check], Check]:
        """Add the decorated check, whose docstring is the promise."""

        def add(check: Check) -> Check:
            self.add(name, (check.__doc__ or "").strip(), check, compiles=compiles)
            return check

        return add

    def add(self, name: str, promise: str, check: Check, **cost: bool) -> None:
        """Add a clause of a family; `compiles` and `heavy` as of `Clause`."""
        self.clauses.append(Clause(f"{self._name}/{name}", promise, check, **cost))


def same(found: Any, expected: Any) -> None:
    """Equal in every element, NaN included, and in shape."""
    found, expected = np.asarray(found), np.asarray(expected)
    equal(found.shape, expected.shape)
    np.testing.assert_array_equal(found, expected)


def equal(found: object, expected: object) -> None:
    """Equal as `==` says."""
    if found != expected:
        raise AssertionError(f"expected {expected!r}, received {found!r}")


def close(found: Any, expected: Any, tolerance: float) -> None:
    """Equal shapes, and no element off by more than `tolerance` of the largest, or of 1."""
    found, expected = np.asarray(found), np.asarray(expected)
    equal(found.shape, expected.shape)
    scale = max(1.0, float(np.abs(expected).max(initial=0.0)))
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * scale)
