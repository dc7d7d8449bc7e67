"""PyTorch: the contract over `torch.func`.

Two paths in torch are silently wrong and never taken here: `grad` of a `vmap` (wrong second
derivatives through fused normalisation layers; callers take `vmap` of `grad`, and see `_tape`), and
compiling a cost function on its own (loses the second-order term; `compile` traces the finished
gradient to a graph and compiles that).
"""

from __future__ import annotations

import importlib
import operator
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.dlpack import from_dlpack

from metaframe.backend.contract import Backend
from metaframe.backend.neutral import plain
from metaframe.backend.types import (
    Array,
    Arrays,
    ArraysFn,
    MappedGradient,
    ObjectiveFn,
    ScalarFn,
    TaskCost,
)
from metaframe.backend.workers import ALONE, Place, Workers
from metaframe.errors import BackendError
from metaframe_torch import _foreign, _private, _tape
from metaframe_torch._ambient import Ambient
from metaframe_torch._calls import InExactForms
from metaframe_torch._left import taken_away
from metaframe_torch._models import KeptAdapter, LearnedAdapter, TorchAdapter, tape_gradient
from metaframe_torch._nn import TorchNN
from metaframe_torch._ops import TorchOps
from metaframe_torch._optim import TorchOptimizer
from metaframe_torch._refusals import in_our_words
from metaframe_torch._roots import with_finite_roots
from metaframe_torch._threads import threads_for

T = TypeVar("T")


