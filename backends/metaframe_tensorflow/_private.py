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
    'on TensorFlow a mode that runs steps again, every one but "reverse",',
    SEEN,
    "error",
)
CONTEXT = PrivateName(
    "tensorflow.python.eager.context:context",
    "ending at once, and not at the time limit, when another process fails,",
    SEEN,
    "slower",
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
    """Could anything record an operation?"""
    return MAY_RECORD.found is None or bool(MAY_RECORD.found())


def records(xs: Sequence[Array]) -> bool:
    """Does a tape record any of `xs`?"""
    return bool(RECORDS.required(list(xs)))


def tell_cluster(text: str) -> None:
    """End the collectives of the other processes with `text` as their error."""
    if CONTEXT.found is not None:
        with suppress(tf.errors.OpError, RuntimeError):
            CONTEXT.found().report_error_to_cluster(tf.errors.UNAVAILABLE, text)
