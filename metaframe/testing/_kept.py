"""True if a cost looks at the data it is given, or at those of an earlier call."""

from __future__ import annotations

import numpy as np

from metaframe import tree
from metaframe.testing.differences import scale
from metaframe.testing.report import Finding
from metaframe.testing.subject import Subject, Values
from metaframe.testing.watch import Watch


def ignored_batch(subject: Subject, watch: Watch) -> Finding | None:
    """A finding if the cost of a task does not change with the data of another in their place."""
    if subject.step is not None or subject.tasks < 2:
        return None
    # At zeros, where variables often begin, a cost may well not depend on its data.
    rng = np.random.default_rng(5)
    start = subject.numbers(subject.variables)
    step = [0.1 * scale(x) * rng.normal(size=x.shape) for x in start]
    there, back = (
        _ignored(subject.moved([x + sign * d for x, d in zip(start, step, strict=True)]))
        for sign in (1, -1)
    )
    ignored, used = [name for name in there[0] if name in back[0]], there[1] or back[1]
    if not ignored:
        return None
    kept = sorted(set(watch.appeared()) | set(_copies(subject, watch, ignored)))
    where = ", ".join(f"batch[{name!r}]" if name else "batch" for name in ignored)
    if kept:
        return Finding(
            "kept batch",
            where,
            f"the cost of a task is the same with the data of another; {', '.join(kept)} is kept "
            "from an earlier call",
            "Compute from the arguments alone: no cache of a batch, of an embedding of it or of "
            "variables in a closure, an attribute or a default argument.",
        )
    if used:
        return None  # a part that this cost has no use for
    return Finding(
        "unused batch",
        where,
        "the cost of a task is the same with the data of another",
        "Compute the cost from the batch, if it depends on data at all.",
        wrong=False,
    )


def _ignored(subject: Subject) -> tuple[list[str], bool]:
    """The leaves that do not matter, of those that differ in two tasks, and whether others do."""
    leaves, spec = tree.flatten(subject.task(1))
    others = tree.leaves(subject.task(0))
    cost = _cost(subject, leaves, spec)
    ignored, used = [], False
    for i, name in enumerate(tree.chains(spec)):
        pair = [subject.backend.to_numpy(x[i]) for x in (leaves, others)]
        if pair[0].tobytes() == pair[1].tobytes():
            continue
        swapped = [*leaves[:i], others[i], *leaves[i + 1 :]]
        if _cost(subject, swapped, spec) == cost:
            ignored.append(name)
        else:
            used = True
    return ignored, used


def _cost(subject: Subject, leaves: object, spec: tree.TreeSpec) -> float:
    task = tree.unflatten(spec, leaves)  # type: ignore[arg-type]
    return float(subject.backend.to_numpy(subject.task_cost(subject.variables, task)))


def _copies(subject: Subject, watch: Watch, names: list[str]) -> list[str]:
    """The arrays within reach of the function that are copies of a task's data."""
    rows: set[bytes] = set()
    for name, leaf in zip(tree.key_chains(subject.batch), tree.leaves(subject.batch), strict=True):
        values: Values = subject.backend.to_numpy(leaf)
        if name in names and values[0].size > 1:
            rows |= {row.tobytes() for row in values}
    found = watch.now().items()
    given = ("variables", "batch")
    return [n for n, x in found if x.tobytes() in rows and not n.endswith(given)]
