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
        padding = [[0, 0], list(pads[0]), list(pads[1]), [0, 0]]
        return tf.nn.conv2d(x, kernel, strides=[1, *stride, 1], padding=padding)

    def max_pool2d(self, x: tf.Tensor, window: tuple[int, int]) -> tf.Tensor:
        # Not tf.nn.max_pool2d: it has no second derivative for some shapes, and gives the
        # gradient of a tie to one pixel, reduce_max to all alike.
        height, width = window
        rows, columns, channels = x.shape[1] // height, x.shape[2] // width, x.shape[3]
        cropped = x[:, : rows * height, : columns * width]
        blocks = tf.reshape(cropped, (-1, rows, height, columns, width, channels))
        return tf.reduce_max(blocks, (2, 4))
