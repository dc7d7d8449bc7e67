"""Update rules: pure functions of values, usable in the inner and in the outer loop.

An `Optimizer` is a pair of pure functions, shaped like optax's:

    state = optimizer.init(params)
    updates, state = optimizer.update(grads, state, params)
    params = apply_updates(params, updates)

Nothing is changed in place and every operation is differentiable, so an inner loop may be
differentiated through the optimizer's state. Square roots are safe at zero: their gradient there
is zero and not NaN.

The learning rate is given to the optimizer, `adam(1e-3)`, or, when the optimizer is used inside
a loop that has a rate of its own, left out, `adam()`, and handed to `update` by that loop. It is a
number, an array, or a structure that names parameters or parts of them, such as layers, with a rate
for each; see `metaframe.core.rates`.

The functions of a pair are functions of this module with their settings filled in, so that a pair
can be pickled, and a learner that has one saved.
"""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from metaframe import arguments, ops, tree
from metaframe.backend.registry import owner
from metaframe.backend.selection import backend_of
from metaframe.core import checks, rates
from metaframe.errors import InputError, InputTypeError

Params = Any
Grads = Any
State = Any
Rate = Any
"""A number, an array, or a structure of them that names parameters or parts of them."""
is_rate_tree = rates.is_structure
Direction = Callable[..., tuple[Params, State]]
"""`(grads, state, params) -> (direction, state)`."""


class Optimizer(NamedTuple):
    """A stateless description of an update rule.

    >>> import torch
    >>> from metaframe import optim
    >>> init, update, rate = optim.sgd(0.5)
    >>> params = {"w": torch.tensor([1.0, 2.0])}
    >>> updates, state = update({"w": torch.tensor([0.5, 0.25])}, init(params), params)
    >>> updates, rate
    ({'w': tensor([-0.2500, -0.1250])}, 0.5)
    """

    init: Callable[[Params], State]
    """`init(params) -> state`."""
    update: Callable[..., tuple[Params, State]]
    """`update(grads, state, params, lr=None) -> (updates, state)`."""
    learning_rate: Rate = None
    """The rate given at construction, `None` if the loop has to provide it."""


def apply_updates(params: Params, updates: Params) -> Params:
    """`params + updates`, leaf by leaf.

    >>> apply_updates({"w": 1.0, "b": 2.0}, {"w": -0.5, "b": 0.25})
    {'w': 0.5, 'b': 2.25}
    """
    leaves, spec = tree.flatten(params)
    moves = tree.same_structure(updates, spec, what="updates")
    return tree.unflatten(spec, [p + u for p, u in zip(leaves, moves, strict=True)])


def gradient_descent_update(
    w: Params, dcdw: Grads, lr: Rate, /, *, stop_gradients: bool = True
) -> Params:
    """One step of gradient descent, `w - lr * dcdw`.

    Args:
        w: variables, any structure.
        dcdw: gradients in the same structure.
        lr: a number, an array, or a structure that names variables or parts of them, with a rate
            for each.
        stop_gradients: return the new variables as constants.

    >>> import torch
    >>> w = {"a": torch.tensor([1.0, 2.0])}
    >>> gradient_descent_update(w, {"a": torch.tensor([0.5, 0.25])}, 0.5)
    {'a': tensor([0.7500, 1.8750])}
    """
    updates, _ = sgd(checks.learning_rate(lr)).update(dcdw, (), w)
    new = apply_updates(w, updates)
    return tree.map(ops.stop_gradient, new) if stop_gradients else new


def sgd(learning_rate: Rate = None) -> Optimizer:
    """Gradient descent: `-lr * g`.

    >>> updates, _ = sgd(0.5).update({"w": 3.0}, ())
    >>> updates
    {'w': -1.5}
    """
    return _optimizer(learning_rate, _no_state, _sgd)


def _optimizer(
    learning_rate: Rate, init: Callable[[Params], State], direction: Direction, **settings: Any
) -> Optimizer:
    """The rule that steps by `-lr` times a direction."""
    own = checks.learning_rate(learning_rate, "learning_rate")
    rule = functools.partial(direction, **settings)
    return Optimizer(init, functools.partial(_stepped, own=own, direction=rule), own)


def _stepped(
    grads: Grads,
    state: State,
    params: Params = None,
    lr: Rate = None,
    *,
    own: Rate,
    direction: Direction,
) -> tuple[Params, State]:
    moves, state = direction(grads, state, params)
    rate = rates.spread(rates.only(own, lr), moves)
    if is_rate_tree(rate):
        return tree.map(lambda d, r: -r * d, moves, rate), state
    single = tree.unwrapped(rate)
    return tree.map(lambda d: -single * d, moves), state


def _no_state(params: Params) -> State:
    del params
    return ()


