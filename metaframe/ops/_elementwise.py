"""Functions of one element, and of two with broadcasting.

A function that is a method of every backend's table is one entry here: its formula in NumPy, from
which the conformance suite has its clause, its signature and its docstring.
"""

from __future__ import annotations

import math

import numpy as np

from metaframe.backend.contract import Backend
from metaframe.backend.types import Array
from metaframe.errors import InputError, InputTypeError
from metaframe.ops._dispatch import elementwise, native, native_or_number, need_floating


@elementwise(np.exp)
def exp(x: Array) -> Array:
    """The exponential function `exp(x)`.

    Args:
        x: a floating array of any shape.

    Returns:
        An array of the same shape and dtype.

    >>> ops.to_numpy(ops.exp(ops.asarray([0.0]))).tolist()
    [1.0]
    """


@elementwise(np.expm1)
def expm1(x: Array) -> Array:
    """`exp(x) - 1`, accurate near zero.

    Args:
        x: a floating array of any shape.

    Returns:
        An array of the same shape and dtype.

    >>> ops.to_numpy(ops.expm1(ops.asarray([0.0]))).tolist()
    [0.0]
    """


@elementwise(np.log)
def log(x: Array) -> Array:
    """The natural logarithm.

    Args:
        x: a floating array of any shape. Zero gives -infinity and a negative number NaN.

    Returns:
        An array of the same shape and dtype.

    >>> ops.to_numpy(ops.log(ops.asarray([1.0]))).tolist()
    [0.0]
    """


@elementwise(np.log1p)
def log1p(x: Array) -> Array:
    """`log(1 + x)`, accurate near zero.

    Args:
        x: a floating array of any shape.

    Returns:
        An array of the same shape and dtype.

    >>> ops.to_numpy(ops.log1p(ops.asarray([0.0]))).tolist()
    [0.0]
    """


@elementwise(np.sqrt)
def sqrt(x: Array) -> Array:
    """The square root; its gradient at zero is infinite (see `safe_sqrt`).

    Args:
        x: a floating array of any shape. A negative number gives NaN.

    Returns:
        An array of the same shape and dtype.

    >>> ops.to_numpy(ops.sqrt(ops.asarray([4.0]))).tolist()
    [2.0]
    """


def safe_sqrt(x: Array) -> Array:
    """The square root with gradient zero at zero, in every order of differentiation.

    For roots of sums of squares, as in Adam: there the plain root gives a gradient of NaN.

    Args:
        x: a floating array of any shape. A negative number gives NaN.

    Returns:
        An array of the same shape and dtype.

    >>> ops.to_numpy(ops.safe_sqrt(ops.asarray([0.0, 4.0]))).tolist()
    [0.0, 2.0]
    """
    backend, (x,) = native(x)
    where, zero = backend.ops.where, x == 0.0
    # Twice: the inner one keeps the infinite derivative out of the product with 0 that the
    # gradient of the outer one is.
    return where(zero, 0.0, backend.ops.sqrt(where(zero, 1.0, x)))


@elementwise(np.square)
def square(x: Array) -> Array:
    """The square `x * x`.

    Args:
        x: an array of any shape.

    Returns:
        An array of the same shape and dtype.

    >>> ops.to_numpy(ops.square(ops.asarray([3.0]))).tolist()
    [9.0]
    """


def power(x: Array, exponent: float) -> Array:
    """`x` to the power of a number.

    Unlike the operator `**`, whose derivatives at zero differ between frameworks, it has all
    derivatives of `1`, `x`, `x * x` and so on, wherever `x` is.

    Args:
        x: an array of any shape: floating, or integers with an exponent of 0, 1, 2, ...
        exponent: a finite number. With one that is not whole, a negative `x` gives NaN. For a
            learned exponent write `ops.exp(exponent * ops.log(x))`, with positive `x`.

    Returns:
        An array of the same shape and dtype.

    Raises:
        InputTypeError: the exponent is not a number, or integers would have a fraction as result.
        InputError: the exponent is infinite or NaN.

    >>> ops.to_numpy(ops.power(ops.asarray([0.0, 3.0]), 2)).tolist()
    [0.0, 9.0]
    """
    if isinstance(exponent, bool) or not isinstance(exponent, int | float):
        raise InputTypeError(
            f"power needs a Python number as the exponent, received {type(exponent).__name__}. For "
            "an array: ops.exp(exponent * ops.log(x))."
        )
    if not math.isfinite(exponent):
        raise InputError(f"power needs a finite exponent, received {exponent}.")
    backend, (x,) = native(x)
    whole = float(exponent).is_integer()
    if whole and 0 <= exponent <= _LARGEST_PRODUCT:
        return _product(backend, x, int(exponent))
    if not whole or exponent < 0:
        need_floating("power with a negative or fractional exponent", backend, x)
    # Where -0.0 has a root, the frameworks give it different derivatives; 0.0 has one.
    return x ** int(exponent) if whole else (x + 0.0) ** exponent


_LARGEST_PRODUCT = 16
"""The exponent up to which `power` multiplies. By the rule for `**` the derivative of order n + 1
of `x**n` is 0 times infinity at zero, in some frameworks."""


