"""The update rule of an inner step, brought to one form.

Three kinds are accepted: our `optim.Optimizer`, a foreign pair with `init` and `update` (an optax
`GradientTransformation`), and a function `update(v, grads, lr, stop_gradients=...)` that returns
new variables. Whatever it is, the variables and the state that it returns have the structure,
shapes and dtypes of those that it got.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from metaframe import tree
from metaframe.backend.registry import owner
from metaframe.backend.selection import backend_of
from metaframe.backend.types import Arrays
from metaframe.core import optim, rates
from metaframe.core.chain import rule
from metaframe.core.optim import Optimizer, Params, Rate, State
from metaframe.errors import InputError, InputTypeError
from metaframe.tree import Flat, Leaves

RETURNED = "what the inner update returned"


class Updated(NamedTuple):
    """The result of an update, as leaves in the order of the variables and of the state."""

    params: Leaves
    state: Leaves
    updates: Leaves
    """The change of the variables."""


class UpdateRule(NamedTuple):
    """One form for every kind of update."""

    init: Callable[[Params], State]
    apply: Callable[[Flat, Leaves, Flat, Rate], Updated]
    """`(v, grads, state, lr) -> Updated`."""
    rate: Callable[..., Rate]
    """`rate(lr, v, name=..., known=...)`: what `apply` takes as `lr`, or an error about it.

    The arguments as of `rates.spread`.
    """


def update_rule(update: Any, *, stop_gradients: bool) -> UpdateRule:
    """`update` as an `UpdateRule`.

    `stop_gradients` is handed to an update function. Pairs have no such argument: what they return
    depends on the gradients as they come, and it is for the caller to make those constants.
    """
    if update is optim.gradient_descent_update:
        # As a pair it also says what it added, without the rounding of a difference.
        return GRADIENT_DESCENT
    if isinstance(update, Optimizer):
        if rule(update) is None:
            _check_signature(update.init, "init(v)", None)
            _check_signature(update.update, "update(grads, state, v, lr)", None, None, None, None)
        return _pair(update.init, update.update, _rate_of(update))
    if hasattr(update, "init") and hasattr(update, "update"):
        return _foreign_pair(update)
    if callable(update):
        return _function(update, stop_gradients)
    raise InputTypeError(
        "the inner update is an optim.Optimizer, a pair with init and update, or a function "
        f"update(v, grads, lr, stop_gradients=...), received {type(update).__name__}."
    )


def _pair(init: Any, update: Any, rate: Callable[..., Rate], *, cast: bool = False) -> UpdateRule:
    """A rule that says what to add, which it does in the variables' dtypes if told to `cast`."""

    def apply(v: Flat, grads: Leaves, state: Flat, lr: Rate) -> Updated:
        result = update(v.build(grads), state.build(state.arrays), v.build(v.arrays), lr)
        if not isinstance(result, tuple) or len(result) != 2:
            raise InputTypeError(
                "the inner update is a pair whose update returns (updates, new state), received "
                f"{type(result).__name__}."
            )
        updates = tree.same_structure(result[0], v.spec, what=RETURNED)
        if cast:
            updates = tuple(map(_in_dtype_of, updates, v.arrays))
        new = tuple(p + u for p, u in zip(v.arrays, updates, strict=True))
        _check_variables(new, v)
        return Updated(new, checked_state(result[1], state), updates)

    return UpdateRule(init, apply, rate)


def _rate_of(optimizer: Optimizer) -> Callable[..., Rate]:
    """For a rule of ours a rate for every variable; another one has its own idea of a rate."""
    if rule(optimizer) is None:
        return lambda lr, v, *, name="lr", known=(): rates.arrays(lr, v)

    def rate(lr: Rate, v: Params, *, name: str = "lr", known: Sequence[str] = ()) -> Rate:
        own = rates.only(optimizer.learning_rate, lr)
        if lr is not None:
            return rates.spread(lr, v, name=name, known=known)
        if not callable(own):  # a schedule, whose rates are not known yet
            rates.spread(own, v, name="the optimizer's learning_rate", known=known)
        return None

    return rate


