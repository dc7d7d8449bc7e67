"""Classes that JAX takes apart, such as an Equinox module, a `FrozenDict` or an `nnx.State`."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import jax

from metaframe.tree.foreign import Node
from metaframe_jax._names import path_name


def node_of(x: object) -> Node | None:
    """`x` taken apart by JAX; None for a leaf.

    A module of `flax.nnx` is taken for a leaf. To JAX it is a tree, in which a Variable that is
    reached on two ways would become two.
    """
    graph_node = getattr(sys.modules.get("flax.nnx"), "Pytree", ())
    if isinstance(x, graph_node) or jax.tree_util.all_leaves([x]):
        return None
    return Node(_one_level, _put_together)


def _one_level(node: Any) -> tuple[list[Any], Any, tuple[str, ...]]:
    below, spec = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)
    return [child for _, child in below], spec, tuple(path_name(path) for path, _ in below)


def _put_together(spec: Any, children: Iterable[Any]) -> Any:
    return jax.tree_util.tree_unflatten(spec, children)
