"""Checkpoints for loops of one's own: a structure of arrays and plain values, in one file.

The file is written and checked as a trainer's checkpoints are; see `metaframe.training.array_file`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from metaframe import tree
from metaframe.backend.registry import owner
from metaframe.errors import CheckpointError, InputError, InputTypeError
from metaframe.files.read import shown
from metaframe.files.schema import anything, integer, many, record, refused, text
from metaframe.files.write import write_atomically
from metaframe.training.array_file import decoded, encoded, read_file
from metaframe.tree.nodes import places

FORMAT = 1
KIND = "arrays"

_CONTENT = record(
    {
        "format": integer,
        "plain": anything,
        "leaves": many(record({"chain": text}, {"dtype": text})),
        "tree": anything,
    }
)

HostArray = np.ndarray[Any, Any]


def save_arrays(path: str | Path, tree_: tree.Tree, plain: Any = None) -> None:
    """Write a structure of arrays and plain values to `path`, atomically and with a checksum.

    Args:
        path: the file.
        tree_: any structure of arrays of any framework and of NumPy, such as variables and the
            state of an update rule. Numbers, strings and None in it are kept too.
        plain: values that JSON can hold, such as the number of steps taken.

    Raises:
        InputError: `plain` cannot be written as JSON, or an array has no value yet.
        InputTypeError: a leaf that is no array, number or string, or a key that is no string.
        OSError: the file cannot be written.

    >>> import tempfile
    >>> import torch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_arrays(f"{folder}/run.safetensors", {"w": torch.ones(2)}, {"step": 10})
    ...     load_arrays(f"{folder}/run.safetensors")
    ({'w': array([1., 1.], dtype=float32)}, {'step': 10})
    """
    leaves = tree.leaves(tree_)
    # Two leaves may have one chain, {"a/b": ...} beside {"a": {"b": ...}}: it is for messages.
    chains = [above[-1][0] for above in places(tree.structure(tree_))]
    arrays, described = {}, []
    for i, (chain, leaf) in enumerate(zip(chains, map(tree.unwrapped, leaves), strict=True)):
        if isinstance(leaf, bool | int | float | str):
            described.append({"chain": chain, "value": leaf})
            continue
        arrays[str(i)], dtype = _on_host(leaf, chain)
        described.append({"chain": chain, "dtype": dtype})
    try:
        json.dumps(plain)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"plain must be JSON values: {error}.") from error
    numbers = iter(range(len(leaves)))
    content = {
        "format": FORMAT,
        "kind": KIND,
        "plain": plain,
        "leaves": described,
        "tree": _outline(tree_, numbers),
    }
    write_atomically(Path(path), encoded(arrays, content))


def load_arrays(path: str | Path, like: tree.Tree = None) -> tuple[tree.Tree, Any]:
    """The structure and the plain values that `save_arrays` wrote to `path`.

    Args:
        path: the file.
        like: a structure of the same key chains, whose arrays have the same shapes and dtypes, of
            any framework. What is read takes its classes, framework and devices. Default: dicts,
            lists and tuples of NumPy arrays, in which any other class is a dict of its fields, and
            bfloat16 is float32.

    Returns:
        `(tree, plain)`.

    Raises:
        CheckpointError: no such file, a damaged one, or one of another structure than `like`.

    >>> import tempfile
    >>> import torch
    >>> from metaframe import optim
    >>> v, rule = {"w": torch.ones(2)}, optim.adam(1e-3)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_arrays(f"{folder}/run.safetensors", (v, rule.init(v)))
    ...     (v, state), _ = load_arrays(f"{folder}/run.safetensors", like=(v, rule.init(v)))
    >>> state.count
    tensor(0.)
    """
    name = str(path)
    content, arrays = decoded(read_file(path), name)
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise CheckpointError(
            f"{name} was not written by save_arrays. A trainer's checkpoint is read by "
            "metaframe.training.read_checkpoint."
        )
    if content.get("format") != FORMAT:
        raise CheckpointError(
            f"{name} has format {shown(content.get('format'))}, this version of metaframe reads "
            f"{FORMAT}."
        )
    try:
        _CONTENT(content, "its content")
        described = content["leaves"]
        leaves = [_leaf(str(i), entry, arrays) for i, entry in enumerate(described)]
        found = _built(content["tree"], places := dict(enumerate(leaves)))
        if places:
            raise ValueError(f"its structure has no place for leaf {min(places)}")
    except ValueError as error:
        raise CheckpointError(f"{name} is not as save_arrays writes it: {error}.") from error
    chains, dtypes = ([entry.get(key) for entry in described] for key in ("chain", "dtype"))
    plain = content["plain"]
    return (found if like is None else _as(like, chains, leaves, dtypes, name)), plain


def _leaf(number: str, entry: Any, arrays: Mapping[str, HostArray]) -> Any:
    """The leaf that `entry` describes, a plain value or the array of this number.

    Raises:
        ValueError: it is neither.
    """
    if "dtype" not in entry:
        if not isinstance(value := entry.get("value"), bool | int | float | str):
            raise refused(value, f"leaf {number}", "a number or a text")
        return value
    if number not in arrays:
        raise ValueError(f"it has no array of number {number}")
    stored = arrays[number].dtype.name
    if stored != ("float32" if entry["dtype"] == "bfloat16" else entry["dtype"]):
        raise refused(stored, f"the dtype of leaf {number}", f"that of {entry['dtype']}")
    return arrays[number]


def _on_host(leaf: Any, chain: str) -> tuple[HostArray, str]:
    """`leaf` in NumPy, and its dtype; bfloat16, which NumPy lacks, as float32, which holds it."""
    backend = owner(leaf)
    if backend is None:
        if not isinstance(leaf, np.ndarray | np.generic) or leaf.dtype.kind not in "biufc":
            raise InputTypeError(
                f"{_place(chain)} of the structure is {leaf!r:.60} ({type(leaf).__name__}). Save "
                "arrays, numbers and strings; whatever else belongs into plain."
            )
        return np.asarray(leaf), leaf.dtype.name
    if backend.is_traced(leaf):
        raise InputError(
            f"{_place(chain)} of the structure is an array inside a transform or a compiled "
            "function, which has no value yet. Return it and save it outside."
        )
    dtype = backend.dtype_name(leaf)
    wide = backend.ops.astype(leaf, "float32") if dtype == "bfloat16" else leaf
    return backend.to_numpy(wide), dtype


def _place(chain: str) -> str:
    return f"the leaf {chain!r}" if chain else "the leaf"


def _outline(node: tree.Tree, places: Any) -> Any:
    """The nesting, with the numbers of leaves in their places."""
    if node is None:
        return None
    if tree.is_leaf(node):
        return next(places)
    if isinstance(node, dict) and not all(isinstance(key, str) for key in node):
        raise InputTypeError(f"the keys of a structure to save are strings, received {[*node]}.")
    below = {name: _outline(child, places) for name, child in tree.children(node).items()}
    if type(node) in (list, tuple):
        return {type(node).__name__: list(below.values())}
    return {"dict": below}


def _built(outline: Any, places: dict[int, Any]) -> tree.Tree:
    """The nesting with the leaves in their places, out of which they are taken.

    Raises:
        ValueError: `_outline` makes no such nesting.
    """
    if outline is None:
        return None
    if type(outline) is int and outline in places:
        return places.pop(outline)
    if isinstance(outline, dict) and len(outline) == 1:
        ((kind, below),) = outline.items()
        if kind == "dict" and isinstance(below, dict):
            return {name: _built(child, places) for name, child in below.items()}
        if kind in ("list", "tuple") and isinstance(below, list):
            items = [_built(child, places) for child in below]
            return items if kind == "list" else tuple(items)
    expected = "a dict, list or tuple, or the number of a leaf without a place"
    raise refused(outline, "a part of its structure", expected)


def _as(
    like: tree.Tree,
    chains: Sequence[str],
    leaves: Sequence[Any],
    dtypes: Sequence[str | None],
    name: str,
) -> tree.Tree:
    expected = tree.key_chains(like)
    if tuple(chains) != expected:
        raise CheckpointError(
            f"{name} holds another structure than like: missing "
            f"{sorted(set(expected) - set(chains))}, unexpected "
            f"{sorted(set(chains) - set(expected))}."
        )
    parts, spec = tree.flatten(like)
    rows = zip(expected, leaves, dtypes, map(tree.unwrapped, parts), strict=True)
    return tree.unflatten(spec, [_leaf_as(*row, name) for row in rows])


def _leaf_as(chain: str, leaf: Any, dtype: str | None, like: Any, name: str) -> Any:
    backend = owner(like)
    if backend is not None:
        expected: Any = (backend.dtype_name(like), tuple(like.shape))
    elif isinstance(like, np.ndarray | np.generic):
        expected = (like.dtype.name, like.shape)
    else:
        expected = (None, ())
    found = (dtype, () if dtype is None else leaf.shape)
    if found != expected:
        described = [
            "a plain value" if d is None else f"{d} of shape {s}" for d, s in (found, expected)
        ]
        raise CheckpointError(
            f"{_place(chain)} is {described[0]} in {name}, and {described[1]} in like."
        )
    if dtype is None and _kind(leaf) is not _kind(like):
        raise CheckpointError(
            f"{_place(chain)} is {shown(leaf)} in {name}, and {shown(like)} in like."
        )
    return leaf if backend is None else backend.asarray(leaf, dtype, backend.device_of(like))


def _kind(value: Any) -> type:
    """Booleans, numbers and texts are no substitute for each other; numbers are."""
    return float if type(value) is int else type(value)
