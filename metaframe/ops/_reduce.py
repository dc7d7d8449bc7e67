"""Reductions over one axis, several, or all (`axis=None`)."""

from __future__ import annotations

import math

from metaframe.backend.contract import Backend
from metaframe.backend.tables import Axis
from metaframe.backend.types import Array
from metaframe.ops._dispatch import native, need_floating
from metaframe.ops._elementwise import safe_sqrt


def sum(x: Array, axis: Axis = None, keepdims: bool = False) -> Array:
    """The sum along axes; of booleans, how many are true.

    Args:
        x: an array of any shape.
        axis: the axis or the axes to sum along, negative ones from the end. Default: all of them.
        keepdims: whether the summed axes stay, with size 1. Default: they are removed.

    Returns:
        An array of the dtype of `x`; for integers and booleans, of the framework's own integer
        dtype.

    >>> ops.to_numpy(ops.sum(ops.asarray([[1.0, 2.0], [3.0, 4.0]]), axis=1)).tolist()
    [3.0, 7.0]
    """
    backend, (x,) = native(x)
    if backend.dtype_name(x) == "bool":
        x = backend.ops.astype(x, "int32")
    return backend.ops.sum(x, axis, keepdims)


def mean(x: Array, axis: Axis = None, keepdims: bool = False) -> Array:
    """The mean along axes.

    Args:
        x: a floating array of any shape.
        axis: the axis or the axes to average along, negative ones from the end. Default: all of
            them.
        keepdims: whether the averaged axes stay, with size 1. Default: they are removed.

    Returns:
        An array of the dtype of `x`.

    Raises:
        InputTypeError: `x` is not floating.

    >>> ops.to_numpy(ops.mean(ops.asarray([[1.0, 2.0], [3.0, 4.0]]), axis=0)).tolist()
    [2.0, 3.0]
    """
    backend, (x,) = native(x)
    need_floating("mean", backend, x)
    return backend.ops.mean(x, axis, keepdims)


def var(x: Array, axis: Axis = None, keepdims: bool = False) -> Array:
    """The variance: the mean squared distance from the mean, divided by n and not by n - 1.

    Args:
        x: a floating array of any shape.
        axis: the axis or the axes to average along, negative ones from the end. Default: all of
            them.
        keepdims: whether the averaged axes stay, with size 1. Default: they are removed.

    Returns:
        An array of the dtype of `x`.

    Raises:
        InputTypeError: `x` is not floating.

    >>> ops.to_numpy(ops.var(ops.asarray([[1.0, 3.0], [2.0, 8.0]]), axis=1)).tolist()
    [1.0, 9.0]
    """
    backend, (x,) = native(x)
    need_floating("var", backend, x)
    table = backend.ops
    return table.mean(table.square(x - table.mean(x, axis, keepdims=True)), axis, keepdims)


def std(x: Array, axis: Axis = None, keepdims: bool = False) -> Array:
    """The standard deviation, the root of `var`; its gradient is zero where all are equal.

    Args:
        x: a floating array of any shape.
        axis: the axis or the axes to average along, negative ones from the end. Default: all of
            them.
        keepdims: whether the averaged axes stay, with size 1. Default: they are removed.

    Returns:
        An array of the dtype of `x`.

    Raises:
        InputTypeError: `x` is not floating.

    >>> ops.to_numpy(ops.std(ops.asarray([[1.0, 3.0], [2.0, 8.0]]), axis=1)).tolist()
    [1.0, 3.0]
    """
    backend, (x,) = native(x)
    need_floating("std", backend, x)
    # As distance from one of them equal elements are zeros, and their mean is exact.
    anchor = backend.stop_gradient(backend.ops.min(x, axis, keepdims=True))
    return safe_sqrt(var(x - anchor, axis, keepdims))


def norm(x: Array, axis: Axis = None, keepdims: bool = False) -> Array:
    """The Euclidean norm, `sqrt(sum(x * x))`; its gradient at zero is zero.

    Args:
        x: a floating array of any shape.
        axis: the axis or the axes to sum along, negative ones from the end. Default: all of them.
        keepdims: whether the summed axes stay, with size 1. Default: they are removed.

    Returns:
        An array of the dtype of `x`.

    Raises:
        InputTypeError: `x` is not floating.

    >>> ops.to_numpy(ops.norm(ops.asarray([[3.0, 4.0], [0.0, 0.0]]), axis=1)).tolist()
    [5.0, 0.0]
    """
    backend, (x,) = native(x)
    need_floating("norm", backend, x)
    return safe_sqrt(backend.ops.sum(backend.ops.square(x), axis, keepdims))


