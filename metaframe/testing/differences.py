"""Finite differences: the derivative of a cost without differentiating it.

The fourth-order stencil (8 (f(h) - f(-h)) - (f(2h) - f(-2h))) / 12 h has an error of order h^4 from
the function and of order eps / h from rounding. It is taken at several h; where neighbouring ones
agree best is the answer, and how well they agree is how far to trust it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from metaframe.testing.subject import Gradient, Subject, Values

CostAt = Callable[[Sequence[Values]], float]
"""The cost at values of the variables."""
SIZES = (1e-2, 2e-3, 4e-4, 8e-5)
"""Steps h along a direction of norm 1."""
TRUSTED = 1e-4
"""A slope is used if its error is below this part of it."""


class Slope(NamedTuple):
    """The derivative along a line."""

    value: float
    error: float


class Component(NamedTuple):
    """One leaf of a gradient along a random direction, by differences and as claimed."""

    name: str
    slope: Slope
    claimed: float
    scale: float
    """The norm of the gradient, to which differences are compared."""

    def agrees(self, rtol: float) -> bool:
        """Is the claim within `rtol` of the gradient's norm, and the differences' own error?"""
        allowed = rtol * max(self.scale, abs(self.slope.value)) + 10 * self.slope.error
        return bool(abs(self.slope.value - self.claimed) <= allowed)

    @property
    def known(self) -> bool:
        """Is the cost smooth and repeatable enough for differences to say anything?"""
        return self.slope.error <= TRUSTED * max(self.scale, abs(self.slope.value))


def slope(fn: Callable[[float], float]) -> Slope:
    """The derivative of `fn` at 0.

    >>> import math
    >>> abs(slope(lambda t: math.exp(2 * t)).value - 2.0) < 1e-11
    True
    """
    here = fn(0.0)
    estimates, jumps = [], []
    for h in SIZES:
        right, left = fn(h), fn(-h)
        near, far = right - left, fn(2 * h) - fn(-2 * h)
        estimates.append((8 * near - far) / (12 * h))
        jumps.append(abs(right - 2 * here + left) / h)
    errors = np.abs(np.diff(estimates))
    best = int(np.argmin(errors)) if np.all(np.isfinite(errors)) else 0
    value, error = float(estimates[best + 1]), float(errors[best])
    # The difference between the slopes to the right and to the left shrinks with h, unless there
    # is a kink at the very point, which central differences do not see.
    kink = jumps[-1] > 1e-6 * max(abs(value), abs(here)) and jumps[-1] > jumps[0] / 4
    return Slope(value, max(error, jumps[-1]) if kink else error)


def components(
    subject: Subject, gradient: Gradient, cost_at: CostAt | None = None
) -> list[Component]:
    """Every leaf of the gradient along a random direction of norm 1.

    `cost_at` takes the place of the subject's own.
    """
    start = subject.numbers(subject.variables)
    scale = float(np.sqrt(sum(np.sum(g**2) for g in gradient.arrays)))
    rng = np.random.default_rng(0)
    found = []
    for i, (name, claimed) in enumerate(zip(subject.names, gradient.arrays, strict=True)):
        if start[i].size == 0:
            continue
        drawn = rng.normal(size=start[i].shape)
        direction = np.asarray(drawn / np.linalg.norm(drawn))
        line = _line(cost_at or subject.cost_at, start, i, direction)
        found.append(Component(name, slope(line), float(np.sum(claimed * direction)), scale))
    return found


def _line(
    cost_at: CostAt, start: list[Values], leaf: int, direction: Values
) -> Callable[[float], float]:
    def along(t: float) -> float:
        moved = [x + t * direction if i == leaf else x for i, x in enumerate(start)]
        return cost_at(moved)

    return along
