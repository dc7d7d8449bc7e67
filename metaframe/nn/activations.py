"""Activations with the same derivatives on every backend."""

from __future__ import annotations

from metaframe.backend.types import Array
from metaframe.ops._dispatch import native


def relu(x: Array) -> Array:
    """`max(x, 0)`, with gradient zero at zero.

    Args:
        x: an array of any shape.

    Returns:
        An array of the same shape and dtype.

    >>> ops.to_numpy(nn.relu(ops.asarray([-1.0, 2.0]))).tolist()
    [0.0, 2.0]
    """
    backend, (x,) = native(x)
    return backend.nn.relu(x)


def gelu(x: Array) -> Array:
    """`x` times the normal distribution function of `x`: the exact form, not the tanh one.

    Hendrycks and Gimpel, 2016, arXiv 1606.08415.

    Args:
        x: a floating array of any shape.

    Returns:
        An array of the same shape and dtype.

    >>> ops.to_numpy(nn.gelu(ops.asarray([-20.0, 0.0, 20.0]))).round(4).tolist()
    [-0.0, 0.0, 20.0]
    """
    backend, (x,) = native(x)
    return backend.nn.gelu(x)


def softmax(x: Array, axis: int = -1) -> Array:
    """`exp(x) / sum(exp(x))` along an axis, without overflow.

    Args:
        x: a floating array with at least one axis.
        axis: the axis whose elements sum to 1, from the end if negative. Default: the last one.

    Returns:
        An array of the same shape and dtype.

    >>> ops.to_numpy(nn.softmax(ops.asarray([1000.0, 1000.0]))).tolist()
    [0.5, 0.5]
    """
    backend, (x,) = native(x)
    return backend.nn.softmax(x, axis)


def log_softmax(x: Array, axis: int = -1) -> Array:
    """`x - log(sum(exp(x)))` along an axis, without overflow.

    Args:
        x: a floating array with at least one axis.
        axis: the axis to sum along, from the end if negative. Default: the last one.

    Returns:
        An array of the same shape and dtype.

    >>> ops.to_numpy(nn.log_softmax(ops.asarray([0.0, -1000.0]))).tolist()
    [0.0, -1000.0]
    """
    backend, (x,) = native(x)
    return backend.nn.log_softmax(x, axis)
