"""The meta-objective of one task, as a pure function over the inner loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from metaframe import tree
from metaframe.backend.contract import Backend
from metaframe.backend.model import Forward, Inputs, ModelAdapter
from metaframe.backend.selection import is_neutral
from metaframe.backend.types import Array, Arrays
from metaframe.core import checks
from metaframe.core.inner_loop import InnerLoop, InnerResult, InnerSettings, Mode, Observer
from metaframe.core.task_program import TaskRun, adapted_cost
from metaframe.errors import InputTypeError
from metaframe.learners.functions import Params, array_like, gradients
from metaframe.learners.learner import LossFn
from metaframe.learners.method import Method, Support
from metaframe.learners.settings import AdaptConfig
from metaframe.models.per_step import STEP, at_step

if TYPE_CHECKING:
    from metaframe.tasks import Task

Meta = dict[str, Params]
"""The meta-parameters of a model, "params", and those of its update rule, "learned"."""


@dataclass(frozen=True)
class Setting:
    """What is the same for every task; with equal settings a compiled program is used again."""

    adapter: ModelAdapter
    config: AdaptConfig
    method: Method
    loss_fn: LossFn
    steps: int
    mode: Mode
    metric: LossFn | None = None

    def loss(self, prediction: Any, target: Any) -> Array:
        """What `loss_fn` returns."""
        return self.adapter.backend.user_function(self.loss_fn)(prediction, target)

    def task_cost(self, meta: Meta, constants: Meta, task: Task) -> tuple[Array, dict[str, Array]]:
        """The task's contribution to the meta-objective, and what to report of it."""
        run = ModelOnTask(self, meta, constants, task).run()
        found = (self.method.objective or adapted_cost)(run)
        report = {"costs": found.cost}
        if self.metric is not None:
            (report["scores"],) = found.report
        return found.cost, report


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
        self.support = Support(
            task.support_x,
            task.support_y,
            lambda params, x: self._call(params, self._state, self._support_forward(), x)[0],
            lambda batch, params: self._support_loss((*batch, setting.steps), params),
            setting.config.names,
            setting.adapter.backend,
        )
        self.start = self._begun({**constants["params"], **meta["params"]}, start)
        """All parameters before the first step."""
        self._adapting = tuple(sorted(setting.config.names))
        self._held = tuple(name for name in self.start if name not in setting.config.names)
        self._batch = tree.Packed((self.support.x, self.support.y), setting.adapter.backend.owns)

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
        finish = self.setting.method.finish

        def adapted(observe: Observer | None = None) -> InnerResult:
            if self.setting.steps == 0:
                return InnerResult(start, tree.Flat.of(()), ())
            found = loop.run(start, context, self.setting.steps, observe)
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
        """What else the inner cost depends on: other parameters, support set, the step."""
        step = (self._state[STEP],) if STEP in self._state else ()
        return (*(self.start[name] for name in self._held), *self._batch.arrays, *step)

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
        setting, target = self.setting, self.task.query_y
        prediction = self.predict(self.named(params), self.task.query_x, step)
        loss = self._loss(prediction, target)
        if setting.metric is None or step is not None:
            return loss, ()
        score = setting.adapter.backend.user_function(setting.metric)(prediction, target)
        return loss, (checks.scalar(score, "metric", setting.adapter.backend),)

    def _inner_cost(self, params: Arrays, context: Arrays) -> tuple[Array, Arrays]:
        """What the inner loop minimises: the support loss, and the algorithm's penalty."""
        held = len(self._held)
        named = self.named(params, context[:held])
        count = len(self._batch.arrays)
        batch = self._batch.unpack(context[held : held + count])
        cost = self._support_loss((*batch, *context[held + count :]), named)
        penalty = self.setting.method.penalty
        if penalty is not None:
            names = self.setting.config.names
            cost = cost + penalty(*({n: p[n] for n in names} for p in (named, self.start)))
        return cost, (cost,)

    def _support_loss(self, batch: Any, params: Params) -> Array:
        x, y, *step = batch
        state = at_step(self._state, *step) if step else self._state
        output, _ = self._call(params, state, self._support_forward(), x)
        return self._loss(output, y)

    def _loss(self, prediction: Any, target: Any) -> Array:
        loss = self.setting.loss(prediction, target)
        return checks.scalar(loss, "loss_fn", self.setting.adapter.backend)

    def _support_forward(self) -> Forward:
        forward = self.setting.config.forward("support")
        return replace(forward, repeated=self.setting.mode != "reverse")

    def _call(self, params: Params, state: Params, forward: Forward, x: Any) -> tuple[Any, Params]:
        return self.setting.adapter.call(params, state, Inputs((x,), forward=forward))

    def _check_all_used(self) -> None:
        batch, names = (self.support.x, self.support.y), self.setting.config.names
        gradients(
            self.setting.adapter.backend,
            self.start,
            names,
            lambda params: self._support_loss(batch, params),
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
    return batch
