"""What one task contributes to a step: a cost after adaptation, or Reptile's direction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from metaframe import checks, tree
from metaframe.backend import Array, Arrays, Backend
from metaframe.errors import InputError
from metaframe.inner import Cost, InnerLoop, InnerSettings, StepView
from metaframe.layout import RETURN_INNER, Layout, ReturnInner

BatchFn = Callable[[tree.Tree], tree.Tree]


@dataclass(frozen=True)
class AdaptedCost:
    """The outer cost after adaptation, for one task."""

    inner_cost: Cost
    outer_cost: Cost | None
    steps: int
    settings: InnerSettings
    inner_batch_fn: BatchFn | None
    outer_batch_fn: BatchFn | None
    average_across_steps: bool
    return_inner_v: ReturnInner

    def __post_init__(self) -> None:
        checks.function(self.inner_cost, "inner_cost_fn")
        if self.outer_cost is not None:
            checks.function(self.outer_cost, "outer_cost_fn")
        for name in ("inner_batch_fn", "outer_batch_fn"):
            if getattr(self, name) is not None:
                checks.function(getattr(self, name), name)
        checks.integer(self.steps, "inner_grad_steps", at_least=0)
        checks.choice(self.return_inner_v, "return_inner_v", RETURN_INNER)

    def bound(
        self, backend: Backend, chosen: tuple[bool, ...]
    ) -> Callable[[tree.Tree, tree.Tree], tuple[Array, tree.Tree]]:
        """`(v, task) -> (outer cost, adapted variables)`, adapting the `chosen` variables."""
        outer = checks.scalar_cost(self.outer_cost or self.inner_cost, "outer_cost_fn", backend)
        inner_batch_of, outer_batch_of = (
            backend.user_function(fn or _as_it_is)
            for fn in (self.inner_batch_fn, self.outer_batch_fn)
        )

        def task_cost(v: tree.Tree, task: tree.Tree) -> tuple[Array, tree.Tree]:
            inner_batch, outer_batch = inner_batch_of(task), outer_batch_of(task)

            def observe(at: tree.Tree, view: StepView | None, index: Array) -> Arrays:
                del view, index
                return (outer(outer_batch, at),)

            loop = InnerLoop(self.inner_cost, v, inner_batch, chosen, self.settings)
            result = loop.run(self.steps, observe if self.average_across_steps else None)
            cost = outer(outer_batch, result.variables)
            for total in result.total:
                cost = (total + cost) / (self.steps + 1)
            return cost, result.variables if self.return_inner_v else ()

        return task_cost


def _as_it_is(task: tree.Tree) -> tree.Tree:
    return task


@dataclass(frozen=True)
class ReptileTask:
    """One task of Reptile: `task -> (direction, (cost, *adapted))`."""

    layout: Layout
    cost_fn: Cost
    steps: int
    settings: InnerSettings
    direction: Literal["gradients", "displacement"]
    return_inner_v: ReturnInner

    def __call__(self, task: tree.Tree) -> tuple[Arrays, Arrays]:
        """The direction, and what is stacked: the cost and the adapted variables if wanted."""
        v = self.layout.variables
        loop = InnerLoop(self.cost_fn, v, task, tree.chosen(v, None), self.settings)
        result = loop.run(self.steps, self._observe)
        total_cost, *total = result.total
        last_cost, last_grads = loop.cost_and_gradient(result.variables)
        last_grads = tuple(map(self.layout.backend.stop_gradient, last_grads))
        if self.direction == "gradients":
            pairs = zip(total, last_grads, strict=True)
            step = tuple((a + b) / (self.steps + 1) for a, b in pairs)
        else:
            step = tuple(-x for x in total)
        cost = (total_cost + last_cost) / (self.steps + 1)
        return step, (cost, *(tree.leaves(result.variables) if self.return_inner_v else ()))

    def _observe(self, at: tree.Tree, view: StepView | None, index: Array) -> Arrays:
        del index
        if view is None:
            raise InputError("Reptile needs the gradients of the inner steps: mode='reverse'.")
        cost = view.cost if self.settings.stop_gradients else self._attached(view, at)
        return (cost, *(view.grads if self.direction == "gradients" else view.updates))

    def _attached(self, view: StepView, at: tree.Tree) -> Array:
        """The cost of a step, which ran on constants, with its gradient as its derivative."""
        backend, leaves = self.layout.backend, tree.leaves(at)
        zeros = (x - backend.stop_gradient(x) for x in leaves)
        products = (
            backend.ops.sum(backend.stop_gradient(g) * zero)
            for g, zero in zip(view.grads, zeros, strict=True)
        )
        return view.cost + sum(products) / self.settings.scale
