"""The rules for kinks in NumPy, and random compositions of portable functions to try them on.

A jet is a value with its first and second derivative along one direction. The chain rule takes it
through a composition; the slopes at a kink are those of docs/reference/derivatives.md. Nothing here
comes from the code under test.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from metaframe import nn, ops

Values = np.ndarray[Any, Any]
NEAR = 1e-3
"""Rounding decides on which side of a kink an inexact number closer than this is."""


@dataclass(frozen=True)
class Jet:
    """Values and derivatives at several points, (points,) each."""

    value: Values
    first: Values
    second: Values
    exact: Values
    """Where no backend rounds the value."""
    clear: Values
    """Where no kink on the way was decided by rounding."""


def constant(value: float, like: Jet) -> Jet:
    """The number at every point of `like`."""
    zeros = np.zeros_like(like.value)
    return Jet(zeros + value, zeros, zeros, np.full(zeros.shape, True), like.clear)


def variable(values: Values, direction: float) -> Jet:
    """A variable whose points are `values`, exact ones."""
    flags = np.full(values.shape, True)
    return Jet(values, np.full(values.shape, direction), np.zeros(values.shape), flags, flags)


def _all(flags: Sequence[Values]) -> Values:
    return np.asarray(np.all(flags, axis=0))


def _short(value: Values) -> Values:
    return (value * 1024 == np.round(value * 1024)) & (np.abs(value) < 1024)


def apart(*jets: Jet) -> Values:
    """Where rounding does not decide which of any two is larger."""
    pairs = [(j, k) for i, j in enumerate(jets) for k in jets[:i] if j is not k]
    decided = [(j.exact & k.exact) | (np.abs(j.value - k.value) > NEAR) for j, k in pairs]
    return _all([*decided, *(j.clear for j in jets)])


def _chain(x: Jet, value: Values, slope: Values, bend: Values, exact: Values) -> Jet:
    return Jet(
        value,
        slope * x.first,
        bend * x.first**2 + slope * x.second,
        x.exact & exact & _short(value),
        x.clear,
    )


def smooth(fn: Any, slope: Any, bend: Any, exact: Any = lambda v: v == 0) -> Callable[[Jet], Jet]:
    """A function by its formulas; it is `exact` at zero, unless told otherwise."""
    return lambda x: _chain(x, fn(x.value), slope(x.value), bend(x.value), exact(x.value))


def kinked(fn: Any, slope: Any) -> Callable[[Jet], Jet]:
    """A function of straight pieces with a kink at zero, by its slopes."""

    def apply(x: Jet) -> Jet:
        zero = constant(0.0, x)
        found = _chain(x, fn(x.value), slope(x.value), zero.value, zero.exact)
        return dataclasses.replace(found, clear=apart(x, zero))

    return apply


def _derivatives(x: Jet) -> tuple[Values, Values, Values]:
    return x.value, x.first, x.second


def mixed(jets: Sequence[Jet], weights: Sequence[Values], decided: Values) -> Jet:
    """The share that each of several has in the result; those with one have equal values."""
    parts = [
        sum(w * d for w, d in zip(weights, column, strict=True))
        for column in zip(*map(_derivatives, jets), strict=True)
    ]
    value = functools.reduce(
        lambda rest, pair: np.where(pair[0] > 0, pair[1].value, rest),
        zip(weights, jets, strict=True),
        jets[0].value,
    )
    exact = _all([j.exact | (w == 0) for j, w in zip(jets, weights, strict=True)])
    return Jet(value, parts[1], parts[2], exact, decided)


def maximum(x: Jet, y: Jet) -> Jet:
    """Half each in a tie."""
    share = (1 + np.sign(x.value - y.value)) / 2
    return mixed([x, y], [share, 1 - share], apart(x, y))


def negative(x: Jet) -> Jet:
    """The same with the other sign."""
    return Jet(-x.value, -x.first, -x.second, x.exact, x.clear)


def minimum(x: Jet, y: Jet) -> Jet:
    """Half each in a tie."""
    return negative(maximum(negative(x), negative(y)))


def largest(*jets: Jet) -> Jet:
    """Equal shares for those that are largest."""
    best = np.max([j.value for j in jets], axis=0)
    hits = [(j.value == best).astype(float) for j in jets]
    weights = [hit / np.sum(hits, axis=0) for hit in hits]
    return mixed(jets, weights, apart(*jets))


def smallest(*jets: Jet) -> Jet:
    """Equal shares for those that are smallest."""
    return negative(largest(*map(negative, jets)))


def first_largest(*jets: Jet) -> Jet:
    """All for the first of those that are largest."""
    place = np.argmax([j.value for j in jets], axis=0)
    weights = [(place == i).astype(float) for i in range(len(jets))]
    return mixed(jets, weights, apart(*jets))


def clip(x: Jet, low: Jet, high: Jet) -> Jet:
    """Half for a bound that is met; nothing of `x` where the bounds leave it no room."""
    room = low.value < high.value
    point = low.value == high.value
    below, above = np.sign(low.value - x.value), np.sign(x.value - high.value)
    of_low = np.select([point, room], [0.5, np.maximum(0, (1 + below) / 2)], 0.0)
    of_high = np.select([point, room], [0.5, np.maximum(0, (1 + above) / 2)], 1.0)
    weights = [1 - of_low - of_high, of_low, of_high]
    return mixed([x, low, high], weights, apart(x, low, high))


def chosen(condition: Jet, x: Jet, y: Jet) -> Jet:
    """`x` where the condition is above zero."""
    taken = (condition.value > 0).astype(float)
    decided = apart(condition, constant(0.0, condition))
    return mixed([x, y], [taken, 1 - taken], decided & x.clear & y.clear)


def add(x: Jet, y: Jet) -> Jet:
    """The sum."""
    value = x.value + y.value
    return Jet(
        value,
        x.first + y.first,
        x.second + y.second,
        x.exact & y.exact & _short(value),
        x.clear & y.clear,
    )


def times(x: Jet, y: Jet) -> Jet:
    """The product."""
    value = x.value * y.value
    return Jet(
        value,
        x.first * y.value + x.value * y.first,
        x.second * y.value + 2 * x.first * y.first + x.value * y.second,
        x.exact & y.exact & _short(value),
        x.clear & y.clear,
    )


def norm(*jets: Jet) -> Jet:
    """Flat where all are zero."""
    value = np.sqrt(sum(j.value**2 for j in jets))
    safe = np.where(value == 0, np.inf, value)
    first = sum(j.value * j.first for j in jets) / safe
    second = sum(j.first**2 + j.value * j.second for j in jets) / safe - first**2 / safe
    zero = _all([j.exact & (j.value == 0) for j in jets])
    return Jet(value, first, second, zero, _all([zero | (value > NEAR), *(j.clear for j in jets)]))


def std(*jets: Jet) -> Jet:
    """Flat where all are equal."""
    mean = functools.reduce(add, jets)
    share = constant(-1 / len(jets), mean)
    found = norm(*(add(j, times(share, mean)) for j in jets))
    equal = _all([j.exact & (j.value == jets[0].value) for j in jets])
    size = np.sqrt(len(jets))
    parts = [np.where(equal, 0.0, part / size) for part in _derivatives(found)]
    clear = _all([equal | (found.value > NEAR), *(j.clear for j in jets)])
    return Jet(*parts, equal, clear)


def logsumexp(*jets: Jet) -> Jet:
    """Smooth, ties included."""
    value = np.logaddexp.reduce([j.value for j in jets])
    shares = [np.exp(j.value - value) for j in jets]
    pairs = list(zip(shares, jets, strict=True))
    first = sum(p * j.first for p, j in pairs)
    second = sum(p * (j.second + j.first**2) for p, j in pairs) - first**2
    return Jet(value, first, second, np.zeros_like(value) > 0, _all([j.clear for j in jets]))


def _sigmoid(v: Values) -> Values:
    return 1 / (1 + np.exp(-v))


def _stacked(fn: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *xs: fn(ops.stack(xs, -1), axis=-1)


def _pooled(*xs: Any) -> Any:
    images = ops.reshape(ops.stack(xs, -1), (-1, 2, 2, 1))
    return ops.reshape(nn.max_pool2d(images), (-1,))


@dataclass(frozen=True)
class Step:
    """One function of a composition, portable and as a rule for jets."""

    arguments: int
    portable: Callable[..., Any]
    rule: Callable[..., Jet]


STEPS: dict[str, Step] = {
    "abs": Step(1, ops.abs, kinked(np.abs, np.sign)),
    "sign": Step(1, ops.sign, kinked(np.sign, np.zeros_like)),
    "relu": Step(1, nn.relu, kinked(lambda v: np.maximum(v, 0), lambda v: v > 0)),
    "softplus": Step(
        1,
        ops.softplus,
        smooth(
            lambda v: np.logaddexp(0, v),
            _sigmoid,
            lambda v: _sigmoid(v) * _sigmoid(-v),
            lambda v: v != v,
        ),
    ),
    "tanh": Step(
        1,
        ops.tanh,
        smooth(
            np.tanh,
            lambda v: 1 - np.tanh(v) ** 2,
            lambda v: -2 * np.tanh(v) * (1 - np.tanh(v) ** 2),
        ),
    ),
    "sin": Step(1, ops.sin, smooth(np.sin, np.cos, lambda v: -np.sin(v))),
    "cos": Step(1, ops.cos, smooth(np.cos, lambda v: -np.sin(v), lambda v: -np.cos(v))),
    "power1": Step(
        1, lambda x: ops.power(x, 1), smooth(np.copy, np.ones_like, np.zeros_like, np.isfinite)
    ),
    "power3": Step(
        1,
        lambda x: ops.power(x, 3),
        smooth(lambda v: v**3, lambda v: 3 * v**2, lambda v: 6 * v, np.isfinite),
    ),
    "add": Step(2, lambda x, y: x + y, add),
    "times": Step(2, lambda x, y: x * y, times),
    "maximum": Step(2, ops.maximum, maximum),
    "minimum": Step(2, ops.minimum, minimum),
    "maximum of a number": Step(
        1, lambda x: ops.maximum(0.0, x), lambda x: maximum(x, constant(0.0, x))
    ),
    "minimum of a number": Step(
        1, lambda x: ops.minimum(x, 1.0), lambda x: minimum(x, constant(1.0, x))
    ),
    "clip": Step(3, ops.clip, clip),
    "clip to numbers": Step(
        1,
        lambda x: ops.clip(x, -1.0, 1.0),
        lambda x: clip(x, constant(-1.0, x), constant(1.0, x)),
    ),
    "clip to a point": Step(
        1, lambda x: ops.clip(x, 1.0, 1.0), lambda x: clip(x, constant(1.0, x), constant(1.0, x))
    ),
    "where": Step(3, lambda c, x, y: ops.where(c > 0, x, y), chosen),
    "max": Step(3, _stacked(ops.max), largest),
    "min": Step(3, _stacked(ops.min), smallest),
    "max_pool2d": Step(4, _pooled, first_largest),
    "norm": Step(3, _stacked(ops.norm), norm),
    "std": Step(3, _stacked(ops.std), std),
    "logsumexp": Step(2, _stacked(ops.logsumexp), logsumexp),
}


@dataclass(frozen=True)
class Composition:
    """A random expression of three variables: each step takes earlier results."""

    steps: tuple[tuple[str, tuple[int, ...]], ...]

    def portable(self, xs: Sequence[Any]) -> Any:
        """The value, by the functions under test."""
        return self._run(list(xs), lambda step: step.portable)[-1]

    def jet(self, points: Values, direction: Sequence[float]) -> Jet:
        """The value and its derivatives along `direction`, by the rules."""
        found: Jet = self._jets(points, direction)[-1]
        return found

    def visited(
        self, points: Values, direction: Sequence[float]
    ) -> list[tuple[str, tuple[Jet, ...]]]:
        """Every step with its arguments."""
        found = self._jets(points, direction)
        return [(name, tuple(found[i] for i in places)) for name, places in self.steps]

    def _jets(self, points: Values, direction: Sequence[float]) -> list[Jet]:
        start = [variable(row, d) for row, d in zip(points, direction, strict=True)]
        with np.errstate(invalid="ignore"):
            return self._run(start, lambda step: step.rule)

    def _run(self, found: list[Any], which: Callable[[Step], Callable[..., Any]]) -> list[Any]:
        for name, places in self.steps:
            found.append(which(STEPS[name])(*(found[i] for i in places)))
        return found


def composition(rng: np.random.Generator, length: int = 6) -> Composition:
    """Random steps; the last ones more often take what the others have made."""
    steps = []
    for i in range(3, 3 + length):
        name = str(rng.choice(list(STEPS)))
        age = np.minimum(rng.geometric(0.4, STEPS[name].arguments), i)
        steps.append((name, tuple(int(i - a) for a in age)))
    return Composition(tuple(steps))
