"""Learning rates for variables: one for all of them, or one for each.

A structure of rates names variables by their key chains, whatever containers either is made of. A
rate at a part of the structure, such as a layer, counts for every variable in it. Whatever form a
rate comes in, in the end it is a number, or an array of the variables' framework, in the dtype of
its variable and no wider than it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from metaframe import tree
from metaframe.backend.contract import Backend
from metaframe.backend.registry import owner
from metaframe.backend.selection import is_neutral
from metaframe.backend.types import Array
from metaframe.core import checks
from metaframe.errors import InputError, InputTypeError, nearest

Rate = Any
"""A number, an array, or a structure of them that names variables or parts of them."""


def spread(
    rate: Rate, variables: tree.Tree, *, name: str = "lr", known: Sequence[str] = ()
) -> Rate:
    """`rate` as one number or array for all `variables`, or as one for each in their structure.

    Args:
        rate: checked by `checks.learning_rate`; or None, which is returned.
        variables: the variables that it is for.
        name: the argument that it is, for errors.
        known: key chains of other variables, for which there may be rates too.

    Raises:
        InputError: a variable without a rate, a rate for no variable, or a rate that would widen
            its variable.
        InputTypeError: a rate of another framework than its variable.

    >>> spread({"body": 0.1, "head": {"w": 0.2}}, {"body": [1.0, 2.0], "head": {"w": 3.0}})
    {'body': [0.1, 0.1], 'head': {'w': 0.2}}
    >>> spread({"bdy": 0.1}, {"body": 1.0})
    Traceback (most recent call last):
    metaframe.errors.InputError: lr has 'bdy', which is no variable. Did you mean 'body'?
    """
    if rate is None or type(rate) is float:
        return rate
    leaves, spec = tree.flatten(variables)
    single = not is_structure(rate)
    if single:
        rates = [tree.unwrapped(rate)] * len(leaves)
    else:
        chains, above = tree.key_chains(variables), tree.parts(spec)
        rates = matched(rate, chains, name=name, known=known, above=above)
    fitted = [
        fit(r, x, lambda i=i: label(name, tree.key_chains(variables)[i]))
        for i, (r, x) in enumerate(zip(rates, leaves, strict=True))
    ]
    if single and all(r is rates[0] for r in fitted):
        return rate
    return tree.unflatten(spec, fitted)


def is_structure(rate: Rate) -> bool:
    """True if it is a structure of rates, and not a single number or array.

    >>> is_structure(0.1), is_structure({"w": 0.1, "b": 0.2})
    (False, True)
    """
    return isinstance(rate, Mapping) or not tree.is_leaf(rate)


def matched(
    rate: Rate,
    chains: Sequence[str],
    *,
    name: str = "lr",
    known: Sequence[str] | None = (),
    noun: str = "variable",
    above: Sequence[Sequence[str]] | None = None,
) -> list[Rate]:
    """The rate of each variable, by key chain, from a structure of rates.

    Args:
        rate: a structure of rates.
        chains: the variables' key chains, or the names of parameters.
        name: see `spread`.
        known: see `spread`; None for any others.
        noun: what `chains` name.
        above: for each of `chains` it and everything that it is a part of, the nearest first;
            default: as its dots and slashes say.
    """
    if isinstance(rate, Mapping) and tree.is_leaf(rate):
        rate = dict(rate)
    given = dict(zip(map(_path, tree.key_chains(rate)), tree.leaves(rate), strict=True))
    if len(given) < len(tree.leaves(rate)):
        raise InputError(
            f"{name} has two rates for one {noun}: dots and slashes in {tree.key_chains(rate)} "
            "mean the same. Leave out one."
        )
    ways = map(_parts, chains) if above is None else (map(_path, way) for way in above)
    parts = {chain: tuple(way) for chain, way in zip(chains, ways, strict=True)}
    if known is not None:
        reached = {part for up in parts.values() for part in up}
        reached |= {part for chain in known for part in _parts(chain)}
        for chain in tree.key_chains(rate):
            if _path(chain) not in reached:
                near = nearest(chain, {*chains, *known})
                raise InputError(f"{name} has {chain!r}, which is no {noun}. {near}")
    found = {c: next((p for p in up if p in given), None) for c, up in parts.items()}
    if missing := [chain for chain, part in found.items() if part is None]:
        raise InputError(
            f"{name} has no rate for the adapted {noun}s {missing}. Give each of them one, or all "
            "of them a single number."
        )
    return [given[part] for part in found.values() if part is not None]


def _path(chain: str) -> str:
    # Parameters of modules have names with dots.
    return chain.replace(".", "/")


def _parts(chain: str) -> Iterator[str]:
    """The path of a variable and of everything that it is a part of, the nearest first."""
    path = _path(chain)
    while path:
        yield path
        path = path.rpartition("/")[0]
    if not chain:
        yield path


def label(name: str, chain: str) -> str:
    """The argument `name` where it is about one variable."""
    return f"{name}[{chain!r}]" if chain else name


def fit(rate: Rate, variable: Array, name: Any) -> Rate:
    """`rate` as a number, or as an array that changes neither dtype nor shape of `variable`.

    Args:
        rate: a number or an array.
        variable: an array of a framework; anything else is not looked at.
        name: a function that returns what to call the rate in an error.
    """
    backend = owner(variable)
    if backend is None or isinstance(rate, (int, float)):
        return rate
    dtype = backend.dtype_name(variable)
    if not backend.owns(rate):
        if (other := owner(rate)) is not None:
            raise InputTypeError(
                f"{name()} is an array of {other.name!r}, its variable one of {backend.name!r}. "
                "Convert one of them."
            )
        rate = backend.asarray(rate, dtype, _device(variable, backend))
    elif backend.dtype_name(rate) != dtype:
        rate = backend.ops.astype(rate, dtype)
    shape, given = tuple(variable.shape), tuple(rate.shape)
    if broadcasts(given, shape):
        return rate
    if None not in given and math.prod(given) == 1:
        return backend.ops.reshape(rate, ())
    raise InputError(
        f"{name()} has shape {given}, and its variable shape {shape}, which it would widen. Give "
        "a rate that broadcasts to the shape of its variable."
    )


def broadcasts(given: tuple[Any, ...], shape: tuple[Any, ...]) -> bool:
    """True if an array of the shape `given` broadcasts to `shape`."""
    pairs = zip(reversed(given), reversed(shape), strict=False)
    return len(given) <= len(shape) and all(a in (1, b) or None in (a, b) for a, b in pairs)


def _device(variable: Array, backend: Backend) -> str | None:
    placed = backend.is_traced(variable) or backend.on_cpu(variable)
    return None if placed else backend.device_of(variable)


def arrays(rate: Rate, variables: tree.Tree) -> Rate:
    """`rate` as it is, with NumPy's arrays as arrays in the dtype of the first of `variables`."""
    first = tree.leaves(variables)[0]
    backend = owner(first)

    def convert(x: Any) -> Any:
        if backend is None or not isinstance(x, np.ndarray):
            return x
        return backend.asarray(x, backend.dtype_name(first), _device(first, backend))

    return rate if rate is None else tree.map(convert, rate)


