"""A call of a model on other values than it holds, as TensorFlow sees it."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import tensorflow as tf

from metaframe.errors import InputError
from metaframe_tensorflow._lost import checked

T = TypeVar("T")


def watched(run: Callable[[], T]) -> tuple[T, Sequence[tf.Variable]]:
    """The result of `run`, which makes no variables, and the trainable ones that it read."""
    refused = tf.variable_creator_scope(_refuse_new_variables)
    with checked(), refused, tf.GradientTape() as tape:
        result = run()
    return result, tape.watched_variables()


class _Inlined:
    """Blocks in which a `tf.function` runs as the Python function that it was made of.

    Its graphs are kept. One that is traced where a model has other values would have these in it
    for good, and answer with them when the model's user calls it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks = 0  # in all threads, as the setting is the process's
        self._before = False
        self._here = threading.local()

    def here(self) -> bool:
        """True if functions are to run so in this thread, by such a block or by the setting."""
        if not self._blocks:
            return tf.config.functions_run_eagerly()  # type: ignore[no-any-return]
        return self._before or getattr(self._here, "blocks", 0) > 0

    @contextmanager
    def functions(self) -> Iterator[None]:
        """One such block."""
        with self._lock:
            if not self._blocks:
                self._before = tf.config.functions_run_eagerly()
                tf.config.run_functions_eagerly(True)
            self._blocks += 1
        self._here.blocks = getattr(self._here, "blocks", 0) + 1
        try:
            yield
        finally:
            self._here.blocks -= 1
            with self._lock:
                self._blocks -= 1
                if not self._blocks:
                    tf.config.run_functions_eagerly(self._before)


inlined = _Inlined()


def has_functions(layers: Sequence[Any]) -> bool:
    """True if a layer has a `tf.function` among its methods and attributes."""
    return any(map(_declares, map(type, layers))) or any(
        _is_function(x) for layer in layers for x in vars(layer).values()
    )


@functools.cache
def _declares(kind: type) -> bool:
    return any(_is_function(x) for base in kind.__mro__ for x in vars(base).values())


def _is_function(x: object) -> bool:
    return isinstance(x, tf.types.experimental.PolymorphicFunction)


def _refuse_new_variables(make: Callable[..., Any], **kwargs: Any) -> Any:
    del make
    raise InputError(
        f"the model makes the variable {kwargs.get('name') or 'Variable'!r} when it is called, too "
        "late for it to be adapted. Call it once on data before."
    )
