"""What MAML and its relatives share: meta-parameters, learners and meta-gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from metaframe import checks
from metaframe.backend import Array
from metaframe.compile import compile
from metaframe.errors import InputError, MetaframeError, nearest
from metaframe.inner import Mode
from metaframe.learners.config import AdaptConfig, Norm
from metaframe.learners.functional import Params
from metaframe.learners.learner import Learner, LossFn
from metaframe.learners.method import Method
from metaframe.learners.objective import Meta, Setting, as_batch
from metaframe.learners.wrapper import Wrapper
from metaframe.meta import MetaResult, TaskMap, meta_value_and_grad
from metaframe.models import ModelAdapter
from metaframe.models.values import live

if TYPE_CHECKING:
    from metaframe.tasks import Task

LEARNED = "learned/"
"""Prefix of the names of what an update rule learns, among the meta-parameters."""
PROGRAMS_KEPT = 16
"""Compiled programs of one wrapper; a loss function made anew for each call would pile them up."""
NOT_VECTORISED = (
    "The tasks were being vectorised. If the model or the loss cannot be, for instance because it "
    "branches on a value or writes to an array in place, run the tasks one after the other: "
    'meta_value_and_grad(..., task_map="loop").'
)


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
        self._learned: ModelAdapter | None = None
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
        checks.function(loss_fn, "loss_fn")
        steps = self.config.steps(steps, at_least=0)
        backend, meta = self._adapter.backend, self.meta_parameters()
        batch = as_batch(tasks, meta, backend)
        constants = {
            "params": {n: x for n, x in self._adapter.params().items() if n not in meta},
            "state": self._adapter.state(),
            "schedule": self._schedule,
        }
        run = self._program(
            Setting(self._adapter, self.config, self._method, loss_fn, steps, mode),
            task_map,
            chunk_size,
            backend.compiles_quickly if compiled is None else compiled,
        )
        result = run(
            self._divided({n: backend.stop_gradient(x) for n, x in meta.items()}),
            {
                kind: {n: backend.asarray(x) for n, x in xs.items()}
                for kind, xs in constants.items()
            },
            batch,
        )
        flat = {**result.grads["params"], **_prefixed(result.grads["learned"])}
        return result._replace(grads={name: flat[name] for name in meta})

    def _program(
        self, setting: Setting, task_map: TaskMap, chunk_size: int | None, compiled: bool
    ) -> Callable[[Meta, Meta, Task], MetaResult]:
        def run(meta: Meta, constants: Meta, batch: Task) -> MetaResult:
            def task_cost(meta: Meta, task: Task) -> tuple[Array, dict[str, Array]]:
                cost = setting.task_cost(meta, constants, task)
                return cost, {"costs": cost}

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

        if not compiled:
            return run
        key = (setting, task_map, chunk_size, self._adapter.signature())
        if key not in self._programs and len(self._programs) == PROGRAMS_KEPT:
            del self._programs[next(iter(self._programs))]
        return self._programs.setdefault(key, compile(run))

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


def _prefixed(learned: Params) -> Params:
    return {LEARNED + name: value for name, value in learned.items()}
