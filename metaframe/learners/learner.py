"""Learner: one adaptable copy of a model's parameters, for one task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

from metaframe import checks
from metaframe.backend import Array
from metaframe.errors import InputError
from metaframe.learners.config import AdaptConfig
from metaframe.learners.functional import Params, descend, gradients
from metaframe.learners.method import Method, Support
from metaframe.models import Inputs, ModelAdapter
from metaframe.models.per_step import at_step

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
        self,
        adapter: ModelAdapter,
        params: Params,
        learned: Params,
        config: AdaptConfig,
        method: Method,
    ) -> None:
        self.params = params
        """The current parameters by name."""
        self.config = config
        self._given = params
        self._adapter = adapter
        self._learned = learned
        self._method = method
        self._statistics = adapter.state()
        self._rule = config.rule
        self._supporting = False
        self._taken = 0
        self._has_support = config.norm != "support"
        self._start: Params | None = None
        if method.begin is None:
            self._begin(params)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output with the current parameters."""
        if self._start is None and not self._supporting:
            raise InputError("this learner has seen no support set yet. Call adapt_on first.")
        if not (self._supporting or self._has_support):
            raise InputError(
                "norm='support' normalises by the support set, which this learner has not seen. "
                "Adapt first, with adapt_on or with a function passed to adapt."
            )
        inputs = Inputs(
            args, kwargs, self.config.forward("support" if self._supporting else "query")
        )
        state = at_step(self._statistics, self._taken)
        output, state = self._adapter.call(self.params, state, inputs)
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
            InputError: a loss that is no scalar or depends on none of the adapted parameters, or
                an algorithm that has to see the support set itself, with `adapt_on`.
            UnusedParameterError: an unused parameter, with `allow_unused=False`.
        """
        if self._method.needs_support:
            raise InputError(
                "this algorithm adapts to a support set and not to a loss. Use "
                "learner.adapt_on(loss_fn, x, y)."
            )
        if not callable(support_loss) and self.config.norm == "support":
            raise InputError("norm='support' needs adapt_on, or a function passed to adapt.")
        if callable(support_loss):
            support_loss = self._adapter.backend.differentiable(support_loss)
        return self._step(support_loss)

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
        loss_fn = self._adapter.backend.differentiable(loss_fn)
        steps = self.config.steps(steps, at_least=1)
        support = self._support(loss_fn, x, y)
        if self._method.begin is not None and (self._start is None or steps == 0):
            self._begin(self._method.begin(support, self._given))
        for _ in range(steps):
            self._step(lambda learner: loss_fn(learner(x), y))
        if self._method.finish is not None and self._start is not None:
            self.params = self._method.finish(support, self._start, self.params)
        if self.config.norm == "support" and (steps == 0 or self._method.finish is not None):
            self._see_support(lambda learner: learner(x))  # at the parameters there are now
        return self

    def _begin(self, params: Params) -> None:
        self.params = self._start = params
        self._rule_state = self._rule.init({name: params[name] for name in self.config.names})

    def _step(self, support_loss: Any) -> Self:
        config, penalised = self.config, self._method.penalty is not None

        def at(params: Params) -> Any:
            value = support_loss(self._sibling(params))
            return value + self._penalty(params) if penalised else value

        if callable(support_loss):
            loss: Any = at
        else:
            loss = support_loss + self._penalty(self.params) if penalised else support_loss
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
        self._taken += 1
        if config.norm == "support":
            self._see_support(support_loss)
        return self

    def _penalty(self, params: Params) -> Any:
        if self._method.penalty is None or self._start is None:
            return 0
        names = self.config.names
        return self._method.penalty(*({n: p[n] for n in names} for p in (params, self._start)))

    def _support(self, loss_fn: LossFn, x: Any, y: Any) -> Support:
        return Support(
            x,
            y,
            lambda params, x: self._sibling(params)(x),
            lambda batch, params: loss_fn(self._sibling(params)(batch[0]), batch[1]),
            self.config.names,
            self._adapter.backend,
        )

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
