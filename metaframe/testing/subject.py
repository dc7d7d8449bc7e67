"""The subject of a check: a meta-cost and the gradient claimed for it, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from metaframe import arguments, optim, tree
from metaframe.backend.contract import Backend
from metaframe.backend.selection import backend_of, is_neutral
from metaframe.backend.types import Array
from metaframe.core import checks
from metaframe.core.inner_loop import Cost, Mode, Order
from metaframe.core.meta_gradient import map_tasks, meta_value_and_grad
from metaframe.core.steps import BatchFn
from metaframe.core.task_map import TaskMap, strategy
from metaframe.core.unroll import inner_loop
from metaframe.errors import InputError, InputTypeError

Values = np.ndarray[Any, Any]
Step = Callable[[tree.Tree, tree.Tree], Any]
"""`(variables, batch) -> (cost, gradients, ...)`, such as `meta_value_and_grad` returns."""


@dataclass(frozen=True)
class Adaptation:
    """The adaptation of the variables to a task, before the cost is taken.

    Args:
        steps: inner steps, 0 or more.
        lr: the inner learning rate; `None` if `update` brings its own.
        update: as for `metaframe.inner_loop`.
        outer_cost: `cost(batch, v)` at the adapted variables; default: the inner cost.
        inner_batch_fn: applied to a task before the inner cost, such as taking the support set.
        outer_batch_fn: the same for the outer cost.
        mode: "reverse", "remat" or "mixed".

    >>> import torch
    >>> def cost(task, v):
    ...     return (v["w"] - task["target"]) ** 2
    >>> Adaptation(steps=1, lr=0.25).adapted(
    ...     cost, {"w": torch.tensor(1.0)}, {"target": torch.tensor(3.0)}, steps=1
    ... )
    {'w': tensor(2.)}
    """

    steps: int = 1
    lr: optim.Rate = 0.01
    update: Any = optim.gradient_descent_update
    outer_cost: Cost | None = None
    inner_batch_fn: BatchFn | None = None
    outer_batch_fn: BatchFn | None = None
    mode: Mode = "reverse"

    def adapted(
        self, cost: Cost, v: tree.Tree, task: tree.Tree, *, steps: int, order: Order = 2
    ) -> tree.Tree:
        """Adapt the variables to one task.

        Args:
            cost: `cost(batch, v) -> scalar`, the inner cost.
            v: the variables, any structure.
            task: the data of the task, without a task axis.
            steps: inner steps, 0 or more, in place of `self.steps`.
            order: 2 for a differentiable result, 1 for constants of the inner gradients.

        Returns:
            The adapted variables, in the structure of `v`.
        """
        inner = self.inner_batch_fn(task) if self.inner_batch_fn else task
        how: dict[str, Any] = {"lr": self.lr, "update": self.update, "mode": self.mode}
        return inner_loop(cost, v, inner, steps=steps, order=order, **how)

    def task_cost(
        self, cost: Cost, backend: Backend, order: Order = 2
    ) -> Callable[[tree.Tree, tree.Tree], Array]:
        """The cost of a task after adaptation, as a function.

        Args:
            cost: `cost(batch, v) -> scalar`, the inner cost, and the outer one too unless
                `outer_cost` is given.
            backend: the backend of the variables.
            order: 2 for exact gradients, 1 for first-order ones.

        Returns:
            `(v, task) -> scalar`.
        """
        outer = checks.scalar_cost(self.outer_cost or cost, "outer_cost", backend)

        def call(v: tree.Tree, task: tree.Tree) -> Array:
            adapted = self.adapted(cost, v, task, steps=self.steps, order=order)
            return outer(self.outer_batch_fn(task) if self.outer_batch_fn else task, adapted)

        return call


ONE_STEP = Adaptation()
_RETURN = "Return (cost, gradients in the structure of the variables)."


class Gradient(NamedTuple):
    """A cost and its gradient, as numbers."""

    cost: float
    leaves: tuple[Values | None, ...]
    """One a variable, None where a step under test returned None."""

    @property
    def arrays(self) -> tuple[Values, ...]:
        """The leaves, with 0 for None."""
        return tuple(np.zeros(()) if leaf is None else leaf for leaf in self.leaves)


class Subject:
    """A meta-cost, its variables and batch in float64, and ways to get its gradient.

    Args:
        cost: `cost(batch, v) -> scalar` for one task.
        variables: where the gradient is taken.
        batch: all tasks; every leaf has a leading task axis.
        adaptation: what happens before the cost is taken.
        step: whose gradient is in question; default: metaframe's own.
    """

    def __init__(
        self,
        cost: Cost,
        variables: tree.Tree,
        batch: tree.Tree,
        adaptation: Adaptation = ONE_STEP,
        step: Step | None = None,
    ) -> None:
        arguments.function(cost, "cost")
        if step is not None:
            arguments.function(step, "step")
        if not isinstance(adaptation, Adaptation):
            raise InputTypeError(
                f"adaptation must be an Adaptation, received {type(adaptation).__name__}. Write "
                "Adaptation(steps=2, lr=0.1)."
            )
        self.cost, self.adaptation, self.step = cost, adaptation, step
        self.backend = backend_of(*tree.leaves(variables), *tree.leaves(batch))
        self.variables = double(variables, self.backend)
        self.batch = double(batch, self.backend)
        self.tasks = checks.tasks(tree.Flat.of(self.batch), None)
        leaves, spec = tree.flatten(self.variables)
        self.names = tree.chains(spec)
        everything = tree.Part(spec, (True,) * len(leaves))
        checks.variables(leaves, everything, self.backend, "variables")
        self.task_cost = adaptation.task_cost(cost, self.backend)

    def numbers(self, structure: tree.Tree) -> list[Values]:
        """The leaves of a structure of arrays, in NumPy."""
        return [np.array(self.backend.to_numpy(leaf)) for leaf in tree.leaves(structure)]

    def cost_at(self, values: Sequence[Values]) -> float:
        """The meta-cost with `values` in the place of the variables."""
        v = self.filled(values)
        if self.step is not None:
            return self._number(self._results(self.step, v, self.batch)[0])
        return float(np.mean(self.costs(v)))

    def costs(self, v: tree.Tree) -> Values:
        """The cost of each task after adaptation from `v`."""
        of_task = map_tasks(lambda task: self.task_cost(v, task), task_map="loop")
        return self.backend.to_numpy(of_task(self.batch))

    def filled(self, values: Sequence[Values]) -> tree.Tree:
        """The structure of the variables with these values."""
        arrays = [self.backend.asarray(x, "float64") for x in values]
        return tree.unflatten(tree.structure(self.variables), arrays)

    def moved(self, values: Sequence[Values]) -> Subject:
        """The same at other variables."""
        other = copy.copy(self)
        other.variables = self.filled(values)
        return other

    def of_tasks(self, count: int) -> Subject:
        """The same with the first tasks alone."""
        if count >= self.tasks:
            return self
        other = copy.copy(self)
        other.batch, other.tasks = tree.map(lambda x: x[:count], self.batch), count
        return other

    def with_adaptation(self, adaptation: Adaptation) -> Subject:
        """The same adapted in another way, by metaframe."""
        other = copy.copy(self)
        other.adaptation, other.step = adaptation, None
        other.task_cost = adaptation.task_cost(self.cost, self.backend)
        return other

    def inner_cost(self, task: tree.Tree, v: tree.Tree) -> Array:
        """The cost that the inner loop minimises, checked."""
        return checks.scalar_cost(self.cost, "cost", self.backend)(task, v)

    def rows(self, tasks: Sequence[int]) -> tree.Tree:
        """A batch of some tasks, or of copies of one."""
        stack = self.backend.ops.stack
        return tree.map(lambda x: stack([x[i] for i in tasks]), self.batch)

    def task(self, i: int) -> tree.Tree:
        """The data of one task."""
        return tree.map(lambda x: x[i], self.batch)

    def quick_cost(self) -> Callable[[Sequence[Values]], float]:
        """`cost_at` in the fastest way that gives the same numbers, where there is one."""
        from metaframe.core.compile import compile as compile_whole

        if self.step is not None:
            return self.cost_at
        leaves = tree.leaves(self.variables)
        how = strategy("auto", leaves)

        def mean(v: tree.Tree, batch: tree.Tree) -> Array:
            run = map_tasks(lambda task: self.task_cost(v, task), task_map=how)
            return self.backend.ops.mean(run(batch))

        run = compile_whole(mean) if self.backend.compiles_quickly else mean

        def quick(values: Sequence[Values]) -> float:
            return self._number(run(self.filled(values), self.batch))

        rng = np.random.default_rng(1)
        start = self.numbers(self.variables)
        for size in (0.0, 1e-2):
            at = [x + size * rng.normal(size=x.shape) for x in start]
            try:
                near = abs(quick(at) - self.cost_at(at)) <= 1e-12 * abs(self.cost_at(at))
            except Exception:  # noqa: BLE001  what cannot run like this runs as it is
                return self.cost_at
            if not near:
                return self.cost_at
        return quick

    def gradient(self) -> Gradient:
        """The cost and the gradient in question."""
        if self.step is None:
            return self.reference()
        return self.of_step(self.step, self.batch)

    def of_step(self, step: Step, batch: tree.Tree) -> Gradient:
        """The results of a step, its gradients brought into the order of the variables."""
        cost, grads, *_ = self._results(step, self.variables, batch)
        leaves, spec = tree.flatten(grads, is_leaf=lambda node: node is None)
        if len(leaves) != len(self.names):
            raise InputError(
                f"step returned {len(leaves)} gradients for {len(self.names)} variables "
                f"{list(self.names)}. {_RETURN}"
            )
        names = tree.key_chains(tree.unflatten(spec, range(len(leaves))))
        in_order = isinstance(grads, (list, tuple))  # as torch.autograd.grad returns them
        if names != self.names and not in_order:
            raise InputError(
                f"step returned gradients called {list(names)} for the variables "
                f"{list(self.names)}. {_RETURN}"
            )
        values = [None if g is None else np.array(self.backend.to_numpy(g)) for g in leaves]
        for name, variable, value in zip(
            self.names, tree.leaves(self.variables), values, strict=True
        ):
            if value is not None and value.shape != tuple(variable.shape):
                raise InputError(
                    f"step returned a gradient of shape {value.shape} for {name!r}, which has "
                    f"shape {tuple(variable.shape)}. {_RETURN}"
                )
        return Gradient(self._number(cost), tuple(values))

    def alone(self, step: Step) -> list[Gradient]:
        """A step's results for each task, by a batch of it alone or of as many copies of it."""

        def of(copies: int) -> list[Gradient]:
            return [self.of_step(step, self.rows([i] * copies)) for i in range(self.tasks)]

        try:
            return of(1)
        except Exception:  # noqa: BLE001  a step may be made for one number of tasks
            return of(self.tasks)

    def reference(
        self, task_map: TaskMap = "loop", *, order: Order = 2, compiled: bool = False
    ) -> Gradient:
        """Metaframe's own meta-gradient, run in one of its ways."""
        from metaframe.core.compile import compile as compile_whole

        task_cost = self.adaptation.task_cost(self.cost, self.backend, order)
        step: Step = meta_value_and_grad(task_cost, task_map=task_map)
        return self.of_step(compile_whole(step) if compiled else step, self.batch)

    @staticmethod
    def _results(step: Step, v: tree.Tree, batch: tree.Tree) -> Sequence[Any]:
        found = step(v, batch)
        if not isinstance(found, (tuple, list)) or len(found) < 2:
            raise InputTypeError(f"step returned {type(found).__name__}. {_RETURN}")
        return found

    def _number(self, cost: Any) -> float:
        return float(self.backend.to_numpy(cost)) if self.backend.owns(cost) else float(cost)


def double(structure: tree.Tree, backend: Backend) -> tree.Tree:
    """`structure` as constant arrays of the backend, floating ones in float64."""

    def convert(leaf: Any) -> Any:
        if is_neutral(leaf):
            values = np.asarray(leaf)
            return backend.asarray(values, "float64" if values.dtype.kind == "f" else None)
        leaf = backend.stop_gradient(leaf)
        return backend.asarray(leaf, "float64" if backend.is_floating(leaf) else None)

    return tree.map(convert, structure)


def distance(one: Gradient, other: Gradient) -> float:
    """The relative distance of two results: the larger of the gradients' and the costs'."""
    pairs = list(zip(one.arrays, other.arrays, strict=True))
    apart = np.sqrt(sum(np.sum((a - b) ** 2) for a, b in pairs))
    norm = np.sqrt(max(sum(np.sum(g**2) for g in pair) for pair in (one.arrays, other.arrays)))
    cost = abs(one.cost - other.cost) / max(abs(one.cost), abs(other.cost), 1e-300)
    return float(max(apart / max(norm, 1e-300), cost))
