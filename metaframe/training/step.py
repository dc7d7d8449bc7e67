"""One outer step: meta-gradient, then the outer optimizer.

With an optimizer of pure functions, ours or optax's, both are one function and compile into one
program, so that nothing is dispatched parameter by parameter. A framework's own optimizer changes
variables in place and stays outside.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from metaframe import arguments, optim
from metaframe.backend.contract import NativeOptimizer
from metaframe.backend.model import Params
from metaframe.backend.types import Array
from metaframe.backend.workers import Share
from metaframe.core.compile import compile
from metaframe.core.inner_loop import MODES, Mode
from metaframe.core.task_map import Execution, TaskMap
from metaframe.errors import InputError, InputTypeError
from metaframe.learners.learner import LossFn
from metaframe.learners.meta_learner import MetaLearner
from metaframe.learners.objective import Meta, as_batch
from metaframe.learners.programs import MetaGradient
from metaframe.tasks import Task
from metaframe.training._keras import keras_optimizer
from metaframe.training.pure_step import Found, PureStep
from metaframe.training.report import NO_SCHEDULE, Gradient, Outcome, refuse_rate
from metaframe.training.report import StepReport as StepReport

Schedule = Callable[[int], float]
"""From the number of steps taken so far to the learning rate of the next one."""


@dataclass(frozen=True)
class StepSettings:
    """The way steps and evaluations run; none of it changes the numbers beyond rounding.

    Attributes:
        task_map: "vmap", all tasks at once; "scan" or "loop", one after the other; "auto",
            one after the other for convolutions on a CPU, at once for everything else.
        chunk_size: with "vmap", how many tasks at once; in an inductive evaluation also how many
            query examples of a task at most.
        mode: how the inner loop is differentiated, see `metaframe.inner_loop`.
        compiled: compile whole steps; default: where the backend compiles quickly.
        distributed: divide the tasks of a step among the active workers, see
            `metaframe.distributed`. Every process calls the trainer alike.
        steps_per_call: in `MetaTrainer.fit`, how many outer steps are taken at most before their
            losses are looked at, in one program where the framework has loops in programs; default:
            as many as pays. 1 looks at every loss before the next step. See
            `docs/training_loop.md`.

    >>> StepSettings(task_map="scan", mode="remat").compiled is None
    True
    """

    task_map: TaskMap = "auto"
    chunk_size: int | None = None
    mode: Mode = "reverse"
    compiled: bool | None = None
    distributed: bool = False
    steps_per_call: int | None = None

    def __post_init__(self) -> None:
        Execution(self.task_map, self.chunk_size, self.distributed)
        arguments.choice(self.mode, "mode", MODES)
        if self.steps_per_call is not None:
            arguments.integer(self.steps_per_call, "steps_per_call", at_least=1)

    def for_learner(self, maml: MetaLearner) -> StepSettings:
        """The settings with the default of `compiled` filled in.

        Args:
            maml: the learner, whose backend decides: compiled where the backend compiles quickly.

        Returns:
            Settings whose `compiled` is a boolean.
        """
        quick = maml.backend.compiles_quickly
        return replace(self, compiled=quick if self.compiled is None else self.compiled)


class OuterStep(Protocol):
    """Computes outer steps and holds the optimizer's state."""

    def __call__(self, batch: Task, rate: float | None, num_tasks: int | None) -> Outcome:
        """The next step; `num_tasks` as for `Gradient`."""
        ...

    def state(self) -> tuple[dict[str, np.ndarray[Any, Any]], Any]:
        """The optimizer's state: arrays by name, and plain values."""
        ...

    def restore(self, arrays: dict[str, np.ndarray[Any, Any]], plain: Any) -> None:
        """Go on from what `state` returned; all of it, or an error and nothing.

        Raises:
            CheckpointError: it is of another optimizer.
        """
        ...


def outer_step(
    maml: MetaLearner,
    optimizer: Any,
    loss_fn: LossFn,
    metric: LossFn | None,
    settings: StepSettings,
    *,
    scheduled: bool = False,
) -> OuterStep:
    """The step for `optimizer`, whatever kind it is; with `scheduled`, it gets a rate each time.

    Raises:
        InputTypeError: it is none that the model's framework or metaframe knows.
        InputError: it has no learning rate and none is scheduled, or the other way round.
    """

    def gradient(num_tasks: int | None) -> MetaGradient:
        return maml.meta_gradient(
            loss_fn,
            task_map=settings.task_map,
            chunk_size=settings.chunk_size,
            mode=settings.mode,
            metric=metric,
            distributed=False if num_tasks is None else Share(num_tasks),
        )

    gradient(None)  # bad arguments are found here and not at the first step
    compiled = bool(settings.for_learner(maml).compiled)
    native = maml.backend.native_optimizer(optimizer) or keras_optimizer(
        optimizer, maml.variables()
    )
    if isinstance(optimizer, optim.Optimizer):
        _check_one_rate(optimizer, scheduled)
    elif scheduled and (native is not None or hasattr(optimizer, "update")):
        raise InputError(NO_SCHEDULE)
    if native is not None:
        return _NativeStep(maml, native, gradient, compiled)
    if hasattr(optimizer, "init") and hasattr(optimizer, "update"):
        looped = compiled and maml.backend.loops_in_programs and not settings.distributed
        return PureStep(maml, optimizer, gradient, compiled=compiled, looped=looped)
    raise InputTypeError(
        f"meta_optimizer is a {type(optimizer).__qualname__}, expected one of metaframe.optim, a "
        f"pair with init and update, or an optimizer of {maml.backend.name!r} or Keras."
    )


class _NativeStep:
    """The gradient as one pure function, then the framework's optimizer."""

    def __init__(
        self, maml: MetaLearner, optimizer: NativeOptimizer, gradient: Gradient, compiled: bool
    ) -> None:
        self._maml = maml
        self._optimizer = optimizer
        self._gradient = gradient

        def step(
            gradient: MetaGradient, params: Params, constants: Meta, batch: Task
        ) -> tuple[Params, Array, dict[str, Array], Array]:
            cost, grads, aux = gradient(params, constants, batch)
            return grads, cost, aux, optim.global_norm(grads)

        self._run = compile(step) if compiled else step

    def __call__(self, batch: Task, rate: float | None, num_tasks: int | None) -> Outcome:
        refuse_rate(rate)
        maml, backend = self._maml, self._maml.backend
        params = maml.meta_arrays()
        batch = as_batch(batch, params, backend)
        grads, cost, aux, norm = self._run(
            self._gradient(num_tasks), params, maml.constants(), batch
        )
        report = Found(cost, aux, norm).on_host(backend).report()
        return Outcome(report, lambda: self._optimizer.step(maml.variables(), grads))

    def state(self) -> tuple[dict[str, np.ndarray[Any, Any]], Any]:
        return self._optimizer.state()

    def restore(self, arrays: dict[str, np.ndarray[Any, Any]], plain: Any) -> None:
        self._optimizer.restore(arrays, plain)


def _check_one_rate(optimizer: optim.Optimizer, scheduled: bool) -> None:
    if scheduled and optimizer.learning_rate is not None:
        raise InputError(
            "the learning rate is given twice: to the optimizer and by schedule=. Leave it out of "
            "the optimizer, as in optim.adam(), or leave out the schedule."
        )
    if not scheduled and optimizer.learning_rate is None:
        raise InputError(
            "no learning rate: give one to the optimizer, as in optim.adam(1e-3), or give the "
            "trainer a schedule=. An Optimizer of your own that needs none says so by its "
            "learning_rate, which is None if the loop has to provide it."
        )
