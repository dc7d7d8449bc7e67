"""The program of one task: begin, inner loop, finish, outer objective.

The steps and the learners run the same program. They differ in their costs, and in the objective:
what a task contributes to the meta-gradient, as a function of its run. An objective returns a cost
whose gradient in the start of the run is that contribution.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, NamedTuple, Protocol

from metaframe import ops
from metaframe.backend.types import Array, Arrays
from metaframe.core.inner_loop import InnerLoop, InnerResult, Observer, Rows, StepView
from metaframe.errors import InputError

OuterCost = Callable[[Arrays, Array | None], tuple[Array, Arrays]]
"""`(params, number of steps taken) -> (outer cost, what to report)`; None stands for all steps."""
Direction = Literal["gradients", "displacement"]


class Outcome(NamedTuple):
    """The contribution of a task.

    >>> def final(run):
    ...     adapted = run.adapted().params
    ...     cost, report = run.outer(adapted, None)
    ...     return Outcome(cost, adapted, report)
    """

    cost: Array
    """A scalar, whose gradient goes into the meta-gradient."""
    params: Arrays
    """The adapted params."""
    report: Arrays
    """Arrays to return for each task."""


class Adapt(Protocol):
    """The inner loop of one task, and after it the algorithm's last word on the params."""

    def __call__(self, observe: Observer | None = None) -> InnerResult:
        """The params after the inner loop, and the sums of what the observer returned."""


@dataclass(frozen=True)
class TaskRun:
    """One task, ready to run.

    Attributes:
        start: the params before the first step.
        steps: the number of inner steps.
        adapted: runs the inner loop.
        inner: the inner cost at given params, with its gradient.
        outer: the outer cost at given params.
        schedule: numbers that change from one call to the next and are not differentiated.

    An objective, such as that of `metaframe.learners.Method`, receives one:

    >>> def unadapted(run: TaskRun) -> Outcome:
    ...     return Outcome(run.outer(run.start, None)[0], run.start, ())
    """

    start: Arrays
    steps: int
    adapted: Adapt
    inner: Callable[[Arrays], tuple[Array, Arrays]]
    outer: OuterCost
    schedule: Mapping[str, Array] = field(default_factory=dict)

    @staticmethod
    def of(
        loop: InnerLoop,
        start: Arrays,
        context: Arrays,
        steps: int,
        outer: OuterCost,
        rows: Rows | None = None,
    ) -> TaskRun:
        """A run of an inner loop that nothing follows.

        Args:
            loop: the inner loop.
            start: the params before the first step.
            context: the arrays that the inner cost sees besides them.
            steps: the number of inner steps.
            outer: the outer cost at given params.
            rows: data with a row for each step; default: every step sees the same.

        Returns:
            A task, ready to run.
        """
        return TaskRun(
            start,
            steps,
            partial(loop.run, start, context, steps, rows=rows),
            partial(loop.cost_and_gradient, context=context),
            outer,
        )


Objective = Callable[[TaskRun], Outcome]


def adapted_cost(run: TaskRun) -> Outcome:
    """The outer cost of the adapted params: MAML."""
    params = run.adapted().params
    cost, report = run.outer(params, None)
    return Outcome(cost, params, report)


def average_cost(run: TaskRun) -> Outcome:
    """The mean of the outer cost over the K+1 points visited."""

    def observe(at: Arrays, view: StepView | None, index: Array) -> Arrays:
        del view
        return (run.outer(at, index)[0],)

    found = run.adapted(observe)
    cost, report = run.outer(found.params, None)
    for total in found.total:
        cost = (total + cost) / (run.steps + 1)
    return Outcome(cost, found.params, report)


def reptile(run: TaskRun, *, direction: Direction, scale: float, stop_gradients: bool) -> Outcome:
    """A cost whose gradient is Reptile's direction; reports the mean of the K+1 inner costs.

    See `metaframe.reptile_step` for the two directions, which are not divided by the rate here.
    """

    def attached(cost: Array, grads: Arrays, at: Arrays) -> Array:
        # The steps ran on constants: the cost is given its gradient as its derivative.
        return cost if stop_gradients else with_gradient(cost, at, [g / scale for g in grads])

    def observe(at: Arrays, view: StepView | None, index: Array) -> Arrays:
        del index
        if view is None:
            raise InputError("Reptile needs the gradients of the inner steps: mode='reverse'.")
        moved = view.grads if direction == "gradients" else view.updates
        return (attached(view.cost, view.grads, at), *moved)

    found = run.adapted(observe)
    last_cost, last = run.inner(found.params)
    total_cost, *total = found.total
    cost = (total_cost + last_cost) / (run.steps + 1)
    if direction == "gradients":
        pairs = zip(total, last, strict=True)
        moved = [(a + ops.stop_gradient(b)) / (run.steps + 1) for a, b in pairs]
    else:
        moved = [-x for x in total]
    return Outcome(with_gradient(cost, run.start, moved), found.params, (cost,))


def with_gradient(cost: Array, at: Arrays, gradient: list[Array]) -> Array:
    """A cost with the value of `cost` and the derivative `gradient` at the point `at`."""
    value = ops.stop_gradient(cost)
    for x, g in zip(at, gradient, strict=True):
        value = value + ops.sum((x - ops.stop_gradient(x)) * ops.stop_gradient(g))
    return value
