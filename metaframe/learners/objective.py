"""The meta-objective of one task, as a pure function over `inner_loop`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from metaframe import tree
from metaframe.backend import Array, Backend, is_neutral
from metaframe.errors import InputTypeError
from metaframe.inner import Mode, inner_loop
from metaframe.learners.config import AdaptConfig
from metaframe.learners.functional import Params, gradients
from metaframe.learners.learner import LossFn
from metaframe.models import ModelAdapter

if TYPE_CHECKING:
    from metaframe.tasks import Task

Meta = dict[str, Params]
"""The meta-parameters of a model, "params", and those of its update rule, "learned"."""


@dataclass(frozen=True)
class TaskObjective:
    """`(meta, constants, task) -> query loss after adaptation, and what to report`."""

    adapter: ModelAdapter
    config: AdaptConfig
    loss_fn: LossFn
    steps: int
    mode: Mode
    metric: LossFn | None = None

    def __call__(self, meta: Meta, constants: Meta, task: Task) -> tuple[Array, dict[str, Array]]:
        """Adapt on the support set, then the loss, and the metric if there is one, on the query."""
        names, state = self.config.names, constants["state"]
        whole = {**constants["params"], **meta["params"]}
        others = {n: x for n, x in whole.items() if n not in names}

        def support_loss(batch: Any, adapted: Params) -> Array:
            forward = replace(self.config.forward("support"), repeated=self.mode != "reverse")
            (x, y), rest = batch
            output, _ = self.adapter.call(self._ordered(adapted, rest), state, forward, (x,), {})
            return self.loss_fn(output, y)

        batch = ((task.support_x, task.support_y), others)
        start = {name: whole[name] for name in names}
        if not self.config.allow_unused:
            self._check_all_used(start, lambda params: support_loss(batch, params))
        adapted = inner_loop(
            support_loss,
            start,
            batch,
            steps=self.steps,
            lr=self.config.rate(meta["learned"]),
            update=self.config.update,
            order=1 if self.config.first_order else 2,
            mode=self.mode,
        )
        params = self._ordered(adapted, others)
        if self.config.norm == "support":
            record = self.config.forward("support")
            _, state = self.adapter.call(params, state, record, (task.support_x,), {})
        query = self.config.forward("query")
        output, _ = self.adapter.call(params, state, query, (task.query_x,), {})
        cost = self.loss_fn(output, task.query_y)
        if self.metric is None:
            return cost, {"costs": cost}
        return cost, {"costs": cost, "scores": self.metric(output, task.query_y)}

    def _ordered(self, adapted: Params, others: Params) -> Params:
        return {n: adapted[n] if n in adapted else others[n] for n in self.adapter.params()}

    def _check_all_used(self, start: Params, loss: Any) -> None:
        backend = self.adapter.backend
        gradients(backend, start, self.config.names, loss, True, allow_unused=False)


def as_batch(tasks: Task | Sequence[Task], like: Params, backend: Backend) -> Task:
    """Tasks as one stacked Task of the model's framework.

    Neutral arrays become arrays like its parameters: on their device, floats in their dtype.

    Raises:
        InputError: no tasks, or tasks of different shapes.
        InputTypeError: arrays of another framework.
    """
    # Here, because the tasks' package reads data sets, which `import metaframe` need not load.
    from metaframe.tasks import Task, stack_tasks

    stacked = tasks if isinstance(tasks, Task) else stack_tasks(tasks)
    example = next(x for x in like.values() if backend.is_floating(x))

    def convert(x: Any) -> Array:
        if backend.owns(x):
            return x
        if is_neutral(x):
            return _converted(x, example, backend)
        raise InputTypeError(
            f"the model is of {backend.name!r}, received tasks with {type(x).__qualname__}. "
            f"Convert the tasks to arrays of {backend.name!r}, or leave them in NumPy."
        )

    batch: Task = tree.map(convert, stacked)
    return batch


def _converted(x: Any, like: Array, backend: Backend) -> Array:
    device = str(like.device)
    return backend.asarray(
        x,
        backend.dtype_name(like) if np.asarray(x).dtype.kind == "f" else None,
        device if device in backend.devices() else None,
    )