def _product(backend: Backend, x: Array, count: int) -> Array:
    """`count` factors `x`, by squaring."""
    if count < 2:
        return x if count else backend.ops.ones_like(x)
    root = backend.ops.square(_product(backend, x, count // 2))
    return root * x if count % 2 else root


@elementwise(np.abs)
def abs(x: Array) -> Array:
    """The absolute value; its gradient at zero is zero.

    Args:
        x: an array of any shape.

    Returns:
        An array of the same shape and dtype.

    >>> ops.to_numpy(ops.abs(ops.asarray([-2.0, 3.0]))).tolist()
    [2.0, 3.0]
    """


@elementwise(np.sign)
def sign(x: Array) -> Array:
    """The sign: -1, 0 or 1, with gradient zero.

    Args:
        x: an array of any shape.

    Returns:
        An array of the same shape and dtype.

    >>> ops.to_numpy(ops.sign(ops.asarray([-2.0, 0.0, 3.0]))).tolist()
    [-1.0, 0.0, 1.0]
    """


@elementwise(np.sin)
def sin(x: Array) -> Array:
    """The sine.

    Args:
        x: a floating array of any shape, in radians.

    Returns:
        An array of the same shape and dtype.

    >>> ops.to_numpy(ops.sin(ops.asarray([0.0]))).tolist()
    [0.0]
    """


@elementwise(np.cos)
def cos(x: Array) -> Array:
    """The cosine.

    Args:
        x: a floating array of any shape, in radians.

    Returns:
        An array of the same shape and dtype.

    >>> ops.to_numpy(ops.cos(ops.asarray([0.0]))).tolist()
    [1.0]
    """


@elementwise(np.tanh)
def tanh(x: Array) -> Array:
    """The hyperbolic tangent.

    Args:
        x: a floating array of any shape.

    Returns:
        An array of the same shape and dtype.

    >>> ops.to_numpy(ops.tanh(ops.asarray([0.0]))).tolist()
    [0.0]
    """


@elementwise(lambda x: 1 / (1 + np.exp(-x)))
def sigmoid(x: Array) -> Array:
    """The logistic function `1 / (1 + exp(-x))`.

    Args:
        x: a floating array of any shape.

    Returns:
        An array of the same shape and dtype.

    >>> ops.to_numpy(ops.sigmoid(ops.asarray([0.0]))).tolist()
    [0.5]
    """


def softplus(x: Array) -> Array:
    """`log(1 + exp(x))`, without overflow and with exact derivatives of every order.

    Args:
        x: a floating array of any shape.

    Returns:
        An array of the same shape and dtype.

    Raises:
        InputTypeError: `x` is not floating.

    >>> found = ops.to_numpy(ops.softplus(ops.asarray([-1000.0, 0.0, 1000.0])))
    >>> [round(x, 4) for x in found.tolist()]
    [0.0, 0.6931, 1000.0]
    """
    backend, (x,) = native(x)
    need_floating("softplus", backend, x)
    positive = x > 0
    return backend.ops.where(positive, x, 0.0) + log1p_exp_of_minus_abs(backend, x, positive)


def log1p_exp_of_minus_abs(backend: Backend, x: Array, positive: Array) -> Array:
    """`log(1 + exp(-|x|))`, where `positive` says which sign of `x` is the absolute value.

    Chosen by `where`, each side keeps its own derivatives at zero; those of `abs` would lose the
    second one there. What is added for a side has to be chosen alike.
    """
    table = backend.ops
    return table.log1p(table.exp(table.where(positive, -x, x)))


def maximum(x: Array | float, y: Array | float) -> Array:
    """The larger of two arrays or numbers, broadcast; at a tie each gets half of the gradient.

    Args:
        x: an array of any shape, or a number.
        y: an array or a number whose shape broadcasts with that of `x`.

    Returns:
        An array of the broadcast shape. A number takes the dtype of the array next to it.

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
    """The smaller of two arrays or numbers, broadcast; at a tie each gets half of the gradient.

    Args:
        x: an array of any shape, or a number.
        y: an array or a number whose shape broadcasts with that of `x`.

    Returns:
        An array of the broadcast shape. A number takes the dtype of the array next to it.

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
    """`x` limited to `[low, high]`, or `high` where `low` is above it.

    At a bound `x` and the bound get half of the gradient each. Where the bounds are equal, nothing
    depends on `x`: its gradient is zero, and the bounds get half each.

    Args:
        x: an array of any shape.
        low: the lower bound, a number or an array that broadcasts with `x`.
        high: the upper bound, a number or an array that broadcasts with `x`.

    Returns:
        An array of the broadcast shape, with the dtype of `x`.

    Raises:
        InputTypeError: a float next to an array of integers.

    >>> ops.to_numpy(ops.clip(ops.asarray([-2.0, 0.5, 3.0]), 0.0, 1.0)).tolist()
    [0.0, 0.5, 1.0]
    """
    backend, (x, low, high) = native_or_number(x, low, high)
    equal = low == high
    if equal is not False:
        known = x == x  # a NaN stays one
        x = backend.ops.where(known if equal is True else known & equal, low, x)
    return minimum(maximum(x, low), high)


def where(condition: Array, x: Array | float, y: Array | float) -> Array:
    """`x` where the condition holds and `y` elsewhere, with broadcasting.

    The branch not taken is differentiated too: an infinite derivative there gives NaN, so make
    its input harmless first, as `safe_sqrt` does.

    Args:
        condition: an array of booleans of any shape.
        x: an array or a number whose shape broadcasts with that of `condition`.
        y: an array or a number whose shape broadcasts with that of `condition`.

    Returns:
        An array of the broadcast shape. A number takes the dtype of the array next to it.

    Raises:
        InputTypeError: a float next to an array of integers.

    >>> x = ops.asarray([-2.0, 3.0])
    >>> ops.to_numpy(ops.where(x > 0, x, 0.0)).tolist()
    [0.0, 3.0]
    """
    backend, (x, y) = native_or_number(x, y)
    _, (condition,) = native(condition)
    return backend.ops.where(condition, x, y)
