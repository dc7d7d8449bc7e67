"""The settings of adaptation that MAML, its relatives and every learner share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from metaframe import arguments, ops, optim
from metaframe.backend.model import Forward
from metaframe.backend.types import Array
from metaframe.core import rates
from metaframe.core.chain import rule as own_rule
from metaframe.core.update_rule import UpdateRule, update_rule
from metaframe.errors import InputError
from metaframe.learners.functions import LearningRate, Params, rate_for
from metaframe.learners.minibatches import Table
from metaframe.learners.norms import NORMS, Norm, Phase, forward_under
from metaframe.learners.outer_variables import OuterVariables

InnerRate = LearningRate | Callable[[Any], LearningRate]
"""A learning rate, or a function from outer variables to one."""


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
        outer: outer variables beyond the model's, which losses and rates are functions of.
        batches: which examples of the support set each step sees; default: all.
    """

    names: tuple[str, ...]
    inner_lr: InnerRate | None
    inner_steps: int
    first_order: bool
    allow_unused: bool
    norm: Norm
    update: Any
    twice: bool | None = None
    every: bool = False
    outer: OuterVariables | None = None
    batches: Table | None = None

    def __post_init__(self) -> None:
        arguments.integer(self.inner_steps, "inner_steps", at_least=0)
        arguments.choice(self.norm, "norm", NORMS)
        if callable(self.inner_lr):
            self._check_learned_rate()
        elif self.inner_lr is not None:
            rate_for(self.inner_lr, self.names, name="inner_lr")
        if self.batches is not None and self.norm == "per-step":
            raise InputError(
                "norm='per-step' keeps the statistics of whole support sets, and with "
                "inner_batches a step sees a part of one. Use another norm."
            )
        update_rule(self.update, stop_gradients=False)

    @property
    def rule(self) -> UpdateRule:
        """The update rule in its one form."""
        return update_rule(self.update, stop_gradients=False)

    def steps(self, given: int | None, *, at_least: int) -> int:
        """The number of steps to take: the configured one, or the one given."""
        if given is None:
            return self.inner_steps
        arguments.integer(given, "steps", at_least=at_least)
        if given and not self.names:
            raise InputError(f"this algorithm takes no inner steps, received steps={given}.")
        return given

    def _check_learned_rate(self) -> None:
        if self.outer is None:
            raise InputError(
                "inner_lr is a function of outer variables, and there are none. Give some: "
                "learned={'rate': 0.1}, inner_lr=lambda learned: learned['rate']."
            )

    def learned(self, values: Params) -> Any:
        """The outer variables as they were given, of learned values by name; None without any."""
        return None if self.outer is None else self.outer.build(values)

    def check_rate(self, params: Params, learned: Params | None = None) -> None:
        """The rates fit `params`, as far as these are known.

        Raises:
            InputError, InputTypeError: naming `inner_lr`.
        """
        known = {name: params[name] for name in self.names if name in params}
        rate = self.rate(learned or {})
        if known and not self._own_rule:
            part = {name: rate[name] for name in known} if isinstance(rate, dict) else rate
            self.rule.rate(part, known, name="inner_lr")

    def starting_rates(self, like: Params) -> Params:
        """The start of learned rates of these shapes.

        Raises:
            InputError: no learning rate to start from, or one of another shape.
        """
        if self.inner_lr is None or callable(self.inner_lr):
            raise InputError(
                f"learned rates start from the numbers in inner_lr, received {self.inner_lr!r}."
            )
        given = rates.spread(self.rate({}), like, name="inner_lr")
        by_name = given if isinstance(given, dict) else dict.fromkeys(like, given)
        return {name: by_name[name] * ops.ones_like(x) for name, x in like.items()}

    def rate(self, learned: dict[str, Array]) -> optim.Rate:
        """The learning rate for the update rule: the learned one, or `inner_lr`."""
        if callable(self.inner_lr):
            found = self.inner_lr(self.learned(learned))
            return found if self._own_rule else rate_for(found, self.names, name="inner_lr")
        if self.outer is not None:
            learned = {}
        if learned and all(name in learned for name in self.names):
            return {name: learned[name] for name in self.names}
        if learned or self.inner_lr is None:
            return learned or None
        return rate_for(self.inner_lr, self.names, name="inner_lr")

    @property
    def _own_rule(self) -> bool:
        """True if the update rule is one of the user's, which may take anything for its rate."""
        return isinstance(self.update, optim.Optimizer) and own_rule(self.update) is None

    def forward(self, phase: Phase) -> Forward:
        """The form of the model's call on the examples of this phase."""
        twice = not self.first_order if self.twice is None else self.twice
        return forward_under(self.norm, phase, twice=twice)
