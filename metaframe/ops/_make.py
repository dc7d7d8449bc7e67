"""Making arrays, changing their dtype, and leaving the framework."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from metaframe.backend.registry import owner
from metaframe.backend.selection import backend_of, convert_neutral, current_selection
from metaframe.backend.types import Array
from metaframe.errors import InputTypeError
from metaframe.ops._dispatch import native


def asarray(x: Any, dtype: str | None = None) -> Array:
    """`x` as an array of the selected backend, or of its own framework if it has one.

    Args:
        x: an array, a number, or nested lists of numbers.
        dtype: a NumPy dtype name. By default arrays of a framework and integers keep theirs, and
            neutral floating inputs get the one that was selected with the backend.

    Returns:
        An array of the shape of `x`, on the selected device; an array of a framework stays where
        it is.

    Raises:
        BackendError: `x` belongs to no framework, and no backend is selected.
        InputTypeError: nested lists of different lengths, or contents that are not numbers.

    >>> ops.asarray([[1, 2], [3, 4]]).shape == (2, 2)
    True
    """
    if owner(x) is not None:
        return x if dtype is None else astype(x, dtype)
    backend, value = backend_of(), np.asarray(x)
    if value.dtype == object:
        raise InputTypeError(
            "asarray needs numbers or nested lists of numbers of equal length, received "
            f"{type(x).__name__} with other contents. Put arrays together with ops.stack."
        )
    if dtype is None:
        return convert_neutral((value,), backend)[0]
    # Straight to `dtype`: by way of the selected one, digits of a wider dtype would be lost.
    selection = current_selection()
    return backend.asarray(value, dtype, None if selection is None else selection.device)


def to_numpy(x: Array) -> np.ndarray[Any, Any]:
    """`x` as a NumPy array, detached and on the host.

    Args:
        x: an array of any framework, a NumPy array or a number. It cannot be traced: inside of a
            compiled function it has no value yet.

    Returns:
        A NumPy array of the same shape and dtype. It may share its memory with `x`.

    >>> ops.to_numpy(ops.asarray([1.0, 2.0])).tolist()
    [1.0, 2.0]
    """
    return np.asarray(x) if (backend := owner(x)) is None else backend.to_numpy(x)


def stop_gradient(x: Array) -> Array:
    """`x` as a constant: the same values, and no gradient through them.

    Args:
        x: an array of any shape and dtype.

    Returns:
        An array of the same shape and dtype.

    >>> ops.to_numpy(ops.stop_gradient(ops.asarray([1.0]))).tolist()
    [1.0]
    """
    backend, (x,) = native(x)
    return backend.stop_gradient(x)


def zeros(shape: Sequence[int], dtype: str | None = None, like: Array | None = None) -> Array:
    """An array of zeros.

    Args:
        shape: the sizes of its axes; `()` for a single number.
        dtype: a NumPy dtype name. Default: that of `like`, or the selected one.
        like: an array whose backend and device to use. Default: the selected ones.

    Returns:
        An array of that shape and dtype.

    Raises:
        BackendError: `like` is None, and no backend is selected.

    >>> ops.to_numpy(ops.zeros((1, 2))).tolist()
    [[0.0, 0.0]]
    """
    if like is None:
        return asarray(np.zeros(tuple(shape)), dtype)
    backend, (like,) = native(like)
    return backend.ops.zeros(shape, dtype or backend.dtype_name(like), like)


def zeros_like(x: Array) -> Array:
    """Zeros with the shape, dtype and device of `x`.

    Args:
        x: an array of any shape and dtype.

    Returns:
        An array like `x`.

    >>> ops.to_numpy(ops.zeros_like(ops.asarray([3.0, 4.0]))).tolist()
    [0.0, 0.0]
    """
    backend, (x,) = native(x)
    return backend.ops.zeros_like(x)


def ones_like(x: Array) -> Array:
    """Ones with the shape, dtype and device of `x`.

    Args:
        x: an array of any shape and dtype.

    Returns:
        An array like `x`.

    >>> ops.to_numpy(ops.ones_like(ops.asarray([3.0, 4.0]))).tolist()
    [1.0, 1.0]
    """
    backend, (x,) = native(x)
    return backend.ops.ones_like(x)


def arange(stop: int, dtype: str = "int32", like: Array | None = None) -> Array:
    """The numbers `0, 1, ..., stop - 1`.

    Args:
        stop: how many numbers, a Python integer.
        dtype: a NumPy dtype name.
        like: an array whose backend and device to use. Default: the selected ones.

    Returns:
        An array of shape (stop,).

    Raises:
        BackendError: `like` is None, and no backend is selected.

    >>> ops.to_numpy(ops.arange(3)).tolist()
    [0, 1, 2]
    """
    if like is None:
        return asarray(np.arange(stop), dtype)
    backend, (like,) = native(like)
    return backend.ops.arange(stop, dtype, like)


def one_hot(labels: Array, classes: int, dtype: str = "float32") -> Array:
    """Rows of zeros with a one at the label.

    Args:
        labels: (...) integers. One outside of `[0, classes)` gives a row of zeros.
        classes: the length of a row, a Python integer.
        dtype: a NumPy dtype name, which may be "bool".

    Returns:
        An array of shape (..., classes).

    >>> ops.to_numpy(ops.one_hot(ops.asarray([2, 0]), 3)).tolist()
    [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    """
    backend, (labels,) = native(labels)
    return backend.ops.one_hot(labels, classes, dtype)


def astype(x: Array, dtype: str) -> Array:
    """`x` converted to another dtype; differentiable between floating dtypes.

    Args:
        x: an array of any shape.
        dtype: a NumPy dtype name, such as "float64", "int32" or "bool".

    Returns:
        An array of the same shape and of that dtype.

    >>> ops.to_numpy(ops.astype(ops.asarray([1.0, 0.0]), "bool")).tolist()
    [True, False]
    """
    backend, (x,) = native(x)
    return backend.ops.astype(x, dtype)
