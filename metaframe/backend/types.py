"""Types of the flat arrays and functions that backends see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

Array = Any
Arrays = tuple[Array, ...]
ArraysFn = Callable[[Arrays], Arrays]
"""A pure function from a flat tuple of arrays to a flat tuple of arrays."""
ScalarFn = Callable[[Arrays], tuple[Array, Arrays]]
"""A pure function from a flat tuple of arrays to (scalar, auxiliary arrays)."""
ObjectiveFn = Callable[[Arrays], Array]
"""A pure function from a flat tuple of arrays to a scalar."""
RowFn = Callable[[Arrays, Arrays], tuple[Arrays, Arrays]]
"""One application in a loop: `(carry, row) -> (carry, what it returns besides)`."""
MappedGradient = Callable[[Arrays, Arrays, Arrays], tuple[Array, Arrays, Arrays]]
"""`(xs, held, tasks) -> (scalars, aux, gradients with respect to xs)`."""


class TaskCost(Protocol):
    """The cost of a task as a function of flat arrays."""

    def __call__(self, xs: Arrays, held: Arrays, task: Arrays) -> tuple[Array, Arrays]:
        """`(differentiated variables, held variables, task) -> (scalar, aux)`."""
