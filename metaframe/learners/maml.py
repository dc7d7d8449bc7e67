"""MAML around a model of any framework (Finn et al. 2017, arXiv 1703.03400)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from metaframe import checks, optim
from metaframe.backend import Array, Backend
from metaframe.compile import compile
from metaframe.errors import MetaframeError
from metaframe.inner import Mode
from metaframe.learners.adaptation import Adaptation
from metaframe.learners.config import AdaptConfig, Norm
from metaframe.learners.functional import LearningRate, Params, adapted_names
from metaframe.learners.learner import Learner, LossFn
from metaframe.learners.objective import Meta, TaskObjective, as_batch
from metaframe.learners.wrapper import Wrapper
from metaframe.meta import MetaResult, TaskMap, meta_value_and_grad
from metaframe.models import ModelAdapter, adapter_of

if TYPE_CHECKING:
    from metaframe.tasks import Task

LEARNED = "learned/"
"""Prefix of the names of what an update rule learns, among the meta-parameters."""
PROGRAMS_KEPT = 16
"""Compiled programs of one wrapper; a loss function made anew for each call would pile them up."""


class MAML(Wrapper):
    """Model-agnostic meta-learning of any model.

        theta' = theta - alpha * grad L_support(theta),   meta-gradient d L_query(theta') / d theta

    On torch the wrapper is an `nn.Module` over the model's live parameters: any `torch.optim`
    optimizer takes `maml.parameters()`, and `backward()` through an adapted learner accumulates
    exact meta-gradients into them. On every backend `meta_value_and_grad` returns them.

    Args:
        module: the model, see `metaframe.models`; its parameters are the meta-parameters.
        inner_lr: inner step size, or one for each adapted parameter by name; `None` if `update`
            brings its own.
        inner_steps: default number of inner steps, at least 1.
        first_order: take the inner gradients for constants (FOMAML).
        adapt_names: names of the parameters to adapt; default: all trainable ones.
        allow_unused: leave adapted parameters that a support loss does not depend on as they are;
            False makes that an error.
        norm: statistics of batch normalisation. "batch": of the examples in hand, so predictions
            for a query depend on the other queries (transductive). "frozen": the model's running
            ones. "support": of the support set, under the adapted parameters. No policy writes to
            the model's running statistics. A pair `(apply, params)`, an Equinox module and a
            `tf.Module` decide for themselves.
        update: the inner update rule, as for `metaframe.inner_loop`.

    Raises:
        InputError: fewer steps than one, no parameters to adapt, an unknown name.
        InputTypeError: not a model.

    >>> import torch
    >>> from metaframe.learners import MAML
    >>> from metaframe.tasks import Task
    >>> maml = MAML(torch.nn.Linear(1, 1), inner_lr=0.1)
    >>> optimizer = torch.optim.SGD(maml.parameters(), lr=0.01)
    >>> x, y = torch.linspace(-1, 1, 8)[:, None], torch.ones(8, 1)
    >>> learner = maml.clone().adapt_on(torch.nn.functional.mse_loss, x, y)
    >>> torch.nn.functional.mse_loss(learner(x), y).backward()
    >>> optimizer.step()

    The same, for many tasks at once and on any backend:

    >>> tasks = [Task(x, y, x, y), Task(x, -y, x, -y)]
    >>> cost, grads, _ = maml.meta_value_and_grad(torch.nn.functional.mse_loss, tasks)
    >>> sorted(grads)
    ['bias', 'weight']
    """

    def __init__(
        self,
        module: Any,
        inner_lr: LearningRate | None = 0.01,
        inner_steps: int = 1,
        first_order: bool = False,
        adapt_names: Iterable[str] | None = None,
        allow_unused: bool = True,
        *,
        norm: Norm = "batch",
        update: Any = optim.gradient_descent_update,
    ) -> None:
        super().__init__()
        adapter = adapter_of(module)
        names = adapted_names(adapter.trainable(), adapt_names)
        self.config = AdaptConfig(
            names, inner_lr, inner_steps, first_order, allow_unused, norm, update
        )
        self.module = adapter.model
        self._adapter = adapter
        self._learned: ModelAdapter | None = None
        self._programs: dict[Hashable, Callable[..., MetaResult]] = {}

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
        """
        values = {**self.meta_parameters(), **(params or {})}
        meta, frozen = self._divided(values), self._adapter.params()
        return Learner(self._adapter, {**frozen, **meta["params"]}, meta["learned"], self.config)

    def meta_parameters(self) -> Params:
        """The meta-parameters by name, live where the framework's parameters are.

        They are the model's trainable parameters, and with the prefix "learned/" what the update
        rule learns.
        """
        params = self._adapter.params()
        meta = {name: params[name] for name in self._adapter.trainable()}
        learned = self._learned.params() if self._learned is not None else {}
        return {**meta, **{LEARNED + name: value for name, value in learned.items()}}

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

        Returns:
            `(cost, grads, aux)`: the mean loss; gradients by name, in the order of
            `meta_parameters`; and `aux["costs"]`, the loss of each task.

        Raises:
            InputError, InputTypeError: bad arguments, before any work.
        """
        backend = self._adapter.backend
        batch = as_batch(tasks, self.meta_parameters(), backend)
        settings = (loss_fn, steps, task_map, chunk_size, mode)
        run: Callable[..., MetaResult]
        if backend.compiles_quickly if compiled is None else compiled:
            key = (*settings, self.config, self.signature())
            run = self._program(key, lambda: self.meta_gradient(*settings))
        else:
            run = self.meta_gradient(*settings)
        result = run(self.meta_arrays(), self.constants(), batch)
        return result._replace(grads={n: result.grads[n] for n in self.meta_parameters()})

    def meta_gradient(
        self,
        loss_fn: LossFn,
        steps: int | None = None,
        task_map: TaskMap = "vmap",
        chunk_size: int | None = None,
        mode: Mode = "reverse",
        metric: LossFn | None = None,
    ) -> Callable[[Params, Meta, Task], MetaResult]:
        """`meta_value_and_grad` as a pure function, to be part of a larger compiled step.

        Args:
            loss_fn, steps, task_map, chunk_size, mode: as for `meta_value_and_grad`.
            metric: a second function of prediction and target, not differentiated; each task's
                value is in `aux["scores"]`.

        Returns:
            A function `(meta, constants, batch) -> (cost, grads, aux)` of what `meta_arrays` and
            `constants` return and of a stacked task.
        """
        checks.function(loss_fn, "loss_fn")
        steps = self.config.inner_steps if steps is None else steps
        checks.steps(steps, "steps", at_least=0)
        objective = TaskObjective(self._adapter, self.config, loss_fn, steps, mode, metric)

        def run(meta: Params, constants: Meta, batch: Task) -> MetaResult:
            def task_cost(meta: Params, task: Task) -> tuple[Array, dict[str, Array]]:
                return objective(self._divided(meta), constants, task)

            transformed = meta_value_and_grad(
                task_cost, task_map=task_map, chunk_size=chunk_size, has_aux=True
            )
            try:
                return transformed(meta, batch)
            except MetaframeError:
                raise
            except Exception as error:
                if task_map == "vmap":
                    error.add_note(NOT_VECTORISED)
                raise

        return run

    def adaptation(self, loss_fn: LossFn) -> Adaptation:
        """Adaptation to one task, step by step and as pure functions, for evaluations."""
        checks.function(loss_fn, "loss_fn")
        return Adaptation(self._adapter, self.config, loss_fn, self._divided)

    def meta_arrays(self) -> Params:
        """The values of `meta_parameters`, as constants of no record of operations."""
        stop = self._adapter.backend.stop_gradient
        return {name: stop(x) for name, x in self.meta_parameters().items()}

    def variables(self) -> dict[str, Any]:
        """The meta-parameters as the objects that the framework's own optimizers update."""
        variables = self._adapter.variables()
        meta = {name: variables[name] for name in self._adapter.trainable()}
        learned = self._learned.variables() if self._learned is not None else {}
        return {**meta, **{LEARNED + name: value for name, value in learned.items()}}

    def constants(self) -> Meta:
        """The model's other arrays: parameters that are not trained, and its state."""
        adapter, asarray = self._adapter, self._adapter.backend.asarray
        trainable = frozenset(adapter.trainable())
        others = {n: asarray(x) for n, x in adapter.params().items() if n not in trainable}
        return {"params": others, "state": {n: asarray(x) for n, x in adapter.state().items()}}

    @property
    def backend(self) -> Backend:
        """The backend of the model."""
        return self._adapter.backend

    def signature(self) -> Hashable:
        """What, besides arrays, decides what the model computes, such as a training flag."""
        return self._adapter.signature()

    def _program(
        self, key: Hashable, make: Callable[[], Callable[..., MetaResult]]
    ) -> Callable[..., MetaResult]:
        if key not in self._programs:
            if len(self._programs) == PROGRAMS_KEPT:
                del self._programs[next(iter(self._programs))]
            self._programs[key] = compile(make())
        return self._programs[key]

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the compiled programs, which a copy makes anew."""
        return {**self.__dict__, "_programs": {}}

    def _divided(self, values: Mapping[str, Array]) -> Meta:
        groups: Meta = {"params": {}, "learned": {}}
        for name, value in values.items():
            learned = self._learned is not None and name.startswith(LEARNED)
            group, key = ("learned", name.removeprefix(LEARNED)) if learned else ("params", name)
            groups[group][key] = value
        return groups


NOT_VECTORISED = (
    "The tasks were being vectorised. If the model or the loss cannot be, for instance because it "
    "branches on a value or writes to an array in place, run the tasks one after the other: "
    'meta_value_and_grad(..., task_map="loop").'
)
