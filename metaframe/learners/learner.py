"""Learner: one adaptable copy of a model's parameters, for one task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

from metaframe import checks
from metaframe.backend import Array
from metaframe.errors import InputError
from metaframe.learners.config import AdaptConfig
from metaframe.learners.functional import Params, descend, gradients
from metaframe.models import ModelAdapter

LossFn = Callable[[Any, Any], Array]
"""`loss_fn(prediction, target) -> scalar`."""


class Learner:
    """A single adaptable copy of a model's parameters, made by `MAML.clone`.

    It starts from the meta-parameters and moves its own `params` with every step of `adapt`; the
    model and its running statistics stay as they are. The adapted parameters remain a
    differentiable function of the meta-parameters.

    >>> import torch
    >>> from metaframe.learners import MAML
    >>> maml = MAML(torch.nn.Linear(1, 1), inner_lr=0.1)
    >>> x, y = torch.ones(5, 1), torch.zeros(5, 1)
    >>> learner = maml.clone().adapt_on(torch.nn.functional.mse_loss, x, y, steps=3)
    >>> torch.nn.functional.mse_loss(learner(x), y).backward()
    >>> maml.module.weight.grad.shape
    torch.Size([1, 1])
    """

    def __init__(
        self, adapter: ModelAdapter, params: Params, learned: Params, config: AdaptConfig
    ) -> None:
        self.params = params
        """The current parameters by name."""
        self.config = config
        self._adapter = adapter
        self._learned = learned
        self._statistics = adapter.state()
        self._rule = config.rule
        self._rule_state = self._rule.init({name: params[name] for name in config.names})
        self._supporting = False
        self._has_support = config.norm != "support"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output with the current parameters."""
        if not (self._supporting or self._has_support):
            raise InputError(
                "norm='support' normalises by the support set, which this learner has not seen. "
                "Adapt first, with adapt_on or with a function passed to adapt."
            )
        forward = self.config.forward("support" if self._supporting else "query")
        output, state = self._adapter.call(self.params, self._statistics, forward, args, kwargs)
        if self._supporting:
            self._statistics = state
        return output

    def adapt(self, support_loss: Array | Callable[[Learner], Array]) -> Self:
        """Take one differentiable inner step.

        Args:
            support_loss: a function from a learner to the support loss. On torch also a loss
                computed with this learner.

        Returns:
            The learner itself, moved.

        Raises:
            InputTypeError: an array, where the framework does not record operations.
            InputError: a loss that is no scalar or depends on none of the adapted parameters.
            UnusedParameterError: an unused parameter, with `allow_unused=False`.
        """
        loss: Any = support_loss
        if callable(support_loss):
            function = support_loss
            loss = lambda params: function(self._sibling(params))  # noqa: E731
        elif self.config.norm == "support":
            raise InputError("norm='support' needs adapt_on, or a function passed to adapt.")
        config = self.config
        grads = gradients(
            self._adapter.backend,
            self.params,
            config.names,
            loss,
            config.first_order,
            config.allow_unused,
        )
        self.params, self._rule_state = descend(
            self.params, grads, self._rule, self._rule_state, config.rate(self._learned)
        )
        if config.norm == "support":
            self._see_support(support_loss)
        return self

    def adapt_on(self, loss_fn: LossFn, x: Any, y: Any, *, steps: int | None = None) -> Self:
        """Take `steps` inner steps on one support set, the loss computed anew at each.

        Args:
            loss_fn: `loss_fn(prediction, target) -> scalar`.
            x: inputs.
            y: targets.
            steps: how many, at least 1; default: the configured `inner_steps`.

        Raises:
            InputError: fewer steps than one; otherwise as `adapt`.
        """
        checks.function(loss_fn, "loss_fn")
        steps = self.config.inner_steps if steps is None else steps
        checks.steps(steps, "steps", at_least=1)
        for _ in range(steps):
            self.adapt(lambda learner: loss_fn(learner(x), y))
        return self

    def _sibling(self, params: Params) -> Learner:
        """This learner at other parameters, looking at the support set."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.params, other._supporting = params, True
        return other

    def _see_support(self, support_loss: Any) -> None:
        """Take the statistics of the support set under the adapted parameters."""
        sibling = self._sibling(self.params)
        support_loss(sibling)
        self._statistics, self._has_support = sibling._statistics, True
