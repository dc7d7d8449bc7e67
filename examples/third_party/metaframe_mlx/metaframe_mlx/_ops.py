"""The array functions in MLX calls.

MLX computes exp and sigmoid of float64 in float32. Here they are composed, for float64 only, of
pow and tanh, which it computes in full with all their derivatives. For sin, cos and erf there is no
such function, and they are declared as gaps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import mlx.core as mx
from mlx.core import array

from metaframe.backend.tables import Axis, OpsTable

FLAT = 20.0
"""From here on tanh is 1 to the last bit, in float64 too."""


def dtype_named(name: str) -> mx.Dtype:
    """MLX's dtype with NumPy's name."""
    dtype: mx.Dtype = mx.bool_ if name == "bool" else getattr(mx, name)
    return dtype


def name_of(dtype: mx.Dtype) -> str:
    """NumPy's name of MLX's dtype."""
    return str(dtype).removeprefix("mlx.core.").removesuffix("_")


def exp(x: array) -> array:
    """The exponential, in float64 as a power of e."""
    return mx.power(mx.array(math.e, x.dtype), x) if x.dtype == mx.float64 else mx.exp(x)


def tanh(x: array) -> array:
    """The hyperbolic tangent.

    MLX's derivatives divide by cosh(x) squared, which overflows and makes NaN of the second one.
    """
    return mx.tanh(mx.where(mx.abs(x) > FLAT, mx.sign(x) * FLAT, x))


def logsumexp(x: array, axis: Axis = None, keepdims: bool = False) -> array:
    """`log(sum(exp(x)))` without overflow."""
    if x.dtype != mx.float64:
        return mx.logsumexp(x, axis, keepdims=keepdims)
    largest = mx.stop_gradient(mx.max(x, axis, keepdims=True))
    # Infinity minus itself would be NaN.
    largest = mx.where(mx.isinf(largest), 0.0, largest)
    total = mx.log(mx.sum(exp(x - largest), axis, keepdims=True)) + largest
    return total if keepdims else mx.squeeze(total, axis)


def _pick(x: array, y: array | float, x_wins: array, y_wins: array) -> array:
    """The winner, elementwise; in a tie each gets half of the gradient."""
    if not mx.issubdtype(x.dtype, mx.floating):
        return mx.where(x_wins, x, y)
    return mx.where(x_wins, x, mx.where(y_wins, y, 0.5 * x + 0.5 * y))


class MLXOps(OpsTable):
    """See `metaframe.ops` for what each function does."""

    def zeros(self, shape: Sequence[int], dtype: str, like: array) -> array:
        del like
        return mx.zeros(tuple(shape), dtype_named(dtype))

    def ones_like(self, x: array) -> array:
        return mx.ones_like(x)

    def zeros_like(self, x: array) -> array:
        return mx.zeros_like(x)

    def arange(self, stop: int, dtype: str, like: array) -> array:
        del like
        return mx.arange(stop, dtype=dtype_named(dtype))

    def one_hot(self, labels: array, classes: int, dtype: str) -> array:
        columns = mx.arange(classes, dtype=labels.dtype)
        return (labels[..., None] == columns).astype(dtype_named(dtype))

    def astype(self, x: array, dtype: str) -> array:
        return x.astype(dtype_named(dtype))

    def exp(self, x: array) -> array:
        return exp(x)

    def expm1(self, x: array) -> array:
        return mx.expm1(x)

    def log(self, x: array) -> array:
        return mx.log(x)

    def log1p(self, x: array) -> array:
        return mx.log1p(x)

    def sqrt(self, x: array) -> array:
        return mx.sqrt(x)

    def square(self, x: array) -> array:
        return mx.square(x)

    def abs(self, x: array) -> array:
        return mx.abs(x)

    def sign(self, x: array) -> array:
        return mx.where(mx.isnan(x), mx.stop_gradient(x), mx.sign(x))  # MLX's is 0 for NaN

    def sin(self, x: array) -> array:
        return mx.sin(x)

    def cos(self, x: array) -> array:
        return mx.cos(x)

    def tanh(self, x: array) -> array:
        return tanh(x)

    def sigmoid(self, x: array) -> array:
        return 0.5 + 0.5 * tanh(0.5 * x) if x.dtype == mx.float64 else mx.sigmoid(x)

    def maximum(self, x: array, y: array | float) -> array:
        return _pick(x, y, x > y, x < y)

    def minimum(self, x: array, y: array | float) -> array:
        return _pick(x, y, x < y, x > y)

    def where(self, condition: array, x: array | float, y: array | float) -> array:
        return mx.where(condition, x, y)

    def sum(self, x: array, axis: Axis = None, keepdims: bool = False) -> array:
        return mx.sum(x, axis, keepdims=keepdims)

    def mean(self, x: array, axis: Axis = None, keepdims: bool = False) -> array:
        return mx.mean(x, axis, keepdims=keepdims)

    def max(self, x: array, axis: Axis = None, keepdims: bool = False) -> array:
        return mx.max(x, axis, keepdims=keepdims)

    def min(self, x: array, axis: Axis = None, keepdims: bool = False) -> array:
        return mx.min(x, axis, keepdims=keepdims)

    def argmax(self, x: array, axis: int) -> array:
        # MLX refuses to differentiate by an index, even where the derivative is zero.
        return mx.stop_gradient(mx.argmax(x, axis))

    def logsumexp(self, x: array, axis: Axis = None, keepdims: bool = False) -> array:
        return logsumexp(x, axis, keepdims)

    def reshape(self, x: array, shape: Sequence[int]) -> array:
        return mx.reshape(x, tuple(shape))

    def transpose(self, x: array, axes: Sequence[int]) -> array:
        return mx.transpose(x, tuple(axes))

    def broadcast_to(self, x: array, shape: Sequence[int]) -> array:
        return mx.broadcast_to(x, tuple(shape))

    def expand_dims(self, x: array, axis: int) -> array:
        return mx.expand_dims(x, axis)

    def squeeze(self, x: array, axis: int) -> array:
        return mx.squeeze(x, axis)

    def concat(self, xs: Sequence[array], axis: int = 0) -> array:
        return mx.concatenate(list(xs), axis)

    def stack(self, xs: Sequence[array], axis: int = 0) -> array:
        return mx.stack(list(xs), axis)

    def take(self, x: array, indices: array, axis: int = 0) -> array:
        return mx.take(x, indices, axis)

    def pad(self, x: array, widths: Sequence[tuple[int, int]]) -> array:
        return mx.pad(x, list(widths))

    def matmul(self, x: array, y: array) -> array:
        return mx.matmul(x, y)

    def einsum(self, equation: str, *xs: array) -> array:
        return mx.einsum(equation, *xs)
