"""The private names of TensorFlow that this backend uses, and what it does where one is missing.

Importing this module looks none of them up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import tensorflow as tf

from metaframe.backend.private import PrivateName
from metaframe.backend.types import Array, Arrays

SEEN = ("2.20.0", "2.21.0")

MAY_RECORD = PrivateName(
    "tensorflow.python.eager.record:could_possibly_record",
    "the quick call of a compiled function",
    SEEN,
    "slower",
)
INFERENCE = PrivateName(
    "tensorflow.python.eager.polymorphic_function.concrete_function:ConcreteFunction.inference_fn",
    "the quick call of a compiled function",
    SEEN,
    "slower",
)
RECORDS = PrivateName(
    "tensorflow.python.eager.record:should_record_backprop",
    "`implicit_loop` on TensorFlow, where a cost closes over a tensor,",
    SEEN,
    "error",
)
EAGER = PrivateName(
    "tensorflow:__internal__.EagerTensor",
    "telling tensors with a value from symbols",
    SEEN,
    "public",
)
FORWARD = PrivateName(
    "tensorflow.python.eager.forwardprop_util:pack_tangents",
    "tasks at once where a ForwardAccumulator may be active",
    SEEN,
    "slower",
)
CONTEXT = PrivateName(
    "tensorflow.python.eager.context:context",
    "ending at once, and not at the time limit, when another process fails,",
    SEEN,
    "slower",
)
DEVICE_SCOPE = PrivateName(
    "tensorflow.python.eager.context:Context.device_name",
    "compiling under a `tf.device` of its own",
    SEEN,
    "public",
)
# Rules of their own. Without the name a gradient that one loses is zero, as in TensorFlow.
RULED = PrivateName(
    "tensorflow.python.ops:custom_gradient",
    "refusing a `tf.recompute_grad` that loses a gradient",
    SEEN,
    "public",
)
# AutoGraph.
NOT_CONVERTED = PrivateName(
    "tensorflow.python.autograph.core.config_lib:DoNotConvert",
    "leaving our code out of the translation within a `tf.function`",
    SEEN,
    "slower",
)
RULES = PrivateName(
    "tensorflow.python.autograph.core:config",
    "leaving our code out of the translation within a `tf.function`",
    SEEN,
    "slower",
)
CONVERT = PrivateName(
    "tensorflow:__internal__.autograph.tf_convert",
    "a branch on a tensor in a function that metaframe calls within a `tf.function`",
    SEEN,
    "theirs",
)
CONVERSION = PrivateName(
    "tensorflow:__internal__.autograph.control_status_ctx",
    "a branch on a tensor in a function that metaframe calls within a `tf.function`",
    SEEN,
    "theirs",
)


def quick_call(concrete: Any) -> Callable[[Arrays], Arrays] | None:
    """The call that `concrete` ends in, for tensors where nothing is recorded; None without it.

    What it does before, checking and sorting arguments that `metaframe.compile` has looked at
    already, takes longer than the program of a small model.
    """
    if MAY_RECORD.found is None or INFERENCE.found is None:
        return None
    # None where there are no results.
    return lambda xs: tuple(concrete.inference_fn.call_flat(*xs) or ())


def may_record() -> bool:
    """True if anything could record an operation."""
    return MAY_RECORD.found is None or bool(MAY_RECORD.found())


def records(xs: Sequence[Array]) -> bool:
    """True if a tape records any of `xs`."""
    return bool(RECORDS.required(list(xs)))


def may_be_recorded(x: Array) -> bool:
    """True if a tape records `x`; without the name, whatever it is."""
    return RECORDS.found is None or bool(RECORDS.found([x]))


def has_tangents(xs: Sequence[Array]) -> bool:
    """True if a ForwardAccumulator has a tangent of any of `xs`."""
    if FORWARD.found is None:
        return False
    return bool(FORWARD.found([tf.convert_to_tensor(x) for x in xs]).tangents)


def in_gradient_of_loop() -> bool:
    """True if the graph of the gradient of a tf.while_loop is being built."""
    # An attribute that its graphs alone have. Without it TensorFlow has a ValueError of its own.
    return hasattr(tf.compat.v1.get_default_graph(), "internal_capture_to_output")


def as_captured(x: Array) -> Array:
    """`x` as the graph that is being built sees it, which its tapes can watch.

    A tensor of one iteration is one that the gradient graph of the loop takes off a list, and no
    tape connects the two.
    """
    graph = tf.compat.v1.get_default_graph()
    return graph.capture(x) if hasattr(graph, "capture") else x


def forward_mode() -> bool:
    """True if a ForwardAccumulator is active, or may be because anything is recorded."""
    if not may_record():
        return False
    return FORWARD.found is None or bool(FORWARD.found([tf.zeros(())]).indices)


def tell_cluster(text: str) -> None:
    """End the collectives of the other processes with `text` as their error."""
    if CONTEXT.found is not None:
        with suppress(tf.errors.OpError, RuntimeError):
            CONTEXT.found().report_error_to_cluster(tf.errors.UNAVAILABLE, text)


def device_scope() -> object:
    """The device of a `tf.device` scope; without the name, of a new tensor."""
    if CONTEXT.found is None or DEVICE_SCOPE.found is None:
        return tf.zeros(()).device
    return CONTEXT.found().device_name


def watch_rules(check: Callable[[Any, Any, Any], None]) -> None:
    """Call `check(f, args, kwargs)` before any function runs that has a `tf.custom_gradient`."""

    def checked(own: Callable[..., Any]) -> Callable[..., Any]:
        def decorator(f: Any, args: Any, kwargs: Any) -> Any:
            check(f, args, kwargs)
            return own(f, args, kwargs)

        return decorator

    for name in ("_eager_mode_decorator", "_graph_mode_decorator"):
        if hasattr(RULED.found, name):
            setattr(RULED.found, name, checked(getattr(RULED.found, name)))


def leave_alone(*packages: str) -> None:
    """Tell AutoGraph not to translate the source of `packages`."""
    if NOT_CONVERTED.found is not None and hasattr(RULES.found, "CONVERSION_RULES"):
        added = tuple(map(NOT_CONVERTED.found, packages))
        RULES.found.CONVERSION_RULES = (*added, *RULES.found.CONVERSION_RULES)


def translated(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn`, of the user's, as AutoGraph translates it if it translates what calls us."""
    if CONVERT.found is None or CONVERSION.found is None:
        return fn
    scope = CONVERSION.found()
    result: Callable[..., Any] = CONVERT.found(fn, scope) if _enabled(scope) else fn
    return result


def _enabled(scope: Any) -> bool:
    return str(getattr(scope, "status", None)).endswith("ENABLED")


def is_eager(x: object) -> bool:
    """True if `x` is a tensor that has a value; without the name, one that is no symbol."""
    if EAGER.found is not None:
        return isinstance(x, EAGER.found)
    return tf.is_tensor(x) and hasattr(x, "numpy")
