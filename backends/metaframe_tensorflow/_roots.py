"""Code of others, differentiated where it takes the root of zero.

See `ops.safe_sqrt` for why. A tape asks every operation for its gradient by name, and only a graph
can say that another is meant. So the code becomes a function of its own, with a graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from metaframe.backend.types import Array, Arrays, ArraysFn


def with_finite_roots(fn: ArraysFn) -> ArraysFn:
    """`fn` with a derivative of zero where one of its operations has none."""

    @tf.function(autograph=False)  # type: ignore[untyped-decorator]
    def traced(*xs: Array) -> Arrays:
        with tf.compat.v1.get_default_graph().gradient_override_map(_GRADIENTS):
            return fn(xs)

    return lambda xs: tuple(traced(*map(tf.convert_to_tensor, xs)))


def _is_zero(x: Array, *_: Array) -> Array:
    return tf.equal(x, 0)


def _registered(
    operation: str,
    call: Callable[..., Array],
    singular: Callable[..., Array] = _is_zero,
    place: int = 0,
) -> str:
    """The name of a gradient of `call` that is zero where the operand at `place` is `singular`."""
    name = f"MetaframeFinite{operation}"

    @tf.RegisterGradient(name)  # type: ignore[untyped-decorator]
    def gradient(op: Any, cotangent: Array) -> list[Array]:
        xs, at = list(op.inputs), singular(*op.inputs)
        with tf.GradientTape() as tape:
            tape.watch(xs)
            elsewhere = tf.where(at, tf.ones_like(xs[place]), xs[place])
            y = call(*xs[:place], elsewhere, *xs[place + 1 :])
        regular = tf.where(at, tf.zeros_like(cotangent), cotangent)
        found: list[Array] = tape.gradient(y, xs, regular)
        return found

    return name


_GRADIENTS = {
    "Sqrt": _registered("Sqrt", tf.sqrt),
    "Rsqrt": _registered("Rsqrt", tf.math.rsqrt),
    "Log": _registered("Log", tf.math.log),
    "Reciprocal": _registered("Reciprocal", tf.math.reciprocal),
    "RealDiv": _registered("RealDiv", tf.math.divide, lambda _, x: _is_zero(x), place=1),
    "Pow": _registered("Pow", tf.pow, lambda x, p: _is_zero(x) & (p < 1)),
}
"""Operations without a derivative at zero, and the gradients that are taken instead."""
