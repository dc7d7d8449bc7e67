"""A pair `(apply, params)`: a function and a structure of arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from metaframe import tree
from metaframe.backend import backend_of, convert_neutral
from metaframe.errors import InputTypeError
from metaframe.models.adapter import Forward, ModelAdapter, Params
from metaframe.nn.models import Model


class PairAdapter(ModelAdapter):
    """`apply(params, *args)` with `params` in any structure; names are key chains."""

    def __init__(self, apply: Callable[..., Any], params: tree.Tree) -> None:
        leaves, self._spec = tree.flatten(params)
        self.backend = backend_of(*leaves)
        self._names = tree.key_chains(params)
        self._apply = apply
        self.write(dict(zip(self._names, convert_neutral(leaves, self.backend), strict=True)))

    def params(self) -> Params:
        """The leaves by key chain."""
        return dict(zip(self._names, tree.leaves(self.model[1]), strict=True))

    def call(
        self,
        params: Params,
        state: Params,
        forward: Forward,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[Any, Params]:
        """`apply(params, *args, **kwargs)`."""
        del forward
        return self._apply(self._structured(params), *args, **kwargs), state

    def write(self, params: Params) -> None:
        """Pair the function with the new parameters."""
        self.model = (self._apply, self._structured(params))

    def _structured(self, params: Params) -> tree.Tree:
        return tree.unflatten(self._spec, [params[name] for name in self._names])


def pair_adapter(model: object) -> ModelAdapter | None:
    """The adapter of a pair; None for anything else."""
    if isinstance(model, Model):
        raise InputTypeError(
            "a metaframe.nn model has no parameters of its own. Pass them with it: "
            "(model, model.init(seed))."
        )
    if not (isinstance(model, tuple) and len(model) == 2):
        return None
    function, params = model
    if isinstance(function, Model):
        function = function.apply
    return PairAdapter(function, params) if callable(function) else None
