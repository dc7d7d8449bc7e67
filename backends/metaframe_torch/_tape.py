"""Autograd's tape, next to the transforms of torch.func.

Where no transform is active the tape takes our gradients, a fifth faster than torch.func on a
convolutional network. A gradient within a gradient stays on the tape.

A `vmap` must not be differentiated from outside: second derivatives through fused normalisation
layers are silently wrong there. A caller may do so all the same, by a transform around ours or by
`backward` on a result of inputs that require grad; then the tasks are gone through one by one.
"""

from __future__ import annotations

import operator
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.autograd.graph import get_gradient_edge

from metaframe.backend.selection import current_selection, selected
from metaframe.backend.types import Array, Arrays, ArraysFn, ScalarFn
from metaframe.errors import InputError
from metaframe_torch import _private
from metaframe_torch._ambient import Ambient, Streams

CLOSES_OVER = (
    "a function of one task, or a compiled one, uses tensors that require grad and are not among "
    "its arguments. So that their gradient is right, tasks run one by one and nothing is compiled. "
    "Detach them, pass them as variables, or call this under torch.no_grad()."
)
_requires_grad = operator.attrgetter("requires_grad")
_inside = ContextVar("inside", default=False)
"""Is a gradient by the tape being taken?"""


def value_and_grad(
    fn: ScalarFn, xs: Arrays, on_disconnected: Callable[[], None] | None
) -> tuple[Array, Arrays, Arrays]:
    """`fn(xs)` and the gradients with respect to `xs`, where no transform is active."""
    refuse_inference_mode()
    nested = _inside.get()
    recorded = nested or (torch.is_grad_enabled() and any(x.requires_grad for x in xs))
    listening = torch.is_grad_enabled()
    token = _inside.set(True)
    try:
        with torch.enable_grad():
            # Aliases: what `fn` may find of `xs` in its closure is a constant to this gradient.
            inputs = tuple(
                x.view_as(x) if recorded and x.requires_grad else x.detach().requires_grad_()
                for x in xs
            )
            # Held until the tape holds them: a leaf alone does not.
            nodes = _marked(inputs) if nested else ()
            value, aux = fn(inputs)
            del nodes
            recorded = recorded or (listening and _close_over((value, *aux), inputs))
            found: tuple[Array | None, ...] = (None,) * len(xs)
            if value.requires_grad:
                found = torch.autograd.grad(value, inputs, create_graph=recorded, allow_unused=True)
    finally:
        _inside.reset(token)
    if on_disconnected is not None and all(g is None for g in found):
        on_disconnected()
    pairs = zip(found, xs, strict=True)
    grads = tuple(torch.zeros_like(x) if g is None else g for g, x in pairs)
    if recorded:
        return value, aux, grads
    # The gradients too: a rule that computes again in the backward pass may record what it does.
    return value.detach(), detached(aux), detached(grads)


