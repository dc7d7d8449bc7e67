"""MLX: lazy arrays, transforms of functions, and a compiler for whole graphs.

Operations only build a graph, and a transform walks the graph that a function has built. There is
no loop in it, so `scan` and `repeat` stay what they are by default: loops in Python, unrolled.
"""

from __future__ import annotations

import importlib
import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import mlx.core as mx
import numpy as np

from metaframe.backend import Array, Arrays, ArraysFn, Backend, ScalarFn
from metaframe.errors import BackendError
from metaframe_mlx._nn import MLXNN
from metaframe_mlx._ops import MLXOps, dtype_named, name_of

IN_FLOAT32 = "MLX 0.32 computes sin, cos and erf of float64 in float32, to 1e-7"
UNSEEN_CLOSURE = "MLX does not show what a function closes over, and a rule around it loses that"
NO_VALUE = "during function transformations"
"""What MLX says when an array is asked for its value where it has none."""


class MLXBackend(Backend):
    """The backend contract on MLX."""

    name = "mlx"
    signature = operator.attrgetter("shape", "dtype")
    conformance_gaps: Mapping[str, str] = {
        "ops/sin-*/value": IN_FLOAT32,
        "ops/sin-*/derivatives": IN_FLOAT32,
        "ops/cos-*/value": IN_FLOAT32,
        "ops/cos-*/derivatives": IN_FLOAT32,
        "nn/gelu-*/value": IN_FLOAT32,
        "nn/gelu-*/derivatives": IN_FLOAT32,
        "inner_loop/remat/closed-over": UNSEEN_CLOSURE,
        "inner_loop/mixed/closed-over": UNSEEN_CLOSURE,
    }

    def __init__(self) -> None:
        # On the CPU MLX has a C++ compiler make its kernels, which takes seconds.
        self.compiles_quickly = mx.default_device().type == mx.gpu
        self.ops = MLXOps()
        self.nn = MLXNN()

    # -- arrays --------------------------------------------------------------------------

    def owns(self, x: object) -> bool:
        return isinstance(x, mx.array)

    def asarray(self, x: Any, dtype: str | None = None, device: str | None = None) -> Array:
        self._check_device(device)
        if dtype == "float64" and mx.default_device().type == mx.gpu:
            raise BackendError(
                "MLX has float64 on the CPU only. Before any other use of MLX: "
                "mlx.core.set_default_device(mlx.core.cpu)."
            )
        if isinstance(x, mx.array):
            return x if dtype is None else x.astype(dtype_named(dtype))
        return _from_numpy(np.asarray(x), dtype)

    def _check_device(self, device: str | None) -> None:
        if device is not None and device not in (known := self.devices()):
            raise BackendError(
                f"MLX has no device {device!r} in use. Known: {', '.join(known)}. Its memory is "
                "shared; to compute elsewhere: mlx.core.set_default_device."
            )

    def to_numpy(self, x: Array) -> np.ndarray[Any, Any]:
        if x.dtype == mx.bfloat16:
            # Not a type of NumPy's own.
            bfloat16 = importlib.import_module("ml_dtypes").bfloat16
            return np.array(x.view(mx.uint16)).view(bfloat16)
        return np.array(x)

    def dtype_name(self, x: Array) -> str:
        return name_of(x.dtype)

    def is_floating(self, x: Array) -> bool:
        return bool(mx.issubdtype(x.dtype, mx.floating))

    def is_traced(self, x: Array) -> bool:
        # MLX does not tell; but who asks wants to look at the value, which can be tried.
        try:
            mx.eval(x)
        except ValueError as error:
            return self.needed_a_value(error)
        return False

    def devices(self) -> tuple[str, ...]:
        return (mx.default_device().type.name,)

    def device_of(self, x: Array) -> str:
        return str(mx.default_device().type.name)

    def on_cpu(self, x: Array) -> bool:
        return bool(mx.default_device().type == mx.cpu)

    def double_precision(self) -> AbstractContextManager[object]:
        scope: AbstractContextManager[object] = mx.stream(mx.cpu)
        return scope

    # -- transforms ----------------------------------------------------------------------

    def stop_gradient(self, x: Array) -> Array:
        return mx.stop_gradient(x)

    def value_and_grad(
        self, fn: ScalarFn, on_disconnected: Callable[[], None] | None = None
    ) -> Callable[[Arrays], tuple[Array, Arrays, Arrays]]:
        def call(xs: Arrays) -> tuple[Array, Arrays, Arrays]:
            reached: list[bool] = []
            besides: list[Arrays] = []

            def traced(xs: list[Array]) -> Array:
                value, aux = fn(tuple(xs) if on_disconnected is None else _watched(xs, reached))
                # On the side: as outputs they would be constants to the transforms outside.
                besides.append(aux)
                return value

            value, grads = mx.value_and_grad(traced)(list(xs))
            if on_disconnected is not None and not reached:
                on_disconnected()
            return value, besides[0], tuple(grads)

        return call

    def vjp(self, fn: ArraysFn, xs: Arrays, cotangents: Arrays) -> Arrays:
        return tuple(mx.vjp(_flat(fn), list(xs), list(cotangents))[1])

    def jvp(self, fn: ArraysFn, xs: Arrays, tangents: Arrays) -> Arrays:
        return tuple(mx.jvp(_flat(fn), list(xs), list(tangents))[1])

    def custom_vjp(
        self, forward: ArraysFn, backward: Callable[[Arrays, Arrays], Arrays]
    ) -> ArraysFn:
        def transposed(xs: Arrays, cotangents: Arrays) -> Arrays:
            found = backward(xs, cotangents)
            return tuple(
                mx.zeros_like(x) if g is None else g for x, g in zip(xs, found, strict=True)
            )

        rule: Any = mx.custom_function(_flat(forward))

        @rule.vjp  # type: ignore[untyped-decorator]
        def pull_back(xs: Any, cotangents: Any, outputs: Any) -> list[Array]:
            del outputs
            return list(transposed(_several(xs), _several(cotangents)))

        @rule.vmap  # type: ignore[untyped-decorator]
        def mapped(xs: Any, axes: Any) -> tuple[list[Array], list[int]]:
            # By default the mapped function would not know the rule any more.
            pairs = list(zip(_several(xs), _several(axes), strict=True))
            size = next(x.shape[axis] for x, axis in pairs if axis is not None)
            rows = tuple(
                mx.broadcast_to(x, (size, *x.shape)) if axis is None else mx.moveaxis(x, axis, 0)
                for x, axis in pairs
            )
            rows_forward, rows_back = self.vmap(forward), self.vmap(_joined(transposed, len(rows)))
            outputs = self.custom_vjp(rows_forward, lambda xs, c: rows_back((*xs, *c)))(rows)
            return list(outputs), [0] * len(outputs)

        return lambda xs: _several(rule(*xs))

    def vmap(self, fn: ArraysFn) -> ArraysFn:
        mapped = mx.vmap(_flat(fn))
        return lambda xs: tuple(mapped(*xs))

    def compile(self, fn: ArraysFn, examples: Arrays) -> ArraysFn:
        compiled = mx.compile(_flat(fn))
        compiled(*examples)  # traced now, so that errors come now; nothing is computed

        return lambda xs: tuple(compiled(*xs))

    def needed_a_value(self, error: Exception) -> bool:
        return isinstance(error, ValueError) and NO_VALUE in str(error)


