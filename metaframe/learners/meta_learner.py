"""What MAML and its relatives share: meta-parameters, learners and meta-gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from metaframe import checks
from metaframe.backend import Array, Backend
from metaframe.compile import compile
from metaframe.errors import InputError, nearest
from metaframe.inner import Mode
from metaframe.learners.config import AdaptConfig, Norm
from metaframe.learners.functional import Params
from metaframe.learners.learner import Learner, LossFn
from metaframe.learners.method import Method
from metaframe.learners.objective import Meta, Setting, as_batch
from metaframe.learners.pure import LEARNED, Adaptation, MetaGradient, divided
from metaframe.learners.wrapper import Wrapper
from metaframe.meta import Execution, MetaResult, TaskMap
from metaframe.models import ModelAdapter, NamedParameters
from metaframe.models.values import live
from metaframe.workers import Share

if TYPE_CHECKING:
    from metaframe.tasks import Task

PROGRAMS_KEPT = 16
"""Compiled programs of one wrapper; a loss function made anew for each call would pile them up."""


class MetaLearner(Wrapper):
    """A model with a way to adapt it; the base of `MAML` and its relatives.

    Args:
        adapter: the model.
        config: how an inner loop runs.
        method: where the algorithm departs from MAML.
    """

    def __init__(self, adapter: ModelAdapter, config: AdaptConfig, method: Method) -> None:
        super().__init__()
        self.config = config
        self.module = adapter.model
        self._adapter = adapter
        self._method = method
        self._learned: NamedParameters | None = None
        self._schedule: Params = {}
        self._programs: dict[Hashable, Callable[..., MetaResult]] = {}

    def _learn(self, values: Params) -> Any:
        """Make `values` meta-parameters, which the update rule gets as its learning rate.

        Returns:
            What holds them, which on torch has to become an attribute to be saved and moved.
        """
        self._learned = live(values, self._adapter.backend)
        return self._learned.model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the model with its meta-parameters, without adaptation."""
        forward = dataclasses.replace(self.config, norm=self._unadapted_norm()).forward("query")
        state = self._adapter.state()
        return self._adapter.call(self._adapter.params(), state, forward, args, kwargs)[0]

    def _unadapted_norm(self) -> Norm:
        # There is no support set here.
        return "batch" if self.config.norm == "support" else self.config.norm

    def clone(self, params: Mapping[str, Array] | None = None) -> Learner:
        """A fresh learner that starts from the meta-parameters.

        Args:
            params: meta-parameters by name to start from instead of the current ones, as a
                function that is being differentiated receives them.

        Raises:
            InputError: an unknown name.
        """
        values, given = self.meta_parameters(), dict(params or {})
        for name in given:
            if name not in values:
                raise InputError(f"no meta-parameter called {name!r}. {nearest(name, values)}")
        meta = self._divided({**values, **given})
        start = {**self._adapter.params(), **meta["params"]}
        return Learner(self._adapter, start, meta["learned"], self.config, self._method)

    def meta_parameters(self) -> Params:
        """The meta-parameters by name, live where the framework's parameters are.

        They are the model's trainable parameters, and with the prefix "learned/" what the update
        rule learns.
        """
        params = self._adapter.params()
        meta = {name: params[name] for name in self._adapter.trainable()}
        learned = self._learned.params() if self._learned is not None else {}
        return {**meta, **_prefixed(learned)}

    def assign(self, values: Mapping[str, Array]) -> None:
        """Set meta-parameters by name: in the model where it can be changed, in `module` else.

        Raises:
            InputError: an unknown name or another shape.
        """
        meta = self._divided(values)
        self._adapter.assign(meta["params"])
        self.module = self._adapter.model
        if self._learned is not None:
            self._learned.assign(meta["learned"])

    def meta_value_and_grad(
        self,
        loss_fn: LossFn,
        tasks: Task | Sequence[Task],
        *,
        steps: int | None = None,
        task_map: TaskMap = "vmap",
        chunk_size: int | None = None,
        mode: Mode = "reverse",
        compiled: bool | None = None,
        distributed: bool = False,
    ) -> MetaResult:
        """Mean query loss after adaptation, and its gradient in the meta-parameters.

        Args:
            loss_fn: `loss_fn(prediction, target) -> scalar`, pure. Pass the same function each
                time: a new one is compiled anew.
            tasks: a list of tasks of one shape, or a stacked one. NumPy arrays are converted.
            steps: inner steps, 0 or more; default: `inner_steps`.
            task_map: "vmap", all tasks at once; "scan" or "loop", one after the other.
            chunk_size: with "vmap", how many tasks at once.
            mode: how the inner loop is differentiated, see `metaframe.inner_loop`.
            compiled: compile the whole; default: where the backend compiles quickly.
            distributed: divide the tasks among the active workers, see `metaframe.distributed`.

        Returns:
            `(cost, grads, aux)`: the mean loss; gradients by name, in the order of
            `meta_parameters`; and `aux["costs"]`, the loss of each task.

        Raises:
            InputError, InputTypeError: bad arguments, before any work.
        """
        gradient = self.meta_gradient(
            loss_fn,
            steps=steps,
            task_map=task_map,
            chunk_size=chunk_size,
            mode=mode,
            distributed=distributed,
        )
        batch = as_batch(tasks, self.meta_parameters(), self.backend)
        quick = self.backend.compiles_quickly
        run = self._program(gradient) if (quick if compiled is None else compiled) else gradient
        result = run(self.meta_arrays(), self.constants(), batch)
        return result._replace(grads={n: result.grads[n] for n in self.meta_parameters()})

    def meta_gradient(
        self,
        loss_fn: LossFn,
        *,
        steps: int | None = None,
        task_map: TaskMap = "vmap",
        chunk_size: int | None = None,
        mode: Mode = "reverse",
        metric: LossFn | None = None,
        distributed: bool | Share = False,
    ) -> MetaGradient:
        """`meta_value_and_grad` as a pure function, to be part of a larger compiled step.

        Args:
            loss_fn, steps, task_map, chunk_size, mode, distributed: as for `meta_value_and_grad`.
            metric: a second function of prediction and target, not differentiated; each task's
                value is in `aux["scores"]`.

        Returns:
            A function `(meta, constants, batch) -> (cost, grads, aux)` of what `meta_arrays` and
            `constants` return and of a stacked task. Two of them are equal, and have the same
            hash, if one program serves for both.
        """
        checks.function(loss_fn, "loss_fn")
        steps = self.config.steps(steps, at_least=0)
        setting = Setting(self._adapter, self.config, self._method, loss_fn, steps, mode, metric)
        how = Execution(task_map, chunk_size, distributed)
        return MetaGradient(setting, how, self._learned is not None, self._flags)

    def adaptation(self, loss_fn: LossFn) -> Adaptation:
        """Adaptation to one task, step by step and as pure functions, for evaluations."""
        checks.function(loss_fn, "loss_fn")
        setting = Setting(self._adapter, self.config, self._method, loss_fn, 1, "reverse")
        return Adaptation(setting, self._learned is not None, self._flags)

    def meta_arrays(self) -> Params:
        """The values of `meta_parameters`, as constants of no record of operations."""
        stop = self.backend.stop_gradient
        return {name: stop(x) for name, x in self.meta_parameters().items()}

    def variables(self) -> dict[str, Any]:
        """The meta-parameters as the objects that the framework's own optimizers update."""
        variables = self._adapter.variables()
        meta = {name: variables[name] for name in self._adapter.trainable()}
        learned = self._learned.variables() if self._learned is not None else {}
        return {**meta, **_prefixed(learned)}

    def constants(self) -> Meta:
        """What else a meta-gradient depends on: other parameters, state, the method's schedule."""
        meta = frozenset(self._adapter.trainable())
        groups = {
            "params": {n: x for n, x in self._adapter.params().items() if n not in meta},
            "state": self._adapter.state(),
            "schedule": self._schedule,
        }
        asarray = self.backend.asarray
        return {kind: {n: asarray(x) for n, x in xs.items()} for kind, xs in groups.items()}

    @property
    def backend(self) -> Backend:
        """The backend of the model."""
        return self._adapter.backend

    @property
    def _flags(self) -> Hashable:
        return self._adapter.signature()

    def _program(self, gradient: MetaGradient) -> Callable[..., MetaResult]:
        if gradient not in self._programs and len(self._programs) == PROGRAMS_KEPT:
            del self._programs[next(iter(self._programs))]
        return self._programs.setdefault(gradient, compile(gradient))

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the compiled programs, which a copy makes anew."""
        return {**self.__dict__, "_programs": {}}

    def _divided(self, values: Mapping[str, Array]) -> Meta:
        return divided(values, self._learned is not None)


def _prefixed(learned: Params) -> Params:
    return {LEARNED + name: value for name, value in learned.items()}