def uncompiled(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` as it is, also within a `torch.compile`, which would lose second-order terms of a cost.

    `torch.compile` goes on after it, and with `fullgraph=True` refuses it.
    """
    if "torch._dynamo" not in sys.modules:  # nothing is compiled; importing it takes a second
        return fn
    known = vars(fn)
    if _DISABLED not in known:
        known[_DISABLED] = torch.compiler.disable(fn, reason=NOT_COMPILED)
    disabled: Callable[..., Any] = known[_DISABLED]
    return disabled


_DISABLED = "_metaframe_not_compiled"
NOT_COMPILED = (
    "metaframe takes gradients of its own, of which torch.compile would lose some. Compile the "
    "whole step by metaframe.compile, or do without fullgraph=True"
)


def refuse_inference_mode() -> None:
    """An error where the tape would record nothing, whatever it is told."""
    if torch.is_inference_mode_enabled():
        raise InputError(
            "no gradient can be taken under torch.inference_mode(). Use torch.no_grad()."
        )


def refuse_script_trace() -> None:
    """An error where torch.jit.trace would record a gradient as a constant, or crash."""
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        raise InputError(
            "torch.jit.trace records no gradients. Compile the step by metaframe.compile, or trace "
            "the model alone."
        )


_OURS = "the start of a gradient of metaframe"


def _notes(node: Any) -> dict[str, object]:
    found: dict[str, object] = node.metadata  # a property, which torch's stubs call a method
    return found


def _marked(inputs: Arrays) -> tuple[object, ...]:
    """The nodes of those of `inputs` that are leaves, with a note that they were made here."""
    nodes = tuple(get_gradient_edge(x).node for x in inputs if x.is_leaf)
    for node in nodes:
        _notes(node)[_OURS] = True
    return nodes


def _close_over(values: Arrays, inputs: Arrays) -> bool:
    """True if any of `values` is on the tape by more than `inputs`."""
    seen = {get_gradient_edge(x).node for x in inputs}
    ahead: list[Any] = [get_gradient_edge(y).node for y in values if y.requires_grad]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        if not node.next_functions and _OURS not in _notes(node):  # another leaf
            return True
        seen.add(node)
        ahead += [following for following, _ in node.next_functions]
    return False


def has_tangents() -> bool:
    """True if tensors may be dual ones, of forward-mode differentiation."""
    try:
        forward_ad.make_dual(torch.empty(0), torch.empty(0))
    except RuntimeError:  # outside of a dual level
        return False
    return True


def forward_mode() -> bool:
    """True if a tangent of forward-mode differentiation, of torch.func or not, may be lost here."""
    return _private.forward_mode_active() or has_tangents()


@contextmanager
def outermost() -> Iterator[None]:
    """A block whose gradients are not within another one."""
    token = _inside.set(False)
    try:
        yield
    finally:
        _inside.reset(token)


def recordable(quick: ArraysFn, exact: ArraysFn) -> ArraysFn:
    """The values of `quick` with the derivatives of `exact`, which computes the same."""

    def call(xs: Arrays) -> Arrays:
        if transforming():
            return exact(xs) if inside_a_gradient() else quick(xs)
        refuse_script_trace()
        # Dual tensors are differentiated from outside too, and no transform of torch.func goes
        # with hooks on what is saved for a backward pass, such as those of a checkpoint.
        if _inside.get() or has_tangents() or _private.hooks_on_saved():
            return exact(xs)
        if not torch.is_grad_enabled():
            return quick(xs)
        wanted = any(map(_requires_grad, xs))
        before = Streams.now() if wanted else None
        found = quick(detached(xs) if wanted else xs)
        closes_over = any(map(_requires_grad, found))
        if closes_over:
            warnings.warn(CLOSES_OVER, stacklevel=2)
        if before is not None and before != Streams.now():
            # Going back, `exact` would draw others. It is recorded as it draws the same ones.
            before.restore()
            return exact(xs)
        if closes_over:
            return exact(xs)
        if not wanted:
            return found
        apply: Any = _Recorded.apply
        return tuple(apply(exact, found, *xs))

    return call


class _Recorded(torch.autograd.Function):
    """Results that are there already; whoever goes back through them computes them again."""

    @staticmethod
    def forward(ctx: Any, exact: ArraysFn, found: Arrays, *xs: Array) -> Arrays:
        ctx.exact, ctx.ambient, ctx.selection = exact, Ambient.now(), current_selection()
        ctx.save_for_backward(*xs)
        ctx.mark_non_differentiable(*(y for y in found if not y.is_floating_point()))
        ctx.set_materialize_grads(False)
        return found

    @staticmethod
    def backward(ctx: Any, *cotangents: Array | None) -> tuple[Array | None, ...]:
        again = torch.is_grad_enabled()
        with selected(ctx.selection), ctx.ambient.resumed(), torch.enable_grad():
            # Aliases: the gradient stops at them, and a further one goes on to what they stand for.
            xs = tuple(x.view_as(x) if again else x.detach() for x in ctx.saved_tensors)
            wanted = [
                x if again else x.requires_grad_()
                for x, needed in zip(xs, ctx.needs_input_grad[2:], strict=True)
                if needed
            ]
            pairs = zip(ctx.exact(xs), cotangents, strict=True)
            used = [(y, c) for y, c in pairs if c is not None and y.requires_grad]
            grads = torch.autograd.grad(
                [y for y, _ in used],
                wanted,
                [c for _, c in used],
                create_graph=again,
                allow_unused=True,
            )
        found = iter(grads)
        return None, None, *(next(found) if needed else None for needed in ctx.needs_input_grad[2:])


def detached(xs: Arrays) -> Arrays:
    """The same values, of which autograd records nothing."""
    return tuple(x.detach() for x in xs)


def inside_a_gradient() -> bool:
    """True if a torch.func transform that differentiates is active."""
    return _private.gradients_active() > 0


def transforming() -> bool:
    """True if a transform of torch.func or a trace is active."""
    return _private.transforming() or _private.tracing()
