"""Statistics of batch normalisation at every step of an adaptation, averaged over tasks."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from metaframe import ops, tree
from metaframe.backend.types import Array, Arrays
from metaframe.core.constants import Settled
from metaframe.core.inner_loop import StepView
from metaframe.core.meta_gradient import map_tasks
from metaframe.core.task_map import Strategy
from metaframe.learners.functions import Params
from metaframe.learners.objective import Meta, ModelOnTask, Setting
from metaframe.learners.programs import divided
from metaframe.models.per_step import StepStatistics, placed

if TYPE_CHECKING:
    from metaframe.tasks import Task


@dataclass(frozen=True)
class StatisticsOfTasks(Settled):
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
            model = ModelOnTask(self.setting, divided(meta, self.learned), constants, task)
            return observed(model)

        mapped = map_tasks(of_task, task_map=self.task_map, chunk_size=self.chunk_size)
        means: Params = tree.map(lambda x: ops.mean(x, axis=0), mapped(batch))
        return means


def observed(model: ModelOnTask) -> Params:
    """One task's statistics: of its support set before each step, of its query set after all."""
    adapter, task, steps = model.setting.adapter, model.task, model.setting.steps
    assert isinstance(adapter, StepStatistics), "the policy put it there"
    names = sorted(adapter.statistics)

    def rows(params: Arrays, x: Array, step: Array) -> Arrays:
        found = model.recorded(model.named(params), x, step)
        return tuple(placed(found[name], step, adapter.rows) for name in names)

    def observe(at: Arrays, view: StepView | None, index: Array) -> Arrays:
        del view
        return rows(at, task.support_x, index)

    found = model.run().adapted(observe)
    query = rows(found.params, task.query_x, adapter.backend.asarray(steps, "int32"))
    if not found.total:
        return dict(zip(names, query, strict=True))
    both = zip(found.total, query, strict=True)
    return dict(zip(names, (support + of_query for support, of_query in both), strict=True))
