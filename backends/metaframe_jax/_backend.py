"""JAX: every transform of the contract is JAX's own, used on flat tuples."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np

from metaframe.backend.contract import Backend
from metaframe.backend.model import ModelAdapter
from metaframe.backend.neutral import plain
from metaframe.backend.types import (
    Array,
    Arrays,
    ArraysFn,
    MappedGradient,
    RowFn,
    ScalarFn,
    TaskCost,
)
from metaframe.backend.workers import Place, Workers
from metaframe.errors import BackendError, nearest
from metaframe.tree.foreign import Node
from metaframe_jax import _private
from metaframe_jax._devices import on_cpu
from metaframe_jax._models import find_adapter
from metaframe_jax._nn import JaxNN
from metaframe_jax._nodes import node_of
from metaframe_jax._ops import JaxOps
from metaframe_jax._roots import with_finite_roots

UNROLL_AT_MOST = 8
"""Inner loops up to this many steps are unrolled, longer ones become one `lax.scan`.

Unrolled code runs up to a quarter faster and compiles in time proportional to the steps. Steps that
are recomputed to save memory are always rolled: XLA sees through an unrolled recomputation, and
keeps what was to be computed again.
"""


_KIND = operator.attrgetter("aval", "sharding")


class JaxBackend(Backend):
    """The backend contract on JAX."""

    name = "jax"
    loops_in_programs = True
    chunk_elements = 2**20

    def __init__(self) -> None:
        self.ops = JaxOps()
        self.nn = JaxNN()

    def owns(self, x: object) -> bool:
        return isinstance(x, jax.Array)

    def asarray(self, x: Any, dtype: str | None = None, device: str | None = None) -> Array:
        if dtype == "float64" and jax.dtypes.canonicalize_dtype("float64") != np.float64:
            raise BackendError(
                "JAX has 64-bit types switched off and would return float32. Before any other "
                'use of JAX: jax.config.update("jax_enable_x64", True).'
            )
        x = plain(x)
        if isinstance(x, np.ndarray):  # converted here it need not be by an operation of JAX
            x = x.astype(jax.dtypes.canonicalize_dtype(dtype or x.dtype), copy=False)
        array = jnp.asarray(x, dtype)
        return array if device is None else jax.device_put(array, self._device(device))

    def _device(self, name: str) -> Any:
        found = {str(d): d for d in jax.devices()} | {d.platform: d for d in jax.devices()[::-1]}
        if name not in found:
            try:
                return jax.devices(name)[0]
            except RuntimeError:
                raise BackendError(f"JAX has no device {name!r}. {nearest(name, found)}") from None
        return found[name]

    def to_numpy(self, x: Array) -> np.ndarray[Any, Any]:
        return np.asarray(x)

    def from_dlpack(self, x: Any) -> Array | None:
        try:
            return jnp.from_dlpack(x)
        except (BufferError, RuntimeError, TypeError, ValueError):
            return None  # strides, a device or a dtype that XLA does not take

    def double_precision(self) -> AbstractContextManager[object]:
        scope: AbstractContextManager[object] = jax.enable_x64(True)
        return scope

    def dtype_name(self, x: Array) -> str:
        return str(x.dtype)

    def is_floating(self, x: Array) -> bool:
        return bool(jnp.issubdtype(x.dtype, jnp.floating))

    def is_traced(self, x: Array) -> bool:
        return _private.is_tracer(x)

    def devices(self) -> tuple[str, ...]:
        return tuple(str(device) for device in jax.devices())

    def device_of(self, x: Array) -> str:
        # Of an array on many devices one that this process has.
        return str(min(x.sharding.addressable_devices, key=lambda device: device.id))

    def on_cpu(self, x: Array) -> bool:
        return on_cpu(x)

    def stop_gradient(self, x: Array) -> Array:
        return jax.lax.stop_gradient(x)

    def value_and_grad(
        self, fn: ScalarFn, on_disconnected: Callable[[], None] | None = None
    ) -> Callable[[Arrays], tuple[Array, Arrays, Arrays]]:
        def checked(xs: Arrays) -> tuple[Array, Arrays]:
            value, aux = fn(xs)
            if on_disconnected is not None and not _private.depends(value, xs):
                on_disconnected()
            return value, aux

        transformed = jax.value_and_grad(checked, has_aux=True)

        def call(xs: Arrays) -> tuple[Array, Arrays, Arrays]:
            if on_disconnected is not None and not _private.connected(fn, xs):
                on_disconnected()
            (value, aux), grads = transformed(xs)
            return value, aux, grads

        return call

    def vjp(self, fn: ArraysFn, xs: Arrays, cotangents: Arrays) -> Arrays:
        _, pull_back = jax.vjp(fn, xs)
        (result,) = pull_back(cotangents)
        return tuple(result)

    def jvp(self, fn: ArraysFn, xs: Arrays, tangents: Arrays) -> Arrays:
        return tuple(jax.jvp(fn, (xs,), (tangents,))[1])

    def custom_vjp(
        self, forward: ArraysFn, backward: Callable[[Arrays, Arrays], Arrays]
    ) -> ArraysFn:
        rule = jax.custom_vjp(forward)
        rule.defvjp(
            lambda xs: (forward(xs), xs), lambda xs, cotangents: (backward(xs, cotangents),)
        )
        return rule

    def checkpoint(self, fn: ArraysFn) -> ArraysFn:
        # Lifts what `fn` closes over, and has a forward mode.
        return jax.checkpoint(fn)

    def recompute(self, fn: ArraysFn) -> ArraysFn:
        return jax.checkpoint(fn)  # whose transpose is one too

    def lift(self, fn: ArraysFn, xs: Arrays) -> tuple[ArraysFn, Arrays]:
        # Not jax.closure_convert: it leaves integers where they are, and `scan` fails at those.
        jaxpr = jax.make_jaxpr(lambda *xs: fn(xs))(*xs)

        def lifted(arrays: Arrays) -> Arrays:
            closed = jax.extend.core.ClosedJaxpr(jaxpr.jaxpr, arrays[len(xs) :])
            return tuple(jax.extend.core.jaxpr_as_fun(closed)(*arrays[: len(xs)]))

        return lifted, tuple(jaxpr.consts)

    def hidden_inputs(self, fn: ArraysFn, xs: Arrays) -> str:
        jax.eval_shape(fn, xs)  # nothing is computed
        return ""

    def with_finite_roots(self, fn: ArraysFn) -> ArraysFn:
        return with_finite_roots(fn)

    def vmap(self, fn: ArraysFn) -> ArraysFn:
        return jax.vmap(fn)

    def mapped_value_and_grad(self, fn: TaskCost) -> MappedGradient:
        def total(xs: Arrays, held: Arrays, tasks: Arrays) -> tuple[Array, tuple[Array, Arrays]]:
            values, aux = jax.vmap(fn, (None, None, 0))(xs, held, tasks)
            return values.sum(), (values, aux)

        transformed = jax.grad(total, has_aux=True)

        def call(xs: Arrays, held: Arrays, tasks: Arrays) -> tuple[Array, Arrays, Arrays]:
            grads, (values, aux) = transformed(xs, held, tasks)
            return values, aux, grads

        return call

    def scan(self, fn: RowFn, carry: Arrays, xs: Arrays) -> tuple[Arrays, Arrays]:
        if not _staged():
            return super().scan(fn, carry, xs)
        final, ys = jax.lax.scan(fn, carry, xs)
        return final, ys

    def scan_rows(
        self,
        fn: RowFn,
        carry: Arrays,
        xs: Arrays,
        first: Array,
        count: Array,
    ) -> tuple[Arrays, Arrays]:
        # A loop whose length is known would be another program for each length: XLA unrolls short
        # ones, and fuses what is in them with what is around them.
        rows = [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in xs]
        _, shapes = jax.eval_shape(fn, carry, tuple(rows))
        tables = tuple(jnp.zeros((xs[0].shape[0], *y.shape), y.dtype) for y in shapes)

        def body(i: Array, state: tuple[Arrays, Arrays]) -> tuple[Arrays, Arrays]:
            carry, tables = state
            row = tuple(jax.lax.dynamic_index_in_dim(x, i, keepdims=False) for x in xs)
            carry, ys = fn(*jax.lax.optimization_barrier((carry, row)))
            written = (
                jax.lax.dynamic_update_index_in_dim(table, y, i, 0)
                for table, y in zip(tables, jax.lax.optimization_barrier(ys), strict=True)
            )
            return carry, tuple(written)

        found: tuple[Arrays, Arrays] = jax.lax.fori_loop(
            first, first + count, body, (carry, tables)
        )
        return found

    def repeat(
        self, fn: RowFn, carry: Arrays, times: int, *, rows: Arrays = (), rolled: bool = False
    ) -> tuple[Arrays, Arrays]:
        if times <= (1 if rolled else UNROLL_AT_MOST) or not _staged():
            return super().repeat(fn, carry, times, rows=rows)
        final, ys = jax.lax.scan(fn, carry, rows, length=times)
        return final, ys

    def signature(self, x: Array) -> Hashable:
        try:
            return _KIND(x)
        except AttributeError:  # a tracer is nowhere
            return x.aval  # type: ignore[no-any-return]

    def ambient(self) -> Hashable:
        return _private.settings()

    def runs_inline(self, xs: Sequence[Array]) -> bool:
        # Programs are transformed like other functions, but not where jax.jit does nothing.
        return bool(jax.config.jax_disable_jit)  # type: ignore[attr-defined]

    def compile(self, fn: ArraysFn, examples: Arrays) -> ArraysFn:
        from metaframe_jax import _distributed

        return _distributed.compiled(fn, examples)

    def needed_a_value(self, error: Exception) -> bool:
        return isinstance(
            error,
            (
                jax.errors.ConcretizationTypeError,
                jax.errors.NonConcreteBooleanIndexError,
                jax.errors.TracerArrayConversionError,
                jax.errors.TracerIntegerConversionError,
            ),
        )

    def register_node(
        self,
        cls: type,
        flatten: Callable[[Any], tuple[list[Any], tuple[str, ...], tuple[str, ...]]],
        unflatten: Callable[[Any, Iterable[Any]], Any],
    ) -> None:
        def with_keys(node: Any) -> tuple[list[tuple[Any, Any]], tuple[str, ...]]:
            children, metadata, keys = flatten(node)
            named = [jax.tree_util.DictKey(key) for key in keys]
            return list(zip(named, children, strict=True)), metadata

        jax.tree_util.register_pytree_with_keys(cls, with_keys, unflatten)

    def node(self, x: object) -> Node | None:
        return node_of(x)

    def workers(self) -> Workers:
        from metaframe_jax import _distributed

        return _distributed.workers()

    def join(self, place: Place) -> AbstractContextManager[object]:
        from metaframe_jax import _distributed

        return _distributed.join(place)

    def lost_others(self, error: Exception) -> bool:
        from metaframe_jax import _distributed

        return _distributed.lost_others(error)

    def adapter(self, model: object) -> ModelAdapter | None:
        return find_adapter(model, self)


def _staged() -> bool:
    """True if a program is being recorded.

    Run eagerly, a loop of `lax` would be compiled for every call, since its body is another
    function each time, and stay in JAX's caches for good, megabytes each.
    """
    return _private.staged()
