"""Adapting a model to one task, one step at a time, as pure functions.

Training differentiates through a whole inner loop and looks at its end. An evaluation looks at
every step and differentiates through none, so it takes the same loop apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from metaframe import checks
from metaframe.backend import Array, Arrays
from metaframe.learners.config import AdaptConfig
from metaframe.learners.functional import Params
from metaframe.learners.learner import LossFn
from metaframe.learners.objective import Meta
from metaframe.models import ModelAdapter

if TYPE_CHECKING:
    from metaframe.tasks import Task


class Adapted(NamedTuple):
    """Where an adaptation is: the adapted parameters by name, and the update rule's state."""

    params: Params
    rule_state: Any


@dataclass(frozen=True)
class Adaptation:
    """The inner loop of one task.

    `meta` and `constants` are what a learner's `meta_arrays` and `constants` return.
    """

    adapter: ModelAdapter
    config: AdaptConfig
    loss_fn: LossFn
    divided: Callable[[Params], Meta]

    def start(self, meta: Params, constants: Meta) -> Adapted:
        """Before the first step."""
        whole = {**constants["params"], **self.divided(meta)["params"]}
        params = {name: whole[name] for name in self.config.names}
        return Adapted(params, self.config.rule.init(params))

    def step(self, at: Adapted, meta: Params, constants: Meta, task: Task) -> Adapted:
        """One step further on the support set."""
        names = self.config.names

        def loss(xs: Arrays) -> tuple[Array, Arrays]:
            params = dict(zip(names, xs, strict=True))
            output, _ = self._call(params, meta, constants, "support", task.support_x)
            return checks.scalar(self.loss_fn(output, task.support_y), "loss_fn", backend), ()

        backend = self.adapter.backend
        differentiate = backend.value_and_grad(loss, checks.cost_ignores_variables)
        _, _, found = differentiate(tuple(at.params[name] for name in names))
        grads = dict(zip(names, found, strict=True))
        rate = self.config.rate(self.divided(meta)["learned"])
        params, rule_state, _ = self.config.rule.apply(at.params, grads, at.rule_state, rate)
        return Adapted(params, rule_state)

    def predict(self, at: Adapted, meta: Params, constants: Meta, task: Task, x: Array) -> Array:
        """The model's output for `x`, all examples in one batch."""
        if self.config.norm == "support":
            _, state = self._call(at.params, meta, constants, "support", task.support_x)
            constants = {**constants, "state": state}
        return self._call(at.params, meta, constants, "query", x)[0]

    def _call(
        self,
        adapted: Params,
        meta: Params,
        constants: Meta,
        phase: Literal["support", "query"],
        x: Array,
    ) -> tuple[Array, Params]:
        whole = {**constants["params"], **self.divided(meta)["params"], **adapted}
        ordered = {name: whole[name] for name in self.adapter.params()}
        forward = self.config.forward(phase)
        return self.adapter.call(ordered, constants["state"], forward, (x,), {})
