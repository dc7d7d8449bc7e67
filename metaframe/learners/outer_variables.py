"""Outer variables beyond the model's: a loss network, one learned rate, a prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from metaframe import tree
from metaframe.backend.contract import Backend
from metaframe.backend.selection import is_neutral
from metaframe.backend.types import Array
from metaframe.errors import InputError, InputTypeError
from metaframe.learners.functions import Params, array_like


class OuterVariables(NamedTuple):
    """The structure of what `MAML(learned=...)` was given; its arrays live among the learned.

    >>> outer = OuterVariables.of({"loss": {"b": 0.0, "w": 1.0}})
    >>> outer.names, outer.build({"loss/b": 3.0, "loss/w": 4.0})
    (('loss/b', 'loss/w'), {'loss': {'b': 3.0, 'w': 4.0}})
    """

    names: tuple[str, ...]
    spec: tree.TreeSpec

    @staticmethod
    def of(learned: Any) -> OuterVariables:
        """The names and the structure of `learned`.

        Raises:
            InputTypeError: no mapping.
            InputError: an empty one, or two variables of one name.
        """
        if not isinstance(learned, Mapping):
            raise InputTypeError(
                "learned is a mapping from names to arrays, or to structures of them, received "
                f"{type(learned).__qualname__}. For one array write learned={{'rate': ...}}."
            )
        names = tree.key_chains(learned)
        if not names:
            raise InputError("learned is empty. Leave it out, or name an array in it.")
        if len(set(names)) < len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise InputError(f"learned has two variables of one name: {twice}. Rename one of them.")
        return OuterVariables(names, tree.structure(learned))

    def values(self, learned: Any, like: Params, backend: Backend) -> Params:
        """Copies of the arrays by name, of the backend and on the device of the parameters.

        Raises:
            InputTypeError: one is of another framework, or not of floating numbers.
        """
        found = {}
        for name, x in zip(self.names, tree.leaves(learned), strict=True):
            array = array_like(_floats(x), like, backend) if is_neutral(x) else x
            if not backend.owns(array) or not backend.is_floating(array):
                raise InputTypeError(
                    f"learned[{name!r}] must be a floating array of {backend.name!r} or NumPy, "
                    f"received {type(x).__qualname__}."
                )
            found[name] = backend.stop_gradient(backend.asarray(array)) * 1
        return found

    def build(self, values: Mapping[str, Array]) -> Any:
        """The structure as the user gave it."""
        return tree.unflatten(self.spec, [values[name] for name in self.names])


def _floats(x: Any) -> Any:
    """A Python number as a float; 1 is a fine place for a rate to start."""
    return float(x) if isinstance(x, int) and not isinstance(x, bool) else x
