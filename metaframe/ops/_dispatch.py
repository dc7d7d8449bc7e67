"""From the arguments of a public function to a backend and arrays of it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

from metaframe.backend.contract import Backend
from metaframe.backend.selection import backend_of, convert_neutral
from metaframe.backend.types import Array, Arrays
from metaframe.errors import InputTypeError

F = TypeVar("F", bound=Callable[..., Any])


ELEMENTWISE: dict[str, Callable[[Any], Any]] = {}
"""The functions of one element that every backend has as a method: by name the formula in NumPy."""


def elementwise(formula: Callable[[Any], Any]) -> Callable[[F], F]:
    """Make a function `(x: Array) -> Array` the method of the same name of the arrays' backend."""

    def decorate(fn: F) -> F:
        name = fn.__name__
        ELEMENTWISE[name] = formula

        @functools.wraps(fn)
        def call(x: Array) -> Array:
            backend, (x,) = native(x)
            return getattr(backend.ops, name)(x)

        return cast(F, call)

    return decorate


def native(*xs: Array) -> tuple[Backend, Arrays]:
    """The backend of `xs`, and `xs` with neutral ones converted to it."""
    backend = backend_of(*xs)
    return backend, convert_neutral(xs, backend)


def native_or_number(*xs: Array | float) -> tuple[Backend, Arrays]:
    """As `native`, but a number next to an array stays one, and so takes the array's dtype.

    Raises:
        InputTypeError: a float that the arrays' dtype cannot hold.
    """
    if all(isinstance(x, int | float) for x in xs):
        return native(*xs)
    backend = backend_of(*xs)
    found = tuple(_keep_number(x, backend) for x in xs)
    arrays = [x for x in found if not isinstance(x, int | float)]
    if not any(backend.is_floating(x) for x in arrays):
        for number in found:
            if isinstance(number, float):
                raise InputTypeError(
                    f"{number} next to an array of {backend.dtype_name(arrays[0])}: frameworks "
                    "round it in different ways. Convert the array with ops.astype."
                )
    return backend, found


def _keep_number(x: Array | float, backend: Backend) -> Array | float:
    if isinstance(x, float):
        return float(x)  # a NumPy scalar is an array to JAX and would widen the result
    return x if isinstance(x, int) else convert_neutral((x,), backend)[0]


def need_floating(name: str, backend: Backend, x: Array) -> None:
    """Refuse integers where frameworks disagree: TensorFlow rounds, torch refuses, JAX converts.

    Raises:
        InputTypeError: `x` is not floating.
    """
    if not backend.is_floating(x):
        raise InputTypeError(
            f"{name} needs a floating array, received {backend.dtype_name(x)}. "
            'Convert it: ops.astype(x, "float32").'
        )
