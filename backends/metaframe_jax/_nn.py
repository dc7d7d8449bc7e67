"""The layer primitives in JAX calls, with the convolution form that suits the platform."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from metaframe.backend.tables import NNTable, Pads
from metaframe_jax._devices import on_cpu


class JaxNN(NNTable):
    """See `metaframe.nn` for what each function does."""

    def relu(self, x: Array) -> Array:
        return jax.nn.relu(x)

    def gelu(self, x: Array) -> Array:
        return jax.nn.gelu(x, approximate=False)

    def softmax(self, x: Array, axis: int = -1) -> Array:
        return jax.nn.softmax(x, axis)

    def log_softmax(self, x: Array, axis: int = -1) -> Array:
        return jax.nn.log_softmax(x, axis)

    def conv2d(self, x: Array, kernel: Array, stride: tuple[int, int], pads: Pads) -> Array:
        # XLA's CPU convolutions are 10-14 times slower than a matrix product inside vmap and
        # scan. The choice is made while tracing: a branch on the platform inside the program
        # would make the backward pass keep the intermediates of both forms.
        if on_cpu(x):
            return _conv2d_by_patches(x, kernel, stride, pads)
        return lax.conv_general_dilated(
            x, kernel, stride, pads, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def max_pool2d(self, x: Array, window: tuple[int, int]) -> Array:
        size = (x.shape[1] // window[0], x.shape[2] // window[1])
        return functools.reduce(_first_largest, _shifted(x, window, window, size))


def _first_largest(x: Array, y: Array) -> Array:
    """The larger element, `x` in a tie; NaN if either is.

    Reductions and jnp.maximum have their gradient compare the operands with the result. When XLA
    fuses that, it computes them again, not always to the same bit, and a gradient that finds no
    equal element is lost: second derivatives of a jitted network were wrong by half.
    """
    return jnp.where((x >= y) | jnp.isnan(x), x, y)


def _conv2d_by_patches(x: Array, kernel: Array, stride: tuple[int, int], pads: Pads) -> Array:
    """One matrix product of the image's patches with the flattened kernel."""
    height, width, channels, filters = kernel.shape
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    rows = (x.shape[1] - height) // stride[0] + 1
    columns = (x.shape[2] - width) // stride[1] + 1

    patches = jnp.concatenate(_shifted(x, (height, width), stride, (rows, columns)), -1)
    return patches @ kernel.reshape(height * width * channels, filters)


def _shifted(
    x: Array, window: tuple[int, int], stride: tuple[int, int], size: tuple[int, int]
) -> list[Array]:
    """For each place in the window, the pixels there, of `size` windows `stride` apart."""
    (down, right), (rows, columns) = stride, size

    def place(i: int, j: int) -> Array:
        end = (x.shape[0], i + (rows - 1) * down + 1, j + (columns - 1) * right + 1, x.shape[3])
        return lax.slice(x, (0, i, j, 0), end, (1, down, right, 1))

    return [place(i, j) for i in range(window[0]) for j in range(window[1])]
