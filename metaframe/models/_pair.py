"""A pair `(apply, params)`: a function and a structure of arrays."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from metaframe import ops, tree
from metaframe.backend.model import BatchNorm, Inputs, ModelAdapter, Params
from metaframe.backend.selection import backend_of, convert_neutral
from metaframe.errors import InputTypeError
from metaframe.nn.layers import recorded_statistics
from metaframe.nn.models import Model

STATISTICS = ("mean", "var")


class PairAdapter(ModelAdapter):
    """`apply(params, *args)` with `params` in any structure; names are key chains.

    A model of `metaframe.nn` says where its batch normalisation is; any other function decides
    for itself what it normalises by.
    """

    def __init__(
        self, apply: Callable[..., Any], params: tree.Tree, norms: tuple[str, ...] = ()
    ) -> None:
        leaves, self._spec = tree.flatten(params)
        self.backend = backend_of(*leaves)
        self._names = tree.key_chains(params)
        self._given = {n: x for n, x in zip(self._names, leaves, strict=True) if not _is_number(x)}
        self._apply = apply
        self._norms = norms
        self.write(dict(zip(self._names, convert_neutral(leaves, self.backend), strict=True)))

    def params(self) -> Params:
        """The leaves by key chain."""
        return dict(zip(self._names, tree.leaves(self.model[1]), strict=True))

    def given(self) -> Mapping[str, Any]:
        """Those of `params`, and before a selected backend converted them where it did."""
        return {**self.params(), **self._given}

    def state(self) -> Params:
        """Running statistics of a model of `metaframe.nn`: means of 0 and variances of 1."""
        scales = ((norm, self.model[1][norm]["scale"]) for norm in self._norms)
        return {
            f"{norm}/{what}": start(scale)
            for norm, scale in scales
            for what, start in zip(STATISTICS, (ops.zeros_like, ops.ones_like), strict=True)
        }

    def batch_norms(self) -> tuple[BatchNorm, ...]:
        """Those of a model of `metaframe.nn`."""
        return tuple(
            BatchNorm(f"{n}/mean", f"{n}/var", f"{n}/scale", f"{n}/shift") for n in self._norms
        )

    def call(self, params: Params, state: Params, inputs: Inputs) -> tuple[Any, Params]:
        """`apply(params, *args, **kwargs)`; `inputs.call` gets that function of `*args`."""
        structure, norm = self._structured(params), inputs.forward.norm
        if norm == "frozen" and self._norms:
            given = {
                name: {**structure[name], **{what: state[f"{name}/{what}"] for what in STATISTICS}}
                for name in self._norms
            }
            structure = {**structure, **given}
        run = functools.partial(self._apply, structure)
        if inputs.call is not None:
            run = functools.partial(inputs.call, run)
        if norm != "record":  # a framework's own batch normalisation does not record
            return run(*inputs.args, **inputs.kwargs), state
        with recorded_statistics() as found:
            output = run(*inputs.args, **inputs.kwargs)
        own = {
            f"{name}/{what}": value
            for name, pair in zip(self._norms, found, strict=bool(self._norms))
            for what, value in zip(STATISTICS, pair, strict=True)
        }
        return output, {**state, **own}

    def write(self, params: Params) -> None:
        """Pair the function with the new parameters."""
        self.model = (self._apply, self._structured(params))

    def _structured(self, params: Params) -> tree.Tree:
        return tree.unflatten(self._spec, [params[name] for name in self._names])


def _is_number(x: object) -> bool:
    return isinstance(x, (int, float))  # equal ones may be the same object


def _is_transform(x: object) -> bool:
    """True if it is the result of `haiku.transform`, by its fields."""
    return getattr(x, "_fields", None) == ("init", "apply")


def pair_adapter(model: object) -> ModelAdapter | None:
    """The adapter of a pair; None for anything else.

    Raises:
        InputTypeError: functions without parameters.
    """
    if isinstance(model, Model):
        raise InputTypeError(
            "a metaframe.nn model has no parameters of its own. Pass them with it: "
            "(model, model.init(seed))."
        )
    if not isinstance(model, tuple):
        return None
    if _is_transform(model) or any(map(_is_transform, model)):
        raise InputTypeError(
            "the functions (init, apply), such as haiku.transform returns, have no parameters of "
            "their own, and whether apply takes a state and a random key they do not say. Say how "
            "the model is called: (lambda params, x: transformed.apply(params, None, x), params), "
            "and with a state (lambda params, x: transformed.apply(params, state, None, x)[0], "
            "params)."
        )
    if len(model) != 2:
        return None
    function, params = model
    if callable(function) and callable(params) and tree.is_leaf(params):
        raise InputTypeError(
            "a pair is a function and its parameters, (apply, params), received two functions. "
            "Pass what init returns as the second."
        )
    if isinstance(function, Model):
        return PairAdapter(function.apply, params, function.norms)
    return PairAdapter(function, params) if callable(function) else None
