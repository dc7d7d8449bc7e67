"""A learner's parts for larger programs: its meta-gradient, and its adaptation by steps.

Both are pure functions of the learner's arrays, and values that compare equal if one compiled
program serves for both. Whoever compiles a step hands them over as constants, so that a learner
that changes in training, by a schedule, by a training flag or by another number or string among the
attributes of its model, gets another program and never an outdated one.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from metaframe.backend.types import Array
from metaframe.core.constants import Settled
from metaframe.core.inner_loop import first_index
from metaframe.core.meta_gradient import MetaResult, meta_value_and_grad
from metaframe.core.task_map import Execution
from metaframe.errors import BackendError, MetaframeError
from metaframe.learners.functions import Params
from metaframe.learners.objective import Meta, ModelOnTask, Setting

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
class MetaGradient(Settled):
    """`(meta, constants, batch) -> (cost, grads, aux)`.

    `meta` and `constants` are what a learner's `meta_arrays` and `constants` return; `grads` are
    by name as `meta` is.
    """

    setting: Setting
    how: Execution
    learned: bool
    """Are there meta-parameters of the update rule?"""
    flags: Hashable
    """What, besides arrays, decides what the model computes, such as a training flag.

    An attribute that `metaframe.models.attributes` does not look at, such as a list, is taken to
    stay as it is.
    """

    def __call__(
        self, meta: Params, constants: Meta, batch: Task, weights: Array | None = None
    ) -> MetaResult:
        """Mean query loss of the batch after adaptation, and its gradient.

        With `weights`, one for each task, the loss of each is multiplied by its own.
        """

        def task_cost(meta: Params, of_task: Any) -> tuple[Array, dict[str, Any]]:
            task, weight = (of_task, None) if weights is None else of_task
            return self.setting.task_cost(divided(meta, self.learned), constants, task, weight)

        transformed = meta_value_and_grad(
            task_cost,
            task_map=self.how.task_map,
            chunk_size=self.how.chunk_size,
            has_aux=True,
            distributed=self.how.distributed,
        )
        try:
            return transformed(meta, batch if weights is None else (batch, weights))
        except Exception as error:
            ours = isinstance(error, MetaframeError) and not isinstance(error, BackendError)
            if self.how.task_map in ("auto", "vmap") and not ours:
                error.add_note(NOT_VECTORISED)
            raise


class Adapted(NamedTuple):
    """The state of an adaptation."""

    params: Params
    """Those that it changes, by name."""
    rule_state: Any
    taken: Array
    """The number of steps that were taken."""
    begun: Params
    """All parameters before the first step, where they were made from the support set."""


@dataclass(frozen=True)
class Adaptation(Settled):
    """The inner loop of one task, taken apart.

    Training differentiates through the whole loop and looks at its end. An evaluation looks at
    every step and differentiates through none.
    """

    setting: Setting
    learned: bool
    flags: Hashable

    def start(self, meta: Params, constants: Meta, task: Task) -> Adapted:
        """Before the first step."""
        at, config = self._on_task(meta, constants, task), self.setting.config
        adapting = {name: at.start[name] for name in config.names}
        taken = first_index(next(iter(at.start.values())))
        begun = {} if self.setting.method.begin is None else at.start
        return Adapted(adapting, config.rule.init(adapting), taken, begun)

    def step(self, at: Adapted, meta: Params, constants: Meta, task: Task) -> Adapted:
        """One step further on the support set."""
        model = self._on_task(meta, constants, task, at)
        found = model.loop().run(
            tuple(at.params[name] for name in sorted(at.params)),
            model.context,
            1,
            state=at.rule_state,
            index=at.taken,
            rows=model.rows(1, at.taken),
        )
        after = model.named(found.params)
        return Adapted(
            {n: after[n] for n in at.params},
            found.state.build(found.state.arrays),
            at.taken + 1,
            at.begun,
        )

    def predict(self, at: Adapted, meta: Params, constants: Meta, task: Task, x: Any) -> Any:
        """The model's output for `x`, all examples in one batch."""
        model = self._on_task(meta, constants, task, at)
        params = {name: at.params.get(name, value) for name, value in model.start.items()}
        return model.predict(params, x, at.taken)

    def _on_task(
        self, meta: Params, constants: Meta, task: Task, at: Adapted | None = None
    ) -> ModelOnTask:
        begun = (at.begun or None) if at else None
        return ModelOnTask(self.setting, divided(meta, self.learned), constants, task, begun)


def divided(values: Mapping[str, Array], learned: bool) -> Meta:
    """Meta-parameters of the model and of the update rule, the latter without their prefix."""
    groups: Meta = {"params": {}, "learned": {}}
    for name, value in values.items():
        of_rule = learned and name.startswith(LEARNED)
        group, key = ("learned", name.removeprefix(LEARNED)) if of_rule else ("params", name)
        groups[group][key] = value
    return groups
