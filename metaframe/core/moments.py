"""Update rules that keep moments of the gradients: momentum, Adam, RMSprop, Adagrad.

Each is a direction and a first state; `metaframe.core.optim` makes a rule of these.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

from metaframe import arguments, ops, tree
from metaframe.backend.registry import owner
from metaframe.core import checks
from metaframe.core.optim import (
    Grads,
    Optimizer,
    Params,
    Rate,
    State,
    counter,
    like,
    parameters_given,
    stepping,
)
from metaframe.errors import InputTypeError


def momentum(learning_rate: Rate = None, decay: float = 0.9, nesterov: bool = False) -> Optimizer:
    """Momentum (Polyak 1964): `m = decay * m + g`, step `-lr * m`.

    With `nesterov` (Nesterov 1983, in the form of Sutskever et al. 2013) the step is
    `-lr * (g + decay * m)`. As `torch.optim.SGD(momentum=, nesterov=)` and `optax.sgd`.

    Args:
        learning_rate: a number, an array, a structure that names parameters or parts of them with
            a rate for each, or a schedule. Default: the loop that uses the rule gives the rate.
        decay: what remains of `m` after a step, at least 0.
        nesterov: whether to use Nesterov's form.

    Returns:
        An update rule whose state is `m`, in the structure of the parameters.

    Raises:
        InputError: a rate that is negative or not finite, or a negative `decay`.

    >>> import torch
    >>> from metaframe import optim
    >>> w, g = torch.tensor([1.0]), torch.tensor([2.0])
    >>> rule = optim.momentum(0.1, decay=0.5)
    >>> state = rule.init(w)
    >>> for _ in range(2):
    ...     step, state = rule.update(g, state, w)
    >>> round(step.item(), 4)
    -0.3
    """
    checks.setting("decay", decay)
    arguments.choice(nesterov, "nesterov", (False, True))
    return stepping(learning_rate, _zeros, _momentum, decay=decay, nesterov=nesterov)


def _zeros(params: Params) -> State:
    return tree.map(ops.zeros_like, params)


def _momentum(
    grads: Grads, state: State, params: Params, *, decay: float, nesterov: bool
) -> tuple[Params, State]:
    del params
    state = tree.map(lambda m, g: decay * m + g, state, grads)
    direction = tree.map(lambda m, g: g + decay * m, state, grads) if nesterov else state
    return direction, state


class AdamState(NamedTuple):
    """The state of `adam` and `adamw`.

    >>> import torch
    >>> from metaframe import optim
    >>> optim.adam(1e-3).init({"w": torch.zeros(2)}).mean
    {'w': tensor([0., 0.])}
    """

    count: Any
    """Steps taken, a float without axes."""
    mean: Params
    """The moving average of the gradients, in the structure of the parameters."""
    square: Params
    """The moving average of their squares."""


def adam(
    learning_rate: Rate = None, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> Optimizer:
    """Adam (Kingma & Ba 2015, arXiv 1412.6980, algorithm 1).

    `-lr * m_hat / (sqrt(v_hat) + eps)` with bias-corrected averages.

    Args:
        learning_rate: a number, an array, a structure that names parameters or parts of them with
            a rate for each, or a schedule. Default: the loop that uses the rule gives the rate.
        b1: decay of the average of the gradients, in [0, 1).
        b2: decay of the average of their squares, in [0, 1).
        eps: added to the root, at least 0.

    Returns:
        An update rule whose state is an `AdamState`.

    Raises:
        InputError: `b1` or `b2` is not in [0, 1), or another setting is negative.

    >>> import torch
    >>> from metaframe import optim
    >>> w, g = torch.tensor([1.0]), torch.tensor([2.0])
    >>> rule = optim.adam(0.1)
    >>> state = rule.init(w)
    >>> for _ in range(2):
    ...     step, state = rule.update(g, state, w)
    >>> round(step.item(), 4)
    -0.1
    """
    return adamw(learning_rate, b1, b2, eps, weight_decay=0.0)


def adamw(
    learning_rate: Rate = None,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
) -> Optimizer:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, arXiv 1711.05101).

    `-lr * (m_hat / (sqrt(v_hat) + eps) + weight_decay * w)`; `update` then needs `params`.

    Args:
        learning_rate: a number, an array, a structure that names parameters or parts of them with
            a rate for each, or a schedule. Default: the loop that uses the rule gives the rate.
        b1: decay of the average of the gradients, in [0, 1).
        b2: decay of the average of their squares, in [0, 1).
        eps: added to the root, at least 0.
        weight_decay: at least 0; with 0 the rule is `adam`.

    Returns:
        An update rule whose state is an `AdamState`.

    Raises:
        InputError: `b1` or `b2` is not in [0, 1), or another setting is negative.
        InputTypeError: from `update`, no `params` to decay.

    >>> import torch
    >>> from metaframe import optim
    >>> w, g = torch.tensor([1.0]), torch.tensor([2.0])
    >>> rule = optim.adamw(0.1, weight_decay=0.5)
    >>> state = rule.init(w)
    >>> for _ in range(2):
    ...     step, state = rule.update(g, state, w)
    >>> round(step.item(), 4)
    -0.15
    """
    for name, decay in (("b1", b1), ("b2", b2)):
        if owner(decay) is not None:  # its logarithm is taken in Python
            raise InputTypeError(f"{name} must be a Python number, received an array.")
        checks.setting(name, decay, "[0, 1)")
    checks.setting("eps", eps)
    checks.setting("weight_decay", weight_decay)
    settings = {"b1": b1, "b2": b2, "eps": eps, "weight_decay": weight_decay}
    return stepping(learning_rate, _adam_state, _adam, **settings)


