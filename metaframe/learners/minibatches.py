"""Minibatches of a support set: which examples each inner step sees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from metaframe import arguments, ops, tree
from metaframe.backend.types import Array
from metaframe.errors import InputError, InputTypeError

Rows = np.ndarray[Any, Any]
Table = Callable[[int, int], Rows]
"""`(steps, examples) -> rows`, integers of shape (steps, batch size)."""


@dataclass(frozen=True)
class Minibatches:
    """Seeded minibatches of `size` examples for `MAML(inner_batches=...)`.

    The examples are shuffled and dealt out in turn, shuffled again when all were seen. Which of
    them step k gets is a function of the seed and k, the same on every backend.

    Args:
        size: examples in a minibatch, at least 1. A set smaller than that is an error.
        seed: another one gives another order.

    >>> Minibatches(2)(3, 4).shape, sorted(Minibatches(2)(2, 4).ravel().tolist())
    ((3, 2), [0, 1, 2, 3])
    """

    size: int
    seed: int = 0

    def __post_init__(self) -> None:
        arguments.integer(self.size, "the size of inner_batches", at_least=1)
        arguments.integer(self.seed, "the seed of inner_batches", at_least=0)

    def __call__(self, steps: int, examples: int) -> Rows:
        """Deal out the examples.

        Args:
            steps: the number of inner steps.
            examples: the number of examples in the support set.

        Returns:
            The indices of the examples that each step sees, (steps, size).

        Raises:
            InputError: a support set smaller than a minibatch.
        """
        if self.size > examples:
            raise InputError(
                f"inner_batches takes {self.size} examples a step, and the support set has "
                f"{examples}. Take fewer, or give larger support sets."
            )
        passes = -(-steps * self.size // examples)
        orders = [
            np.random.Generator(np.random.Philox(key=[self.seed, i])).permutation(examples)
            for i in range(passes)
        ]
        dealt = np.concatenate(orders) if orders else np.zeros(0, np.int64)
        return dealt[: steps * self.size].reshape(steps, self.size)


@dataclass(frozen=True, eq=False)
class GivenRows:
    """Rows of one's own, for steps one after the other; after the last they start over."""

    rows: Rows

    def __call__(self, steps: int, examples: int) -> Rows:
        """The rows of the first `steps` steps."""
        if self.rows.size and int(self.rows.max()) >= examples:
            raise InputError(
                f"inner_batches names example {int(self.rows.max())}, and the support set has "
                f"{examples}: 0 to {examples - 1}."
            )
        return self.rows[np.arange(steps) % len(self.rows)]


def minibatches(given: Any) -> Table | None:
    """The argument `inner_batches` in one form.

    Raises:
        InputError, InputTypeError: neither a size nor rows.
    """
    if given is None or isinstance(given, Minibatches):
        return given
    if isinstance(given, (int, np.integer)) and not isinstance(given, bool):
        return Minibatches(int(given))
    if isinstance(given, (np.ndarray, list, tuple)):
        rows = np.asarray(given)
        if rows.ndim != 2 or rows.dtype.kind not in "iu" or not rows.size or rows.min() < 0:
            raise InputError(
                "the rows in inner_batches are integers from 0, of shape (steps, batch size), "
                f"received {rows.dtype} of shape {rows.shape}."
            )
        return GivenRows(rows.astype(np.int32))
    raise InputTypeError(
        "inner_batches is the size of a minibatch, Minibatches(size, seed=...), or integers of "
        f"shape (steps, batch size), received {type(given).__qualname__}."
    )


def count(structure: Any) -> int:
    """The number of examples in a support set."""
    return int(tree.leaves(structure)[0].shape[0])


def chosen(structure: Any, rows: Array) -> Any:
    """These examples of a structure of arrays."""
    return tree.map(lambda x: ops.take(x, rows), structure)