def max(x: Array, axis: Axis = None, keepdims: bool = False) -> Array:
    """The largest element along axes; equal ones share the gradient evenly.

    Args:
        x: an array of any shape.
        axis: the axis or the axes to reduce, negative ones from the end. Default: all of them.
        keepdims: whether the reduced axes stay, with size 1. Default: they are removed.

    Returns:
        An array of the dtype of `x`.

    >>> ops.to_numpy(ops.max(ops.asarray([[1.0, 2.0], [4.0, 3.0]]), axis=1)).tolist()
    [2.0, 4.0]
    """
    backend, (x,) = native(x)
    if not backend.is_floating(x):
        return backend.ops.max(x, axis, keepdims)
    return _largest(backend, x, axis, keepdims)


def min(x: Array, axis: Axis = None, keepdims: bool = False) -> Array:
    """The smallest element along axes; equal ones share the gradient evenly.

    Args:
        x: an array of any shape.
        axis: the axis or the axes to reduce, negative ones from the end. Default: all of them.
        keepdims: whether the reduced axes stay, with size 1. Default: they are removed.

    Returns:
        An array of the dtype of `x`.

    >>> ops.to_numpy(ops.min(ops.asarray([[1.0, 2.0], [4.0, 3.0]]), axis=1)).tolist()
    [1.0, 3.0]
    """
    backend, (x,) = native(x)
    if not backend.is_floating(x):
        return backend.ops.min(x, axis, keepdims)
    return -_largest(backend, -x, axis, keepdims)


def _largest(backend: Backend, x: Array, axis: Axis, keepdims: bool) -> Array:
    """The maximum, with a gradient that does not hang on recomputing it to the same bit.

    The frameworks give the gradient to the elements equal to the maximum. Where a compiler fuses
    operations, an element may be computed again for that comparison and differ in the last bit,
    and then nothing gets it. Here the position of the maximum, an integer, always does.
    """
    table, rank = backend.ops, len(x.shape)
    axes = range(rank) if axis is None else [axis] if isinstance(axis, int) else axis
    reduced = sorted(a % rank for a in axes)
    kept = [a for a in range(rank) if a not in reduced]
    if not reduced:
        return x
    last = table.transpose(x, kept + reduced)
    sizes = [x.shape[a] for a in kept]
    rows = table.reshape(last, [*sizes, math.prod(x.shape[a] for a in reduced)])
    best = backend.stop_gradient(table.max(rows, -1, keepdims=True))
    first = table.one_hot(table.argmax(rows, -1), rows.shape[-1], "bool")
    hit = first | (rows == best)
    # Their mean, as distance from `best` to be exact; infinity minus itself would be NaN.
    anchor = table.where(best - best == 0.0, best, 0.0)
    distance = table.sum(table.where(hit, rows - anchor, 0.0), -1)
    count = table.sum(table.astype(hit, backend.dtype_name(x)), -1)
    result = table.squeeze(best, -1) + distance / count
    return table.reshape(
        result, [1 if a in reduced else x.shape[a] for a in range(rank)] if keepdims else sizes
    )


def argmax(x: Array, axis: int = -1) -> Array:
    """The index of the largest element along an axis.

    At a tie it is the first of them, and with a NaN the first NaN.

    Args:
        x: an array of any shape with at least one axis.
        axis: the axis to search, from the end if negative. Default: the last one.

    Returns:
        Integers, without that axis, of the framework's own integer dtype.

    >>> ops.to_numpy(ops.argmax(ops.asarray([[1.0, 2.0], [4.0, 4.0]]))).tolist()
    [1, 0]
    """
    backend, (x,) = native(x)
    return backend.ops.argmax(x, axis)


def logsumexp(x: Array, axis: Axis = None, keepdims: bool = False) -> Array:
    """`log(sum(exp(x)))` along axes, without overflow.

    Args:
        x: a floating array of any shape.
        axis: the axis or the axes to sum along, negative ones from the end. Default: all of them.
        keepdims: whether the summed axes stay, with size 1. Default: they are removed.

    Returns:
        An array of the dtype of `x`.

    >>> ops.to_numpy(ops.logsumexp(ops.asarray([[0.0], [1000.0]]), axis=1)).tolist()
    [0.0, 1000.0]
    """
    backend, (x,) = native(x)
    return backend.ops.logsumexp(x, axis, keepdims)
