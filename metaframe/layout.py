"""How one call of a step lays out its tasks and variables, and which variables take part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from metaframe import checks, tree
from metaframe.backend import Array, Backend
from metaframe.errors import InputError
from metaframe.inputs import arrays_of
from metaframe.meta import Execution, Strategy

Batched = bool | Literal["vmap", "scan"]
_WhichTasks = Literal["first", "all"]
ReturnInner = bool | _WhichTasks

RETURN_INNER: tuple[ReturnInner, ...] = (False, True, *get_args(_WhichTasks))


@dataclass(frozen=True)
class Layout:
    """The tasks and variables of one call, checked, as arrays, laid out for `accumulate`."""

    backend: Backend
    batch: tree.Tree
    variables: tree.Tree
    num_tasks: int
    tiled: bool
    task_map: Strategy
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
        variables, batch, backend = arrays_of(variables, batch)
        count = checks.tasks(batch, num_tasks)
        tiled = batched is True
        if tiled:
            checks.tiled(variables, count)

        def lay_out(x: Array) -> Array:
            x = x if x.shape[0] == count else x[:count]
            # All tasks as a single one, or each with a leading axis of size 1.
            return x[None] if tiled else backend.ops.expand_dims(x, 1) if batched is False else x

        prepare = backend.stop_gradient if stop_gradients else backend.asarray
        return Layout(
            backend,
            tree.map(lay_out, batch),
            tree.map(prepare, variables),
            count,
            tiled,
            _task_map(batched),
            stop_gradients,
        )

    @property
    def scale(self) -> int:
        """What turns the gradient of a mean over tiled tasks into every task's own."""
        return self.num_tasks if self.tiled else 1

    def without_task_axis(self, x: Array, how: Literal["sum", "mean"]) -> Array:
        """A gradient in the shape of one task's variables."""
        if not self.tiled:
            return x
        reduce = self.backend.ops.sum if how == "sum" else self.backend.ops.mean
        return reduce(x, axis=0)

    def cost(self, cost: Any) -> Any:
        """The cost as the caller gets it."""
        return tree.map(self.backend.stop_gradient, cost) if self.stop_gradients else cost

    def inner(self, adapted: tree.Tree, which: ReturnInner) -> tree.Tree:
        """Adapted variables as the caller asked for them, from those of all tasks."""
        if not which:
            return ()
        if self.tiled:
            adapted = tree.map(lambda x: x[0], adapted)
        if which == "first":
            adapted = tree.map(lambda x: x[:1], adapted)
        return tree.map(self.backend.stop_gradient, adapted) if self.stop_gradients else adapted


def execution(
    batched: Batched, chunk_size: int | None, distributed: bool, stop_gradients: bool
) -> Execution:
    """How the tasks of a step run.

    Raises:
        InputError: an unknown setting, or two that do not go together.
    """
    checks.choice(batched, "batched", (True, False, "vmap", "scan"))
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
    return Execution(_task_map(batched), chunk_size, distributed)


def _task_map(batched: Batched) -> Strategy:
    return "loop" if isinstance(batched, bool) else batched


@dataclass(frozen=True)
class Choices:
    """Which variables adapt and which are differentiated, possibly another choice each task."""

    inner_v: Any
    keep_inner_v: bool
    outer_v: Any
    keep_outer_v: bool

    @property
    def per_task(self) -> bool:
        """Does any choice differ between tasks?"""
        return _is_per_task(self.inner_v) or _is_per_task(self.outer_v)

    def inner(self, variables: tree.Tree, task: int | None = None) -> tuple[bool, ...]:
        """One flag a variable: does it adapt (in this task)?"""
        return tree.chosen(variables, _at(self.inner_v, task), self.keep_inner_v)

    def outer(self, variables: tree.Tree, task: int | None = None) -> tuple[bool, ...]:
        """One flag a variable: is it differentiated (in this task)?"""
        return tree.chosen(variables, _at(self.outer_v, task), self.keep_outer_v)

    def check_count(self, layout: Layout) -> None:
        """Choices per task come one a task, and with the tasks one by one."""
        for name, choice in (("inner_v", self.inner_v), ("outer_v", self.outer_v)):
            if not _is_per_task(choice):
                continue
            if layout.tiled or layout.task_map != "loop":
                raise InputError(f"{name} gives one choice a task, which needs batched=False.")
            if len(choice) != layout.num_tasks:
                raise InputError(
                    f"{name} gives {len(choice)} choices for {layout.num_tasks} tasks."
                )


def _is_per_task(choice: Any) -> bool:
    return (
        isinstance(choice, (list, tuple))
        and len(choice) > 0
        and isinstance(choice[0], (list, tuple, Mapping, type(None)))
    )


def _at(choice: Any, task: int | None) -> Any:
    return choice[task] if _is_per_task(choice) else choice
