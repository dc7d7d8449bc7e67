"""Points where a cost has no derivative, or values that are rounded: what differences cannot judge.

Where a gradient is right at neighbouring points and the cost has a kink, a tie or a jump at the
very point, any value in between is a derivative: that is a note and no fault.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from metaframe.testing.differences import (
    EPS,
    FAR,
    NEAR,
    PRECISE,
    Component,
    CostAt,
    components,
    scale,
)
from metaframe.testing.report import Finding
from metaframe.testing.subject import Subject, Values

Line = Callable[[float], float]
TINY = 1e-7
NUDGE = 0.05


def at_kinks(
    subject: Subject, open_: Sequence[Component], cost_at: CostAt
) -> tuple[list[Component], Finding | None]:
    """Those of the components that are at a kink, and the note about them."""
    names = {c.name for c in open_}
    if not (right := _right_nearby(subject, names, cost_at)):
        return [], None
    found = [c for c in open_ if c.name in right and (not c.known or _has_kink(subject, cost_at))]
    if not found:
        return [], None
    where = ", ".join(repr(c.name) for c in found)
    note = Finding(
        "kink",
        where,
        "the cost has a kink, a tie or a jump at this very point, where there is no one "
        f"derivative; {NUDGE:g} away, in a random direction, the gradient is right",
        "Nothing, if that is meant: a relu at 0, a maximum of equal values, a maximum over a pool.",
        wrong=False,
    )
    return found, note


def _right_nearby(subject: Subject, names: set[str], cost_at: CostAt) -> set[str]:
    """The names whose gradient is right at both of two points nearby."""
    rng = np.random.default_rng(2)
    start = subject.numbers(subject.variables)
    for _ in range(2):
        at = [x + NUDGE * (scale(x) + np.abs(x)) * rng.normal(size=x.shape) for x in start]
        there = subject.moved(at)
        found = components(there, there.gradient(), cost_at, names)
        names = {c.name for c in found if c.known and not c.lossy and c.agrees(PRECISE)}
        if not names:
            break
    return names


def _has_kink(subject: Subject, cost_at: CostAt) -> bool:
    """True if the slopes to both sides differ along one of a few directions."""
    rng = np.random.default_rng(3)
    start = subject.numbers(subject.variables)
    here = cost_at(start)
    for _ in range(6):
        step = [TINY * scale(x) * rng.normal(size=x.shape) for x in start]
        ahead = cost_at([x + d for x, d in zip(start, step, strict=True)]) - here
        behind = here - cost_at([x - d for x, d in zip(start, step, strict=True)])
        size = max(abs(ahead), abs(behind))
        if abs(ahead - behind) > 1e-3 * size > 1e-3 * 1e-12 * abs(here):
            return True
    return False


def rounded(
    subject: Subject, open_: Sequence[Component], cost_at: CostAt
) -> tuple[list[Component], list[Finding]]:
    """Those of the components along which the cost is constant in pieces, with findings."""
    start, findings, found = subject.numbers(subject.variables), [], []
    for c in open_:
        i = subject.names.index(c.name)
        line = _line(cost_at, start, i)
        near, far, wide = (
            np.array([line(k * step) for k in range(-20, 21)]) for step in (1e-9, 5e-4, 5e-2)
        )
        size = EPS * np.max(np.abs(wide))
        flat = np.mean(np.abs(np.diff(near)) <= NEAR * size) >= 0.9
        moves = abs(c.claimed) * 1e-9 > NEAR * size
        # Jumps of the size of the rounding of float64 are those of any cost.
        pieces, more = (int(np.sum(np.abs(np.diff(x)) > FAR * size)) for x in (far, wide))
        if not (flat and moves and (pieces or more)):
            continue
        found.append(c)
        dtype = _dtype(subject, far)
        # How many pieces are crossed: many for a short float, few for numbers that are rounded.
        many = pieces > 4 * np.sqrt(start[i].size)
        findings.append(_short(c, dtype) if dtype or many else _straight_through(c))
    return found, findings


def _line(cost_at: CostAt, start: list[Values], leaf: int) -> Line:
    drawn = np.random.default_rng(0).normal(size=start[leaf].shape)
    direction = drawn / np.linalg.norm(drawn)

    def along(t: float) -> float:
        return cost_at([x + t * direction if i == leaf else x for i, x in enumerate(start)])

    return along


def _dtype(subject: Subject, values: Values) -> str:
    """The short float that every cost is a number of, if there is one."""
    costs = subject.costs(subject.variables) if subject.step is None else values
    costs = np.asarray(costs, np.float64)
    with np.errstate(over="ignore"):
        if np.array_equal(costs, costs.astype(np.float16).astype(np.float64)):
            return "float16"
    bits = costs.astype(np.float32).view(np.uint32)
    exact = np.array_equal(costs, costs.astype(np.float32).astype(np.float64))
    return "bfloat16" if exact and not np.any(bits & 0xFFFF) else ""


def _short(c: Component, dtype: str) -> Finding:
    what = f"its values are those of {dtype}" if dtype else "its steps are those of a short float"
    return Finding(
        "lost precision",
        repr(c.name),
        f"the cost is constant in pieces along {c.name!r}: {what}, float16 or bfloat16",
        "Find what goes through a short float: a cast, autocast, a mixed-precision policy, an "
        "array or a model of a fixed dtype. Check the gradient in float64.",
    )


def _straight_through(c: Component) -> Finding:
    return Finding(
        "rounded values",
        repr(c.name),
        f"the cost is constant in pieces along {c.name!r}, so its derivative is 0 wherever it has "
        f"one, and the gradient says {c.claimed:.9g}: a straight-through estimate",
        "Find what rounds: round, sign, floor, argmax, a comparison or a cast to integers, with a "
        "derivative put in its place. Check the gradient without the rounding.",
    )
