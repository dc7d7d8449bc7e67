"""The meta-objective of one task, as a pure function over the inner loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from metaframe import checks, optim, tree
from metaframe.backend import Array, Backend, is_neutral
from metaframe.errors import InputTypeError
from metaframe.inner import InnerLoop, InnerResult, InnerSettings, Mode, Observer
from metaframe.learners.config import AdaptConfig
from metaframe.learners.functional import Params, array_like, gradients
from metaframe.learners.learner import LossFn
from metaframe.learners.method import Method, Support
from metaframe.models import Forward, Inputs, ModelAdapter
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

    def task_cost(self, meta: Meta, constants: Meta, task: Task) -> tuple[Array, dict[str, Array]]:
        """The task's contribution to the meta-objective, and what to report of it."""
        objective = self.method.objective or adapted_query_loss
        run = TaskRun(self, meta, constants, task)
        cost = objective(run)
        if self.metric is None:
            return cost, {"costs": cost}
        score = self.metric(run.prediction, task.query_y)
        return cost, {"costs": cost, "scores": checks.scalar(score, "metric", self.adapter.backend)}


class TaskRun:
    """One task: its losses and its inner loop, as functions of named parameters.

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
        self.schedule = constants["schedule"]
        """What changes from one call to the next and is not differentiated."""
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

    def _begun(self, params: Params, start: Params | None) -> Params:
        if start is not None:
            return start
        params = {name: params[name] for name in self.setting.adapter.params()}
        begin = self.setting.method.begin
        return params if begin is None else begin(self.support, params)

    def adapted(self, observe: Observer | None = None) -> InnerResult:
        """All parameters after the inner loop, and the sums of what the observer returned."""
        setting = self.setting
        if setting.steps == 0:
            return InnerResult(self.start, ())
        if not setting.config.allow_unused:
            self._check_all_used()
        result = self.loop(self.start).run(setting.steps, observe)
        params = self.ordered(result.variables)
        if setting.method.finish is not None:
            params = setting.method.finish(self.support, self.start, params)
        return InnerResult(params, result.total)

    def query_loss(self, params: Params, step: Array | None = None) -> Array:
        """The loss on the query set, after this many steps; by default after all."""
        self.prediction = self.predict(params, self.task.query_x, step)
        """What the last query loss was computed from."""
        return self._loss(self.prediction, self.task.query_y)

    def predict(self, params: Params, x: Any, step: Array | None = None) -> Any:
        """The model's output for examples that it did not adapt on, all in one batch."""
        state = at_step(self._state, self.setting.steps if step is None else step)
        if self.setting.config.norm == "support":
            record = self.setting.config.forward("support")
            _, state = self._call(params, state, record, self.task.support_x)
        return self._call(params, state, self.setting.config.forward("query"), x)[0]

    @property
    def rate(self) -> optim.Rate:
        """What the update rule is given as learning rate."""
        return self.setting.config.rate(self._learned)

    def ordered(self, params: Params) -> Params:
        """In the model's own order, which a structure does not keep."""
        return {name: params[name] for name in self.start}

    def recorded(self, params: Params, x: Any, step: Any) -> Params:
        """The model's state when batch normalisation takes the statistics of `x` and keeps them."""
        forward = replace(self.setting.config.forward("query"), norm="record", twice=False)
        return self._call(params, at_step(self._state, step), forward, x)[1]

    def loop(self, start: Params) -> InnerLoop:
        """The inner loop from `start`."""
        config, batch = self.setting.config, (self.support.x, self.support.y)
        stepwise = STEP in self._state
        settings = InnerSettings(
            self.rate,
            config.update,
            1 if config.first_order else 2,
            self.setting.mode,
            batch_of_step=_with_step if stepwise else None,
            lr_name="inner_lr",
        )
        chosen = tree.leaves({name: name in config.names for name in start})
        return InnerLoop(
            self.inner_cost,
            start,
            (*batch, self._state[STEP]) if stepwise else batch,
            chosen,
            settings,
        )

    def inner_cost(self, batch: Any, params: Params) -> Array:
        """What the inner loop minimises: the support loss, and the algorithm's penalty."""
        loss, penalty = self._support_loss(batch, params), self.setting.method.penalty
        if penalty is None:
            return loss
        names = self.setting.config.names
        return loss + penalty(*({n: p[n] for n in names} for p in (params, self.start)))

    def _support_loss(self, batch: Any, params: Params) -> Array:
        x, y, *step = batch
        state = at_step(self._state, *step) if step else self._state
        output, _ = self._call(self.ordered(params), state, self._support_forward(), x)
        return self._loss(output, y)

    def _loss(self, prediction: Any, target: Any) -> Array:
        loss = self.setting.loss_fn(prediction, target)
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


def _with_step(batch: Any, step: Array) -> Any:
    return (*batch[:2], step)


def adapted_query_loss(run: TaskRun) -> Array:
    """What MAML minimises: the query loss of the adapted parameters."""
    return run.query_loss(run.adapted().variables)


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
