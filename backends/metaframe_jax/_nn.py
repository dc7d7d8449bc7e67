"""The layer primitives in JAX calls, with the convolution form that suits the platform."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, Device, lax

from metaframe.optable import NNTable, Pads


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
        if _platform(x) == "cpu":
            return _conv2d_by_patches(x, kernel, stride, pads)
        return lax.conv_general_dilated(
            x, kernel, stride, pads, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def max_pool2d(self, x: Array, window: tuple[int, int]) -> Array:
        # Not lax.reduce_window: it gives the gradient of a tie to one pixel, max to all alike.
        height, width = window
        rows, columns, channels = x.shape[1] // height, x.shape[2] // width, x.shape[3]
        blocks = x[:, : rows * height, : columns * width].reshape(
            -1, rows, height, columns, width, channels
        )
        return jnp.max(blocks, (2, 4))


def _platform(x: Array) -> str:
    """Where work on `x` runs; for a tracer, where it runs unless told otherwise."""
    if not isinstance(x, jax.core.Tracer):
        return str(next(iter(x.devices())).platform)
    device: Device | str | None = jax.config.jax_default_device  # type: ignore[attr-defined]
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else str(device.platform)


def _conv2d_by_patches(x: Array, kernel: Array, stride: tuple[int, int], pads: Pads) -> Array:
    """One matrix product of the image's patches with the flattened kernel."""
    height, width, channels, filters = kernel.shape
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    rows = (x.shape[1] - height) // stride[0] + 1
    columns = (x.shape[2] - width) // stride[1] + 1

    def shifted(i: int, j: int) -> Array:
        end = (i + (rows - 1) * stride[0] + 1, j + (columns - 1) * stride[1] + 1)
        return lax.slice(
            x, (0, i, j, 0), (x.shape[0], *end, channels), (1, stride[0], stride[1], 1)
        )

    patches = jnp.concatenate([shifted(i, j) for i in range(height) for j in range(width)], -1)
    return patches @ kernel.reshape(height * width * channels, filters)
