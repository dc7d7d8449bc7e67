"""TensorFlow: the contract over GradientTape, vectorized_map and tf.function."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import numpy as np
import tensorflow as tf

from metaframe.backend.contract import Backend
from metaframe.backend.neutral import plain
from metaframe.backend.types import Array, Arrays, ArraysFn, RowFn, ScalarFn
from metaframe.backend.workers import ALONE, Place, Workers
from metaframe.errors import BackendError, InputError
from metaframe_tensorflow import _loop, _private
from metaframe_tensorflow._foreign import inlined, watched
from metaframe_tensorflow._lost import checked, refuse_lost
from metaframe_tensorflow._models import ModuleAdapter, VariablesAdapter
from metaframe_tensorflow._moments import exact_moments
from metaframe_tensorflow._nn import TensorFlowNN
from metaframe_tensorflow._ops import TensorFlowOps
from metaframe_tensorflow._remarks import without_remarks
from metaframe_tensorflow._roots import with_finite_roots
from metaframe_tensorflow._rule import closures, is_differentiable, with_rule

T = TypeVar("T")

UNROLL_AT_MOST = 8
"""Inner loops up to this many steps are unrolled in a graph, longer ones become one `while`."""

ALIGNMENT = 64
"""Bytes: what Eigen may assume of a tensor's memory, at the most."""

_NO_VALUE = (
    "symbolic Tensor (",
    "symbolic tf.Tensor (",
    "not 'SymbolicTensor'",
    "not SymbolicTensor",
    "'SymbolicTensor' object",
    "type 'SymbolicTensor' is not iterable",
    "No default session is registered",
    "must be a TF tensor, not Python object",
    "Expected any non-tensor type, but got a tensor instead",
)
"""The words of TensorFlow, Python and NumPy for a tensor of a graph asked for its value."""


@functools.cache
def _prepared() -> None:
    """Tell TensorFlow, before the first call of a public function, what to leave and to refuse."""
    _private.leave_alone("metaframe", "metaframe_tensorflow")
    _private.watch_rules(refuse_lost)