def only(own: Rate, given: Rate) -> Rate:
    """The rate that an optimizer has or that its loop gives, one of the two.

    Raises:
        InputError: both are given, or neither.
    """
    if own is not None and given is not None:
        raise InputError(
            "the learning rate is given twice: to the optimizer and to the loop that uses it. "
            "Leave it out of one: optim.adam() takes the loop's; with a loop rate of None the "
            "optimizer's counts."
        )
    if own is None and given is None:
        raise InputError("no learning rate: give it to the optimizer or to the loop that uses it.")
    return checks.plain_numbers(given if own is None else own)


def refuse_zero(rate: Rate, name: str, user: str) -> None:
    """Raise `InputError` for a rate of 0, as far as values are known, by which `user` divides."""
    for chain, x in zip(tree.key_chains(rate), tree.leaves(rate), strict=True):
        if is_neutral(x) and not np.all(x):
            raise InputError(
                f"{label(name, chain)}: {user} divides by the inner learning rate, a positive "
                f"number; received {x!r}."
            )


def divided(variables: tree.Tree, rate: Rate) -> tree.Tree:
    """`variables` divided by their rates, as `spread` returns them; None for 1.

    >>> divided({"w": 3.0, "b": 2.0}, {"w": 1.5, "b": 1.0})
    {'w': 2.0, 'b': 2.0}
    """
    if rate is None:
        return variables
    if is_structure(rate):
        return tree.map(lambda x, r: x / r, variables, rate)
    single = tree.unwrapped(rate)
    return tree.map(lambda x: x / single, variables)
