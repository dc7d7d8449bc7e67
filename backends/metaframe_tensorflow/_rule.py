"""Functions with a derivative of their own, closures included.

`tf.custom_gradient` differentiates by the arguments of a function and drops what it closes over:
silently in a graph, whose tapes may lie outside it and are not known yet. So what a function closes
over becomes arguments of the rule as well, with cotangents found by differentiating the function
itself. Nothing is substituted: a tape can watch the very tensors that the function uses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from metaframe.backend.types import Arrays, ArraysFn
from metaframe_tensorflow._moments import exact_moments


def with_rule(
    forward: ArraysFn,
    backward: Callable[[Arrays, Arrays], Arrays],
    closed_over: Callable[[ArraysFn, Arrays], Arrays],
) -> ArraysFn:
    """`forward`, differentiated by `backward`, and as it is by what `closed_over` finds."""
    closed: Arrays | None = None

    def call(xs: Arrays) -> Arrays:
        nonlocal closed
        if closed is None:
            closed = closed_over(forward, xs)
        others, count = closed, len(xs)

        @tf.custom_gradient  # type: ignore[untyped-decorator]
        def rule(*given: Any) -> tuple[list[Any], Callable[..., Any]]:
            own = given[:count]

            def pull_back(*cotangents: Any, variables: Sequence[Any] = ()) -> Any:
                rest = [v for v in variables if all(v is not x for x in others)]
                grads = _closure_gradients(forward, own, (*others, *rest), cotangents)
                of_inputs = [*backward(own, cotangents), *grads[: len(others)]]
                if not variables:
                    return of_inputs
                of_rest = dict(zip(map(id, rest), grads[len(others) :], strict=True))
                return of_inputs, [of_rest.get(id(v)) for v in variables]

            return list(forward(own)), pull_back

        return tuple(rule(*xs, *others))

    return call


def traced_closures(fn: ArraysFn, xs: Arrays) -> Arrays:
    """The differentiable tensors and the variables that `fn` uses besides `xs`."""
    specs = [tf.TensorSpec(x.shape, x.dtype) for x in xs]
    traced = tf.function(lambda *xs: list(fn(xs)), autograph=False).get_concrete_function(*specs)
    tensors = (x for x in traced.captured_inputs if x.dtype.is_floating or x.dtype.is_complex)
    return (*tensors, *traced.variables)


def _closure_gradients(
    fn: ArraysFn, xs: Arrays, closed: Sequence[Any], cotangents: Sequence[Any]
) -> list[Any]:
    if not closed:
        return []
    with exact_moments(), tf.GradientTape(watch_accessed_variables=False) as tape:
        watched = [x if isinstance(x, tf.Variable) else _here(x) for x in closed]
        tape.watch(watched)
        ys = fn(xs)
    found: list[Any] = tape.gradient(ys, watched, output_gradients=list(cotangents))
    return found


def _here(x: Any) -> Any:
    """`x` as the graph that is being built sees it.

    What a loop's gradient graph captures, such as a value of one iteration, no tape connects with
    the tensor outside.
    """
    return x if tf.executing_eagerly() else tf.compat.v1.get_default_graph().capture(x)
