"""How one call of a step lays out its tasks and variables, and which variables take part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from metaframe import arguments, tree
from metaframe.backend.contract import Backend
from metaframe.backend.types import Array, Arrays
from metaframe.core import checks
from metaframe.core.meta_gradient import first_tasks, taken_apart
from metaframe.core.task_map import Execution, Strategy
from metaframe.errors import InputError

Batched = bool | Literal["vmap", "scan"]
_WhichTasks = Literal["first", "all"]
ReturnInner = bool | _WhichTasks

RETURN_INNER: tuple[ReturnInner, ...] = (False, True, *get_args(_WhichTasks))


@dataclass(frozen=True)
class Layout:
    """The tasks and variables of one call, checked, as flat arrays, laid out for a task map."""

    backend: Backend
    batch: tree.Flat
    variables: tree.Flat
    num_tasks: int
    tiled: bool
    stop_gradients: bool

    @staticmethod
    def of(
        batch: tree.Tree,
        variables: tree.Tree,
        num_tasks: int | None,
        batched: Batched,
        stop_gradients: bool,
    ) -> Layout:
        """Check one call's data and lay it out."""
        v, data, count, backend = taken_apart(variables, batch, num_tasks)
        tiled = batched is True
        if tiled:
            checks.tiled(v, count)
        tasks = first_tasks(data.arrays, count)
        if tiled:  # all tasks as a single one
            tasks = tuple(x[None] for x in tasks)
        elif batched is False:  # each with a leading axis of size 1
            tasks = tuple(backend.ops.expand_dims(x, 1) for x in tasks)
        prepare = backend.stop_gradient if stop_gradients else backend.asarray
        return Layout(
            backend,
            tree.Flat(tasks, data.spec),
            tree.Flat(tuple(map(prepare, v.arrays)), v.spec),
            count,
            tiled,
            stop_gradients,
        )

    @property
    def scale(self) -> int:
        """What turns the gradient of a mean over tiled tasks into every task's own."""
        return self.num_tasks if self.tiled else 1

    def without_task_axis(self, grads: Arrays, how: Literal["sum", "mean"]) -> Arrays:
        """Gradients in the shapes of one task's variables."""
        if not self.tiled:
            return grads
        reduce = self.backend.ops.sum if how == "sum" else self.backend.ops.mean
        return tuple(reduce(x, axis=0) for x in grads)

    def cost(self, cost: Array) -> Any:
        """The cost as the caller gets it."""
        cost = self.backend.stop_gradient(cost) if self.stop_gradients else cost
        return tree.wrapped_as(self.variables.spec, cost)

    def inner(self, adapted: Arrays, which: ReturnInner) -> tree.Tree:
        """Adapted variables as the caller asked for them, from those of all tasks."""
        if not which:
            return ()
        if self.tiled:
            adapted = tuple(x[0] for x in adapted)
        if which == "first":
            adapted = tuple(x[:1] for x in adapted)
        if self.stop_gradients:
            adapted = tuple(map(self.backend.stop_gradient, adapted))
        return self.variables.build(adapted)


def execution(
    batched: Batched, chunk_size: int | None, distributed: bool, stop_gradients: bool
) -> Execution:
    """How the tasks of a step run.

    Raises:
        InputError: an unknown setting, or two that do not go together.
    """
    arguments.choice(batched, "batched", (True, False, "vmap", "scan"))
    if distributed and batched is True:
        raise InputError(
            "distributed=True divides the tasks, and with batched=True the cost function sees all "
            'of them in one call. Choose batched="vmap", "scan" or False.'
        )
    if distributed and not stop_gradients:
        raise InputError(
            "distributed=True with stop_gradients=False: the sum over workers is not "
            "differentiable. Leave out one of them."
        )
    task_map: Strategy = "loop" if isinstance(batched, bool) else batched
    return Execution(task_map, chunk_size, distributed)


@dataclass(frozen=True)
class Choices:
    """Which variables adapt and which are differentiated, possibly another choice each task."""

    inner_v: Any = None
    keep_inner_v: bool = True
    outer_v: Any = None
    keep_outer_v: bool = True

    def check(self, layout: Layout, how: Execution) -> None:
        """Choices per task come one a task, and with the tasks one by one."""
        for name, choice in (("inner_v", self.inner_v), ("outer_v", self.outer_v)):
            if not _is_per_task(choice):
                continue
            if layout.tiled or how.task_map != "loop":
                raise InputError(f"{name} gives one choice a task, which needs batched=False.")
            if how.distributed:
                raise InputError(
                    f"{name} gives one choice a task, which distributed=True does not take."
                )
            if len(choice) != layout.num_tasks:
                raise InputError(
                    f"{name} gives {len(choice)} choices for {layout.num_tasks} tasks."
                )

    def parts(self, layout: Layout) -> list[tuple[tree.Part, tree.Part]]:
        """The variables that adapt and those that are differentiated: for each task, or for all."""
        count = layout.num_tasks if self._per_task else 1
        return [
            (
                _part(layout, _at(self.inner_v, i), self.keep_inner_v, "inner_v"),
                _part(layout, _at(self.outer_v, i), self.keep_outer_v, "outer_v"),
            )
            for i in range(count)
        ]

    @property
    def _per_task(self) -> bool:
        return _is_per_task(self.inner_v) or _is_per_task(self.outer_v)


def _part(layout: Layout, choice: Any, keep: bool, name: str) -> tree.Part:
    spec = layout.variables.spec
    part = tree.Part(spec, tree.flags(spec, choice, keep))
    checks.variables(layout.variables.arrays, part, layout.backend, name)
    return part


def _is_per_task(choice: Any) -> bool:
    return (
        isinstance(choice, (list, tuple))
        and len(choice) > 0
        and isinstance(choice[0], (list, tuple, Mapping, type(None)))
    )


def _at(choice: Any, task: int) -> Any:
    return choice[task] if _is_per_task(choice) else choice
