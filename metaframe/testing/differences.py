"""Finite differences: the derivative of a cost without differentiating it.

The fourth-order stencil (8 (f(h) - f(-h)) - (f(2h) - f(-2h))) / 12 h has an error of order h^4 from
the function and of order eps / h from rounding. It is taken at several h; where neighbouring ones
agree best is the answer, and how well they agree is how far to trust it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from metaframe.testing.subject import Gradient, Subject, Values

CostAt = Callable[[Sequence[Values]], float]
"""The cost at values of the variables."""
SIZES = (1e-2, 2e-3, 4e-4, 8e-5)
"""Steps h along a direction of norm 1."""
FINER = 1 / 625
"""The part of them that is taken where they meet kinks."""
ORDINARY = 30.0
"""Numbers up to so many times larger or smaller than 1 are moved by steps of `SIZES`."""
PRECISE = 1e-7
"""An error below this part of the gradient needs no explanation."""
TRUSTED = 1e-4
"""A larger one, up to this part, is that of rounding or the slope is not used."""
NEAR = 100
"""Up to so many times its rounding, a number cannot be told from 0."""
FAR = 1e4
"""Noise so many times the rounding of float64 comes from something else."""
EPS = float(np.finfo(np.float64).eps)


class Slope(NamedTuple):
    """The derivative along a line."""

    value: float
    error: float
    rounding: float
    """The error of the value from rounding the argument and the cost to float64."""
    falling: bool
    """Did the error fall with h as that of a smooth function does?"""
    noisy: bool
    """Does the cost vary at random, like one that is computed in less than float64?"""
    moved: bool
    """Is the cost anywhere on the line another than at 0?"""


class Component(NamedTuple):
    """One leaf of a gradient along a random direction, by differences and as claimed."""

    name: str
    slope: Slope
    claimed: float
    norm: float
    """The norm of the leaf, to which differences are compared."""

    @property
    def size(self) -> float:
        """The size of the leaf's gradient, whichever of the two is right."""
        return max(self.norm, abs(self.slope.value))

    @property
    def apart(self) -> float:
        """The distance of the claim from the differences."""
        return abs(self.slope.value - self.claimed)

    @property
    def stationary(self) -> bool:
        """True if the slope and the claim are 0, as far as float64 can tell."""
        return max(self.slope.error, self.size) <= NEAR * self.slope.rounding

    @property
    def lossy(self) -> bool:
        """True if the cost has too few digits for small faults to be seen."""
        return self.slope.noisy and self.slope.error > PRECISE * self.size

    @property
    def known(self) -> bool:
        """True if the cost is smooth and repeatable enough for differences to say anything."""
        error, rounding = self.slope.error, self.slope.rounding
        if self.stationary:
            return True
        # A slope that is too rough to confirm a claim can still refute one that is far off.
        usable = error <= max(TRUSTED * self.size, NEAR * rounding)
        if usable and self.apart > 100 * max(error, rounding):
            return True
        explained = self.slope.falling or error <= FAR * rounding
        allowed = TRUSTED if explained and not self.lossy else PRECISE
        return error <= allowed * self.size

    def agrees(self, rtol: float) -> bool:
        """True if the claim is within `rtol` of the leaf's norm, and the differences' own error."""
        allowed = rtol * self.size + 10 * max(self.slope.error, self.slope.rounding)
        return bool(self.apart <= allowed)


def slope(fn: Callable[[float], float], at: float = 1.0) -> Slope:
    """The derivative of `fn` at 0, where `at` is the size of what its argument is added to.

    >>> import math
    >>> abs(slope(lambda t: math.exp(2 * t)).value - 2.0) < 1e-11
    True
    """
    here = fn(0.0)
    values = np.array([[fn(2 * h), fn(h), fn(-h), fn(-2 * h)] for h in SIZES])
    with np.errstate(over="ignore", invalid="ignore"):
        return _slope(here, values, at)


