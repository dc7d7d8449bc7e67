"""One outer step: meta-gradient, then the outer optimizer.

With an optimizer of pure functions, ours or optax's, both are one function and compile into one
program, so that nothing is dispatched parameter by parameter. A framework's own optimizer changes
variables in place and stays outside.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np

from metaframe import arguments, optim, tree
from metaframe.backend.contract import Backend, NativeOptimizer
from metaframe.backend.model import Params
from metaframe.backend.types import Array
from metaframe.backend.workers import Share
from metaframe.core.chain import rule
from metaframe.core.compile import compile
from metaframe.core.inner_loop import MODES, Mode
from metaframe.core.task_map import Execution, TaskMap
from metaframe.errors import CheckpointError, InputError, InputTypeError
from metaframe.learners.learner import LossFn
from metaframe.learners.meta_learner import MetaLearner
from metaframe.learners.objective import Meta, as_batch
from metaframe.learners.programs import MetaGradient
from metaframe.tasks import Task
from metaframe.training._keras import keras_optimizer

Schedule = Callable[[int], float]
"""From the number of steps taken so far to the learning rate of the next one."""

Gradient = Callable[[int | None], MetaGradient]
"""What the learner offers now; the training loop may change it, by a schedule or a flag.

Its argument: how many tasks there are in all, where a batch holds this process's share of them.
"""


@dataclass(frozen=True)
class StepSettings:
    """How steps and evaluations run; none of it changes the numbers beyond rounding.

    Attributes:
        task_map: "vmap", all tasks at once; "scan" or "loop", one after the other; "auto",
            one after the other for convolutions on a CPU, at once for everything else.
        chunk_size: with "vmap", how many tasks at once; in an inductive evaluation also how many
            query examples of a task at most.
        mode: how the inner loop is differentiated, see `metaframe.inner_loop`.
        compiled: compile whole steps; default: where the backend compiles quickly.
        distributed: divide the tasks of a step among the active workers, see
            `metaframe.distributed`. Every process calls the trainer alike.

    >>> StepSettings(task_map="scan", mode="remat").compiled is None
    True
    """

    task_map: TaskMap = "auto"
    chunk_size: int | None = None
    mode: Mode = "reverse"
    compiled: bool | None = None
    distributed: bool = False

    def __post_init__(self) -> None:
        Execution(self.task_map, self.chunk_size, self.distributed)
        arguments.choice(self.mode, "mode", MODES)

    def for_learner(self, maml: MetaLearner) -> StepSettings:
        """With the default of `compiled` filled in."""
        quick = maml.backend.compiles_quickly
        return replace(self, compiled=quick if self.compiled is None else self.compiled)


class StepReport(NamedTuple):
    """What one outer step found, before the update.

    >>> StepReport(0.5, np.array([0.25, 0.75]), None, 2.0).loss
    0.5
    """

    loss: float
    """Mean query loss after adaptation."""
    task_losses: np.ndarray[Any, Any]
    task_scores: np.ndarray[Any, Any] | None
    """The metric of each task, if there is one."""
    grad_norm: float
    """Euclidean norm of the whole meta-gradient."""


class Outcome(NamedTuple):
    """A step that was computed and is not yet in effect."""

    report: StepReport
    apply: Callable[[], None]


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
        raise InputError(_NO_SCHEDULE)
    if native is not None:
        return _NativeStep(maml, native, gradient, compiled)
    if hasattr(optimizer, "init") and hasattr(optimizer, "update"):
        return _PureStep(maml, optimizer, gradient, compiled)
    raise InputTypeError(
        f"meta_optimizer is a {type(optimizer).__qualname__}, expected one of metaframe.optim, a "
        f"pair with init and update, or an optimizer of {maml.backend.name!r} or Keras."
    )


def _report(aux: dict[str, Array], cost: Array, norm: Array, to_numpy: Any) -> StepReport:
    scores = aux.get("scores")
    return StepReport(
        float(to_numpy(cost)),
        to_numpy(aux["costs"]),
        None if scores is None else to_numpy(scores),
        float(to_numpy(norm)),
    )


class _PureStep:
    """Gradient and update as one pure function."""

    def __init__(
        self, maml: MetaLearner, optimizer: Any, gradient: Gradient, compiled: bool
    ) -> None:
        self._maml = maml
        self._gradient = gradient
        self._state = optimizer.init(maml.meta_arrays())
        self._ours = ours = isinstance(optimizer, optim.Optimizer)
        self._rule = rule(optimizer) if ours else None

        def step(
            gradient: MetaGradient,
            params: Params,
            state: Any,
            constants: Meta,
            batch: Task,
            rate: Array | None,
        ) -> tuple[Params, Any, Array, dict[str, Array], Array]:
            cost, grads, aux = gradient(params, constants, batch)
            updates, state = optimizer.update(grads, state, params, *([rate] if ours else []))
            after = optim.apply_updates(params, updates)
            return after, state, cost, aux, optim.global_norm(grads)

        self._run = compile(step) if compiled else step

    def __call__(self, batch: Task, rate: float | None, num_tasks: int | None) -> Outcome:
        if not self._ours:
            _refuse_rate(rate)
        maml, backend = self._maml, self._maml.backend
        params = maml.meta_arrays()
        batch = as_batch(batch, params, backend)
        array = None if rate is None else _like(rate, params, maml)
        after, state, cost, aux, norm = self._run(
            self._gradient(num_tasks), params, self._state, maml.constants(), batch, array
        )

        def apply() -> None:
            maml.assign(after)
            self._state = state

        return Outcome(_report(aux, cost, norm, backend.to_numpy), apply)

    def state(self) -> tuple[dict[str, np.ndarray[Any, Any]], Any]:
        names, leaves = tree.key_chains(self._state), tree.leaves(self._state)
        backend = self._maml.backend
        arrays = {n: on_host(x, backend) for n, x in zip(names, leaves, strict=True)}
        return arrays, {} if self._rule is None else {"rule": self._rule}

    def restore(self, arrays: dict[str, np.ndarray[Any, Any]], plain: Any) -> None:
        names = tree.key_chains(self._state)
        if set(names) != set(arrays):
            raise CheckpointError(
                "the checkpoint is of another optimizer: "
                f"missing {sorted(set(names) - set(arrays))}, "
                f"unexpected {sorted(set(arrays) - set(names))}."
            )
        written = plain.get("rule")  # checkpoints from before it was kept have none
        if None not in (written, self._rule) and written != self._rule:
            raise CheckpointError(
                f"the checkpoint is of another optimizer: of {written}, and this one is "
                f"{self._rule}."
            )
        backend = self._maml.backend
        leaves = [
            backend.asarray(arrays[name], backend.dtype_name(old), backend.device_of(old))
            for name, old in zip(names, tree.leaves(self._state), strict=True)
        ]
        self._state = tree.unflatten(tree.structure(self._state), leaves)


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
        _refuse_rate(rate)
        maml, backend = self._maml, self._maml.backend
        params = maml.meta_arrays()
        batch = as_batch(batch, params, backend)
        grads, cost, aux, norm = self._run(
            self._gradient(num_tasks), params, maml.constants(), batch
        )
        report = _report(aux, cost, norm, backend.to_numpy)
        return Outcome(report, lambda: self._optimizer.step(maml.variables(), grads))

    def state(self) -> tuple[dict[str, np.ndarray[Any, Any]], Any]:
        return self._optimizer.state()

    def restore(self, arrays: dict[str, np.ndarray[Any, Any]], plain: Any) -> None:
        self._optimizer.restore(arrays, plain)


_NO_SCHEDULE = (
    "schedule= is for optimizers of metaframe.optim made without a learning rate. Schedule another "
    "optimizer by its own means: optax by a schedule in the place of the rate, a framework's own "
    "optimizer in a callback."
)


def _refuse_rate(rate: float | None) -> None:
    if rate is not None:
        raise InputError(_NO_SCHEDULE)


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


def on_host(x: Array, backend: Backend) -> np.ndarray[Any, Any]:
    """`x` in NumPy; bfloat16, which that lacks, as float32, which holds it exactly."""
    wide = backend.dtype_name(x) == "bfloat16"
    return backend.to_numpy(backend.ops.astype(x, "float32") if wide else x)


def _like(rate: float, params: Params, maml: MetaLearner) -> Array:
    first = next(x for x in params.values() if maml.backend.is_floating(x))
    return maml.backend.asarray(float(rate), maml.backend.dtype_name(first))
