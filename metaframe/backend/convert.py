"""Arrays of one framework as arrays of another, bit for bit.

DLPack hands over the memory itself where both frameworks can take it as it is; what they cannot,
such as a strided view, goes through NumPy. Either way every bit arrives: NaN payloads, -0.0,
bfloat16. Nothing is rounded: a float that the target cannot hold is an error.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from metaframe import tree
from metaframe.backend.contract import Backend
from metaframe.backend.neutral import numbers
from metaframe.backend.registry import load_backend, owner
from metaframe.backend.types import Array
from metaframe.errors import InputError, InputTypeError, MetaframeError

_CONSTANTS = (bool, int, float, complex, str, bytes, np.generic)


def convert(tree_: tree.Tree, to: str, device: str | None = None) -> tree.Tree:
    """`tree_` with every array as an array of the framework `to`.

    For variables, the state of an optimizer of `metaframe.optim`, and batches. Arrays are
    constants afterwards: no gradient reaches back through a conversion.

    Args:
        tree_: any structure of arrays of any framework, and of NumPy arrays. Numbers and strings
            stay what they are.
        to: the name of the target backend.
        device: where the arrays are placed; default: where they are, if the target has memory in
            common with their framework there, otherwise the target's default.

    Returns:
        The same structure. An array may share its memory with the one it came from: before you
        write into either in place, as torch's optimizers do, take a copy of it.

    Raises:
        UnknownKeyError, BackendNotInstalledError: see `metaframe.set_backend`.
        BackendError: an unknown device, or float64 for JAX with 64-bit types switched off.
        InputError: integers that the target has no type for (JAX without 64-bit types makes them
            int32 where their values allow it), or an array inside a transform, which has no
            values yet.
        InputTypeError: a leaf that is no array, such as a whole model, or an array of something
            that the target has no arrays of: text, dates, objects, JAX's keys, sparse or quantized
            tensors, more than 64 bits.

    >>> import torch
    >>> from metaframe import convert
    >>> v = convert({"w": torch.tensor([1.5, -0.0])}, to="jax")
    >>> v, convert(v, to="torch")
    ({'w': Array([ 1.5, -0. ], dtype=float32)}, {'w': tensor([1.5000, -0.0000])})
    """
    target = load_backend(to)
    leaves, spec = tree.flatten(tree_)
    converted = []
    for i, leaf in enumerate(leaves):
        source = owner(leaf)
        if source is None and isinstance(leaf, _CONSTANTS):
            converted.append(leaf)
            continue
        name = tree.key_chains(tree_)[i] or "the input"
        if source is None and not isinstance(leaf, np.ndarray):
            raise InputTypeError(_no_array(leaf, name))
        if source is not None and source.is_traced(leaf):
            raise InputError(
                f"{name!r} is inside a transform or a compiled function and has no values to "
                "convert yet. Convert before or after it."
            )
        converted.append(_converted(leaf, name, source, target, device))
    return tree.unflatten(spec, converted)


def _no_array(leaf: object, name: str) -> str:
    return (
        f"{name!r} is a {type(leaf).__module__}.{type(leaf).__qualname__}, which is neither an "
        "array nor a number. Convert the variables of a model: metaframe.named_params(model)."
    )


def _converted(
    x: Array, name: str, source: Backend | None, target: Backend, device: str | None
) -> Array:
    if source is target:
        return target.asarray(target.stop_gradient(x), device=device)
    dtype = x.dtype.name if source is None else source.dtype_name(x)
    try:
        if source is None:
            return _from_numpy(numbers(x, repr(name)), name, dtype, target, device)
        shared = target.from_dlpack(source.to_dlpack(x))
        if shared is not None and target.dtype_name(shared) == dtype:
            return shared if device is None else target.asarray(shared, device=device)
        return _from_numpy(source.to_numpy(x), name, dtype, target, device)
    except MetaframeError:
        raise
    except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
        of = "NumPy" if source is None else source.name
        raise InputTypeError(
            f"{name!r} is an array of {of} with the dtype {dtype}, which cannot become an array of "
            f"{target.name} as it is. Convert it to dense numbers of at most 64 bits, or leave it "
            "out."
        ) from error


def _from_numpy(
    values: np.ndarray[Any, Any], name: str, dtype: str, target: Backend, device: str | None
) -> Array:
    # A floating dtype is asked for by name, so that a target without it says so. An integer is
    # not: a narrower type will do if it holds the values.
    integral = values.dtype.kind in "iub"
    result = target.asarray(values, None if integral else dtype, device)
    if target.dtype_name(result) != dtype and not np.array_equal(target.to_numpy(result), values):
        raise InputError(
            f"{name!r} is {dtype} and has values that {target.name}'s "
            f"{target.dtype_name(result)} cannot hold. Convert it to a type {target.name} has."
        )
    return result