def _with_finite_roots(update: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
    """`update`, code of others, as something to differentiate.

    The square root of a second moment has no derivative where that is zero, as it is for a unit
    that is dead in every example: `optax.adam` with its default `eps_root=0` would return NaN.
    """

    def call(*given: Any) -> Any:
        backend = backend_of(*tree.leaves(given[0]))
        arguments = tree.Packed(given, backend.owns)
        returned = tree.Returned(backend.owns)

        def flat(xs: Arrays) -> Arrays:
            found = backend.user_function(update)(*arguments.unpack(xs), **settings)
            return returned.flatten(found)

        try:
            arrays = backend.with_finite_roots(flat)(arguments.arrays)
        except Exception as error:
            if not backend.needed_a_value(error):
                raise
            # It looks at values, and runs as it is.
            return backend.user_function(update)(*given, **settings)
        return returned.build(arrays)

    return call


def _foreign_pair(pair: Any) -> UpdateRule:
    def rate(lr: Rate, v: Params, *, name: str = "lr", known: Sequence[str] = ()) -> Rate:
        del v, known
        if lr is not None:
            raise InputError(
                "this update rule brings its own learning rate (it is no optim.Optimizer); "
                f"pass None as {name}, the inner learning rate, received {lr!r}."
            )
        return None

    finite = _with_finite_roots(pair.update)

    def update(grads: Params, state: State, v: Params, lr: Rate) -> Any:
        del lr
        return finite(grads, state, v)

    _check_signature(pair.update, "update(grads, state, v)", None, None, None)
    # As optax applies them: in the dtype of the variables, whatever it accumulates in.
    return _pair(pair.init, update, rate, cast=True)


def _in_dtype_of(x: Any, like: Any) -> Any:
    backend = owner(like)
    if backend is None or not backend.owns(x) or backend.dtype_name(x) == backend.dtype_name(like):
        return x
    return backend.ops.astype(x, backend.dtype_name(like))


def _function(update: Callable[..., Params], stop_gradients: bool) -> UpdateRule:
    _check_signature(
        update,
        "update(v, grads, lr, stop_gradients=...)",
        None,
        None,
        None,
        stop_gradients=stop_gradients,
    )

    def rate(lr: Rate, v: Params, *, name: str = "lr", known: Sequence[str] = ()) -> Rate:
        if lr is None or not rates.is_structure(lr):
            return rates.arrays(lr, v)
        return rates.spread(lr, v, name=name, known=known)

    finite = _with_finite_roots(update, stop_gradients=stop_gradients)

    def apply(v: Flat, grads: Leaves, state: Flat, lr: Rate) -> Updated:
        returned = finite(v.build(v.arrays), v.build(grads), lr)
        new = tree.same_structure(returned, v.spec, what=RETURNED)
        _check_variables(new, v)
        return Updated(new, state.arrays, tuple(n - o for n, o in zip(new, v.arrays, strict=True)))

    return UpdateRule(lambda v: (), apply, rate)


def _check_signature(fn: Any, form: str, *args: Any, **kwargs: Any) -> None:
    try:
        inspect.signature(fn).bind(*args, **kwargs)
    except TypeError as error:
        raise InputTypeError(
            f"the inner update function is called as {form}: {error}. Take these arguments."
        ) from None
    except ValueError:
        pass  # written in C, and without a signature


def _check_variables(new: Leaves, v: Flat) -> None:
    """New variables are arrays of the shapes and dtypes of the old ones."""
    for name, x, like in _unlike(new, v):
        if owner(like) is not None:
            where = f" for {name!r}" if name else ""
            raise InputError(
                f"the inner update returned {_described(x)}{where}, whose variable is "
                f"{_described(like)}. Return variables of the shapes and dtypes of the old ones."
            )


def checked_state(
    new: State, state: Flat, what: str = "the state that the inner update returned"
) -> Leaves:
    """The leaves of a new state: of the structure, shapes and dtypes of the old one."""
    found = tree.same_structure(new, state.spec, what=what)
    for name, x, like in _unlike(found, state):
        where = f" at {name!r}" if name else ""
        raise InputError(
            f"{what} has {_described(x)}{where}; it has to be {_described(like)}. A state "
            "consists of arrays whose shapes and dtypes stay; count in an array, such as "
            "ops.sum(ops.zeros_like(w))."
        )
    return found


def _unlike(new: Leaves, old: Flat) -> Iterator[tuple[str, Any, Any]]:
    """The key chain of a leaf that cannot stand in the place of the old one, and both leaves."""
    for i, (x, like) in enumerate(zip(new, old.arrays, strict=True)):
        if not _alike(x, like):
            yield tree.chains(old.spec)[i], x, like


def _alike(x: Any, like: Any) -> bool:
    backend = owner(like)
    if backend is None:
        return x is like or (owner(x) is None and np.array_equal(np.asarray(x), np.asarray(like)))
    if not backend.owns(x) or backend.dtype_name(x) != backend.dtype_name(like):
        return False
    a, b = tuple(x.shape), tuple(like.shape)
    # TensorFlow has None where a size is not known yet.
    return len(a) == len(b) and all(m == n or None in (m, n) for m, n in zip(a, b, strict=True))


def _described(x: Any) -> str:
    backend = owner(x)
    if backend is None:
        return f"{x!r:.60} ({type(x).__name__})"
    return f"{backend.dtype_name(x)} of shape {tuple(x.shape)} ({backend.name})"


GRADIENT_DESCENT = update_rule(optim.sgd(), stop_gradients=False)
"""Gradient descent with the rate of the loop."""