class TorchBackend(Backend):
    """The backend contract on PyTorch."""

    name = "torch"
    module_base = torch.nn.Module
    compiles_quickly = False
    chunk_elements = 2**20
    signature = operator.attrgetter("shape", "dtype", "device", "layout")
    # Some operations, such as mse_loss, fail where one input has a tangent and another has none.
    forward_needs_tangents = True

    def __init__(self) -> None:
        self.ops = TorchOps()
        self.nn = TorchNN()

    def owns(self, x: object) -> bool:
        return isinstance(x, torch.Tensor)

    def asarray(self, x: Any, dtype: str | None = None, device: str | None = None) -> Array:
        x = plain(x)
        if isinstance(x, np.ndarray):
            x = _readable(x)
        kind = None if dtype is None else getattr(torch, dtype)
        try:
            if isinstance(x, torch.Tensor):  # as_tensor would take it to the default device
                return x.to(device or x.device, kind or x.dtype)
            array = torch.as_tensor(x, dtype=kind, device=device)
        except (RuntimeError, AssertionError) as error:
            if device is None:
                raise
            known = ", ".join(self.devices())
            raise BackendError(f"torch has no device {device!r} here. Known: {known}.") from error
        self.check_values((array,))
        return array

    def check_values(self, xs: Arrays) -> None:
        if any(x.is_meta for x in xs):
            raise BackendError(
                "tensors on the device 'meta' have no values, and so would the results. Choose "
                'another device: torch.set_default_device("cpu"), or module.to_empty(device="cpu") '
                "and load the parameters."
            )

    def to_numpy(self, x: Array) -> np.ndarray[Any, Any]:
        x = x.detach().cpu().resolve_conj().resolve_neg()
        if x.dtype == torch.bfloat16:
            # Not a type of NumPy's own; the package that adds it comes with JAX and TensorFlow.
            bfloat16 = importlib.import_module("ml_dtypes").bfloat16
            return np.asarray(x.contiguous().view(torch.int16).numpy().view(bfloat16))
        return np.asarray(x.numpy())

    def to_dlpack(self, x: Array) -> Any:
        # The protocol knows nothing of signs that are still to be applied.
        return x.detach().resolve_conj().resolve_neg()

    def from_dlpack(self, x: Any) -> Array | None:
        try:
            return from_dlpack(x)
        except (BufferError, RuntimeError, TypeError, ValueError):
            return None  # a device or a dtype that torch does not take

    def seed_from(self, generator: object) -> int | None:
        if not isinstance(generator, torch.Generator):
            return None
        where = generator.device
        return int(torch.randint(2**63 - 1, (), generator=generator, device=where))

    def dtype_name(self, x: Array) -> str:
        return str(x.dtype).removeprefix("torch.")

    def is_floating(self, x: Array) -> bool:
        return bool(x.is_floating_point())

    def is_traced(self, x: Array) -> bool:
        # While make_fx records, tensors look plain, but their values must not be looked at.
        if _private.is_wrapped(x) or _private.tracing():
            return True
        return type(x) not in (torch.Tensor, torch.nn.Parameter)

    def devices(self) -> tuple[str, ...]:
        found = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        if torch.backends.mps.is_available():
            found.append("mps")
        return ("cpu", *found)

    def device_of(self, x: Array) -> str:
        return "mps" if x.device.type == "mps" else str(x.device)  # there is one, without a number

    def on_cpu(self, x: Array) -> bool:
        return bool(x.device.type == "cpu")

    def stop_gradient(self, x: Array) -> Array:
        return x.detach()

    def alias(self, x: Array) -> Array:
        if not isinstance(x, torch.nn.Parameter) and not x.requires_grad:
            return x  # no parameter to anyone
        with torch.enable_grad():  # a view made without a graph would not lead back to `x`
            return x.view_as(x)

    def value_and_grad(
        self, fn: ScalarFn, on_disconnected: Callable[[], None] | None = None
    ) -> Callable[[Arrays], tuple[Array, Arrays, Arrays]]:
        def checked(xs: Arrays) -> tuple[Array, Arrays]:
            value, aux = fn(xs)
            if on_disconnected is not None and not value.requires_grad:
                on_disconnected()
            return value, aux

        objective = fn if on_disconnected is None else checked
        recorded = torch.func.grad_and_value(objective, has_aux=True)

        @in_our_words()
        def call(xs: Arrays) -> tuple[Array, Arrays, Arrays]:
            _tape.refuse_script_trace()
            if not _tape.transforming() and not _tape.has_tangents():
                return _tape.value_and_grad(fn, xs, on_disconnected)
            # torch.func.grad records its backward pass, so that it can be differentiated again. For
            # the outermost gradient that would be a graph in memory which nobody asks for; the
            # pull-back of torch.func.vjp can do without, unless the tape records a rule of our own.
            if not _tape.inside_a_gradient():
                with_pull_back: Any = torch.func.vjp(objective, xs, has_aux=True)
                value, pull_back, aux = with_pull_back
                if not _private.records(value):
                    (grads,) = _private.pull_back_once(pull_back, torch.ones_like(value))
                    return value, aux, grads
            grads, (value, aux) = recorded(xs)
            return value, aux, grads

        return call

    def vjp(self, fn: ArraysFn, xs: Arrays, cotangents: Arrays) -> Arrays:
        kept: list[int] = []

        def differentiable(xs: Arrays) -> Arrays:
            found = fn(xs)
            kept[:] = (i for i, y in enumerate(found) if self.is_differentiable(y))
            return tuple(found[i] for i in kept)

        pull_back: Any = torch.func.vjp(differentiable, xs)[1]
        (result,) = pull_back(tuple(cotangents[i] for i in kept))
        return tuple(result)

    def jvp(self, fn: ArraysFn, xs: Arrays, tangents: Arrays) -> Arrays:
        try:
            return tuple(torch.func.jvp(fn, (xs,), (tangents,))[1])
        except RuntimeError as error:
            if "ZeroTensors are immutable" in str(error):
                with _private.zeros_with_memory():
                    return self.jvp(fn, xs, tangents)
            if not any(words in str(error) for words in _NO_FORWARD_MODE):
                raise
            raise BackendError(
                "torch has no forward mode for an operation in this function "
                f"({str(error).splitlines()[0]}). Write it in other operations, or do without: "
                'mode="remat" computes the same and saves memory too.'
            ) from error

    def custom_vjp(
        self, forward: ArraysFn, backward: Callable[[Arrays, Arrays], Arrays]
    ) -> ArraysFn:
        apply: Any = _Rule.apply

        def call(xs: Arrays) -> Arrays:
            if _tape.forward_mode():
                raise BackendError(
                    "torch has no forward mode (torch.func.jvp, jacfwd, hessian, forward_ad) for "
                    'a rule that runs again in the backward pass. Use mode="reverse", or '
                    "differentiate in reverse mode: torch.func.grad, jacrev."
                )
            return tuple(apply(forward, backward, *xs))

        return call

    def unstack(self, x: Array) -> Sequence[Array]:
        rows: Sequence[Array] = x.unbind()
        return rows

    def hidden_inputs(self, fn: ArraysFn, xs: Arrays) -> str:
        from metaframe_torch._hidden import hidden_effect

        return hidden_effect(fn, xs, self.random_state)

    def with_finite_roots(self, fn: ArraysFn) -> ArraysFn:
        return with_finite_roots(fn)

    def vmap(self, fn: ArraysFn) -> ArraysFn:
        each = _one_by_one(fn)
        return lambda xs: _tape.recordable(each if _is_alone(xs) else _mapped(fn), each)(xs)

    def mapped_value_and_grad(self, fn: TaskCost) -> MappedGradient:
        def call(xs: Arrays, held: Arrays, tasks: Arrays) -> tuple[Array, Arrays, Arrays]:
            count, end = len(xs), len(xs) + len(held)

            def by(mapped: Callable[[ArraysFn], ArraysFn]) -> ArraysFn:
                def run(arrays: Arrays) -> Arrays:
                    def one(task: Arrays) -> Arrays:
                        objective = partial(fn, held=arrays[count:end], task=task)
                        value, aux, grads = self.value_and_grad(objective)(arrays[:count])
                        return (*grads, value, *aux)

                    out = mapped(one)(arrays[end:])
                    return (*(g.sum(0) for g in out[:count]), *out[count:])

                return run

            each = by(_one_by_one)
            quick = each if _is_alone(tasks) else by(_mapped)
            out = _tape.recordable(quick, each)((*xs, *held, *tasks))
            return out[count], out[count + 1 :], out[:count]

        return call

    def compile(self, fn: ArraysFn, examples: Arrays) -> ArraysFn:
        from metaframe_torch._compile import compile_traced

        return compile_traced(fn, examples)

    def ambient(self) -> Hashable:
        return Ambient.now()

    def threads_for(self, elements: int) -> AbstractContextManager[object]:
        return threads_for(elements)

    def runs_inline(self, xs: Sequence[Array]) -> bool:
        return (
            _tape.transforming()
            or _tape.has_tangents()
            or _private.modes_active()
            or _private.hooks_on_saved()
            or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
            or not _PLAIN.issuperset(map(type, xs))
        )

    def opaque(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        return _tape.uncompiled(fn)

    def needed_a_value(self, error: Exception) -> bool:
        if type(error).__name__ in _private.VALUE_NEEDED:
            return True
        return isinstance(error, RuntimeError) and any(w in str(error) for w in _NO_VALUE)

    def random_state(self) -> dict[str, np.ndarray[Any, Any]]:
        streams = {f"cuda:{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
        return {name: s.numpy() for name, s in {"cpu": torch.get_rng_state(), **streams}.items()}

    def restore_random_state(self, state: dict[str, np.ndarray[Any, Any]]) -> None:
        for name, values in state.items():
            stream = torch.from_numpy(values.copy())
            if name == "cpu":
                torch.set_rng_state(stream)
            elif name in self.devices():
                torch.cuda.set_rng_state(stream, name)

    def register_node(
        self,
        cls: type,
        flatten: Callable[[Any], tuple[list[Any], tuple[str, ...], tuple[str, ...]]],
        unflatten: Callable[[Any, Iterable[Any]], Any],
    ) -> None:
        if _private.REGISTER_NODE.found is None:
            return  # torch.func refuses one by itself
        _private.REGISTER_NODE.found(
            cls,
            lambda node: flatten(node)[:2],
            lambda children, metadata: unflatten(metadata, children),
            serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
        )

    def workers(self) -> Workers:
        if not (dist.is_available() and dist.is_initialized()):
            return ALONE
        from metaframe_torch import _distributed

        return _distributed.workers()

    def join(self, place: Place) -> AbstractContextManager[object]:
        from metaframe_torch import _distributed

        return _distributed.join(place)

    def lost_others(self, error: Exception) -> bool:
        from metaframe_torch import _distributed

        return _distributed.lost_others(error)

    def adapter(self, model: object) -> TorchAdapter | None:
        return TorchAdapter(model, self) if isinstance(model, torch.nn.Module) else None

    def run_foreign(self, run: Callable[[], T], *, twice: bool) -> tuple[T, Sequence[Any]]:
        return _foreign.run_foreign(run, twice=twice)

    def live(self, values: dict[str, Array]) -> LearnedAdapter:
        return LearnedAdapter(values, self)

    def kept(self, values: dict[str, Array]) -> KeptAdapter:
        return KeptAdapter(values, self)

    def native_optimizer(self, optimizer: object) -> TorchOptimizer | None:
        return TorchOptimizer(optimizer) if isinstance(optimizer, torch.optim.Optimizer) else None

    def differentiable(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        return InExactForms(fn)

    @in_our_words()
    def loss_gradient(
        self, loss: Array | ObjectiveFn, xs: Arrays, *, first_order: bool
    ) -> tuple[Array | None, ...]:
        # Inside a transform nothing is recorded for autograd; only the transform can say.
        if _private.transforming() and callable(loss):
            return super().loss_gradient(loss, xs, first_order=first_order)
        return tape_gradient(loss, xs, first_order=first_order)


_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter, torch.nn.Buffer})
_NO_VALUE = (
    "data-dependent control flow",
    "on a Tensor inside",
    "is asked of a tensor that is being traced",
    "data pointer of Tensor",
    "data is not allocated yet",
    "for 'meta' device type",
    "Cannot access storage of",
    "vmap over torch.allclose",
)
"""torch's words where a value is asked for that is not known, as far as it has no class for it:
those of vmap, of torch.func and of tensors without memory."""
_NO_FORWARD_MODE = ("forward AD", "forward mode AD")
"""torch's words for it; there is no class of error."""


def _readable(x: np.ndarray[Any, Any]) -> Any:
    """`x` as something torch takes."""
    if x.dtype.name == "bfloat16":
        return torch.from_numpy(np.array(x).view(np.int16)).view(torch.bfloat16)
    # A read-only array is copied: torch would share the memory, and warn that it is not to be
    # written to. A negative stride is nothing torch has.
    return x if x.flags.writeable and min(x.strides, default=0) >= 0 else x.copy()


class _Rule(torch.autograd.Function):
    """A function with its own derivative, which keeps its inputs and nothing else."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        forward: ArraysFn, backward: Callable[[Arrays, Arrays], Arrays], *xs: Array
    ) -> Arrays:
        # An input that is returned as it is cannot be kept for the backward pass; a view can.
        return tuple(y.view_as(y) if any(y is x for x in xs) else y for y in forward(xs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Arrays) -> None:
        _, ctx.transpose, *xs = inputs
        ctx.save_for_backward(*xs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Array) -> tuple[Any, ...]:
        xs = ctx.saved_tensors
        if not torch.is_grad_enabled():
            # Nobody differentiates this backward pass. The transpose needs a graph of its own,
            # which must not reach back into the one that is being walked.
            xs, cotangents = _tape.detached(xs), _tape.detached(cotangents)
        else:
            # A tensor of a transform that has ended, as under jacrev, is none that a rule within
            # this one may be given. A view of it is a tensor of those that are active.
            xs = tuple(x.view_as(x) for x in xs)
        with torch.enable_grad():
            return (None, None, *ctx.transpose(xs, cotangents))


def _mapped(fn: ArraysFn) -> ArraysFn:
    mapped: ArraysFn = torch.func.vmap(fn, randomness="different")
    return taken_away()(in_our_words(mapped=True)(mapped))


def _is_alone(tasks: Arrays) -> bool:
    """True for a single task, which `vmap` would only make slower."""
    return bool(tasks) and tasks[0].shape[0] == 1


def _one_by_one(fn: ArraysFn) -> ArraysFn:
    """The results of `_mapped` by a loop over tasks, which may be differentiated from outside."""

    def run(xs: Arrays) -> Arrays:
        rows = [fn(tuple(x[i] for x in xs)) for i in range(xs[0].shape[0])]
        return tuple(torch.stack(column) for column in zip(*rows, strict=True))

    return run
