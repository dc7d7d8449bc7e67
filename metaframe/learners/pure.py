"""What a learner offers to larger programs: its meta-gradient, and its adaptation step by step.

Both are pure functions of the learner's arrays, and values that compare equal if one compiled
program serves for both. Whoever compiles a step hands them over as constants, so that a learner
that changes in training, by a schedule or by a training flag, gets another program and never an
outdated one.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from metaframe import checks
from metaframe.backend import Array, Arrays
from metaframe.errors import MetaframeError
from metaframe.learners.functional import Params
from metaframe.learners.objective import Meta, Setting, TaskRun
from metaframe.meta import Execution, MetaResult, meta_value_and_grad

if TYPE_CHECKING:
    from metaframe.tasks import Task

LEARNED = "learned/"
"""Prefix of the names of what an update rule learns, among the meta-parameters."""
NOT_VECTORISED = (
    "The tasks were being vectorised. If the model or the loss cannot be, for instance because it "
    "branches on a value or writes to an array in place, run the tasks one after the other: "
    'meta_value_and_grad(..., task_map="loop").'
)


@dataclass(frozen=True)
class MetaGradient:
    """`(meta, constants, batch) -> (cost, grads, aux)`.

    `meta` and `constants` are what a learner's `meta_arrays` and `constants` return; `grads` are
    by name as `meta` is.
    """

    setting: Setting
    how: Execution
    learned: bool
    """Are there meta-parameters of the update rule?"""
    flags: Hashable
    """What, besides arrays, decides what the model computes, such as a training flag."""

    def __call__(self, meta: Params, constants: Meta, batch: Task) -> MetaResult:
        """Mean query loss of the batch after adaptation, and its gradient."""

        def task_cost(meta: Params, task: Task) -> tuple[Array, dict[str, Array]]:
            return self.setting.task_cost(divided(meta, self.learned), constants, task)

        transformed = meta_value_and_grad(
            task_cost,
            task_map=self.how.task_map,
            chunk_size=self.how.chunk_size,
            has_aux=True,
            distributed=self.how.distributed,
        )
        try:
            return transformed(meta, batch)
        except MetaframeError:
            raise
        except Exception as error:
            if self.how.task_map == "vmap":
                error.add_note(NOT_VECTORISED)
            raise


class Adapted(NamedTuple):
    """Where an adaptation is: the parameters by name that it changes, and the rule's state."""

    params: Params
    rule_state: Any


@dataclass(frozen=True)
class Adaptation:
    """The inner loop of one task, taken apart.

    Training differentiates through the whole loop and looks at its end. An evaluation looks at
    every step and differentiates through none.
    """

    setting: Setting
    learned: bool
    flags: Hashable

    def start(self, meta: Params, constants: Meta, task: Task) -> Adapted:
        """Before the first step."""
        start, config = self._run(meta, constants, task).start, self.setting.config
        adapting = {name: start[name] for name in config.names}
        # A method with a beginning of its own may make any of them from the support set.
        kept = adapting if self.setting.method.begin is None else start
        return Adapted(kept, config.rule.init(adapting))

    def step(self, at: Adapted, meta: Params, constants: Meta, task: Task) -> Adapted:
        """One step further on the support set."""
        run, config = self._run(meta, constants, task), self.setting.config
        whole = {**run.start, **at.params}

        def loss(xs: Arrays) -> tuple[Array, Arrays]:
            params = run.ordered({**whole, **dict(zip(config.names, xs, strict=True))})
            cost = run.inner_cost((task.support_x, task.support_y), params)
            return checks.scalar(cost, "loss_fn", backend), ()

        backend = self.setting.adapter.backend
        differentiate = backend.value_and_grad(loss, checks.cost_ignores_variables)
        _, _, found = differentiate(tuple(whole[name] for name in config.names))
        grads = dict(zip(config.names, found, strict=True))
        before = {name: whole[name] for name in config.names}
        after, state, _ = config.rule.apply(before, grads, at.rule_state, run.rate)
        return Adapted({**at.params, **after}, state)

    def predict(self, at: Adapted, meta: Params, constants: Meta, task: Task, x: Any) -> Any:
        """The model's output for `x`, all examples in one batch."""
        run = self._run(meta, constants, task)
        return run.predict(run.ordered({**run.start, **at.params}), x)

    def _run(self, meta: Params, constants: Meta, task: Task) -> TaskRun:
        return TaskRun(self.setting, divided(meta, self.learned), constants, task)


def divided(values: Mapping[str, Array], learned: bool) -> Meta:
    """Meta-parameters of the model and of the update rule, the latter without their prefix."""
    groups: Meta = {"params": {}, "learned": {}}
    for name, value in values.items():
        of_rule = learned and name.startswith(LEARNED)
        group, key = ("learned", name.removeprefix(LEARNED)) if of_rule else ("params", name)
        groups[group][key] = value
    return groups
