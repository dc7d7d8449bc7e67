"""Update rules put together of links, and the links: clipping, and weight decay in the gradient.

A link is a pair `(init, update)` of functions like an update rule's, with
`update(grads, state, params) -> (grads, state)`. `chain` makes one rule of links and a rule.
"""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

from metaframe import ops, tree
from metaframe.backend.registry import owner
from metaframe.core import checks
from metaframe.core.optim import (
    Grads,
    Optimizer,
    Params,
    Rate,
    State,
    like,
    own_rule,
    parameters_given,
    widest,
)
from metaframe.errors import InputError, InputTypeError


class Link(NamedTuple):
    """A part of a chain, before its rule or after it.

    >>> from metaframe import optim
    >>> double = optim.Link(lambda grads, state, params: ({"w": 2 * grads["w"]}, state))
    >>> optim.chain(double, optim.sgd(0.5)).update({"w": 3.0}, ())[0]
    {'w': -3.0}
    """

    update: Callable[[Grads, State, Params], tuple[Grads, State]]
    """`update(grads, state, params) -> (grads, state)`; after the rule it gets the updates."""
    init: Callable[[Params], State] | None = None
    """`init(params) -> state`; without it the state is `()`."""


def chain(*parts: Any) -> Optimizer:
    """The parts one after another: each gets what the one before returned.

    Args:
        parts: one update rule of `metaframe.optim`, and links before it, which see gradients, or
            after it, which see updates. A link is a `Link`, or a pair with `init` and `update`
            such as an optax transformation on JAX.

    Returns:
        An update rule with the learning rate of the one in it. Its state is a tuple of the states
        of the parts that have any; where only one part has, it is that state itself.

    Raises:
        InputError: not exactly one update rule.
        InputTypeError: a part that is neither.

    >>> import torch
    >>> from metaframe import optim
    >>> rule = optim.chain(optim.clip(norm=1.0), optim.add_decayed_weights(0.5), optim.sgd(0.1))
    >>> w = torch.tensor([1.0, 2.0])
    >>> rule.update(torch.tensor([3.0, 4.0]), rule.init(w), w)[0]
    tensor([-0.1100, -0.1800])
    """
    for part in parts:
        if not (hasattr(part, "init") and hasattr(part, "update")):
            raise InputTypeError(
                "a part of a chain is an optim.Optimizer, an optim.Link or a pair with init and "
                f"update, received {type(part).__name__}."
            )
    rules = [part for part in parts if isinstance(part, Optimizer)]
    if len(rules) != 1:
        raise InputError(
            f"a chain has exactly one update rule such as optim.sgd(), received {len(rules)} in "
            f"{len(parts)} parts. Everything else in it is a link."
        )
    stateful = tuple(part for part in parts if part.init is not None)
    return Optimizer(
        functools.partial(_chain_init, parts=stateful),
        functools.partial(_chained, parts=parts),
        rules[0].learning_rate,
    )


def _chain_init(params: Params, *, parts: tuple[Any, ...]) -> State:
    states = tuple(part.init(params) for part in parts)
    return states[0] if len(states) == 1 else states


def _chained(
    grads: Grads,
    state: State,
    params: Params = None,
    lr: Rate = None,
    *,
    parts: tuple[Any, ...],
) -> tuple[Params, State]:
    single = sum(part.init is not None for part in parts) == 1
    states, after = iter((state,) if single else state), []
    for part in parts:
        given = () if part.init is None else next(states)
        rate = (lr,) if isinstance(part, Optimizer) else ()
        grads, new = part.update(grads, given, params, *rate)
        if part.init is not None:
            after.append(new)
    return grads, after[0] if single else tuple(after)


def clip(*, norm: float | None = None, value: float | None = None) -> Link:
    """A link that clips, by element and then by global norm.

    Args:
        norm: the limit of the global norm, as for `clip_by_global_norm`;
            `optax.clip_by_global_norm` is this link. Default: none.
        value: the limit of an element, as for `clip_by_value`; `optax.clip` is this link.
            Default: none.

    Returns:
        A link without a state.

    Raises:
        InputError: neither limit is given, or one that is not above 0.
        InputTypeError: a limit is not a number.

    >>> import torch
    >>> from metaframe import optim
    >>> rule = optim.chain(optim.clip(value=2.0), optim.sgd(1.0))
    >>> rule.update({"w": torch.tensor([3.0, 1.0])}, ())[0]
    {'w': tensor([-2., -1.])}
    """
    if norm is None and value is None:
        raise InputError("clipping needs norm=, value= or both, received neither.")
    for limit in (norm, value):
        if limit is not None:
            _check_limit(limit)
    return Link(functools.partial(_clip, norm=norm, value=value))


def _clip(
    grads: Grads, state: State, params: Params, *, norm: float | None, value: float | None
) -> tuple[Grads, State]:
    del params
    if value is not None:
        grads = clip_by_value(grads, value)
    if norm is not None:
        grads = clip_by_global_norm(grads, norm)
    return grads, state


