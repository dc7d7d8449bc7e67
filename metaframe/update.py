"""What an inner step may be given as update rule, brought to one form.

Three kinds are accepted: our `optim.Optimizer`, a foreign pair with `init` and `update` (an optax
`GradientTransformation`), and a function `update(v, grads, lr, stop_gradients=...)` that returns
new variables.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from metaframe import optim, tree
from metaframe.backend import Arrays, backend_of
from metaframe.errors import InputError, InputTypeError
from metaframe.optim import Optimizer, Params, Rate, State


class UpdateRule(NamedTuple):
    """One form for every kind of update."""

    init: Callable[[Params], State]
    apply: Callable[[Params, Params, State, Rate], tuple[Params, State, Params]]
    """`(v, grads, state, lr) -> (new v, new state, what was added)`."""


def update_rule(update: Any, *, stop_gradients: bool) -> UpdateRule:
    """`update` as an `UpdateRule`.

    `stop_gradients` is handed to an update function. Pairs have no such argument: what they return
    depends on the gradients as they come, and it is for the caller to make those constants.
    """
    if update is optim.gradient_descent_update:
        # As a pair it also says what it added, without the rounding of a difference.
        update = optim.sgd()
    if isinstance(update, Optimizer):
        return _pair(update.init, update.update)
    if hasattr(update, "init") and hasattr(update, "update"):
        return _foreign_pair(update)
    if callable(update):
        return _function(update, stop_gradients)
    raise InputTypeError(
        "the inner update is an optim.Optimizer, a pair with init and update, or a function "
        f"update(v, grads, lr, stop_gradients=...), received {type(update).__name__}."
    )


def _pair(init: Any, update: Any) -> UpdateRule:
    def apply(v: Params, grads: Params, state: State, lr: Rate) -> tuple[Params, State, Params]:
        updates, state = update(grads, state, v, lr)
        return optim.apply_updates(v, updates), state, updates

    return UpdateRule(init, apply)


def _with_finite_roots(update: Callable[..., Any]) -> Callable[..., Any]:
    """`update`, code of others, as something to differentiate.

    The square root of a second moment has no derivative where that is zero, as it is for a unit
    that is dead in every example: `optax.adam` with its default `eps_root=0` would return NaN.
    """

    def call(*given: Any) -> Any:
        backend = backend_of(*tree.leaves(given[0]))
        arguments = tree.Packed(given, backend.owns)
        results: list[tree.Packed] = []

        def flat(xs: Arrays) -> Arrays:
            results.append(tree.Packed(update(*arguments.unpack(xs)), backend.owns))
            return results[-1].arrays

        try:
            arrays = backend.with_finite_roots(flat)(arguments.arrays)
        except Exception as error:
            if not backend.needed_a_value(error):
                raise
            return update(*given)  # it looks at values, and runs as it is
        return results[-1].unpack(arrays)

    return call


def _foreign_pair(pair: Any) -> UpdateRule:
    apply = _with_finite_roots(pair.update)

    def update(grads: Params, state: State, v: Params, lr: Rate) -> tuple[Params, State]:
        if lr is not None:
            raise InputError(
                "this update rule brings its own learning rate (it is no optim.Optimizer); "
                f"pass None as the inner learning rate, received {lr!r}."
            )
        updates, state = apply(grads, state, v)
        return updates, state

    return _pair(pair.init, update)


def _function(update: Callable[..., Params], stop_gradients: bool) -> UpdateRule:
    try:
        inspect.signature(update).bind(None, None, None, stop_gradients=stop_gradients)
    except TypeError as error:
        raise InputTypeError(
            "the inner update function is called as update(v, grads, lr, stop_gradients=...): "
            f"{error}."
        ) from None
    except ValueError:
        pass  # written in C, and without a signature

    finite = _with_finite_roots(functools.partial(update, stop_gradients=stop_gradients))

    def apply(v: Params, grads: Params, state: State, lr: Rate) -> tuple[Params, State, Params]:
        new = finite(v, grads, lr)
        tree.same_structure(new, tree.structure(v), what="what the inner update returned")
        return new, state, tree.map(lambda n, o: n - o, new, v)

    return UpdateRule(lambda v: (), apply)
