"""What batch normalisation sees at every step of an adaptation, averaged over tasks."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from metaframe import ops, tree
from metaframe.backend.types import Array, Arrays
from metaframe.core.inner_loop import StepView
from metaframe.core.meta_gradient import Strategy, map_tasks
from metaframe.learners.functional import Params
from metaframe.learners.objective import Meta, Setting, TaskRun
from metaframe.learners.pure import divided
from metaframe.models.per_step import StepStatistics, placed

if TYPE_CHECKING:
    from metaframe.tasks import Task


@dataclass(frozen=True)
class StatisticsOfTasks:
    """`(meta, constants, batch) -> statistics`: tables of means over tasks, a row for each step.

    Two of them are equal, and have the same hash, if one program serves for both.
    """

    setting: Setting
    task_map: Strategy
    chunk_size: int | None
    learned: bool
    flags: Hashable

    def __call__(self, meta: Params, constants: Meta, batch: Task) -> Params:
        """The statistics of every layer at theta_0 .. theta_K."""

        def of_task(task: Task) -> Params:
            return observed(TaskRun(self.setting, divided(meta, self.learned), constants, task))

        mapped = map_tasks(of_task, task_map=self.task_map, chunk_size=self.chunk_size)
        means: Params = tree.map(lambda x: ops.mean(x, axis=0), mapped(batch))
        return means


def observed(run: TaskRun) -> Params:
    """One task's statistics: of its support set before each step, of its query set after all."""
    adapter, task = run.setting.adapter, run.task
    assert isinstance(adapter, StepStatistics), "the policy put it there"
    names = sorted(adapter.statistics)

    def rows(params: Params, x: Array, step: Array) -> Arrays:
        found = run.recorded(run.ordered(params), x, step)
        return tuple(placed(found[name], step, adapter.rows) for name in names)

    def observe(at: Params, view: StepView | None, index: Array) -> Arrays:
        del view
        return rows(at, task.support_x, index)

    result = run.adapted(observe)
    last = adapter.backend.asarray(run.setting.steps, "int32")
    query = rows(result.variables, task.query_x, last)
    if not result.total:
        return dict(zip(names, query, strict=True))
    both = zip(result.total, query, strict=True)
    return dict(zip(names, (support + of_query for support, of_query in both), strict=True))
