"""Clipped gradients, and update rules that clip theirs first."""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Callable
from typing import Any

from metaframe import ops, tree
from metaframe.backend.registry import owner
from metaframe.core.optim import RULES, Grads, Optimizer, Params, Rate, State, like, widest
from metaframe.errors import InputError, InputTypeError


def clip_by_value(grads: Grads, limit: float) -> Grads:
    """Every element limited to `[-limit, limit]`.

    Raises:
        InputError: `limit` is not above 0.

    >>> import torch
    >>> clip_by_value({"w": torch.tensor([-3.0, 0.5])}, 1.0)
    {'w': tensor([-1.0000,  0.5000])}
    """
    _check_limit(limit)
    return tree.map(lambda g: ops.clip(g, -limit, limit), grads)


def global_norm(grads: Grads) -> Any:
    """The Euclidean norm over all leaves, in float32 at least; its gradient at zero is zero.

    >>> import torch
    >>> global_norm({"w": torch.tensor([3.0]), "b": torch.tensor([4.0])})
    tensor(5.)
    """
    leaves = tree.leaves(grads)
    dtype = widest(leaves)
    return ops.safe_sqrt(sum(ops.sum(ops.square(ops.astype(g, dtype))) for g in leaves))


def clip_by_global_norm(grads: Grads, limit: float) -> Grads:
    """`grads` scaled so that their global norm is at most `limit` (Pascanu et al. 2013).

    With a limit of infinity they are left as they are.

    Raises:
        InputError: `limit` is not above 0.

    >>> import torch
    >>> clip_by_global_norm({"w": torch.tensor([3.0]), "b": torch.tensor([4.0])}, 1.0)
    {'w': tensor([0.6000]), 'b': tensor([0.8000])}
    """
    _check_limit(limit)
    if isinstance(limit, numbers.Real) and limit == math.inf:  # and not inf / inf
        return grads
    norm = global_norm(grads)
    scale = limit / ops.maximum(norm, limit)
    return tree.map(lambda g: g * like(scale, g), grads)


def _check_limit(limit: Any) -> None:
    # Arrays are not looked at, they may be traced.
    if owner(limit) is not None:
        return
    if isinstance(limit, bool) or not isinstance(limit, numbers.Real):
        raise InputTypeError(f"the limit to clip to must be a number, received {limit!r}.")
    if not float(limit) > 0:
        raise InputError(
            f"the limit to clip to must be above 0, received {limit}. 0 would stop the training; "
            "for no clipping leave it out."
        )


def clipped(
    optimizer: Optimizer, *, norm: float | None = None, value: float | None = None
) -> Optimizer:
    """`optimizer` with its gradients clipped first, by element and then by global norm.

    Raises:
        InputError: neither limit is given, or one that is not above 0.

    >>> import torch
    >>> from metaframe import optim
    >>> rule = optim.clipped(optim.sgd(1.0), norm=1.0)
    >>> rule.update({"w": torch.tensor([3.0, 4.0])}, ())[0]
    {'w': tensor([-0.6000, -0.8000])}
    """
    if not isinstance(optimizer, Optimizer):
        raise InputTypeError(
            f"optimizer must be an optim.Optimizer, received {type(optimizer).__name__}."
        )
    if norm is None and value is None:
        raise InputError("clipped needs norm=, value= or both, received neither.")
    for limit in (norm, value):
        if limit is not None:
            _check_limit(limit)

    update = functools.partial(_clipped, update=optimizer.update, norm=norm, value=value)
    return Optimizer(optimizer.init, update, optimizer.learning_rate)


def _clipped(
    grads: Grads,
    state: State,
    params: Params = None,
    lr: Rate = None,
    *,
    update: Callable[..., tuple[Params, State]],
    norm: float | None,
    value: float | None,
) -> tuple[Params, State]:
    if value is not None:
        grads = clip_by_value(grads, value)
    if norm is not None:
        grads = clip_by_global_norm(grads, norm)
    return update(grads, state, params, lr)


def rule(optimizer: Optimizer) -> str | None:
    """What the state of `optimizer` means, clipped or not; None for a rule of someone else.

    Momentum, RMSprop and Adagrad keep arrays of the same names and shapes, so that only this tells
    their states apart.

    >>> from metaframe import optim
    >>> rule(clipped(optim.adamw(1e-3), norm=1.0)), rule(optim.momentum(0.1, nesterov=True))
    ('adam', 'momentum')
    """
    update: Any = optimizer.update
    while getattr(update, "func", None) is _clipped:
        update = update.keywords["update"]
    return RULES.get(getattr(update, "func", None))