def add_decayed_weights(weight_decay: float = 0.0, mask: Any = None) -> Link:
    """A link that adds `weight_decay * w` to the gradient: coupled weight decay, an L2 penalty.

    Before a rule it is `weight_decay=` of `torch.optim.SGD`, `Adam`, `RMSprop` and `Adagrad`, and
    `optax.add_decayed_weights`. `adamw` decays apart from the gradient.

    Args:
        weight_decay: at least 0, a number or an array; the default is that of both.
        mask: which parameters decay, as `inner_v` of `unroll`: a key chain, several, or a nested
            mapping of booleans. All by default.

    Returns:
        A link without a state.

    Raises:
        InputError: a negative number.
        InputTypeError: from `update`, no `params` to decay.

    >>> import torch
    >>> from metaframe import optim
    >>> rule = optim.chain(optim.add_decayed_weights(0.5, mask="w"), optim.sgd(1.0))
    >>> params = {"w": torch.tensor(2.0), "b": torch.tensor(2.0)}
    >>> rule.update({"w": torch.tensor(1.0), "b": torch.tensor(1.0)}, (), params)[0]
    {'w': tensor(-2.), 'b': tensor(-1.)}
    """
    checks.setting("weight_decay", weight_decay)
    return Link(functools.partial(_decayed, weight_decay=weight_decay, mask=mask))


def _decayed(
    grads: Grads, state: State, params: Params, *, weight_decay: Any, mask: Any
) -> tuple[Grads, State]:
    leaves, spec = tree.flatten(parameters_given(params))
    slopes = tree.same_structure(grads, spec, what="the gradients")
    flags = tree.flags(spec, mask, name="mask")
    number = owner(weight_decay) is None

    def decayed(g: Any, w: Any) -> Any:
        return g + (weight_decay if number else like(weight_decay, w)) * w

    triples = zip(slopes, leaves, flags, strict=True)
    return tree.unflatten(spec, [decayed(g, w) if flag else g for g, w, flag in triples]), state


def clip_by_value(grads: Grads, limit: float) -> Grads:
    """Every element limited to `[-limit, limit]`.

    Args:
        grads: any structure of arrays.
        limit: above 0, a number or an array without axes.

    Returns:
        The clipped gradients, in the structure of `grads`.

    Raises:
        InputError: `limit` is not above 0.
        InputTypeError: `limit` is not a number.

    >>> import torch
    >>> clip_by_value({"w": torch.tensor([-3.0, 0.5])}, 1.0)
    {'w': tensor([-1.0000,  0.5000])}
    """
    _check_limit(limit)
    return tree.map(lambda g: ops.clip(g, -limit, limit), grads)


def global_norm(grads: Grads) -> Any:
    """The Euclidean norm over all leaves, in float32 at least; its gradient at zero is zero.

    Args:
        grads: any structure of arrays.

    Returns:
        An array without axes, float64 where a leaf is and float32 otherwise.

    >>> import torch
    >>> global_norm({"w": torch.tensor([3.0]), "b": torch.tensor([4.0])})
    tensor(5.)
    """
    leaves = tree.leaves(grads)
    dtype = widest(leaves)
    return ops.safe_sqrt(sum(ops.sum(ops.square(ops.astype(g, dtype))) for g in leaves))


def clip_by_global_norm(grads: Grads, limit: float) -> Grads:
    """`grads` scaled so that their global norm is at most `limit` (Pascanu et al. 2013).

    Args:
        grads: any structure of arrays.
        limit: above 0, a number or an array without axes. With infinity nothing is scaled.

    Returns:
        The scaled gradients, in the structure of `grads`.

    Raises:
        InputError: `limit` is not above 0.
        InputTypeError: `limit` is not a number.

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

    Args:
        optimizer: an update rule of `metaframe.optim`.
        norm: the limit of the global norm, as for `clip_by_global_norm`. Default: none.
        value: the limit of an element, as for `clip_by_value`. Default: none.

    Returns:
        An update rule with the learning rate and the state of `optimizer`.

    Raises:
        InputError: neither limit is given, or one that is not above 0.
        InputTypeError: `optimizer` is not an update rule, or a limit is not a number.

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
    return chain(clip(norm=norm, value=value), optimizer)


def rule(optimizer: Optimizer) -> str | None:
    """The kind of state of `optimizer`, in a chain or not; None for a rule of someone else.

    Momentum, RMSprop and Adagrad keep arrays of the same names and shapes, so that only this tells
    their states apart. Links that keep a state are named "link".

    >>> from metaframe.optim import adamw, momentum
    >>> rule(clipped(adamw(1e-3), norm=1.0)), rule(momentum(0.1, nesterov=True))
    ('adam', 'momentum')
    """
    update: Any = optimizer.update
    if getattr(update, "func", None) is not _chained:
        return own_rule(optimizer)
    parts = [part for part in update.keywords["parts"] if part.init is not None]
    names = [rule(part) if isinstance(part, Optimizer) else "link" for part in parts]
    return None if None in names else ", ".join(map(str, names))
