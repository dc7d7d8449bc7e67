"""Functions with a derivative of their own, closures included.

`tf.custom_gradient` differentiates by the arguments of a function and drops what it closes over:
silently in a graph, whose tapes may lie outside it and are not known yet. So what a function closes
over becomes arguments of the rule as well, with cotangents found by differentiating the function
itself. Nothing is substituted: a tape can watch the very tensors that the function uses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import tensorflow as tf

from metaframe.backend.types import Arrays, ArraysFn
from metaframe.errors import BackendError, InputError
from metaframe_tensorflow import _private
from metaframe_tensorflow._moments import exact_moments

NO_FORWARD_MODE = (
    "tf.autodiff.ForwardAccumulator does not go through a rule that runs again in the backward "
    'pass, except around a tf.function. Use mode="reverse", or a tf.GradientTape.'
)
CONSTANT_IN_LOOP = (
    "a step that runs again in the backward pass closes over a tensor or variable from outside of "
    "the tf.function, and TensorFlow has no way for those into the gradient of a tf.while_loop. "
    'Make it an argument, in the variables or the batch, run the tasks with "vmap", or use '
    'mode="reverse".'
)

_looking: ContextVar[bool] = ContextVar("_looking", default=False)
"""Is a function traced to see what it does, and not to be run?"""


def with_rule(
    forward: ArraysFn,
    backward: Callable[[Arrays, Arrays], Arrays],
    closed_over: Callable[[ArraysFn, Arrays], Arrays],
) -> ArraysFn:
    """`forward`, differentiated by `backward`, and as it is by what `closed_over` finds."""
    closed: Arrays | None = None

    def call(xs: Arrays) -> Arrays:
        nonlocal closed
        if _looking.get():
            return forward(xs)  # nothing is differentiated
        if closed is None:
            closed = closed_over(forward, xs)
        others, count = tuple(filter(is_differentiable, closed)), len(xs)
        constants = any(map(is_eager, closed))
        if _private.has_tangents((*xs, *others)):
            raise BackendError(NO_FORWARD_MODE)

        @tf.custom_gradient  # type: ignore[untyped-decorator]
        def rule(*given: Any) -> tuple[list[Any], Callable[..., Any]]:
            own = given[:count]

            def pull_back(*cotangents: Any, variables: Sequence[Any] = ()) -> Any:
                if constants and _private.in_gradient_of_loop():
                    raise InputError(CONSTANT_IN_LOOP)
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


def traced(fn: ArraysFn, xs: Arrays) -> Any:
    """`fn` as a concrete function, to look into."""
    specs = [tf.TensorSpec(x.shape, x.dtype) for x in xs]
    graph = tf.function(lambda *xs: list(fn(xs)), autograph=False)
    token = _looking.set(True)
    try:
        return graph.get_concrete_function(*specs)
    finally:
        _looking.reset(token)


def closures(fn: ArraysFn, xs: Arrays) -> Arrays:
    """The tensors and variables that `fn` uses besides `xs`."""
    found = traced(fn, xs)
    tensors = (x for x in found.captured_inputs if x.dtype != tf.resource)
    return (*tensors, *found.variables)


def is_differentiable(x: Any) -> bool:
    """True if `x` is of a dtype that has gradients."""
    return bool(x.dtype.is_floating or x.dtype.is_complex)


def is_eager(x: Any) -> bool:
    """True if `x` is a variable, or a tensor with a value."""
    return isinstance(x, tf.Variable) or _private.is_eager(x)


def _closure_gradients(
    fn: ArraysFn, xs: Arrays, closed: Sequence[Any], cotangents: Sequence[Any]
) -> list[Any]:
    if not closed:
        return []
    with exact_moments(), tf.GradientTape(watch_accessed_variables=False) as tape:
        sources = watched_outside(tape, closed)
        ys = fn(xs)
    found = tape.gradient(ys, sources, output_gradients=list(cotangents))
    return summed(found, len(closed))


def watched_outside(tape: tf.GradientTape, closed: Sequence[Any]) -> list[Any]:
    """The tensors and variables from outside of the graph being built that `tape` watches.

    A tape connects a tensor with what stands for it in a graph as soon as that is used, so it
    watches the tensor itself: that is also what a rule or a function called within is recorded
    for. In the gradient of a `tf.while_loop` there is no such connection, and what stands for each
    tensor comes after them all.
    """
    if not _private.in_gradient_of_loop():
        tape.watch(closed)
        return list(closed)
    inside = [x if isinstance(x, tf.Variable) else _private.as_captured(x) for x in closed]
    known = set(map(id, closed))
    # One that stands for itself is watched once.
    sources = [*closed, *(tf.zeros(()) if id(x) in known else x for x in inside)]
    tape.watch(sources)
    return sources


def summed(found: Sequence[Any], count: int) -> list[Any]:
    """The gradient of each of `count` tensors, from those of what `watched_outside` returned."""
    if len(found) == count:
        return list(found)
    pairs = zip(found[:count], found[count:], strict=True)
    return [b if a is None else a if b is None else a + b for a, b in pairs]
