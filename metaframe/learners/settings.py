"""How a learner adapts: the settings that MAML, its relatives and every learner share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from metaframe import arguments, ops, optim
from metaframe.backend.model import Forward
from metaframe.backend.types import Array
from metaframe.core import rates
from metaframe.core.update_rule import UpdateRule, update_rule
from metaframe.errors import InputError
from metaframe.learners.functions import LearningRate, Params, rate_for
from metaframe.learners.norms import NORMS, Norm, Phase, forward_under


# By identity, because a learning rate may be an array or a mapping, which have no hash.
@dataclass(frozen=True, eq=False)
class AdaptConfig:
    """The settings of an adaptation. Checked when made.

    Attributes:
        names: the parameters to adapt.
        inner_lr: step size; `None` if the update rule brings its own.
        inner_steps: default number of steps.
        first_order: take inner gradients for constants.
        allow_unused: leave parameters that the support loss does not depend on as they are.
        norm: statistics of batch normalisation. "batch": of the examples in hand, so query
            predictions depend on each other (transductive). "frozen": the model's running ones.
            "support": of the support set under the adapted parameters. "per-step": running ones,
            one set for each number of inner steps taken.
        update: the update rule; what it learns, by name, comes as its learning rate.
        twice: will a support loss be differentiated twice? Default: not with `first_order`.
        every: adapt parameters too that are trained by now and were frozen when this was made.
    """

    names: tuple[str, ...]
    inner_lr: LearningRate | None
    inner_steps: int
    first_order: bool
    allow_unused: bool
    norm: Norm
    update: Any
    twice: bool | None = None
    every: bool = False

    def __post_init__(self) -> None:
        arguments.integer(self.inner_steps, "inner_steps", at_least=0)
        arguments.choice(self.norm, "norm", NORMS)
        if self.inner_lr is not None:
            rate_for(self.inner_lr, self.names, name="inner_lr")
        update_rule(self.update, stop_gradients=False)

    @property
    def rule(self) -> UpdateRule:
        """The update rule in its one form."""
        return update_rule(self.update, stop_gradients=False)

    def steps(self, given: int | None, *, at_least: int) -> int:
        """How many steps to take: the configured number, or the one given."""
        if given is None:
            return self.inner_steps
        arguments.integer(given, "steps", at_least=at_least)
        if given and not self.names:
            raise InputError(f"this algorithm takes no inner steps, received steps={given}.")
        return given

    def check_rate(self, params: Params) -> None:
        """The rates fit `params`, as far as these are known.

        Raises:
            InputError, InputTypeError: naming `inner_lr`.
        """
        known = {name: params[name] for name in self.names if name in params}
        rate = self.rate({})
        if known:
            part = {name: rate[name] for name in known} if isinstance(rate, dict) else rate
            self.rule.rate(part, known, name="inner_lr")

    def starting_rates(self, like: Params) -> Params:
        """Where learned rates of these shapes start.

        Raises:
            InputError: no learning rate to start from, or one of another shape.
        """
        if self.inner_lr is None:
            raise InputError("learned rates start from inner_lr, received None.")
        given = rates.spread(self.rate({}), like, name="inner_lr")
        by_name = given if isinstance(given, dict) else dict.fromkeys(like, given)
        return {name: by_name[name] * ops.ones_like(x) for name, x in like.items()}

    def rate(self, learned: dict[str, Array]) -> optim.Rate:
        """What the update rule is given as learning rate: what is learned, or `inner_lr`."""
        if learned and all(name in learned for name in self.names):
            return {name: learned[name] for name in self.names}
        if learned or self.inner_lr is None:
            return learned or None
        return rate_for(self.inner_lr, self.names, name="inner_lr")

    def forward(self, phase: Phase) -> Forward:
        """How the model is called on the examples of this phase."""
        twice = not self.first_order if self.twice is None else self.twice
        return forward_under(self.norm, phase, twice=twice)