class TensorFlowBackend(Backend):
    """The backend contract on TensorFlow."""

    name = "tensorflow"
    loops_in_programs = True
    conformance_gaps: Mapping[str, str] = {
        "products/custom_vjp-of-vmap": "vectorized_map converts the operations inside a rule and "
        "loses the rule: take the gradient inside vmap, or write the rule as the true derivative"
    }

    def __init__(self) -> None:
        self.ops = TensorFlowOps()
        self.nn = TensorFlowNN()

    def opaque(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        _prepared()
        return fn

    def owns(self, x: object) -> bool:
        return isinstance(x, (tf.Tensor, tf.Variable))

    def asarray(self, x: Any, dtype: str | None = None, device: str | None = None) -> Array:
        if device is not None:
            if device not in (known := self.devices()):
                raise BackendError(
                    f"TensorFlow has no device {device!r} here. Known: {', '.join(known)}."
                )
            with tf.device(device):
                return tf.identity(self.asarray(x, dtype))
        if self.owns(x):
            array = tf.convert_to_tensor(x)
            return array if dtype is None else tf.cast(array, dtype)
        # Through NumPy, because tf.cast of a Python float goes through float32.
        return tf.constant(np.asarray(plain(x), dtype))

    def to_numpy(self, x: Array) -> np.ndarray[Any, Any]:
        return np.asarray(x.numpy())

    def to_dlpack(self, x: Array) -> Any:
        kind = x.dtype
        if kind == tf.string or kind.is_quantized or not kind.is_numpy_compatible:
            # TensorFlow aborts the process when it is asked for this memory.
            raise TypeError(f"{kind.name} has no memory that others could read")
        return tf.convert_to_tensor(x)

    def from_dlpack(self, x: Any) -> Array | None:
        try:
            capsule = x.__dlpack__()
            # TensorFlow takes unaligned memory, and aborts the process at the first use of it.
            aligned = _address(capsule) % ALIGNMENT == 0
            return tf.experimental.dlpack.from_dlpack(capsule) if aligned else None
        except (BufferError, RuntimeError, TypeError, ValueError, tf.errors.OpError):
            return None  # strides, a device or a dtype that TensorFlow does not take

    def dtype_name(self, x: Array) -> str:
        return str(x.dtype.name)

    def is_floating(self, x: Array) -> bool:
        return bool(x.dtype.is_floating)

    def is_traced(self, x: Array) -> bool:
        return not isinstance(x, tf.Variable) and not hasattr(x, "numpy")

    def seed_from(self, generator: object) -> int | None:
        if not isinstance(generator, tf.random.Generator):
            return None
        return int(generator.uniform((), 0, 2**63 - 1, tf.int64))

    def devices(self) -> tuple[str, ...]:
        # In a cluster those of every process are listed; a name without its task is one's own.
        names = (device.name for device in tf.config.list_logical_devices())
        return tuple(dict.fromkeys(name.rpartition("device:")[2] for name in names))

    def device_of(self, x: Array) -> str:
        return str(x.device).rpartition("/device:")[2]

    def on_cpu(self, x: Array) -> bool:
        # In a tf.function a tensor has no device yet; it goes to an accelerator if there is one.
        return "CPU" in x.device if x.device else not tf.config.list_logical_devices("GPU")

    def stop_gradient(self, x: Array) -> Array:
        return tf.stop_gradient(x)

    def value_and_grad(
        self, fn: ScalarFn, on_disconnected: Callable[[], None] | None = None
    ) -> Callable[[Arrays], tuple[Array, Arrays, Arrays]]:
        def call(xs: Arrays) -> tuple[Array, Arrays, Arrays]:
            # identity: a fresh tensor, so that the same array given twice gets two gradients.
            xs = tuple(tf.identity(x) for x in xs)
            with checked(), exact_moments(), _tape() as tape:
                tape.watch(xs)
                value, aux = fn(xs)
            grads = tape.gradient(value, xs)
            if on_disconnected is not None and all(g is None for g in grads):
                _refuse_stopped_recording()
                on_disconnected()
            return value, aux, tuple(map(_dense, grads, xs))

        return call

    def vjp(self, fn: ArraysFn, xs: Arrays, cotangents: Arrays) -> Arrays:
        xs = tuple(tf.identity(x) for x in xs)
        with checked(), exact_moments(), _tape() as tape:
            tape.watch(xs)
            outputs = fn(xs)
        grads = tape.gradient(outputs, xs, output_gradients=list(cotangents))
        return tuple(map(_dense, grads, xs))

    def jvp(self, fn: ArraysFn, xs: Arrays, tangents: Arrays) -> Arrays:
        # The gradient graph of a loop captures tensors of the loop without their tangents.
        xs = tuple(tf.identity(x) for x in xs)
        with (
            exact_moments(),
            tf.autodiff.ForwardAccumulator(list(xs), list(tangents)) as accumulator,
        ):
            outputs = fn(xs)
        return tuple(
            accumulator.jvp(y, unconnected_gradients=tf.UnconnectedGradients.ZERO) for y in outputs
        )

    def custom_vjp(
        self, forward: ArraysFn, backward: Callable[[Arrays, Arrays], Arrays]
    ) -> ArraysFn:
        return with_rule(forward, backward, self._closed_over)

    def _closed_over(self, fn: ArraysFn, xs: Arrays) -> Arrays:
        if tf.executing_eagerly() and not _private.may_record():
            return ()
        try:
            return closures(fn, xs)
        except Exception as error:
            if not self.needed_a_value(error):
                raise
            return ()  # `hidden_inputs` has looked

    def loses_closures(self, fn: ArraysFn, xs: Arrays) -> str:
        closed = [x for x in self._closed_over(fn, xs) if is_differentiable(x)]
        if any(isinstance(x, tf.Variable) and x.trainable for x in closed):
            return "a variable"
        return "a tensor" if closed and _private.records(closed) else ""

    def hidden_inputs(self, fn: ArraysFn, xs: Arrays) -> str:
        from metaframe_tensorflow._hidden import hidden_effect

        try:
            return hidden_effect(fn, xs)
        except Exception as error:
            if not self.needed_a_value(error):
                raise
        # It can run eagerly and cannot be traced; that it draws random numbers is not known then.
        if _private.records(fn(tuple(map(self.stop_gradient, xs)))):
            return "depends on a tensor that it closes over, whose gradient would be lost"
        return ""

    def with_finite_roots(self, fn: ArraysFn) -> ArraysFn:
        return with_finite_roots(fn)

    def vmap(self, fn: ArraysFn) -> ArraysFn:
        def mapped(*xs: Array) -> list[Array]:
            traced: list[bool] = []

            def of_row(row: list[Array]) -> Arrays:
                # identity: a constant from outside becomes a tensor of the graph, and is repeated.
                results = tuple(tf.identity(y) for y in fn(tuple(row)))
                traced.append(True)
                return results

            try:
                # A note of vectorized_map to its own authors, one for each convolution. That their
                # gradients are taken task by task on TensorFlow is in docs/performance.md.
                with without_remarks("Conv2DBackpropFilter uses a while_loop"):
                    return list(tf.vectorized_map(of_row, xs))
            except Exception as error:
                if not traced:
                    raise  # by `fn`, and not by what is made of it
                raise BackendError(_not_vectorised(error)) from error

        def call(xs: Arrays) -> Arrays:
            if not tf.executing_eagerly():
                return tuple(mapped(*xs))
            if _private.forward_mode():
                # Forward mode over the gradient of a graph function fails with an InternalError.
                rows = [fn(tuple(x[i] for x in xs)) for i in range(xs[0].shape[0])]
                return tuple(map(tf.stack, zip(*rows, strict=True)))
            # vectorized_map makes a graph even for one eager call, and warns of it from the
            # fifth call on. In a function of our own, traced by hand, it does so silently.
            graph = tf.function(mapped, autograph=False)
            return tuple(graph.get_concrete_function(*xs)(*xs))

        return call

    def scan(self, fn: RowFn, carry: Arrays, xs: Arrays) -> tuple[Arrays, Arrays]:
        if tf.executing_eagerly():
            return super().scan(fn, carry, xs)
        length = xs[0].shape[0]
        # The first row runs outside the loop and tells what the others will look like.
        carry, first = fn(carry, tuple(x[0] for x in xs))
        stores = [
            tf.TensorArray(y.dtype, size=length, element_shape=y.shape).write(0, y) for y in first
        ]

        def body(i: Array, carry: Arrays, stores: list[Any]) -> tuple[Array, Arrays, list[Any]]:
            carry, ys = fn(carry, tuple(x[i] for x in xs))
            written = [store.write(i, y) for store, y in zip(stores, ys, strict=True)]
            return i + 1, tuple(carry), written

        _, carry, stores = tf.while_loop(
            lambda i, *_: i < length,
            body,
            (tf.constant(1), tuple(carry), stores),
            parallel_iterations=1,
        )
        return tuple(carry), tuple(store.stack() for store in stores)

    def repeat(
        self, fn: RowFn, carry: Arrays, times: int, *, rows: Arrays = (), rolled: bool = False
    ) -> tuple[Arrays, Arrays]:
        if times > (1 if rolled else UNROLL_AT_MOST) and not tf.executing_eagerly():
            found = _loop.rolled(fn, carry, times, rows)
            if found is not None:
                return found
        return super().repeat(fn, carry, times, rows=rows)

    def unstack(self, x: Array) -> Sequence[Array]:
        return tf.unstack(x)  # type: ignore[no-any-return]

    def scan_rows(
        self,
        fn: RowFn,
        carry: Arrays,
        xs: Arrays,
        first: Array,
        count: Array,
    ) -> tuple[Arrays, Arrays]:
        if tf.executing_eagerly():
            return super().scan_rows(fn, carry, xs, first, count)
        width = len(carry)

        def of_row(arrays: Arrays) -> Arrays:
            after, ys = fn(arrays[:width], arrays[width:])
            return (*after, *ys)

        from metaframe_tensorflow import _compile

        # A function of its own, which XLA compiles where it would compile a step alone.
        step = _compile.unit(of_row, (*carry, *(x[0] for x in xs)))
        shapes = step.structured_outputs[width:]
        stores = [
            tf.TensorArray(y.dtype, size=xs[0].shape[0], element_shape=y.shape) for y in shapes
        ]

        def body(i: Array, carry: Arrays, stores: list[Any]) -> tuple[Array, Arrays, list[Any]]:
            results = step(*carry, *(x[i] for x in xs))
            written = [s.write(i, y) for s, y in zip(stores, results[width:], strict=True)]
            return i + 1, tuple(results[:width]), written

        _, carry, stores = tf.while_loop(
            lambda i, *_: i < first + count,
            body,
            (first, tuple(carry), stores),
            parallel_iterations=1,
        )
        return tuple(carry), tuple(store.stack() for store in stores)

    def needed_a_value(self, error: Exception) -> bool:
        if isinstance(error, tf.errors.OperatorNotAllowedInGraphError):
            return True
        # What Python itself asks of a tensor has no class of its own.
        kinds = (NotImplementedError, AttributeError, TypeError, ValueError, tf.errors.OpError)
        return isinstance(error, kinds) and any(words in str(error) for words in _NO_VALUE)

    def ambient(self) -> Hashable:
        return (
            tf.config.experimental.tensor_float_32_execution_enabled(),
            tf.distribute.get_strategy() if tf.distribute.has_strategy() else None,
            _private.device_scope(),
        )

    def runs_inline(self, xs: Sequence[Array]) -> bool:
        return not tf.executing_eagerly() or inlined.here()

    def user_function(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        return _private.translated(fn)

    def signature(self, x: Array) -> Hashable:
        return tuple(x.shape), x.dtype, x.device

    def compile(self, fn: ArraysFn, examples: Arrays) -> ArraysFn:
        from metaframe_tensorflow._compile import compile_graph

        return compile_graph(fn, examples)

    def workers(self) -> Workers:
        if not tf.distribute.has_strategy():
            return ALONE
        from metaframe_tensorflow import _distributed

        return _distributed.workers()

    def join(self, place: Place) -> AbstractContextManager[object]:
        from metaframe_tensorflow import _distributed

        return _distributed.join(place)

    def lost_others(self, error: Exception) -> bool:
        from metaframe_tensorflow import _distributed

        return _distributed.lost_others(error)

    def adapter(self, model: object) -> ModuleAdapter | None:
        return ModuleAdapter(model, self) if isinstance(model, tf.Module) else None

    def run_foreign(self, run: Callable[[], T], *, twice: bool) -> tuple[T, Sequence[Any]]:
        del twice
        with inlined.functions():
            return watched(run)

    def live(self, values: dict[str, Array]) -> VariablesAdapter:
        return VariablesAdapter(values, self)


def _tape() -> tf.GradientTape:
    return tf.GradientTape(watch_accessed_variables=False)


def _not_vectorised(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (
        f"TensorFlow cannot vectorise the model or the loss over tasks: {' '.join(lines)[:200]} It "
        "does not know the derivatives of a loop or a branch there, such as that of a recurrent "
        "layer of Keras without unroll=True, a tf.while_loop or a tf.cond. Run the tasks one after "
        'the other, task_map="scan" or task_map="loop".'
    )


def _refuse_stopped_recording() -> None:
    x = tf.constant(1.0)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = 2 * x
    if tape.gradient(y, x) is None:
        raise InputError(
            "no gradient can be taken where TensorFlow records nothing, such as within "
            'tf.recompute_grad. Leave it out; mode="remat" recomputes inner steps.'
        )


def _address(capsule: Any) -> int:
    """The address of the memory that a DLPack capsule describes.

    A DLTensor begins with the pointer; its byte offset comes last, at byte 40.
    """
    pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
    pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    tensor = pointer_of(capsule, b"dltensor")
    data, offset = (ctypes.c_uint64.from_address(tensor + at).value for at in (0, 40))
    return int(data + offset)


def _dense(grad: Any, x: Array) -> Array:
    if grad is None:
        return tf.zeros_like(x)
    return tf.convert_to_tensor(grad)  # gathers have sparse gradients (IndexedSlices)
