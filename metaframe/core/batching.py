"""The layout of tasks and variables in one call of a step, and the variables that take part.

A strategy of the task map as `batched` runs the tasks without a task axis. The reference has two
layouts with one, which are spelled True (all tasks in one call, on variables that were tiled) and
False (one after the other, each with a leading axis of size 1). Only this module knows of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from metaframe import arguments, tree
from metaframe.backend.contract import Backend
from metaframe.backend.types import Array, Arrays
from metaframe.core import checks
from metaframe.core.meta_gradient import first_tasks, taken_apart
from metaframe.core.task_map import TASK_MAPS, Execution, TaskMap
from metaframe.errors import InputError

Batched = bool | TaskMap
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
    with_task_axis: bool
    """Do the cost functions see a task axis?"""
    stop_gradients: bool
    how: Execution

    @staticmethod
    def of(
        batch: tree.Tree,
        variables: tree.Tree,
        batched: Batched,
        *,
        num_tasks: int | None,
        stop_gradients: bool,
        chunk_size: int | None,
        distributed: bool,
    ) -> Layout:
        """Check one call's data and lay it out.

        Raises:
            InputError: an unknown setting, two that do not go together, or data of a wrong shape.
        """
        how = _execution(batched, chunk_size, distributed, stop_gradients)
        v, data, count, backend = taken_apart(variables, batch, num_tasks)
        tasks = first_tasks(data.arrays, count)
        if batched is True:
            checks.tiled(v, count)
            tasks = tuple(x[None] for x in tasks)
        elif batched is False:
            tasks = tuple(backend.ops.expand_dims(x, 1) for x in tasks)
        prepare = backend.stop_gradient if stop_gradients else backend.asarray
        return Layout(
            backend,
            tree.Flat(tasks, data.spec),
            tree.Flat(tuple(map(prepare, v.arrays)), v.spec),
            count,
            batched is True,
            isinstance(batched, bool),
            stop_gradients,
            how.settled(v.arrays),
        )

    def parts(
        self,
        inner_v: Any = None,
        keep_inner_v: bool = True,
        outer_v: Any = None,
        keep_outer_v: bool = True,
    ) -> list[tuple[tree.Part, tree.Part]]:
        """The variables that adapt and those that are differentiated: for each task, or for all."""
        inner = self._parts(inner_v, keep_inner_v, "inner_v")
        outer = self._parts(outer_v, keep_outer_v, "outer_v")
        count = max(len(inner), len(outer))
        return [(inner[i % len(inner)], outer[i % len(outer)]) for i in range(count)]

    def _parts(self, choice: Any, keep: bool, name: str) -> list[tree.Part]:
        if not _is_per_task(choice):
            return [self._part(choice, keep, name)]
        if self.tiled or self.how.task_map != "loop":
            raise InputError(f"{name} gives one choice a task, which needs batched=False.")
        if self.how.distributed:
            raise InputError(
                f"{name} gives one choice a task, which distributed=True does not take."
            )
        if len(choice) != self.num_tasks:
            raise InputError(f"{name} gives {len(choice)} choices for {self.num_tasks} tasks.")
        return [self._part(each, keep, name) for each in choice]

    def _part(self, choice: Any, keep: bool, name: str) -> tree.Part:
        part = tree.Part(
            self.variables.spec, tree.flags(self.variables.spec, choice, keep, name=name)
        )
        checks.variables(self.variables.arrays, part, self.backend, name)
        return part

    @property
    def scale(self) -> int:
        """The factor from the gradient of a mean over tiled tasks to every task's own."""
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


def _execution(
    batched: Batched, chunk_size: int | None, distributed: bool, stop_gradients: bool
) -> Execution:
    arguments.choice(batched, "batched", (True, False, *TASK_MAPS))
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
    return Execution("loop" if isinstance(batched, bool) else batched, chunk_size, distributed)


def _is_per_task(choice: Any) -> bool:
    return (
        isinstance(choice, (list, tuple))
        and len(choice) > 0
        and isinstance(choice[0], (list, tuple, Mapping, type(None)))
    )
