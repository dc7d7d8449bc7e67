"""The dependencies of a step besides its arguments, which running it again would get wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from metaframe.backend.types import Arrays, ArraysFn
from metaframe_torch import _private, _tape
from metaframe_torch._ambient import outside

RandomState = Callable[[], dict[str, np.ndarray[Any, Any]]]


def hidden_effect(fn: ArraysFn, xs: Arrays, random_state: RandomState) -> str:
    """A dependency of `fn` besides `xs`, or a change that it makes; empty if there is none.

    The arguments are stripped of every transform and of the tape, so that a result which belongs
    to one got there through a closure.
    """
    before = _bytes(random_state)
    with _tape.outermost(), _private.writes() as written:
        found = fn(tuple(map(_private.stripped, xs)))
    if _bytes(random_state) != before:
        return "draws random numbers, of which there would be others"
    if written():
        return "changes a tensor in place, and would do so again"
    if any(map(_private.belongs_to_a_gradient, found)):
        return "depends on a tensor that it closes over, whose gradient would be lost"
    return ""


def _bytes(random_state: RandomState) -> dict[str, bytes]:
    return {name: state.tobytes() for name, state in outside(random_state).items()}
