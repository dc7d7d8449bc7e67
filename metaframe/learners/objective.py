"""The meta-objective of one task, as a pure function over the inner loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from metaframe import ops, tree
from metaframe.backend.contract import Backend
from metaframe.backend.model import Forward, Inputs, ModelAdapter
from metaframe.backend.selection import is_neutral
from metaframe.backend.types import Array, Arrays
from metaframe.core import checks
from metaframe.core.inner_loop import (
    InnerLoop,
    InnerResult,
    InnerSettings,
    Mode,
    Observer,
    Rows,
)
from metaframe.core.task_program import TaskRun, adapted_cost
from metaframe.errors import InputError, InputTypeError
from metaframe.learners.functions import Params, array_like, gradients
from metaframe.learners.method import Method, Support
from metaframe.learners.minibatches import chosen, count
from metaframe.learners.settings import AdaptConfig
from metaframe.learners.task_loss import LossFn, TaskLoss, run_user
from metaframe.models.per_step import STEP, at_step

if TYPE_CHECKING:
    from metaframe.tasks import Task

Meta = dict[str, Params]
"""The meta-parameters of a model, "params", and those of its update rule, "learned"."""


@dataclass(frozen=True)
class Setting:
    """Settings common to all tasks; with equal settings a compiled program is used again."""

    adapter: ModelAdapter
    config: AdaptConfig
    method: Method
    losses: TaskLoss
    steps: int
    mode: Mode
    metric: LossFn | None = None

    def task_cost(
        self, meta: Meta, constants: Meta, task: Task, weight: Array | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """The task's contribution to the meta-objective, and what to report of it.

        The contribution is multiplied by the task's weight; the report has the cost itself.
        """
        model = ModelOnTask(self, meta, constants, task)
        found = (self.method.objective or adapted_cost)(model.run())
        seen = list(found.report)
        report: dict[str, Any] = {"costs": found.cost}
        if self.metric is not None:
            report["scores"] = seen.pop(0)
        report |= model.aux.build(seen)
        own = self.losses.weight(self.adapter.backend, task, model.learned)
        cost = found.cost
        for factor in (weight, own):
            cost = cost if factor is None else cost * factor
        return cost, report


class ModelOnTask:
    """A model on one task: its losses and its inner loop, as functions of named parameters.

    `start` are all parameters before the first step, if they are known already.
    """

    def __init__(
        self,
        setting: Setting,
        meta: Meta,
        constants: Meta,
        task: Task,
        start: Params | None = None,
    ) -> None:
        self.setting = setting
        self.task = task
        self._schedule = constants["schedule"]
        self._state = constants["state"]
        self._learned = {**constants["learned"], **meta["learned"]}
        self.learned = setting.config.learned(self._learned)
        """The outer variables beyond the model's, as they were given; None without any."""
        self.aux = tree.Returned()
        """The structure of what else is reported of the query set, once that has run."""
        self.support = Support(
            task.support_x,
            task.support_y,
            lambda params, x: self._call(params, self._state, self._support_forward(), x)[0],
            self._loss_of,
            setting.config.names,
            setting.adapter.backend,
            self.learned,
        )
        self.start = self._begun({**constants["params"], **meta["params"]}, start)
        """All parameters before the first step."""
        self._adapting = tuple(sorted(setting.config.names))
        self._held = tuple(name for name in self.start if name not in setting.config.names)
        self._batch = tree.Packed(
            (self.support.x, self.support.y, self.learned), setting.adapter.backend.owns
        )

    def _begun(self, params: Params, start: Params | None) -> Params:
        if start is not None:
            return start
        params = {name: params[name] for name in self.setting.adapter.params()}
        begin = self.setting.method.begin
        return params if begin is None else begin(self.support, params)

    def run(self) -> TaskRun:
        """The task program, on flat arrays."""
        if self.setting.steps and not self.setting.config.allow_unused:
            self._check_all_used()
        loop, start, context = self.loop(), self.params, self.context
        rows = self.rows(self.setting.steps)
        finish = self.setting.method.finish

        def adapted(observe: Observer | None = None) -> InnerResult:
            if self.setting.steps == 0:
                return InnerResult(start, tree.Flat.of(()), ())
            found = loop.run(start, context, self.setting.steps, observe, rows=rows)
            if finish is None:
                return found
            after = finish(self.support, self.start, self.named(found.params))
            return found._replace(params=tuple(after[name] for name in self._adapting))

        return TaskRun(
            start,
            self.setting.steps,
            adapted,
            partial(loop.cost_and_gradient, context=context),
            self._query,
            self._schedule,
        )

    @property
    def params(self) -> Arrays:
        """The parameters that adapt, before the first step."""
        return tuple(self.start[name] for name in self._adapting)

    @property
    def context(self) -> Arrays:
        """Other inputs of the inner cost: other parameters, support set, the step."""
        step = (self._state[STEP],) if STEP in self._state else ()
        return (*(self.start[name] for name in self._held), *self._batch.arrays, *step)

    def rows(self, steps: int, taken: Array | None = None) -> Rows | None:
        """The examples that each step sees; None where they see all of them.

        Those of the first `steps` steps, or of the one after the `taken` that were taken.
        """
        batches, backend = self.setting.config.batches, self.setting.adapter.backend
        if batches is None:
            return None
        known = max(steps, 1) if taken is None else max(self.setting.steps, 1)
        table = batches(known, count(self.task.support_x)).astype("int32")
        array = array_like(table, self.start, backend)
        if taken is not None:
            array = ops.take(array, ops.reshape(taken % known, (1,)))
        return Rows((array,))

    def loop(self) -> InnerLoop:
        """The inner loop."""
        config = self.setting.config
        settings = InnerSettings(
            config.rate(self._learned),
            config.update,
            1 if config.first_order else 2,
            self.setting.mode,
            context_of_step=_at_step if STEP in self._state else None,
            lr_name="inner_lr",
        )
        spec = tree.structure(dict.fromkeys(self._adapting, 0))
        return InnerLoop(self.setting.adapter.backend, self._inner_cost, spec, settings)

    def named(self, params: Arrays, held: Arrays | None = None) -> Params:
        """All parameters by name, in the model's own order."""
        adapted = dict(zip(self._adapting, params, strict=True))
        others = self.start if held is None else dict(zip(self._held, held, strict=True))
        return {n: adapted[n] if n in adapted else others[n] for n in self.start}

    def predict(self, params: Params, x: Any, step: Array | None = None) -> Any:
        """The model's output for examples that it did not adapt on, all in one batch."""
        state = at_step(self._state, self.setting.steps if step is None else step)
        if self.setting.config.norm == "support":
            record = self.setting.config.forward("support")
            _, state = self._call(params, state, record, self.task.support_x)
        return self._call(params, state, self.setting.config.forward("query"), x)[0]

    def recorded(self, params: Params, x: Any, step: Any) -> Params:
        """The model's state when batch normalisation takes the statistics of `x` and keeps them."""
        forward = replace(self.setting.config.forward("query"), norm="record", twice=False)
        return self._call(params, at_step(self._state, step), forward, x)[1]

    def _query(self, params: Arrays, step: Array | None) -> tuple[Array, Arrays]:
        """The query loss after this many steps, by default after all, and then the score too."""
        setting, target, backend = self.setting, self.task.query_y, self.setting.adapter.backend
        prediction = self.predict(self.named(params), self.task.query_x, step)
        loss, aux = setting.losses.query(backend, prediction, target)
        if step is not None:
            return loss, ()
        more = {"aux": aux} if setting.losses.has_aux else {}
        if setting.losses.statistics:
            state = self.recorded(self.named(params), self.task.query_x, setting.steps)
            more["statistics"] = {name: state[name] for name in setting.adapter.recordable()}
        report = self.aux.flatten(more)
        if setting.metric is None:
            return loss, report
        score = run_user(backend, setting.metric, prediction, target)
        return loss, (checks.scalar(score, "metric", backend), *report)

    def _inner_cost(self, params: Arrays, context: Arrays) -> tuple[Array, Arrays]:
        """The cost that the inner loop minimises: the support loss, and the algorithm's penalty.

        Last in the context come the step and the rows of its minibatch, where there are such.
        """
        held, end = len(self._held), len(self._held) + len(self._batch.arrays)
        named = self.named(params, context[:held])
        x, y, learned = self._batch.unpack(context[held:end])
        step = context[end] if STEP in self._state else None
        if self.setting.config.batches is not None and len(context) > end + (step is not None):
            x, y = chosen((x, y), context[-1])
        cost = self._support_loss(named, x, y, learned, step)
        penalty = self.setting.method.penalty
        if penalty is not None:
            names = self.setting.config.names
            cost = cost + penalty(*({n: p[n] for n in names} for p in (named, self.start)))
        return cost, (cost,)

    def _loss_of(self, batch: Any, params: Params) -> Array:
        """The loss of `Support`, at the last step."""
        x, y, *learned = batch
        given = learned[0] if learned else self.learned
        return self._support_loss(params, x, y, given, self.setting.steps)

    def _support_loss(self, params: Params, x: Any, y: Any, learned: Any, step: Any) -> Array:
        state = self._state if step is None else at_step(self._state, step)
        output, _ = self._call(params, state, self._support_forward(), x, learned)
        return self.setting.losses.support(self.setting.adapter.backend, output, y, learned)

    def _support_forward(self) -> Forward:
        forward = self.setting.config.forward("support")
        return replace(forward, repeated=self.setting.mode != "reverse")

    def _call(
        self, params: Params, state: Params, forward: Forward, x: Any, learned: Any = None
    ) -> tuple[Any, Params]:
        call = self.setting.losses.calling(self.learned if learned is None else learned)
        return self.setting.adapter.call(params, state, Inputs((x,), forward=forward, call=call))

    def _check_all_used(self) -> None:
        support, names = self.support, self.setting.config.names
        gradients(
            self.setting.adapter.backend,
            self.start,
            names,
            lambda params: support.loss((support.x, support.y), params),
            True,
            allow_unused=False,
        )


def _at_step(context: Arrays, step: Array) -> Arrays:
    return (*context[:-1], step)


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

    def convert(x: Any) -> Array:
        if backend.owns(x):
            return x
        if is_neutral(x):
            return array_like(x, like, backend)
        raise InputTypeError(
            f"the model is of {backend.name!r}, received tasks with {type(x).__qualname__}. "
            f"Convert the tasks to arrays of {backend.name!r}, or leave them in NumPy."
        )

    batch: Task = tree.map(convert, stacked)
    backend.check_values((*like.values(), *tree.leaves(batch)))
    return batch


def task_weights(weights: Any, batch: Task, like: Params, backend: Backend) -> Array:
    """One weight for each task of a batch, as an array of the backend.

    Raises:
        InputError: not one number for each.
    """
    given = weights
    if not backend.owns(weights):
        given = array_like(np.asarray(weights, dtype=float), like, backend)
    tasks = tree.leaves(batch)[0].shape[0]
    if tuple(given.shape) != (tasks,):
        raise InputError(
            f"weights has shape {tuple(given.shape)}, and there are {tasks} tasks: give one number "
            f"for each, shape ({tasks},), or a function of a task."
        )
    return given
