"""The array functions in jax.numpy calls."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from metaframe.backend.tables import Axis, OpsTable


def _pick(x: Array, y: Array | float, x_wins: Array, y_wins: Array) -> Array:
    """The winner, elementwise. In a tie each gets half of the gradient.

    jnp.maximum has its gradient compare the result with `x` and `y`. When XLA fuses that, it
    computes them again, not always to the same bit, and then neither gets the gradient.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return jnp.where(x_wins, x, y)
    return jnp.where(x_wins, x, jnp.where(y_wins, y, 0.5 * x + 0.5 * y))


class JaxOps(OpsTable):
    """See `metaframe.ops` for what each function does.

    New arrays are left uncommitted, so they follow the arrays they are used with.
    """

    def zeros(self, shape: Sequence[int], dtype: str, like: Array) -> Array:
        del like
        return jnp.zeros(tuple(shape), dtype)

    def ones_like(self, x: Array) -> Array:
        return jnp.ones_like(x)

    def zeros_like(self, x: Array) -> Array:
        return jnp.zeros_like(x)

    def arange(self, stop: int, dtype: str, like: Array) -> Array:
        del like
        return jnp.arange(stop, dtype=dtype)

    def one_hot(self, labels: Array, classes: int, dtype: str) -> Array:
        return jax.nn.one_hot(labels, classes, dtype=jnp.dtype(dtype))

    def astype(self, x: Array, dtype: str) -> Array:
        return x.astype(dtype)

    def exp(self, x: Array) -> Array:
        return jnp.exp(x)

    def expm1(self, x: Array) -> Array:
        return jnp.expm1(x)

    def log(self, x: Array) -> Array:
        return jnp.log(x)

    def log1p(self, x: Array) -> Array:
        return jnp.log1p(x)

    def sqrt(self, x: Array) -> Array:
        return jnp.sqrt(x)

    def square(self, x: Array) -> Array:
        return jnp.square(x)

    def abs(self, x: Array) -> Array:
        # jnp.abs has the derivative 1 at zero.
        return x * jnp.sign(x) if jnp.issubdtype(x.dtype, jnp.floating) else jnp.abs(x)

    def sign(self, x: Array) -> Array:
        return jnp.sign(x)

    def sin(self, x: Array) -> Array:
        return jnp.sin(x)

    def cos(self, x: Array) -> Array:
        return jnp.cos(x)

    def tanh(self, x: Array) -> Array:
        return jnp.tanh(x)

    def sigmoid(self, x: Array) -> Array:
        return jax.nn.sigmoid(x)

    def maximum(self, x: Array, y: Array | float) -> Array:
        return _pick(x, y, x > y, x < y)

    def minimum(self, x: Array, y: Array | float) -> Array:
        return _pick(x, y, x < y, x > y)

    def where(self, condition: Array, x: Array | float, y: Array | float) -> Array:
        return jnp.where(condition, x, y)

    def sum(self, x: Array, axis: Axis = None, keepdims: bool = False) -> Array:
        return jnp.sum(x, axis, keepdims=keepdims)

    def mean(self, x: Array, axis: Axis = None, keepdims: bool = False) -> Array:
        return jnp.mean(x, axis, keepdims=keepdims)

    def max(self, x: Array, axis: Axis = None, keepdims: bool = False) -> Array:
        return jnp.max(x, axis, keepdims=keepdims)

    def min(self, x: Array, axis: Axis = None, keepdims: bool = False) -> Array:
        return jnp.min(x, axis, keepdims=keepdims)

    def argmax(self, x: Array, axis: int) -> Array:
        return jnp.argmax(x, axis)

    def logsumexp(self, x: Array, axis: Axis = None, keepdims: bool = False) -> Array:
        return jax.nn.logsumexp(x, axis, keepdims=keepdims)

    def reshape(self, x: Array, shape: Sequence[int]) -> Array:
        return jnp.reshape(x, tuple(shape))

    def transpose(self, x: Array, axes: Sequence[int]) -> Array:
        return jnp.transpose(x, tuple(axes))

    def broadcast_to(self, x: Array, shape: Sequence[int]) -> Array:
        return jnp.broadcast_to(x, tuple(shape))

    def expand_dims(self, x: Array, axis: int) -> Array:
        return jnp.expand_dims(x, axis)

    def squeeze(self, x: Array, axis: int) -> Array:
        return jnp.squeeze(x, axis)

    def concat(self, xs: Sequence[Array], axis: int = 0) -> Array:
        return jnp.concatenate(tuple(xs), axis)

    def stack(self, xs: Sequence[Array], axis: int = 0) -> Array:
        return jnp.stack(tuple(xs), axis)

    def take(self, x: Array, indices: Array, axis: int = 0) -> Array:
        return jnp.take(x, indices, axis)

    def pad(self, x: Array, widths: Sequence[tuple[int, int]]) -> Array:
        return jnp.pad(x, tuple(widths))

    def matmul(self, x: Array, y: Array) -> Array:
        return jnp.matmul(x, y)

    def einsum(self, equation: str, *xs: Array) -> Array:
        return jnp.einsum(equation, *xs)
