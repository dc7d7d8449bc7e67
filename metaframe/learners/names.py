"""The two names of a meta-parameter of torch: the model's, and that of the module around it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from metaframe import tree
from metaframe.backend.registry import register_with_frameworks
from metaframe.backend.types import Array


class Named(dict[str, Array]):
    """Arrays by name, found by other names too.

    Everywhere else it is a dict of the first names alone: for iteration, comparison and
    `metaframe.tree`.

    >>> grads = Named({"weight": 2.0}, {"module.weight": "weight"})
    >>> grads["module.weight"], "module.weight" in grads, list(grads)
    (2.0, True, ['weight'])
    """

    def __init__(self, values: Mapping[str, Array], others: Mapping[str, str]) -> None:
        super().__init__(values)
        self._others = dict(others)
        register_with_frameworks(Named, _flatten, _unflatten)

    def __missing__(self, name: str) -> Array:
        if name not in self._others:
            raise KeyError(name)
        return self[self._others[name]]

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or name in self._others

    def get(self, name: str, default: Any = None) -> Any:
        """As of a dict."""
        try:
            return self[name]
        except KeyError:
            return default

    def __reduce__(self) -> tuple[Any, ...]:
        return Named, (dict(self), self._others)


def _flatten(named: Named) -> tuple[list[Array], Any, tuple[str, ...]]:
    keys = tuple(sorted(named))
    return [named[key] for key in keys], (keys, tuple(named._others.items())), keys


def _unflatten(names: Any, values: Iterable[Array]) -> Named:
    keys, others = names
    return Named(dict(zip(keys, values, strict=True)), dict(others))


tree.register_dict(Named, _flatten, _unflatten)


def named(values: Mapping[str, Array], wrapper: Any, meta: Mapping[str, Array]) -> dict[str, Array]:
    """`values` by the names of `meta`, and by those that `wrapper` has for the same parameters."""
    ordered = {name: values[name] for name in meta}
    others = _other_names(wrapper, meta)
    return Named(ordered, others) if others else ordered


def renamed(
    values: Mapping[str, Array], wrapper: Any, meta: Mapping[str, Array]
) -> dict[str, Array]:
    """`values`, given by either name, by the names of `meta`; unknown ones stay as they are."""
    if all(name in meta for name in values):
        return dict(values)
    others = _other_names(wrapper, meta)
    return {others.get(name, name): value for name, value in values.items()}


def _other_names(wrapper: Any, meta: Mapping[str, Array]) -> dict[str, str]:
    """Names in the framework's own view of `wrapper`, where it has one, and those of `meta`."""
    if not hasattr(wrapper, "named_parameters"):
        return {}
    names = {id(x): name for name, x in meta.items()}
    own = wrapper.named_parameters(remove_duplicate=False)
    return {other: names[id(x)] for other, x in own if id(x) in names}
