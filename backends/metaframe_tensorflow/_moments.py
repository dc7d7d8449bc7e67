"""`tf.nn.moments` with all of its second derivative.

TensorFlow's own takes the mean inside the variance for a constant: the variance's derivative by
it is zero. The derivative of that is not, so that the gradient of a gradient lacks a term, which
nothing reports. Keras normalises by these moments: its batch, layer and group normalisation all
have a wrong meta-gradient without what is here.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import tensorflow as tf

_inside: ContextVar[bool] = ContextVar("_inside", default=False)


@contextmanager
def exact_moments() -> Iterator[None]:
    """Inside, `tf.nn.moments` can be differentiated more than once; its values are the same."""
    _install()
    token = _inside.set(True)
    try:
        yield
    finally:
        _inside.reset(token)


@functools.cache
def _install() -> None:
    """Put a function in the place of TensorFlow's that calls it everywhere but inside.

    It stays there: taking it away again would take it from another thread too.
    """
    theirs = tf.nn.moments

    @functools.wraps(theirs)
    def moments(
        x: Any, axes: Any, shift: Any = None, keepdims: bool = False, name: str | None = None
    ) -> tuple[tf.Tensor, tf.Tensor]:
        if not _inside.get():
            found: tuple[tf.Tensor, tf.Tensor] = theirs(x, axes, shift, keepdims, name)
            return found
        return _moments(tf.convert_to_tensor(x), axes, keepdims)

    tf.nn.moments = moments


def _moments(x: tf.Tensor, axes: Any, keepdims: bool) -> tuple[tf.Tensor, tf.Tensor]:
    wide = tf.cast(x, tf.float32) if x.dtype == tf.float16 else x  # as theirs
    mean = tf.reduce_mean(wide, axes, keepdims=True)
    var = tf.reduce_mean(tf.math.squared_difference(wide, mean), axes, keepdims=True)
    if not keepdims:
        mean, var = tf.squeeze(mean, axes), tf.squeeze(var, axes)
    return tf.cast(mean, x.dtype), tf.cast(var, x.dtype)
