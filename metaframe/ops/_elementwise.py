"""Functions of one element, and of two with broadcasting."""

from __future__ import annotations

from metaframe.backend import Array
from metaframe.ops._dispatch import native, native_or_number


def exp(x: Array) -> Array:
    """The exponential function.

    >>> ops.to_numpy(ops.exp(ops.asarray([0.0]))).tolist()
    [1.0]
    """
    backend, (x,) = native(x)
    return backend.ops.exp(x)


def expm1(x: Array) -> Array:
    """`exp(x) - 1`, accurate near zero.

    >>> ops.to_numpy(ops.expm1(ops.asarray([0.0]))).tolist()
    [0.0]
    """
    backend, (x,) = native(x)
    return backend.ops.expm1(x)


def log(x: Array) -> Array:
    """The natural logarithm.

    >>> ops.to_numpy(ops.log(ops.asarray([1.0]))).tolist()
    [0.0]
    """
    backend, (x,) = native(x)
    return backend.ops.log(x)


def log1p(x: Array) -> Array:
    """`log(1 + x)`, accurate near zero.

    >>> ops.to_numpy(ops.log1p(ops.asarray([0.0]))).tolist()
    [0.0]
    """
    backend, (x,) = native(x)
    return backend.ops.log1p(x)


def sqrt(x: Array) -> Array:
    """The square root; its gradient at zero is infinite (see `safe_sqrt`).

    >>> ops.to_numpy(ops.sqrt(ops.asarray([4.0]))).tolist()
    [2.0]
    """
    backend, (x,) = native(x)
    return backend.ops.sqrt(x)


def safe_sqrt(x: Array) -> Array:
    """The square root with gradient zero at zero, in every order of differentiation.

    For roots of sums of squares, as in Adam: there the plain root gives a gradient of NaN.

    >>> ops.to_numpy(ops.safe_sqrt(ops.asarray([0.0, 4.0]))).tolist()
    [0.0, 2.0]
    """
    backend, (x,) = native(x)
    where, zero = backend.ops.where, x == 0.0
    # Twice: the inner one keeps the infinite derivative out of the product with 0 that the
    # gradient of the outer one is.
    return where(zero, 0.0, backend.ops.sqrt(where(zero, 1.0, x)))


def square(x: Array) -> Array:
    """`x * x`.

    >>> ops.to_numpy(ops.square(ops.asarray([3.0]))).tolist()
    [9.0]
    """
    backend, (x,) = native(x)
    return backend.ops.square(x)


def abs(x: Array) -> Array:
    """The absolute value; its gradient at zero is zero.

    >>> ops.to_numpy(ops.abs(ops.asarray([-2.0, 3.0]))).tolist()
    [2.0, 3.0]
    """
    backend, (x,) = native(x)
    return backend.ops.abs(x)


def sign(x: Array) -> Array:
    """-1, 0 or 1.

    >>> ops.to_numpy(ops.sign(ops.asarray([-2.0, 0.0, 3.0]))).tolist()
    [-1.0, 0.0, 1.0]
    """
    backend, (x,) = native(x)
    return backend.ops.sign(x)


def sin(x: Array) -> Array:
    """The sine.

    >>> ops.to_numpy(ops.sin(ops.asarray([0.0]))).tolist()
    [0.0]
    """
    backend, (x,) = native(x)
    return backend.ops.sin(x)


def cos(x: Array) -> Array:
    """The cosine.

    >>> ops.to_numpy(ops.cos(ops.asarray([0.0]))).tolist()
    [1.0]
    """
    backend, (x,) = native(x)
    return backend.ops.cos(x)


def tanh(x: Array) -> Array:
    """The hyperbolic tangent.

    >>> ops.to_numpy(ops.tanh(ops.asarray([0.0]))).tolist()
    [0.0]
    """
    backend, (x,) = native(x)
    return backend.ops.tanh(x)


def sigmoid(x: Array) -> Array:
    """`1 / (1 + exp(-x))`.

    >>> ops.to_numpy(ops.sigmoid(ops.asarray([0.0]))).tolist()
    [0.5]
    """
    backend, (x,) = native(x)
    return backend.ops.sigmoid(x)


def maximum(x: Array | float, y: Array | float) -> Array:
    """The larger of two arrays, or of an array and a number, with broadcasting.

    Raises:
        InputTypeError: a float next to an array of integers.

    >>> ops.to_numpy(ops.maximum(ops.asarray([-2.0, 3.0]), 0.0)).tolist()
    [0.0, 3.0]
    """
    if isinstance(x, int | float):
        x, y = y, x
    backend, (x, y) = native_or_number(x, y)
    return backend.ops.maximum(x, y)


def minimum(x: Array | float, y: Array | float) -> Array:
    """The smaller of two arrays, or of an array and a number, with broadcasting.

    Raises:
        InputTypeError: a float next to an array of integers.

    >>> ops.to_numpy(ops.minimum(ops.asarray([-2.0, 3.0]), 0.0)).tolist()
    [-2.0, 0.0]
    """
    if isinstance(x, int | float):
        x, y = y, x
    backend, (x, y) = native_or_number(x, y)
    return backend.ops.minimum(x, y)


def clip(x: Array, low: Array | float, high: Array | float) -> Array:
    """`x` limited to `[low, high]`.

    >>> ops.to_numpy(ops.clip(ops.asarray([-2.0, 0.5, 3.0]), 0.0, 1.0)).tolist()
    [0.0, 0.5, 1.0]
    """
    return minimum(maximum(x, low), high)


def where(condition: Array, x: Array | float, y: Array | float) -> Array:
    """`x` where the condition holds and `y` elsewhere, with broadcasting.

    The branch not taken is differentiated too: an infinite derivative there gives NaN, so make
    its input harmless first, as `safe_sqrt` does.

    Raises:
        InputTypeError: a float next to an array of integers.

    >>> x = ops.asarray([-2.0, 3.0])
    >>> ops.to_numpy(ops.where(x > 0, x, 0.0)).tolist()
    [0.0, 3.0]
    """
    backend, (x, y) = native_or_number(x, y)
    _, (condition,) = native(condition)
    return backend.ops.where(condition, x, y)
