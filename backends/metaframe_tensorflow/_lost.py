"""Gradients that a rule of TensorFlow's loses, refused.

`tf.custom_gradient`, and `tf.recompute_grad` by way of it, knows of the arguments of a function and
of the variables that it reads. What else a function closes over has no gradient. Adapted weights
are tensors in the places of variables, so a layer that is right by itself would stop learning.
"""

from __future__ import annotations

import contextvars
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import tensorflow as tf

from metaframe.errors import InputError
from metaframe_tensorflow import _private
from metaframe_tensorflow._rule import is_differentiable, traced

_RECOMPUTED = "recompute_grad.<locals>.inner"
_checking = contextvars.ContextVar("checking", default=False)


@contextmanager
def checked() -> Iterator[None]:
    """A block in which functions with a rule of their own are looked at."""
    token = _checking.set(True)
    try:
        yield
    finally:
        _checking.reset(token)


def refuse_lost(f: Any, args: Any, kwargs: Any) -> None:
    """Raise an error if a rule of `f` loses the gradient of something that a tape records."""
    if not _checking.get() or _passes_all_on(f):
        return
    token = _checking.set(False)
    try:
        graph = traced(lambda _: _nothing(f(*args, **kwargs)), ())
    except Exception as error:
        if not _recomputes(f):
            return  # it will be raised again, where `f` runs
        raise InputError(_LOST.format(described=_described(f))) from error
    finally:
        _checking.reset(token)
    given = set(map(id, tf.nest.flatten((args, kwargs))))
    closed = [x for x in graph.captured_inputs if x.dtype != tf.resource and id(x) not in given]
    if any(is_differentiable(x) and _private.may_be_recorded(x) for x in closed):
        raise InputError(_LOST.format(described=_described(f)))


_LOST = (
    "{described} loses the gradient of what the function closes over, such as the adapted weights "
    "of a layer. Call the function without it, or pass it everything as arguments. "
    'mode="remat" of meta_value_and_grad recomputes inner steps.'
)


def _passes_all_on(f: Any) -> bool:
    """True if `f` is a function of TensorFlow or of ours, which close over no inputs."""
    package = getattr(f, "__module__", "").partition(".")[0]
    return package in ("tensorflow", "metaframe_tensorflow") and not _recomputes(f)


def _recomputes(f: Any) -> bool:
    return getattr(f, "__qualname__", "").endswith(_RECOMPUTED)


def _described(f: Any) -> str:
    if _recomputes(f):
        return "tf.recompute_grad (also as keras.remat and keras.RematScope)"
    return f"the tf.custom_gradient of {getattr(f, '__qualname__', f)}"


def _nothing(result: Any) -> tuple[()]:
    del result
    return ()