def _adam_state(params: Params) -> State:
    zeros = _zeros(params)
    return AdamState(counter(params), zeros, zeros)


def _adam(
    grads: Grads,
    state: State,
    params: Params,
    *,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
) -> tuple[Params, State]:
    count = state.count + 1
    mean = tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mean, grads)
    square = tree.map(lambda s, g: b2 * s + (1 - b2) * g * g, state.square, grads)
    debias1, debias2 = _one_minus_power(b1, count), _one_minus_power(b2, count)

    def direction(m: Any, s: Any) -> Any:
        return (m / like(debias1, m)) / (ops.safe_sqrt(s / like(debias2, s)) + eps)

    step = tree.map(direction, mean, square)
    if weight_decay:
        step = tree.map(lambda d, p: d + weight_decay * p, step, parameters_given(params))
    return step, AdamState(count, mean, square)


def rmsprop(learning_rate: Rate = None, decay: float = 0.9, eps: float = 1e-8) -> Optimizer:
    """RMSprop (Tieleman & Hinton 2012): `-lr * g / (sqrt(s) + eps)`, s the average of squares.

    Args:
        learning_rate: a number, an array, a structure that names parameters or parts of them with
            a rate for each, or a schedule. Default: the loop that uses the rule gives the rate.
        decay: of the average, `s = decay * s + (1 - decay) * g * g`, in [0, 1].
        eps: added to the root, at least 0.

    Returns:
        An update rule whose state is `s`, in the structure of the parameters and zero at first.

    Raises:
        InputError: a setting is out of range.

    >>> import torch
    >>> from metaframe import optim
    >>> w, g = torch.tensor([1.0]), torch.tensor([2.0])
    >>> rule = optim.rmsprop(0.1, decay=0.75)
    >>> state = rule.init(w)
    >>> for _ in range(1):
    ...     step, state = rule.update(g, state, w)
    >>> round(step.item(), 4)
    -0.2
    """
    checks.setting("decay", decay, "[0, 1]")
    checks.setting("eps", eps)
    return stepping(learning_rate, _zeros, _rmsprop, decay=decay, eps=eps)


def _rmsprop(
    grads: Grads, state: State, params: Params, *, decay: float, eps: float
) -> tuple[Params, State]:
    del params
    state = tree.map(lambda s, g: decay * s + (1 - decay) * g * g, state, grads)
    return _normalised(grads, state, eps), state


def adagrad(
    learning_rate: Rate = None, initial_accumulator: float = 0.1, eps: float = 1e-7
) -> Optimizer:
    """Adagrad (Duchi et al. 2011): `-lr * g / (sqrt(s) + eps)`, s the sum of squares.

    Args:
        learning_rate: a number, an array, a structure that names parameters or parts of them with
            a rate for each, or a schedule. Default: the loop that uses the rule gives the rate.
        initial_accumulator: what `s` starts from, at least 0.
        eps: added to the root, at least 0.

    Returns:
        An update rule whose state is `s`, in the structure of the parameters.

    Raises:
        InputError: a setting is negative.

    >>> import torch
    >>> from metaframe import optim
    >>> w, g = torch.tensor([1.0]), torch.tensor([2.0])
    >>> rule = optim.adagrad(0.1, initial_accumulator=0.0)
    >>> state = rule.init(w)
    >>> for _ in range(2):
    ...     step, state = rule.update(g, state, w)
    >>> round(step.item(), 4)
    -0.0707
    """
    checks.setting("initial_accumulator", initial_accumulator)
    checks.setting("eps", eps)
    init = functools.partial(_filled, value=initial_accumulator)
    return stepping(learning_rate, init, _adagrad, eps=eps)


def _filled(params: Params, *, value: float) -> State:
    return tree.map(lambda p: value * ops.ones_like(p), params)


def _adagrad(grads: Grads, state: State, params: Params, *, eps: float) -> tuple[Params, State]:
    del params
    state = tree.map(lambda s, g: s + g * g, state, grads)
    return _normalised(grads, state, eps), state


def _normalised(grads: Grads, squares: Params, eps: float) -> Params:
    return tree.map(lambda g, s: g / (ops.safe_sqrt(s) + eps), grads, squares)


def _one_minus_power(base: float, count: Any) -> Any:
    # 1 - base**count loses three digits in float32 for base 0.999; expm1 loses none, which also
    # makes backends agree.
    if base == 0.0:
        return ops.ones_like(count)
    return -ops.expm1(ops.stop_gradient(count) * math.log(base))
