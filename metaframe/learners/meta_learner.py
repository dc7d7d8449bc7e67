"""The common part of MAML and its relatives: meta-parameters, learners, meta-gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from metaframe import arguments
from metaframe.backend.contract import Backend
from metaframe.backend.model import Inputs, ModelAdapter, NamedParameters
from metaframe.backend.types import Array
from metaframe.backend.workers import Share
from metaframe.core import checks
from metaframe.core.compile import compile
from metaframe.core.entrance import entrance
from metaframe.core.inner_loop import Mode
from metaframe.core.meta_gradient import MetaResult
from metaframe.core.task_map import Execution, TaskMap, strategy
from metaframe.errors import InputError, nearest
from metaframe.learners import parameters
from metaframe.learners.functions import Params, array_like
from metaframe.learners.learner import Learner
from metaframe.learners.method import Method
from metaframe.learners.names import named, renamed
from metaframe.learners.native_class import Wrapper
from metaframe.learners.norms import Norm
from metaframe.learners.objective import Meta, Setting, as_batch, task_weights
from metaframe.learners.programs import Adaptation, MetaGradient, divided
from metaframe.learners.settings import AdaptConfig
from metaframe.learners.statistics import StatisticsOfTasks
from metaframe.learners.task_loss import LossFn, TaskLoss
from metaframe.models.learned_values import live
from metaframe.models.per_step import StepStatistics

if TYPE_CHECKING:
    from metaframe.tasks import Task

Program = Callable[..., Any]
"""A pure function of meta-parameters, constants and a stacked task, and weights of tasks."""


class Phase(NamedTuple):
    """The settings of an algorithm with a schedule of its own in one epoch of training."""

    config: AdaptConfig
    method: Method
    schedule: Mapping[str, np.ndarray[Any, Any]]
    """Numbers that the method reads and that are not differentiated."""


class MetaLearner(Wrapper):
    """A model with a way to adapt it; the base of `MAML` and its relatives.

    Args:
        adapter: the model.
        config: how an inner loop runs.
        method: where the algorithm departs from MAML.
    """

    def __init__(self, adapter: ModelAdapter, config: AdaptConfig, method: Method) -> None:
        super().__init__()
        checks.learnable(adapter.params(), adapter.trainable(), adapter.backend)
        if config.norm == "per-step":
            adapter = StepStatistics(adapter, config.inner_steps)
            self.step_statistics = adapter.tables.model  # on torch to be saved and moved
        self.config = config
        self.module = adapter.model
        self._adapter = adapter
        self._method = method
        self._learned: NamedParameters | None = None
        self._schedule: Mapping[str, np.ndarray[Any, Any]] = {}
        self._epoch = 0
        self._phase_of: Callable[[int], Phase] | None = None
        self._compiled: Program | None = None
        self._narrowed: tuple[AdaptConfig, AdaptConfig] | None = None

    def _learn(self, values: Params) -> Any:
        """Make `values` meta-parameters, which the update rule gets as its learning rate.

        Returns:
            What holds them, which on torch has to become an attribute to be saved and moved.
        """
        self._learned = live(values, self._adapter.backend)
        return self._learned.model

    @entrance
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the model with its meta-parameters, without adaptation.

        Args:
            args: positional arguments of the model.
            kwargs: keyword arguments of the model.

        Returns:
            What the model returns.
        """
        forward = dataclasses.replace(self.config, norm=self._unadapted_norm()).forward("query")
        inputs = Inputs(args, kwargs, forward)
        return self._adapter.call(self._adapter.params(), self._adapter.state(), inputs)[0]

    def _unadapted_norm(self) -> Norm:
        return "batch" if self.config.norm == "support" else self.config.norm  # no support set

    def _follow(self, phase_of: Callable[[int], Phase]) -> None:
        """Let the epoch decide what the algorithm does, from here on."""
        self._phase_of = phase_of
        self._enter(self.epoch)

    @property
    def epoch(self) -> int:
        """The epoch of training, from 0. `MetaTrainer` sets it; a loop of one's own has to.

        It changes something for algorithms with a schedule of their own, such as `MAMLPlusPlus`.
        """
        return self._epoch

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        arguments.integer(epoch, "epoch", at_least=0)
        if epoch != self._epoch:
            self._enter(epoch)

    def _enter(self, epoch: int) -> None:
        self._epoch = epoch
        if self._phase_of is not None:
            self.config, self._method, self._schedule = self._phase_of(epoch)

    @entrance
    def clone(self, params: Mapping[str, Array] | None = None) -> Learner:
        """A fresh learner that starts from the meta-parameters.

        Args:
            params: meta-parameters by name to start from instead of the current ones, as a
                function that is being differentiated receives them.

        Returns:
            A learner whose parameters are a differentiable function of the meta-parameters.

        Raises:
            InputError: an unknown name.
        """
        values = self.meta_parameters()
        given = renamed(params or {}, self, values)
        for name in given:
            if name not in values:
                raise InputError(f"no meta-parameter called {name!r}. {nearest(name, values)}")
        meta, alias = self._divided(given), self.backend.alias
        start = {n: alias(x) for n, x in self._adapter.params().items() if n not in meta["params"]}
        ordered = {name: {**start, **meta["params"]}[name] for name in self._adapter.params()}
        learned = {**parameters.of_rule(self._learned), **meta["learned"]}
        return Learner(self._adapter, ordered, learned, self._adapting, self._method)

    def meta_parameters(self) -> Params:
        """The meta-parameters by name, live where the framework's parameters are.

        They are the model's trainable parameters, and with the prefix "learned/" what the update
        rule learns.
        """
        return parameters.meta_parameters(self._adapter, self._learned)

    def not_learned(self) -> dict[str, str]:
        """The arrays of the model that are no meta-parameters, and why.

        Returns:
            By name "frozen", the dtype of a parameter of integers or booleans, or "state" for what
            is no parameter, such as running statistics and what TensorFlow and Keras freeze; and
            "NumPy array" for one in an Equinox module, which takes these for constants.

        >>> import torch
        >>> from metaframe import MAML
        >>> model = torch.nn.Sequential(torch.nn.Linear(1, 2), torch.nn.Linear(2, 1, bias=False))
        >>> model[0].bias.requires_grad_(False)
        Parameter containing:
        ...
        >>> MAML(model).not_learned()
        {'0.bias': 'frozen'}
        """
        return parameters.left_out(self._adapter, self._learned)

    def assign(self, values: Mapping[str, Array]) -> None:
        """Set meta-parameters: in the model where it can be changed, in `module` otherwise.

        Args:
            values: arrays by name, as `meta_parameters()` names them; others keep their values.

        Raises:
            InputError: an unknown name or another shape.
        """
        meta = self._divided(renamed(values, self, self.meta_parameters()))
        self._adapter.assign(meta["params"])
        self.module = self._adapter.model
        if self._learned is not None:
            self._learned.assign(meta["learned"])

    @entrance
    def meta_value_and_grad(
        self,
        loss_fn: LossFn,
        tasks: Task | Sequence[Task],
        *,
        steps: int | None = None,
        task_map: TaskMap = "auto",
        chunk_size: int | None = None,
        mode: Mode = "reverse",
        compiled: bool | None = None,
        distributed: bool = False,
        support_loss: LossFn | None = None,
        call: Callable[..., Any] | None = None,
        metric: LossFn | None = None,
        weights: Any = None,
        has_aux: bool = False,
        statistics: bool = False,
    ) -> MetaResult:
        """Mean query loss after adaptation, and its gradient in the meta-parameters.

        `support_loss`, `call` and a function as `weights` may have an argument `learned`, which
        receives the outer variables of `MAML(learned=...)`; see also `TaskLoss`.

        Args:
            loss_fn: `loss_fn(prediction, target) -> scalar`, pure. Pass the same function each
                time: a new one is compiled anew.
            tasks: a list of tasks of one shape, or a stacked one. NumPy arrays are converted.
            steps: inner steps, 0 or more; default: `inner_steps`.
            task_map: "vmap", all tasks at once; "scan" or "loop", one after the other; "auto",
                one after the other for convolutions on a CPU, at once for everything else.
            chunk_size: with "vmap", how many tasks at once.
            mode: how the inner loop is differentiated, see `metaframe.inner_loop`.
            compiled: compile the whole; default: where the backend compiles quickly.
            distributed: divide the tasks among the active workers, see `metaframe.distributed`.
            support_loss: `support_loss(prediction, target) -> scalar`, what the inner loop
                minimises; default: `loss_fn`.
            call: `call(model, x) -> prediction`, such as `lambda model, x: model(**x)`; default:
                `model(x)`.
            metric: a second function of prediction and target, not differentiated.
            weights: a number for each task, shape (tasks,), by which its loss is multiplied in the
                mean; or `weights(task) -> scalar`. Weights with a mean of 1 keep the scale.
            has_aux: `loss_fn` returns `(scalar, aux)`, the aux any structure of arrays.
            statistics: report the mean and the variance that each batch normalisation takes of the
                query set, under the adapted parameters, for running averages of your own.

        Returns:
            `(cost, grads, aux)`: the mean loss; gradients by name, in the order of
            `meta_parameters`; and in `aux`, with a leading task axis, "costs", the loss of each
            task without its weight, "scores", the metric, "aux", that of the loss, and
            "statistics", by the names in the model's state. On torch `grads` has them by the names
            of `named_parameters()` too: "module.weight" is "weight".

        Raises:
            InputError, InputTypeError: bad arguments, before any work.
        """
        by_task = weights if callable(weights) else None
        gradient = self.meta_gradient(
            TaskLoss.of(
                loss_fn,
                support_loss=support_loss,
                call=call,
                weights=by_task,
                has_aux=has_aux,
                statistics=statistics,
            ),
            steps=steps,
            task_map=task_map,
            chunk_size=chunk_size,
            mode=mode,
            metric=metric,
            distributed=distributed,
        )
        given = None if by_task is not None else weights
        result: MetaResult = self._run(gradient, tasks, compiled, given)
        return result._replace(grads=named(result.grads, self, self.meta_parameters()))

    def meta_gradient(
        self,
        loss_fn: LossFn,
        *,
        steps: int | None = None,
        task_map: TaskMap = "auto",
        chunk_size: int | None = None,
        mode: Mode = "reverse",
        metric: LossFn | None = None,
        distributed: bool | Share = False,
    ) -> MetaGradient:
        """`meta_value_and_grad` as a pure function, to be part of a larger compiled step.

        Args:
            loss_fn: as for `meta_value_and_grad`.
            steps: as for `meta_value_and_grad`.
            task_map: as for `meta_value_and_grad`.
            chunk_size: as for `meta_value_and_grad`.
            mode: as for `meta_value_and_grad`.
            metric: a second function of prediction and target, not differentiated; each task's
                value is in `aux["scores"]`.
            distributed: as for `meta_value_and_grad`.

        Returns:
            A function `(meta, constants, batch) -> (cost, grads, aux)` of what `meta_arrays` and
            `constants` return and of a stacked task. Two of them are equal, and have the same
            hash, if one program serves for both.
        """
        setting = self._setting(loss_fn, steps, mode, metric)
        how = Execution(task_map, chunk_size, distributed)
        return MetaGradient(setting, how, self._learned is not None, self._flags)

    @property
    def statistics(self) -> Params:
        """With norm="per-step" the running statistics: tables by name, a row for each 0 .. K."""
        adapter = self._adapter
        return dict(adapter.statistics) if isinstance(adapter, StepStatistics) else {}

    def assign_statistics(self, values: Mapping[str, Array]) -> None:
        """Set the running statistics, all of them.

        Args:
            values: arrays by name, with the names and shapes of `statistics`.

        Raises:
            InputError: other names or shapes.
        """
        own = self.statistics
        if set(own) != set(values):
            raise InputError(f"the statistics are {sorted(own)}, received {sorted(values)}.")
        for name, value in values.items():
            if tuple(value.shape) != tuple(own[name].shape):
                raise InputError(
                    f"statistics {name!r} have shape {tuple(own[name].shape)}, received shape "
                    f"{tuple(value.shape)}."
                )
        if isinstance(self._adapter, StepStatistics):
            self._adapter.tables.write(dict(values))

    def collect_statistics(
        self,
        loss_fn: LossFn,
        tasks: Task | Sequence[Task],
        *,
        decay: float = 0.9,
        task_map: TaskMap = "auto",
        chunk_size: int | None = None,
        compiled: bool | None = None,
    ) -> None:
        """With norm="per-step", move the running statistics towards those of `tasks`.

            row_k <- decay * row_k + (1 - decay) * mean over tasks of the statistics at theta_k

        Those of the support set for k < K, of the query set for K. Nothing else changes them:
        `MetaTrainer` calls this before every step, a loop of one's own has to.

        Args:
            loss_fn: as for `meta_value_and_grad`.
            tasks: as for `meta_value_and_grad`.
            decay: what the old rows keep, in [0, 1]; 0 replaces them.
            task_map: as for `meta_value_and_grad`.
            chunk_size: as for `meta_value_and_grad`.
            compiled: as for `meta_value_and_grad`.

        Raises:
            InputError: another policy, or a decay out of range.

        >>> import torch
        >>> from metaframe import MAML
        >>> from metaframe.tasks import Task
        >>> maml = MAML(torch.nn.BatchNorm1d(1), inner_steps=2, norm="per-step")
        >>> x = torch.tensor([[1.0], [3.0]])
        >>> maml.collect_statistics(torch.nn.functional.mse_loss, [Task(x, x, x, x)], decay=0.5)
        >>> maml.statistics["running_mean"].tolist()
        [[1.0], [1.0], [1.0]]
        """
        if not self.statistics:
            raise InputError(
                f"statistics are collected with norm='per-step', received {self.config.norm!r}."
            )
        if not 0 <= decay <= 1:
            raise InputError(f"decay must be in [0, 1], received {decay!r}.")
        how = strategy(task_map, tuple(self.meta_parameters().values()))
        collect = StatisticsOfTasks(
            self._setting(loss_fn), how, chunk_size, self._learned is not None, self._flags
        )
        found = self._run(collect, tasks, compiled)
        old = self.statistics
        self.assign_statistics({n: decay * old[n] + (1 - decay) * found[n] for n in old})

    def adaptation(self, loss_fn: LossFn) -> Adaptation:
        """Adaptation to one task, step by step and as pure functions, for evaluations.

        Args:
            loss_fn: `loss_fn(prediction, target) -> scalar`, or a `TaskLoss`.

        Returns:
            An `Adaptation`.
        """
        return Adaptation(self._setting(loss_fn), self._learned is not None, self._flags)

    def meta_arrays(self) -> Params:
        """Detached values of `meta_parameters`, as arrays: a model of JAX may hold NumPy arrays."""
        asarray, stop = self.backend.asarray, self.backend.stop_gradient
        return {name: stop(asarray(x)) for name, x in self.meta_parameters().items()}

    def variables(self) -> dict[str, Any]:
        """The meta-parameters as the objects that the framework's own optimizers update."""
        variables = {
            **self._adapter.variables(),
            **parameters.prefixed(self._learned.variables() if self._learned is not None else {}),
        }
        return {name: variables[name] for name in self.meta_parameters()}

    def constants(self) -> Meta:
        """Inputs of a meta-gradient that are not differentiated.

        Returns:
            By kind, "params" (the other parameters), "state", "schedule" and "learned", detached
            arrays by name.
        """
        params = self._adapter.params()
        meta = frozenset(parameters.trainable(self._adapter, params))
        # The model may have moved to another device or dtype since.
        schedule = {n: array_like(x, params, self.backend) for n, x in self._schedule.items()}
        groups = {
            "params": {n: x for n, x in params.items() if n not in meta},
            "state": self._adapter.state(),
            "schedule": schedule,
            "learned": parameters.of_rule(self._learned, trained=False),
        }
        asarray, stop = self.backend.asarray, self.backend.stop_gradient
        return {kind: {n: stop(asarray(x)) for n, x in xs.items()} for kind, xs in groups.items()}

    @property
    def backend(self) -> Backend:
        """The backend of the model."""
        backend: Backend = self._adapter.backend
        return backend

    @property
    def _adapting(self) -> AdaptConfig:
        """The settings for the parameters that are trained now."""
        config = self.config
        names = parameters.adapting(config, self._adapter, self._learned)
        if names == config.names:
            return config
        if (
            self._narrowed is None
            or self._narrowed[0] is not config
            or self._narrowed[1].names != names
        ):  # the same object while nothing changes, since another one is another program
            self._narrowed = config, dataclasses.replace(config, names=names)
        return self._narrowed[1]

    @property
    def _flags(self) -> Hashable:
        return self._adapter.signature()

    def _setting(
        self,
        loss_fn: LossFn,
        steps: int | None = None,
        mode: Mode = "reverse",
        metric: LossFn | None = None,
    ) -> Setting:
        losses, config = TaskLoss.of(loss_fn), self._adapting
        losses.check_learned(config.outer is not None)
        if losses.statistics and (config.norm == "per-step" or not self._adapter.recordable()):
            raise InputError(
                "statistics=True reports those of batch normalisation, and this model has none "
                "that metaframe knows of; with norm='per-step', collect_statistics keeps them."
            )
        if metric is not None:
            arguments.function(metric, "metric")
        steps = config.steps(steps, at_least=0)
        return Setting(self._adapter, config, self._method, losses, steps, mode, metric)

    def _run(
        self,
        fn: Program,
        tasks: Task | Sequence[Task],
        compiled: bool | None,
        weights: Any = None,
    ) -> Any:
        """`fn(meta-parameters, constants, batch)`, compiled where that is the default or asked.

        With weights of the tasks, these come last.
        """
        like = self.meta_parameters()
        batch, backend = as_batch(tasks, like, self.backend), self.backend
        more = () if weights is None else (task_weights(weights, batch, like, backend),)
        run: Program = _called
        if self.backend.compiles_quickly if compiled is None else compiled:
            run = self._compiled = self._compiled or compile(_called)
        return run(fn, self.meta_arrays(), self.constants(), batch, *more)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the compiled programs, which a copy makes anew."""
        return {**self.__dict__, "_compiled": None}

    def _divided(self, values: Mapping[str, Array]) -> Meta:
        return divided(values, self._learned is not None)


def _called(fn: Program, *arguments: Any) -> Any:
    return fn(*arguments)


_called.__name__ = "a learner's meta-gradient"
