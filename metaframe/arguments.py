"""Checks of plain arguments: integers, choices and functions, which need no backend.

Each message names the argument, what came in and what was expected.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from metaframe.errors import InputError, InputTypeError, nearest


def integer(value: Any, name: str, *, at_least: int) -> int:
    """`value` as an int that is at least so much; booleans are not counts."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise InputTypeError(
            f"{name} must be an integer, received {value!r} ({type(value).__name__})."
        )
    if value < at_least:
        raise InputError(f"{name} must be at least {at_least}, received {value}.")
    return int(value)


def choice(value: Any, name: str, allowed: Sequence[Any]) -> None:
    """`value` is one of `allowed` (compared with its type: True is not 1)."""
    if any(value == a and type(value) is type(a) for a in allowed):
        return
    hint = ""
    if isinstance(value, str):
        hint = " " + nearest(value, [a for a in allowed if isinstance(a, str)])
    shown = ", ".join(repr(a) for a in allowed)
    raise InputError(f"{name} must be one of {shown}, received {value!r}.{hint}")


def function(value: Any, name: str) -> None:
    """`value` can be called."""
    if not callable(value):
        raise InputTypeError(f"{name} must be a function, received {type(value).__name__}.")


def axes(x: Any) -> tuple[Any, ...] | None:
    """The lengths of the axes of `x`, () for a number; None where tracing does not know them."""
    try:
        return tuple(getattr(x, "shape", ()))
    except ValueError:
        return None


def leading_axis(x: Any, name: object, what: str) -> int | None:
    """The length of the first axis of `x`; None if it has no axes.

    Args:
        x: an array.
        name: what to call it in an error.
        what: what the axis counts, for errors.

    Raises:
        InputError: the length is not known while a function is traced.

    >>> leading_axis(np.ones((3, 2)), "batch", "task"), leading_axis(1.0, "batch", "task")
    (3, None)
    """
    found = axes(x)
    if found == ():
        return None
    if found is None or not isinstance(found[0], (int, np.integer)):
        raise InputError(
            f"{name} has shape {x.shape}: the length of its {what} axis is not known while the "
            "function is traced. Give it one, in the signature of the traced function or, in "
            "TensorFlow, by tf.ensure_shape."
        )
    return int(found[0])


def chunk_size(value: Any) -> None:
    """None, or at least one task at a time."""
    if value is not None:
        integer(value, "chunk_size", at_least=1)
