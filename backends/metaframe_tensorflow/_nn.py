"""The layer primitives in TensorFlow calls that can be differentiated twice."""

from __future__ import annotations

import math

import tensorflow as tf

from metaframe.optable import NNTable, Pads


class TensorFlowNN(NNTable):
    """See `metaframe.nn` for what each function does."""

    def relu(self, x: tf.Tensor) -> tf.Tensor:
        return tf.nn.relu(x)

    def gelu(self, x: tf.Tensor) -> tf.Tensor:
        # tf.nn.gelu takes sqrt(2) through float32, which is wrong by 2e-8 in float64.
        return 0.5 * x * (1.0 + tf.math.erf(math.sqrt(0.5) * x))

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
        # Not tf.nn.max_pool2d: it has no second derivative for some shapes, and gives the
        # gradient of a tie to one pixel, reduce_max to all alike.
        height, width = window
        rows, columns, channels = x.shape[1] // height, x.shape[2] // width, x.shape[3]
        cropped = x[:, : rows * height, : columns * width]
        blocks = tf.reshape(cropped, (-1, rows, height, columns, width, channels))
        # Windows last: the gradient of a maximum over two separate axes broadcasts in a pattern
        # that TensorFlow does not support once vectorized_map has added an axis.
        windows = tf.transpose(blocks, (0, 1, 3, 5, 2, 4))
        pixels = tf.reshape(windows, (-1, rows, columns, channels, height * width))
        return tf.reduce_max(pixels, -1)
