"""The origin of a value that is not finite."""

from __future__ import annotations

import numpy as np

from metaframe import tree
from metaframe.testing.report import Finding
from metaframe.testing.subject import Gradient, Subject

_ADVICE = (
    "Keep the function and its derivatives finite there: sqrt(x + eps), log(x + eps), "
    "ops.where on the argument of the function and not on its result; labels in [0, classes); a "
    "smaller learning rate."
)
_PADDING = (
    "Remove it from the data. A weight of 0 does not: 0 * NaN is NaN. Pad with a real task at "
    "weight 0."
)


def not_finite(subject: Subject, gradient: Gradient) -> Finding | None:
    """The first place on the way to the gradient that is not finite; None if all is."""
    names = [
        name
        for name, leaf in zip(subject.names, gradient.arrays, strict=True)
        if not np.all(np.isfinite(leaf))
    ]
    if not names and np.isfinite(gradient.cost):
        return None
    found = _in_inputs(subject) or _in_forward(subject)
    if found is not None:
        return found
    what = "the cost is finite and" if np.isfinite(gradient.cost) else "every inner step is finite;"
    where = ", ".join(map(repr, names)) or "the cost"
    return Finding(
        "not finite",
        where,
        f"{what} the derivative through the inner loop is not: a second derivative without a "
        "value, as that of sqrt at 0",
        _ADVICE,
    )


def _in_inputs(subject: Subject) -> Finding | None:
    for what, structure in (("batch", subject.batch), ("variables", subject.variables)):
        leaves = subject.numbers(structure)
        for name, values in zip(tree.key_chains(structure), leaves, strict=True):
            if values.dtype.kind not in "f" or np.all(np.isfinite(values)):
                continue
            where, bad = f"{what}[{name!r}]" if name else what, ~np.isfinite(values)
            if what == "batch":
                rows = np.flatnonzero(bad.reshape(len(values), -1).any(axis=1))
                where += f", task {int(rows[0])}"
            return Finding("not finite", where, f"{int(bad.sum())} values of the input", _PADDING)
    return None


def _in_forward(subject: Subject) -> Finding | None:
    """Task by task and step by step: the variables, the cost, its gradient."""
    leaves, spec = tree.flatten(subject.batch)
    for i in range(subject.tasks):
        task = tree.unflatten(spec, [leaf[i] for leaf in leaves])
        for k in range(subject.adaptation.steps + 1):
            v = subject.adaptation.adapted(subject.cost, subject.variables, task, steps=k)
            for name, values in zip(subject.names, subject.numbers(v), strict=True):
                if not np.all(np.isfinite(values)):
                    return Finding(
                        "not finite",
                        f"task {i}, inner step {k}",
                        f"the inner gradient of {name!r}, so that the step gave a value that is "
                        "not finite",
                        _ADVICE,
                    )
        cost = subject.backend.to_numpy(subject.task_cost(subject.variables, task))
        if not np.isfinite(cost):
            return Finding("not finite", f"task {i}", f"the outer cost is {float(cost)}", _ADVICE)
    return None
