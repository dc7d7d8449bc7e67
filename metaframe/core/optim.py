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
for each; see `metaframe.core.rates`. Given to the optimizer, it may also be a schedule, a function
of the number of steps taken; see `metaframe.core.schedules`.

The functions of a pair are functions of this module with their settings filled in, so that a pair
can be pickled, and a learner that has one saved.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from metaframe import ops, tree
from metaframe.backend.selection import backend_of
from metaframe.core import checks, rates
from metaframe.core.schedules import Schedule, as_schedule, parameter_arrays, with_arrays
from metaframe.errors import InputTypeError

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

    Args:
        params: any structure of arrays or numbers.
        updates: what to add, in the same structure, as an optimizer's `update` returns it.

    Returns:
        The new parameters, in the structure of `params`.

    Raises:
        InputError: the structures differ.

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

    Returns:
        The new variables, in the structure of `w`.

    Raises:
        InputTypeError: `lr` is not a number or an array of numbers.
        InputError: `lr` is negative or not finite, or the structures differ.

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

    Args:
        learning_rate: a number, an array, a structure that names parameters or parts of them with
            a rate for each, or a schedule. Default: the loop that uses the rule gives the rate.

    Returns:
        An update rule without a state.

    Raises:
        InputError: a rate that is negative or not finite.

    >>> updates, _ = sgd(0.5).update({"w": 3.0}, ())
    >>> updates
    {'w': -1.5}
    """
    return stepping(learning_rate, _no_state, _sgd)


def stepping(
    learning_rate: Rate, init: Callable[[Params], State], direction: Direction, **settings: Any
) -> Optimizer:
    """The rule that steps by `-lr` times a direction."""
    rule = functools.partial(direction, **settings)
    if callable(learning_rate):
        schedule, update = as_schedule(learning_rate), _with_rate(None, rule)
        return Optimizer(
            functools.partial(_scheduled_state, init=init, schedule=schedule),
            functools.partial(_scheduled, schedule=schedule, update=update),
            schedule,
        )
    own = checks.learning_rate(learning_rate, "learning_rate")
    return Optimizer(init, _with_rate(own, rule), own)


def _with_rate(own: Rate, direction: Direction) -> Callable[..., tuple[Params, State]]:
    return functools.partial(_stepped, own=own, direction=direction)


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


class ScheduledState(NamedTuple):
    """The state of a rule whose learning rate is a schedule.

    >>> import torch
    >>> from metaframe import optim
    >>> optim.sgd(optim.cosine(torch.tensor(0.1), 100)).init({"w": torch.zeros(2)})
    ScheduledState(count=tensor(0.), parameters=(tensor(0.1000),), rule=())
    """

    count: Any
    """Steps taken."""
    parameters: tuple[Any, ...]
    """The parameters of the schedule that are arrays."""
    rule: State
    """The state of the rule without the schedule."""


def _scheduled_state(
    params: Params, *, init: Callable[[Params], State], schedule: Schedule
) -> State:
    count = counter(params)
    return ScheduledState(count, parameter_arrays(schedule, count), init(params))


def _scheduled(
    grads: Grads,
    state: State,
    params: Params = None,
    lr: Rate = None,
    *,
    schedule: Schedule,
    update: Callable[..., tuple[Params, State]],
) -> tuple[Params, State]:
    if lr is not None:
        rates.only(schedule, lr)
    count, parameters, own = state
    rate = with_arrays(schedule, parameters)(ops.stop_gradient(count))
    updates, own = update(grads, own, params, rate)
    return updates, ScheduledState(count + 1, parameters, own)


def _no_state(params: Params) -> State:
    del params
    return ()


def _sgd(grads: Grads, state: State, params: Params) -> tuple[Params, State]:
    del params
    return grads, state


def parameters_given(params: Params) -> Params:
    """`params`, which a rule with weight decay cannot do without."""
    if params is None:
        raise InputTypeError("weight decay needs the parameters: update(grads, state, params).")
    return params


def counter(params: Params) -> Any:
    """The number of steps taken, before the first: zero, a float of the parameters' precision.

    So that a bias correction is as exact as they are, and every leaf of the state differentiable.
    bfloat16 would count to 256.
    """
    leaves = tree.leaves(params)
    return ops.astype(ops.sum(ops.zeros_like(leaves[0])), widest(leaves))


def own_rule(optimizer: Optimizer) -> str | None:
    """The kind of state of a rule made by `stepping`; None for a rule of someone else."""
    update: Any = optimizer.update
    if getattr(update, "func", None) is _scheduled:
        update = update.keywords["update"]
    if getattr(update, "func", None) is not _stepped:
        return None
    name: str = update.keywords["direction"].func.__name__
    return name.removeprefix("_")


def widest(leaves: Iterable[Any]) -> str:
    """The dtype to count and to sum in: float64 where a leaf has it, else float32."""
    return "float64" if "float64" in map(_dtype, leaves) else "float32"


def like(x: Any, leaf: Any) -> Any:
    """`x` in the dtype of `leaf`."""
    return ops.astype(x, _dtype(leaf))


def _dtype(leaf: Any) -> str:
    array = ops.asarray(tree.unwrapped(leaf))
    return backend_of(array).dtype_name(array)
