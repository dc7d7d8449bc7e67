"""The layer primitives in TensorFlow calls that can be differentiated twice."""

from __future__ import annotations

import functools
import itertools
import math

import tensorflow as tf

from metaframe.backend.tables import NNTable, Pads


class TensorFlowNN(NNTable):
    """See `metaframe.nn` for what each function does."""

    def relu(self, x: tf.Tensor) -> tf.Tensor:
        return tf.nn.relu(x)

    def gelu(self, x: tf.Tensor) -> tf.Tensor:
        # tf.nn.gelu takes sqrt(2) through float32, which is wrong by 2e-8 in float64.
        # erf of infinity is NaN here, and erfc is not.
        return 0.5 * x * tf.math.erfc(-math.sqrt(0.5) * x)

    def softmax(self, x: tf.Tensor, axis: int = -1) -> tf.Tensor:
        return tf.nn.softmax(x, axis)

    def log_softmax(self, x: tf.Tensor, axis: int = -1) -> tf.Tensor:
        return tf.nn.log_softmax(x, axis)

    def conv2d(
        self, x: tf.Tensor, kernel: tf.Tensor, stride: tuple[int, int], pads: Pads
    ) -> tf.Tensor:
        if pads != ((0, 0), (0, 0)):
            # By hand: vectorized_map loses the `explicit_paddings` of the gradient's kernels.
            x = tf.pad(x, ((0, 0), *pads, (0, 0)))
        return tf.nn.conv2d(x, kernel, stride, "VALID")

    def max_pool2d(self, x: tf.Tensor, window: tuple[int, int]) -> tf.Tensor:
        # tf.nn.max_pool2d has no second derivative for some shapes. tf.maximum gives the gradient
        # of a tie to its first argument, and so the one of a window to its first pixel.
        height, width = window
        rows, columns = x.shape[1] // height, x.shape[2] // width
        cropped = x[:, : rows * height, : columns * width]
        blocks = tf.reshape(cropped, (-1, rows, height, columns, width, x.shape[3]))
        # unstack and not slices: its gradient is one stack and not a sum of padded tensors.
        pixels = [tf.unstack(row, axis=3) for row in tf.unstack(blocks, axis=2)]
        return functools.reduce(tf.maximum, itertools.chain(*pixels))