def _slope(here: float, values: Values, at: float) -> Slope:
    far_right, right, left, far_left = values.T
    steps = np.array(SIZES)
    estimates = (8 * (right - left) - (far_right - far_left)) / (12 * steps)
    jumps = np.abs(right - 2 * here + left) / steps
    largest = np.maximum(np.max(np.abs(values), axis=1), abs(here))
    steepest = np.max(np.abs(values - here), axis=1) / steps
    rounding = EPS * (largest + at * steepest) / steps
    best, error = _best(estimates, rounding)
    value, h = float(estimates[best]), steps[best]
    noise = _noise(here, values)
    error = float(max(error, noise / h))
    # What varies by more than this is not continuous, or coarser than float32.
    noisy = FAR * rounding[best] * h < noise < 1e-5 * largest[best]
    # The difference between the slopes to the right and to the left shrinks with h, unless there
    # is a kink at the very point, which central differences do not see.
    kink = jumps[-1] > 1e-6 * max(abs(value), abs(here)) and jumps[-1] > jumps[0] / 4
    if kink and not noisy:
        error = max(error, float(jumps[-1]))
    errors = np.abs(np.diff(estimates))
    falling = best > 1 and errors[best - 1] < errors[best - 2] / 25
    moved = bool(np.any(values != here))
    rounded = float(rounding[best]) if np.isfinite(error) else 0.0
    return Slope(value, error, rounded, bool(falling), bool(noisy), moved)


def _best(estimates: Values, rounding: Values) -> tuple[int, float]:
    """The estimate to take, and its error: the distance of the one before.

    Two from small steps may be near each other by chance. So the noise that smaller steps show
    counts too, for its size at this one, and a larger step is taken if it is hardly worse.
    """
    steps, errors = np.array(SIZES[1:]), np.abs(np.diff(estimates))
    shown = np.where(np.isfinite(errors), errors, np.inf) * steps
    errors = np.array([np.max(shown[i:]) for i in range(len(shown))]) / steps
    likely = np.fmax(errors, rounding[1:])
    best = int(np.argmax(likely <= 10 * np.min(likely)))
    return best + 1, float(errors[best])


def _noise(here: float, values: Values) -> float:
    """The variation of the cost from one value to the next, however near they are.

    From one h to the next, a fifth of it, fourth differences of a smooth function fall to a 625th,
    those next to a kink to a fifth, and those of noise stay.
    """
    fourth = np.abs(values @ np.array([1, -4, -4, 1]) + 6 * here) / 8
    noise = float(np.max(fourth[2:]))
    stays = noise > fourth[1] / 3 or noise > np.max(fourth[:2]) / 10
    return noise if stays else 0.0


def components(
    subject: Subject,
    gradient: Gradient,
    cost_at: CostAt | None = None,
    names: Collection[str] | None = None,
) -> list[Component]:
    """Every leaf of the gradient, or those of `names`, along a random direction of norm 1.

    `cost_at` takes the place of the subject's own.
    """
    start = subject.numbers(subject.variables)
    at = float(np.sqrt(1.0 + sum(np.sum(x**2) for x in start)))
    rng = np.random.default_rng(0)
    found = []
    for i, (name, claimed) in enumerate(zip(subject.names, gradient.arrays, strict=True)):
        if start[i].size == 0 or (names is not None and name not in names):
            continue
        drawn = rng.normal(size=start[i].shape)
        direction = np.asarray(drawn / np.linalg.norm(drawn))
        line = _line(cost_at or subject.cost_at, start, i, direction)
        along = slope(line, at)
        norm = float(np.linalg.norm(claimed))
        claim = float(np.sum(claimed * direction))
        component = Component(name, along, claim, norm)
        if not component.known or component.lossy or not component.agrees(PRECISE):
            for part, around in _other_sizes(start[i], at):
                other = Component(name, _scaled(line, part, around), claim, norm)
                if other.known and not other.lossy and not other.stationary:
                    component = other
                    break
        found.append(component)
    return found


def scale(leaf: Values) -> float:
    """The size of numbers that are far from 1; 1 for others, and for zeros."""
    own = float(np.sqrt(np.mean(leaf**2))) if leaf.size else 0.0
    return own if 0 < own < 1 / ORDINARY or own > ORDINARY else 1.0


def _other_sizes(leaf: Values, at: float) -> Iterator[tuple[float, float]]:
    """Other steps, as parts of those of `SIZES`, and what they are added to in units of them.

    Those in proportion to numbers far from 1, and smaller ones, between kinks that lie near each
    other as those of many relus.
    """
    own = scale(leaf)
    if own != 1.0:
        yield own, float(np.sqrt(leaf.size))
    yield FINER, at


def _scaled(fn: Callable[[float], float], part: float, at: float) -> Slope:
    """The slope by steps that are a part of those of `SIZES`."""
    found = slope(lambda t: fn(t * part), at)
    value, error, rounding = (x / part for x in found[:3])
    return found._replace(value=value, error=error, rounding=rounding)


def _line(
    cost_at: CostAt, start: list[Values], leaf: int, direction: Values
) -> Callable[[float], float]:
    def along(t: float) -> float:
        moved = [x + t * direction if i == leaf else x for i, x in enumerate(start)]
        return cost_at(moved)

    return along