def _sgd(grads: Grads, state: State, params: Params) -> tuple[Params, State]:
    del params
    return grads, state


def momentum(learning_rate: Rate = None, decay: float = 0.9, nesterov: bool = False) -> Optimizer:
    """Momentum (Polyak 1964): `m = decay * m + g`, step `-lr * m`.

    With `nesterov` (Nesterov 1983, in the form of Sutskever et al. 2013) the step is
    `-lr * (g + decay * m)`. As `torch.optim.SGD(momentum=, nesterov=)` and `optax.sgd`.

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
    return _optimizer(learning_rate, _zeros, _momentum, decay=decay, nesterov=nesterov)


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
    """Steps taken, and the moving averages of gradients and of their squares.

    >>> import torch
    >>> from metaframe import optim
    >>> optim.adam(1e-3).init({"w": torch.zeros(2)}).mean
    {'w': tensor([0., 0.])}
    """

    count: Any
    mean: Params
    square: Params


def adam(
    learning_rate: Rate = None, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> Optimizer:
    """Adam (Kingma & Ba 2015, arXiv 1412.6980, algorithm 1).

    `-lr * m_hat / (sqrt(v_hat) + eps)` with bias-corrected averages.

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
    return _optimizer(learning_rate, _adam_state, _adam, **settings)


def _adam_state(params: Params) -> State:
    zeros = _zeros(params)
    return AdamState(_counter(params), zeros, zeros)


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
        return (m / _like(debias1, m)) / (ops.safe_sqrt(s / _like(debias2, s)) + eps)

    step = tree.map(direction, mean, square)
    if weight_decay:
        step = tree.map(lambda d, p: d + weight_decay * p, step, _needed(params))
    return step, AdamState(count, mean, square)


def rmsprop(learning_rate: Rate = None, decay: float = 0.9, eps: float = 1e-8) -> Optimizer:
    """RMSprop (Tieleman & Hinton 2012): `-lr * g / (sqrt(s) + eps)`, s the average of squares.

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
    return _optimizer(learning_rate, _zeros, _rmsprop, decay=decay, eps=eps)


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
    return _optimizer(learning_rate, init, _adagrad, eps=eps)


def _filled(params: Params, *, value: float) -> State:
    return tree.map(lambda p: value * ops.ones_like(p), params)


def _adagrad(grads: Grads, state: State, params: Params, *, eps: float) -> tuple[Params, State]:
    del params
    state = tree.map(lambda s, g: s + g * g, state, grads)
    return _normalised(grads, state, eps), state


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
    dtype = _widest(leaves)
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
    return tree.map(lambda g: g * _like(scale, g), grads)


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

    >>> rule(clipped(adamw(1e-3), norm=1.0)), rule(momentum(0.1, nesterov=True))
    ('adam', 'momentum')
    """
    update: Any = optimizer.update
    while getattr(update, "func", None) is _clipped:
        update = update.keywords["update"]
    if getattr(update, "func", None) is not _stepped:
        return None
    return _RULES[update.keywords["direction"].func]


_RULES: dict[Any, str] = {
    _sgd: "sgd",
    _momentum: "momentum",
    _adam: "adam",
    _rmsprop: "rmsprop",
    _adagrad: "adagrad",
}


def _needed(params: Params) -> Params:
    if params is None:
        raise InputTypeError("weight decay needs the parameters: update(grads, state, params).")
    return params


def _normalised(grads: Grads, squares: Params, eps: float) -> Params:
    return tree.map(lambda g, s: g / (ops.safe_sqrt(s) + eps), grads, squares)


def _counter(params: Params) -> Any:
    # A float of the parameters' precision, so that the bias correction is as exact as they are
    # and every leaf of the state is differentiable. bfloat16 would count to 256.
    leaves = tree.leaves(params)
    return ops.astype(ops.sum(ops.zeros_like(leaves[0])), _widest(leaves))


def _widest(leaves: Iterable[Any]) -> str:
    """The dtype to count and to sum in: float64 where a leaf has it, else float32."""
    return "float64" if "float64" in map(_dtype, leaves) else "float32"


def _like(x: Any, leaf: Any) -> Any:
    """`x` in the dtype of `leaf`."""
    return ops.astype(x, _dtype(leaf))


def _dtype(leaf: Any) -> str:
    array = ops.asarray(tree.unwrapped(leaf))
    return backend_of(array).dtype_name(array)


def _one_minus_power(base: float, count: Any) -> Any:
    # 1 - base**count loses three digits in float32 for base 0.999; expm1 loses none, which also
    # makes backends agree.
    if base == 0.0:
        return ops.ones_like(count)
    return -ops.expm1(ops.stop_gradient(count) * math.log(base))
