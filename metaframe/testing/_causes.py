"""Causes of a wrong gradient, found by comparing it with other known quantities."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from metaframe.testing._detached import detached_leaf, no_second_derivative
from metaframe.testing.differences import Component
from metaframe.testing.report import Finding
from metaframe.testing.subject import Gradient, Subject, distance

SAME = 1e-7
"""Relative: so near, two gradients are one."""


def causes(
    subject: Subject, found: Gradient, wrong: Sequence[Component], first_order: Gradient | None
) -> list[Finding]:
    """The findings for a gradient that is wrong in the given components."""
    if (once := no_second_derivative(subject)) is not None:
        return [once]
    if first_order is not None and distance(first_order, found) <= SAME:
        return [_first_order(wrong)]
    if (part := detached_leaf(subject, found)) is not None:
        return [part]
    cut = [c for c in wrong if c.claimed == 0.0]
    others = [c for c in wrong if c.claimed != 0.0]
    findings = [_disconnected(subject, found, cut)] if cut else []
    if others:
        whole = len(others) == len(subject.names) > 1
        ratio = _ratio(others) if whole else None
        findings.append(
            _wrong(subject, others) if ratio is None else _scaled(subject, others, ratio)
        )
    return findings


def _where(wrong: Sequence[Component]) -> str:
    return ", ".join(repr(c.name) for c in wrong)


def _numbers(wrong: Sequence[Component]) -> str:
    first = wrong[0]
    return (
        f"along a random direction {first.claimed:.9g} in {first.name!r}, finite differences say "
        f"{first.slope.value:.9g}"
    )


def redrawn(wrong: Sequence[Component]) -> Finding:
    """The finding for a gradient that is wrong even with all random streams set back."""
    return Finding(
        "randomness in the backward pass",
        _where(wrong),
        f"with the random numbers of the cost held fixed, {_numbers(wrong)}",
        "The backward pass draws again what the forward pass drew. Make random numbers an "
        "argument: draw masks or keys outside and pass them in the batch.",
    )


def _first_order(wrong: Sequence[Component]) -> Finding:
    return Finding(
        "lost second-order term",
        _where(wrong),
        f"it equals the first-order gradient, and the curvature is not zero: {_numbers(wrong)}",
        "Differentiate through the inner gradient: no detach or stop_gradient in the update, "
        "create_graph=True, and compile the whole meta-gradient, never the cost alone.",
    )


def _disconnected(subject: Subject, found: Gradient, wrong: Sequence[Component]) -> Finding:
    by_name = dict(zip(subject.names, found.leaves, strict=True))
    nothing = "None" if any(by_name[c.name] is None for c in wrong) else "zero"
    return Finding(
        "disconnected variable",
        _where(wrong),
        f"the gradient is {nothing} although the cost depends on it: {_numbers(wrong)}",
        "Find where it is cut off: detach, stop_gradient, a conversion to NumPy, or a variable "
        "that a custom or recomputed step closes over instead of taking it as an argument. "
        "allow_unused hides this.",
    )


def _ratio(wrong: Sequence[Component]) -> float | None:
    """The factor between the gradient and the right one, if there is one."""
    if any(c.slope.value == 0.0 for c in wrong):
        return None
    ratios = np.array([c.claimed / c.slope.value for c in wrong])
    return float(ratios[0]) if np.ptp(ratios) <= 1e-5 * abs(ratios[0]) else None


def _scaled(subject: Subject, wrong: Sequence[Component], ratio: float) -> Finding:
    return Finding(
        "scaled gradient",
        _where(wrong),
        f"it is {ratio:.6g} times the right one, with {subject.tasks} tasks: {_numbers(wrong)}",
        "Take the mean over tasks or devices once: a sum where a mean is meant, or a reduction "
        "inside the gradient and again outside.",
    )


def _wrong(subject: Subject, wrong: Sequence[Component]) -> Finding:
    ours = "Use metaframe's meta-gradient of this cost. " if subject.step is not None else ""
    return Finding(
        "wrong gradient",
        _where(wrong),
        _numbers(wrong),
        f"{ours}Known causes: the gradient of a mean over vmap through fused batch, instance or "
        "layer normalisation (take vmap of the gradient); recomputing a step that contains a "
        "gradient tape; synchronising devices inside the gradient; a custom derivative that is "
        "wrong.",
    )
