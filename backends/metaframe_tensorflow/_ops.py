"""The array functions in TensorFlow calls.

Python numbers become tensors with `tf.convert_to_tensor(value, dtype)`: `tf.cast` would take
them through float32 and lose digits in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from metaframe.backend.tables import Axis, OpsTable


def _pick(x: tf.Tensor, y: tf.Tensor, x_wins: tf.Tensor, y_wins: tf.Tensor) -> tf.Tensor:
    """The winner, elementwise. In a tie each gets half of the gradient, as on other backends."""
    return tf.where(x_wins, x, tf.where(y_wins, y, 0.5 * x + 0.5 * y))


def _like(value: tf.Tensor | float, x: tf.Tensor) -> tf.Tensor:
    return value if tf.is_tensor(value) else tf.convert_to_tensor(value, x.dtype)


class TensorFlowOps(OpsTable):
    """See `metaframe.ops` for what each function does."""

    def zeros(self, shape: Sequence[int], dtype: str, like: tf.Tensor) -> tf.Tensor:
        del like
        return tf.zeros(tuple(shape), dtype)

    def ones_like(self, x: tf.Tensor) -> tf.Tensor:
        return tf.ones_like(x)

    def zeros_like(self, x: tf.Tensor) -> tf.Tensor:
        return tf.zeros_like(x)

    def arange(self, stop: int, dtype: str, like: tf.Tensor) -> tf.Tensor:
        del like
        return tf.range(stop, dtype=dtype)

    def one_hot(self, labels: tf.Tensor, classes: int, dtype: str) -> tf.Tensor:
        columns = tf.range(classes, dtype=labels.dtype)
        return tf.cast(tf.expand_dims(labels, -1) == columns, dtype)

    def astype(self, x: tf.Tensor, dtype: str) -> tf.Tensor:
        return tf.cast(x, dtype)

    def exp(self, x: tf.Tensor) -> tf.Tensor:
        return tf.exp(x)

    def expm1(self, x: tf.Tensor) -> tf.Tensor:
        return tf.math.expm1(x)

    def log(self, x: tf.Tensor) -> tf.Tensor:
        return tf.math.log(x)

    def log1p(self, x: tf.Tensor) -> tf.Tensor:
        return tf.math.log1p(x)

    def sqrt(self, x: tf.Tensor) -> tf.Tensor:
        return tf.sqrt(x)

    def square(self, x: tf.Tensor) -> tf.Tensor:
        return tf.square(x)

    def abs(self, x: tf.Tensor) -> tf.Tensor:
        return tf.abs(x)

    def sign(self, x: tf.Tensor) -> tf.Tensor:
        return tf.sign(x)

    def sin(self, x: tf.Tensor) -> tf.Tensor:
        return tf.sin(x)

    def cos(self, x: tf.Tensor) -> tf.Tensor:
        return tf.cos(x)

    def tanh(self, x: tf.Tensor) -> tf.Tensor:
        return tf.tanh(x)

    def sigmoid(self, x: tf.Tensor) -> tf.Tensor:
        return tf.sigmoid(x)

    def maximum(self, x: tf.Tensor, y: tf.Tensor | float) -> tf.Tensor:
        y = _like(y, x)
        # tf.maximum gives the whole gradient of a tie to `x`.
        return _pick(x, y, x > y, x < y) if x.dtype.is_floating else tf.maximum(x, y)

    def minimum(self, x: tf.Tensor, y: tf.Tensor | float) -> tf.Tensor:
        y = _like(y, x)
        return _pick(x, y, x < y, x > y) if x.dtype.is_floating else tf.minimum(x, y)

    def where(self, condition: tf.Tensor, x: tf.Tensor | float, y: tf.Tensor | float) -> tf.Tensor:
        array = x if tf.is_tensor(x) else y
        return tf.where(condition, _like(x, array), _like(y, array))

    def sum(self, x: tf.Tensor, axis: Axis = None, keepdims: bool = False) -> tf.Tensor:
        return tf.reduce_sum(x, axis, keepdims)

    def mean(self, x: tf.Tensor, axis: Axis = None, keepdims: bool = False) -> tf.Tensor:
        return tf.reduce_mean(x, axis, keepdims)

    def max(self, x: tf.Tensor, axis: Axis = None, keepdims: bool = False) -> tf.Tensor:
        return tf.reduce_max(x, axis, keepdims)

    def min(self, x: tf.Tensor, axis: Axis = None, keepdims: bool = False) -> tf.Tensor:
        return tf.reduce_min(x, axis, keepdims)

    def argmax(self, x: tf.Tensor, axis: int) -> tf.Tensor:
        found = tf.argmax(x, axis)
        if not x.dtype.is_floating:
            return found
        # tf.argmax passes over NaN, which is the largest of all elsewhere.
        unknown = tf.math.is_nan(x)
        first = tf.argmax(tf.cast(unknown, tf.int8), axis)
        return tf.where(tf.reduce_any(unknown, axis), first, found)

    def logsumexp(self, x: tf.Tensor, axis: Axis = None, keepdims: bool = False) -> tf.Tensor:
        return tf.reduce_logsumexp(x, axis, keepdims)

    def reshape(self, x: tf.Tensor, shape: Sequence[int]) -> tf.Tensor:
        return tf.reshape(x, tuple(shape))

    def transpose(self, x: tf.Tensor, axes: Sequence[int]) -> tf.Tensor:
        return tf.transpose(x, tuple(axes))

    def broadcast_to(self, x: tf.Tensor, shape: Sequence[int]) -> tf.Tensor:
        return tf.broadcast_to(x, tuple(shape))

    def expand_dims(self, x: tf.Tensor, axis: int) -> tf.Tensor:
        return tf.expand_dims(x, axis)

    def squeeze(self, x: tf.Tensor, axis: int) -> tf.Tensor:
        return tf.squeeze(x, axis)

    def concat(self, xs: Sequence[tf.Tensor], axis: int = 0) -> tf.Tensor:
        return tf.concat(tuple(xs), axis)

    def stack(self, xs: Sequence[tf.Tensor], axis: int = 0) -> tf.Tensor:
        return tf.stack(tuple(xs), axis)

    def take(self, x: tf.Tensor, indices: tf.Tensor, axis: int = 0) -> tf.Tensor:
        return tf.gather(x, indices, axis=axis)

    def pad(self, x: tf.Tensor, widths: Sequence[tuple[int, int]]) -> tf.Tensor:
        return tf.pad(x, tuple(widths))

    def matmul(self, x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        x_rank, y_rank = x.shape.rank, y.shape.rank
        if x_rank == 1 and y_rank > 2:
            return tf.squeeze(tf.matmul(tf.expand_dims(x, 0), y), -2)
        if y_rank > 2 or x_rank == y_rank == 2:
            return tf.matmul(x, y)
        # One flat product: tf.matmul would repeat `y` for every leading index of `x`.
        return tf.tensordot(x, y, 1)

    def einsum(self, equation: str, *xs: tf.Tensor) -> tf.Tensor:
        return tf.einsum(equation, *xs)
