"""Learning rates in every form that is taken, brought to one for each variable.

A rate is a number or an array, for all variables, or a structure of them: one for each variable or
for each part of the variables, such as a layer. Keys and positions decide what belongs together,
not classes, so a dict serves for a `Container` and a list for a tuple.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from metaframe import ops, tree
from metaframe.backend.registry import owner
from metaframe.backend.selection import backend_of, is_neutral
from metaframe.backend.types import Array
from metaframe.errors import InputError, InputTypeError, nearest


def checked(lr: Any) -> Any:
    """`lr` after a look at what is in it, with NumPy's scalars as Python numbers.

    Raises:
        InputTypeError: neither a number nor a float array.
        InputError: a number or a NumPy array that is negative or not finite. Other arrays are not
            looked at, they may be traced.
    """
    if type(lr) is float and 0 <= lr < math.inf:
        return lr  # the common case, which eager steps ask for every time
    leaves, spec = tree.flatten(lr)
    for i, rate in enumerate(leaves):
        if not _is_rate(rate):
            raise InputTypeError(
                f"{_named(tree.chains(spec)[i])} must be a number or a float array, received "
                f"{_shown(rate)}."
            )
        if is_neutral(rate) and not np.all(np.isfinite(rate) & (np.asarray(rate) >= 0)):
            raise InputError(
                f"{_named(tree.chains(spec)[i])} must be finite and not negative, received "
                f"{rate!r}."
            )
    return tree.unflatten(spec, map(_plain, leaves))


def for_each(lr: Any, leaves: Sequence[Array], spec: tree.TreeSpec) -> tuple[Any, ...]:
    """One rate for each of the variables `leaves` of structure `spec`.

    Each is a number, or an array of the variable's framework and dtype that scales it without
    changing its shape.

    Raises:
        InputError: a rate is missing, is for no variable, or would widen one.
        InputTypeError: neither a number nor a float array, or an array of another framework.

    >>> leaves, spec = tree.flatten({"layer": {"w": np.ones(2), "b": np.ones(1)}})
    >>> for_each({"layer": 0.1}, leaves, spec)
    (0.1, 0.1)
    """
    if type(lr) is float:
        return (lr,) * len(leaves)
    rates: list[Any] = [None] * len(leaves)
    _spread(lr, tree.unflatten(spec, range(len(leaves))), "", rates)
    chains = tree.chains(spec)
    return tuple(
        _fitting(rate, leaf, chain) for rate, leaf, chain in zip(rates, leaves, chains, strict=True)
    )


def _spread(lr: Any, places: tree.Tree, chain: str, rates: list[Any]) -> None:
    """Put `lr` into the places of `rates` that the structure `places` holds."""
    if lr is not None and tree.is_leaf(lr):
        for i in tree.leaves(places):
            rates[i] = lr
        return
    known = {} if tree.is_leaf(places) else tree.children(places)
    given = tree.children(lr)
    for key in given:
        if key not in known:
            where = f"{chain}/{key}" if chain else key
            hint = nearest(key, known) if known else f"{chain!r} is one variable: give it one rate."
            raise InputError(
                f"lr has a rate for {where!r}, which is no variable that adapts. {hint}"
            )
    missing = [f"{chain}/{key}" if chain else key for key in known if key not in given]
    if missing or not known:
        raise InputError(
            f"lr has no rate for {missing or [chain]}. Give one for every variable that adapts, or "
            "a number for all of them."
        )
    for key, below in known.items():
        _spread(given[key], below, f"{chain}/{key}" if chain else key, rates)


def _fitting(rate: Any, variable: Array, chain: str) -> Any:
    rate = _plain(tree.unwrapped(rate))
    if not _is_rate(rate):
        raise InputTypeError(
            f"{_named(chain)} must be a number or a float array, received {_shown(rate)}."
        )
    if isinstance(rate, (int, float)):
        return rate
    if owner(variable) is None:
        return rate  # variables of no framework, whose arithmetic is NumPy's
    backend = backend_of(variable)
    if isinstance(rate, np.ndarray):
        dtype, device = backend.dtype_name(variable), None
        if not backend.is_traced(variable):
            device = backend.device_of(variable)
        rate = backend.asarray(rate, dtype, device)
    elif not backend.owns(rate):
        backend_of(variable, rate)  # raises
    shape, own = tuple(rate.shape), tuple(variable.shape)
    if shape and not _fits(shape, own):
        raise InputError(
            f"{_named(chain)} has shape {shape}, which does not fit a variable of shape {own}. "
            "Pass a number, or an array of the variable's shape."
        )
    dtype = backend.dtype_name(variable)
    return rate if backend.dtype_name(rate) == dtype else ops.astype(rate, dtype)


def _fits(shape: tuple[int, ...], own: tuple[int, ...]) -> bool:
    try:
        return np.broadcast_shapes(shape, own) == own
    except ValueError:
        return False


def _is_rate(x: Any) -> bool:
    if isinstance(x, (bool, np.bool_)):
        return False
    if isinstance(x, (int, float)):
        return True
    if is_neutral(x):
        return np.asarray(x).dtype.kind in ("f" if np.ndim(x) else "fiu")
    own = owner(x)
    return own is not None and own.is_floating(x)


def _plain(rate: Any) -> Any:
    """NumPy's scalars as Python numbers: their dtype is not to decide that of variables."""
    return rate.item() if isinstance(rate, np.generic | np.ndarray) and not rate.shape else rate


def _named(chain: str) -> str:
    return f"learning rate {chain!r} (lr)" if chain else "the learning rate (lr)"


def _shown(x: Any) -> str:
    own = owner(x)
    if own is None:
        return f"{x!r:.60}"
    return f"an array of {own.dtype_name(x)}"