def _from_numpy(values: np.ndarray[Any, Any], dtype: str | None) -> Array:
    values = np.array(values, order="C")  # MLX takes no negative strides
    if values.dtype.name == "bfloat16":
        array = mx.array(values.view(np.uint16)).view(mx.bfloat16)
        return array if dtype is None else array.astype(dtype_named(dtype))
    # With its dtype: left alone, MLX makes float32 of float64.
    return mx.array(values, dtype_named(dtype or values.dtype.name))


def _flat(fn: ArraysFn) -> Callable[..., list[Array]]:
    return lambda *xs: list(fn(xs))


def _several(xs: Any) -> Arrays:
    """MLX hands a single argument over as it is, several in a sequence."""
    return tuple(xs) if isinstance(xs, Sequence) else (xs,)


def _joined(fn: Callable[[Arrays, Arrays], Arrays], count: int) -> ArraysFn:
    """`fn` of two tuples, the first of `count` arrays, as a function of one."""
    return lambda xs: fn(xs[:count], xs[count:])


def _watched(xs: Sequence[Array], reached: list[bool]) -> Arrays:
    """`xs` through an identity that notes when a cotangent comes back to it."""
    identity: Any = mx.custom_function(lambda *xs: list(xs))

    @identity.vjp  # type: ignore[untyped-decorator]
    def note(primals: Any, cotangents: Any, outputs: Any) -> list[Array]:
        del primals, outputs
        reached.append(True)
        return list(cotangents)

    return _several(identity(*xs))
