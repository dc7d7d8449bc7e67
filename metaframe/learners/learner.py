"""Learner: one adaptable copy of a model's parameters, for one task."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal, Self

import numpy as np

from metaframe import arguments, tree
from metaframe.backend.model import Inputs, ModelAdapter
from metaframe.backend.types import Array
from metaframe.core.entrance import entrance
from metaframe.errors import InputError
from metaframe.learners.functions import (
    LearningRate,
    Params,
    array_like,
    descend,
    gradients,
    rate_for,
)
from metaframe.learners.method import Method, Support
from metaframe.learners.minibatches import chosen, count
from metaframe.learners.parts import ModelOfLearner, Part, attribute
from metaframe.learners.settings import AdaptConfig
from metaframe.learners.task_loss import LossFn as LossFn
from metaframe.learners.task_loss import TaskLoss
from metaframe.models.per_step import STEP, at_step


class Buffers(dict[str, Array]):
    """Arrays by name, which a call goes through."""

    def __call__(self) -> Iterator[Array]:
        """The arrays in order."""
        return iter(self.values())


class Learner:
    """A single adaptable copy of a model's parameters, made by `MAML.clone`.

    It starts from the meta-parameters and moves its own `params` with every step of `adapt`; the
    model and its running statistics stay as they are. The adapted parameters remain a
    differentiable function of the meta-parameters.

    A learner answers like its model: `learner.log_prob(s, a)`, `learner.encoder(x)` and
    `learner.weight` are those of the model with the adapted parameters, and so are
    `named_parameters()` and `state_dict()`. Names that the learner has itself come first, and
    what would change the model is refused. A method or a layer that is taken from a learner stays
    the learner's: it computes with the parameters that the learner has when it is called.

    Where the model has no attribute of the name, `learner.module` is the model, and `lr`,
    `inner_steps`, `first_order`, `adapt_names` and `allow_unused` are the settings of `MAML`.

    Args:
        adapter: the model behind the neutral interface.
        params: the meta-parameters by name, to start from.
        learned: the outer variables beyond the model's, by name.
        config: the settings of the adaptation.
        method: the inner loop of the algorithm.

    >>> import torch
    >>> from metaframe.learners import MAML
    >>> maml = MAML(torch.nn.Linear(1, 1), inner_lr=0.1)
    >>> x, y = torch.ones(5, 1), torch.zeros(5, 1)
    >>> learner = maml.clone().adapt_on(torch.nn.functional.mse_loss, x, y, steps=3)
    >>> torch.nn.functional.mse_loss(learner(x), y).backward()
    >>> maml.module.weight.grad.shape
    torch.Size([1, 1])
    >>> learner.weight is learner.params["weight"], learner.in_features
    (True, 1)
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
        self._supporting = False
        self._training: bool | None = None
        self._taken = 0
        self._has_support = config.norm != "support"
        self._start: Params | None = None
        if method.begin is None:
            self._begin(params)

    @entrance
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output with the current parameters; NumPy arrays are converted.

        Args:
            args: positional arguments of the model.
            kwargs: keyword arguments of the model.

        Returns:
            What the model returns.
        """
        args, kwargs = self._converted((args, kwargs))
        return self._run(None, args, kwargs)

    forward = __call__

    def __getattr__(self, name: str) -> Any:
        """An attribute, a method or a part of the model, under the current parameters.

        Raises:
            AttributeError: the model has none of this name, with the nearest name.
        """
        if name.startswith("__") or "_adapter" not in self.__dict__:  # while it is unpickled
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        if name in self.params:
            return self.params[name]
        try:
            return attribute(ModelOfLearner(self), lambda model: model, name, "")
        except AttributeError as error:
            if error.name != name or name not in _SETTINGS:
                raise
            return _SETTINGS[name](self)

    def __getitem__(self, key: Any) -> Any:
        """A part of a model that has parts by number or name, such as a `Sequential`."""
        return Part(ModelOfLearner(self), lambda model: model, "the model")[key]

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *ModelOfLearner(self).look(dir)})

    def named_parameters(self) -> Iterator[tuple[str, Array]]:
        """Names and current parameters, in the model's order."""
        yield from self.params.items()

    def parameters(self) -> Iterator[Array]:
        """The current parameters, in the model's order."""
        yield from self.params.values()

    def named_buffers(self) -> Iterator[tuple[str, Array]]:
        """Names and arrays of what is no parameter, such as running statistics."""
        yield from ((name, x) for name, x in self._statistics.items() if name != STEP)

    @property
    def buffers(self) -> Buffers:
        """The arrays of `named_buffers`: by name, and by a call in order, as those of a module."""
        return Buffers(self.named_buffers())

    def state_dict(self) -> dict[str, Array]:
        """Current parameters and buffers by name, detached.

        On torch what the model's own `state_dict` returns, which `load_state_dict` of the model
        takes.
        """
        if hasattr(self._adapter.model, "state_dict"):
            own: dict[str, Array] = ModelOfLearner(self).look(lambda model: model.state_dict())
            return own
        stop = self._adapter.backend.stop_gradient
        named = (*self.named_parameters(), *self.named_buffers())
        return {name: stop(self._adapter.backend.asarray(x)) for name, x in named}

    def clone(self) -> Self:
        """A learner that goes on from here by itself; derivatives go through to this one."""
        other = copy.copy(self)
        other.params = dict(self.params)
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A learner of a copied model, whose parameters are detached from this one's."""
        stop = self._adapter.backend.stop_gradient
        other = copy.copy(self)
        memo[id(self)] = other
        for name, value in vars(self).items():
            if name in ("params", "_given", "_start") and value is not None:
                value = {n: stop(self._adapter.backend.asarray(x)) for n, x in value.items()}
            vars(other)[name] = copy.deepcopy(value, memo)
        return other

    def train(self, mode: bool = True) -> Self:
        """Call the model in training mode from here on, or in evaluation mode.

        It decides what dropout does, in this learner alone: the model keeps its own mode. Batch
        normalisation follows `norm=`, except that Keras has one switch for both, which is this.

        Args:
            mode: True for training mode, False for evaluation mode.

        Returns:
            The learner.

        Raises:
            InputError: a model that has no such mode.
        """
        if not self._adapter.switchable:
            raise InputError(
                "the model has no training mode that a learner could switch. Pass what it takes "
                "for it in the call, such as learner(x, deterministic=True)."
            )
        arguments.choice(mode, "mode", (True, False))
        self._training = mode
        return self

    def eval(self) -> Self:
        """`train(False)`."""
        return self.train(False)

    @property
    def training(self) -> bool:
        """True if the model is called in training mode."""
        if self._training is None:
            own: bool = attribute(ModelOfLearner(self), lambda model: model, "training", "")
            return own
        return self._training

    @property
    def _outer(self) -> Any:
        return self.config.learned(self._learned)

    def _run(
        self, call: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, part: bool = False
    ) -> Any:
        """A call of the model, or of a part of it, on the examples in hand."""
        if self._start is None and not self._supporting:
            raise InputError("this learner has seen no support set yet. Call adapt_on first.")
        if not (self._supporting or self._has_support):
            raise InputError(
                "norm='support' normalises by the support set, which this learner has not seen. "
                "Adapt first, with adapt_on or with a function passed to adapt."
            )
        output, state = self._evaluate(call, args, kwargs, part=part)
        if self._supporting:
            self._statistics = state
        return output

    def _evaluate(
        self, call: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, part: bool
    ) -> Any:
        phase: Literal["support", "query"] = "support" if self._supporting else "query"
        forward = self.config.forward(phase)
        if self._training is not None:
            forward = replace(forward, training=self._training)
        params = self.params
        if part:  # without what the algorithm adds to the model
            params = {name: params[name] for name in self._adapter.params()}
        state = at_step(self._statistics, self._taken)
        return self._adapter.call(params, state, Inputs(args, kwargs, forward, call))

    def _converted(self, inputs: Any) -> Any:
        """`inputs` with NumPy arrays as arrays like the parameters, as `meta_value_and_grad`."""

        def convert(x: Any) -> Any:
            return array_like(x, self.params, self._adapter.backend) if _is_numpy(x) else x

        return tree.map(convert, inputs) if any(map(_is_numpy, tree.leaves(inputs))) else inputs

    @entrance
    def adapt(
        self,
        support_loss: Array | Callable[[Learner], Array],
        *,
        lr: LearningRate | None = None,
    ) -> Self:
        """Take one differentiable inner step.

        Args:
            support_loss: a function from a learner to the support loss. On torch also a loss
                computed with this learner.
            lr: the learning rate of this step, as `inner_lr` of `MAML`; default: that.

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
        return self._step(support_loss, lr)

    @entrance
    def adapt_on(
        self,
        loss_fn: LossFn,
        x: Any,
        y: Any,
        *,
        steps: int | None = None,
        lr: LearningRate | None = None,
        call: Callable[..., Any] | None = None,
    ) -> Self:
        """Take `steps` inner steps on one support set, the loss computed anew at each.

        Args:
            loss_fn: `loss_fn(prediction, target) -> scalar`, which the steps minimise; or a
                `TaskLoss`, of which they minimise the support loss.
            x: inputs; NumPy arrays are converted.
            y: targets, alike.
            steps: how many, at least 1; default: the configured `inner_steps`.
            lr: the learning rate of these steps, as `inner_lr` of `MAML`; default: that.
            call: `call(model, x) -> prediction`; default: `model(x)`.

        Returns:
            The learner, adapted.

        Raises:
            InputError: fewer steps than one; otherwise as `adapt`.
        """
        losses = loss_fn if isinstance(loss_fn, TaskLoss) else _of_support(loss_fn)
        losses = TaskLoss.of(losses, call=call)
        losses.check_learned(self.config.outer is not None)
        steps = self.config.steps(steps, at_least=1)
        x, y = self._converted((x, y))
        support = self._support(losses, x, y)
        if self._method.begin is not None and (self._start is None or steps == 0):
            self._begin(self._method.begin(support, self._given))
        rows = self._rows(steps, x)
        for k in range(steps):
            batch = (x, y) if rows is None else chosen((x, y), rows[k])
            self._step(lambda learner, batch=batch: learner._loss(losses, *batch), lr)
        if self._method.finish is not None and self._start is not None:
            self.params = self._method.finish(support, self._start, self.params)
        whole = steps == 0 or rows is not None or self._method.finish is not None
        if self.config.norm == "support" and whole:
            # At the parameters there are now.
            self._see_support(lambda learner: learner._predict(losses, x))
        return self

    def _predict(self, losses: TaskLoss, x: Any, learned: Any = None) -> Any:
        return self._run(losses.calling(self._outer if learned is None else learned), (x,), {})

    def _loss(self, losses: TaskLoss, x: Any, y: Any, learned: Any = None) -> Array:
        learned = self._outer if learned is None else learned
        prediction = self._predict(losses, x, learned)
        return losses.support(self._adapter.backend, prediction, y, learned)

    def _rows(self, steps: int, x: Any) -> list[Array] | None:
        """The examples that each of the next steps sees; None where they see all of them."""
        batches, done = self.config.batches, self._taken
        if batches is None:
            return None
        known = max(done + steps, 1)
        table = batches(known, count(x))[done:].astype("int32")
        return [array_like(row, self.params, self._adapter.backend) for row in table]

    def _begin(self, params: Params) -> None:
        self.params = self._start = params
        self._rule_state = self.config.rule.init({name: params[name] for name in self.config.names})

    def _step(self, support_loss: Any, lr: LearningRate | None = None) -> Self:
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
        adapted = {name: self.params[name] for name in config.names}
        rule = config.rule
        if lr is None:
            rate = rule.rate(config.rate(self._learned), adapted, name="inner_lr")
        else:
            rate = rule.rate(rate_for(lr, config.names, self.params), adapted)
        self.params, self._rule_state = descend(self.params, grads, rule, self._rule_state, rate)
        self._taken += 1
        if config.norm == "support":
            self._see_support(support_loss)
        return self

    def _penalty(self, params: Params) -> Any:
        if self._method.penalty is None or self._start is None:
            return 0
        names = self.config.names
        return self._method.penalty(*({n: p[n] for n in names} for p in (params, self._start)))

    def _support(self, losses: TaskLoss, x: Any, y: Any) -> Support:
        return Support(
            x,
            y,
            lambda params, x: self._sibling(params)._predict(losses, x),
            lambda batch, params: self._sibling(params)._loss(losses, *batch),
            self.config.names,
            self._adapter.backend,
            self._outer,
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


_SETTINGS: dict[str, Callable[[Learner], Any]] = {
    "module": lambda learner: learner._adapter.model,
    "lr": lambda learner: learner.config.rate(learner._learned),
    "learned": lambda learner: learner._outer,
    "inner_steps": lambda learner: learner.config.inner_steps,
    "first_order": lambda learner: learner.config.first_order,
    "adapt_names": lambda learner: learner.config.names,
    "allow_unused": lambda learner: learner.config.allow_unused,
}
"""Attributes of a learner whose names its model may have."""


def _of_support(loss_fn: Any) -> TaskLoss:
    """A loss of the support set alone, which may ask for the outer variables."""
    arguments.function(loss_fn, "loss_fn")
    return TaskLoss(loss_fn, support_loss=loss_fn)


def _is_numpy(x: object) -> bool:
    return isinstance(x, np.ndarray) and x.dtype.kind in "biuf"
