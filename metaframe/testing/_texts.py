"""The texts of the gradient doctor about what it found."""

from __future__ import annotations

from collections.abc import Sequence

from metaframe.testing.differences import NEAR, Component
from metaframe.testing.report import Finding
from metaframe.testing.subject import Gradient

EXECUTIONS_DIFFER = (
    "Make the function pure: no counters, lists or caches that a call changes, no branch on "
    "values, no random numbers that are not arguments."
)
BACKENDS_DIFFER = "Use functions of metaframe.ops and metaframe.nn only, and no dtype written out."
TASKS_MIXED = (
    "Find what mixes tasks: batch statistics or a reduction over the task axis, a sum where a mean "
    "is meant, state carried from task to task. Or take the gradient of each task inside the map, "
    "vmap(grad), instead of the gradient of a mean over the map."
)


def in_place(names: Sequence[str]) -> Finding:
    return Finding(
        "in-place change",
        ", ".join(names),
        "calling the function changed its values",
        "Return the new value instead of writing it: under vmap, compilation and recomputation a "
        "write happens once, not at all, or more than once. Freeze running statistics, or use "
        "those of the batch.",
    )


def random() -> Finding:
    return Finding(
        "randomness",
        "",
        "two calls with the same arguments differ",
        "Make random numbers an argument: draw masks or keys outside and pass them in the batch.",
        wrong=False,
    )


def why(c: Component) -> str:
    """The reason for which differences say nothing."""
    if c.slope.error <= NEAR * c.slope.rounding:
        return "its gradient is so small that the rounding of the cost covers it"
    return "the cost is not smooth at this point"


def lossy(found: Sequence[Component]) -> Finding:
    first = found[0]
    return Finding(
        "lost precision",
        ", ".join(repr(c.name) for c in found),
        "the cost has fewer digits than float64, and small faults do not show: along a random "
        f"direction its slope in {first.name!r} is {first.slope.value:.9g}, give or take "
        f"{first.slope.error:.1e}",
        "Find what goes through float32: a cast, an array or a model of a fixed dtype. Or what "
        "loses as many digits in float64: a difference of large numbers, an ill-conditioned solve.",
    )


def unused(found: Sequence[Component], tasks: int) -> Finding:
    return Finding(
        "unused variable",
        ", ".join(sorted({repr(c.name) for c in found})),
        f"no gradient in any of {tasks} tasks, and moving it does not change the cost",
        "Take it out of the variables, or use it.",
        wrong=False,
    )


def failed(name: str, error: Exception) -> Finding:
    return Finding(
        "cannot be vectorised",
        name,
        summary(error),
        'Choose with ops.where instead of `if`, or run tasks one by one: task_map="loop" and '
        "without compile.",
        wrong=False,
    )


def summary(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"


def rounded(gap: float) -> Finding:
    return Finding(
        "lost precision",
        "step",
        f"in float64 it differs from metaframe's by {gap:.1e}, the size of a rounding to float32",
        "Find the number that goes through float32: a constant such as tf.cast(0.01, tf.float64), "
        "an array without a dtype, a cast. Write tf.constant(0.01, tf.float64).",
    )


def another(found: Gradient, ours: Gradient, gap: float) -> Finding:
    return Finding(
        "another cost",
        "step",
        f"its gradient is that of its cost {found.cost:.9g}, which is not the cost {ours.cost:.9g} "
        f"after the adaptation as described; the gradients differ by {gap:.1e}",
        "Compare learning rate, number of steps, data and reduction of both.",
    )
