"""Names of the arrays in a pytree: the keys on the way to each, joined with "/"."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

IsLeaf = Callable[[Any], bool]


def path_name(path: tuple[Any, ...]) -> str:
    """The keys of a path, joined with "/"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def unique(names: Iterable[str]) -> list[str]:
    """`names` with a number at the second of two that are equal, and at every further one.

    A key with a slash in it makes two paths read alike.
    """
    found: dict[str, None] = {}
    for name in names:
        copies, free = 1, name
        while free in found:
            copies += 1
            free = f"{name}:{copies}"
        found[free] = None
    return list(found)


def named(tree: Any, is_leaf: IsLeaf | None = None) -> dict[str, Any]:
    """The leaves by name."""
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]
    names = unique(path_name(path) for path, _ in leaves)
    return {name: leaf for name, (_, leaf) in zip(names, leaves, strict=True)}


def filled(tree: Any, values: Mapping[str, Any], is_leaf: IsLeaf | None = None) -> Any:
    """The tree with `values` in the places of its leaves, which stay where there is none."""
    new = [values.get(name, leaf) for name, leaf in named(tree, is_leaf).items()]
    spec = jax.tree_util.tree_structure(tree, is_leaf=is_leaf)
    return jax.tree_util.tree_unflatten(spec, new)
