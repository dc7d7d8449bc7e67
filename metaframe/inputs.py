"""Variables and data of a call, as arrays of one framework."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from metaframe import tree
from metaframe.backend import (
    Array,
    Backend,
    backend_of,
    convert_neutral,
    current_selection,
    following,
)


def arrays_of(
    v: tree.Tree, batch: tree.Tree, *, keep_numbers: bool = False
) -> tuple[tree.Tree, tree.Tree, Backend]:
    """Both structures with every leaf an array of one backend, and that backend.

    With `keep_numbers` the Python numbers in `batch` stay what they are.
    """
    v_leaves, v_spec = tree.flatten(v)
    batch_leaves, batch_spec = tree.flatten(batch)
    with following(tree.node_types(v_spec, batch_spec)):
        backend = backend_of(*v_leaves, *batch_leaves)
        v_arrays = convert_neutral(v_leaves, backend)
        batch_arrays = tuple(
            x if keep_numbers and not isinstance(x, np.generic | np.ndarray) else _array(x, backend)
            for x in batch_leaves
        )
    return tree.unflatten(v_spec, v_arrays), tree.unflatten(batch_spec, batch_arrays), backend


def converted(params: Mapping[str, Array]) -> dict[str, Array]:
    """`params` with NumPy arrays as arrays of the selected backend, if one is selected."""
    selection = current_selection()
    if selection is None or not any(isinstance(x, np.ndarray) for x in params.values()):
        return dict(params)
    arrays = convert_neutral(tuple(params.values()), backend_of(*params.values()))
    return dict(zip(params, arrays, strict=True))


def _array(x: object, backend: Backend) -> Array:
    (array,) = convert_neutral((x,), backend)
    return array
