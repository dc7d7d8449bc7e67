"""The layer primitives in MLX calls that can be differentiated twice, in either direction."""

from __future__ import annotations

import functools
import math

import mlx.core as mx
from mlx.core import array

from metaframe.backend.tables import NNTable, Pads
from metaframe_mlx._ops import exp, logsumexp


class MLXNN(NNTable):
    """See `metaframe.nn` for what each function does."""

    def relu(self, x: array) -> array:
        return mx.maximum(x, 0)

    def gelu(self, x: array) -> array:
        return 0.5 * x * (1 + mx.erf(math.sqrt(0.5) * x))

    def softmax(self, x: array, axis: int = -1) -> array:
        return mx.softmax(x, axis) if x.dtype != mx.float64 else exp(self.log_softmax(x, axis))

    def log_softmax(self, x: array, axis: int = -1) -> array:
        return x - logsumexp(x, axis, keepdims=True)

    def conv2d(self, x: array, kernel: array, stride: tuple[int, int], pads: Pads) -> array:
        # A product of patches and kernel: MLX's own convolution has no forward-mode derivative.
        height, width, channels, filters = kernel.shape
        x = mx.pad(x, [(0, 0), *pads, (0, 0)])
        rows, columns = (
            (x.shape[1] - height) // stride[0] + 1,
            (x.shape[2] - width) // stride[1] + 1,
        )
        places = _shifted(x, (height, width), stride, (rows, columns))
        return mx.concatenate(places, -1) @ mx.reshape(kernel, (height * width * channels, filters))

    def max_pool2d(self, x: array, window: tuple[int, int]) -> array:
        size = (x.shape[1] // window[0], x.shape[2] // window[1])
        return functools.reduce(_first_largest, _shifted(x, window, window, size))


def _first_largest(x: array, y: array) -> array:
    """The larger element, `x` in a tie; NaN if either is."""
    return mx.where((x >= y) | mx.isnan(x), x, y)


def _shifted(
    x: array, window: tuple[int, int], stride: tuple[int, int], size: tuple[int, int]
) -> list[array]:
    """For each place in the window, the pixels there, of `size` windows `stride` apart."""
    (down, right), (rows, columns) = stride, size
    return [
        x[:, i : i + (rows - 1) * down + 1 : down, j : j + (columns - 1) * right + 1 : right]
        for i in range(window[0])
        for j in range(window[1])
    ]
