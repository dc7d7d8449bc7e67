"""From the arguments of a public function to a backend and arrays of it."""

from __future__ import annotations

from metaframe.backend import Array, Arrays, Backend, backend_of, convert_neutral


def native(*xs: Array) -> tuple[Backend, Arrays]:
    """The backend of `xs`, and `xs` with neutral ones converted to it."""
    backend = backend_of(*xs)
    return backend, convert_neutral(xs, backend)


def native_or_number(*xs: Array | float) -> tuple[Backend, Arrays]:
    """As `native`, but a number next to an array stays one, and so takes the array's dtype."""
    if all(isinstance(x, int | float) for x in xs):
        return native(*xs)
    backend = backend_of(*xs)
    return backend, tuple(_keep_number(x, backend) for x in xs)


def _keep_number(x: Array | float, backend: Backend) -> Array | float:
    if isinstance(x, float):
        return float(x)  # a NumPy scalar is an array to JAX and would widen the result
    return x if isinstance(x, int) else convert_neutral((x,), backend)[0]
