"""The transforms of PyTorch."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from metaframe.errors import InputError
from transform_tables import RIGHT, Fn, Refused, Row

NOTHING_RECORDED = Refused(
    InputError, "nothing is recorded under inference mode, so no gradient can be taken"
)
SCRIPT = Refused(InputError, "`torch.jit.trace` records no gradients")


def ones(x: Any) -> Any:
    return torch.ones_like(x)


def two(w: Any) -> Any:
    return torch.stack([w, 2 * w])


def leaf(w: Any) -> Any:
    return w.clone().requires_grad_()


def backward(f: Fn, w: Any) -> Any:
    w = leaf(w)
    f(w).backward()
    return w.grad


def create_graph(f: Fn, w: Any) -> Any:
    w = leaf(w)
    (first,) = torch.autograd.grad(f(w), w, create_graph=True)
    return torch.stack([first, torch.autograd.grad(first.sum(), w)[0]])


def batched(f: Fn, w: Any) -> Any:
    w = leaf(w)
    cotangents = torch.tensor([[1.0], [2.0]], dtype=w.dtype)
    return torch.autograd.grad(f(w).reshape(1), w, cotangents, is_grads_batched=True)[0]


def dual(f: Fn, w: Any) -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(w, ones(w)))).tangent


def within(scope: AbstractContextManager[Any], f: Fn, w: Any) -> Any:
    with scope:
        return f(w)


def differentiated_within(scope: AbstractContextManager[Any], f: Fn, w: Any) -> Any:
    w = leaf(w)
    with scope:
        y = f(w)
    return torch.autograd.grad(y, w)[0]


def recomputed(reentrant: bool, f: Fn, w: Any) -> Any:
    return backward(lambda w: checkpoint.checkpoint(f, w, use_reentrant=reentrant), w)


def default_dtype(f: Fn, w: Any) -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return f(w)
    finally:
        torch.set_default_dtype(before)


def dynamo(f: Fn) -> Fn:
    torch._dynamo.reset()
    compiled: Fn = torch.compile(f, backend="eager")
    return compiled


class Labelled(torch.Tensor):
    """A subclass that changes nothing."""


functional: Any = torch.autograd.functional
func: Any = torch.func

ROWS = {
    "torch.func.grad": Row(lambda f, w: func.grad(f)(w)),
    "torch.func.vjp": Row(lambda f, w: func.vjp(f, w)[1](torch.ones((), dtype=w.dtype))[0]),
    "torch.func.jvp": Row(lambda f, w: func.jvp(f, (w,), (ones(w),))[1]),
    "torch.func.vmap": Row(lambda f, w: func.vmap(f)(two(w))),
    "torch.func.jacrev": Row(lambda f, w: func.jacrev(f)(w)),
    "torch.func.jacfwd": Row(lambda f, w: func.jacfwd(f)(w)),
    "torch.func.hessian": Row(lambda f, w: func.hessian(f)(w)),
    "torch.func.vmap of grad": Row(lambda f, w: func.vmap(func.grad(f))(two(w))),
    "torch.func.grad of vmap": Row(lambda f, w: func.grad(lambda w: func.vmap(f)(two(w)).sum())(w)),
    "torch.func.grad of grad": Row(lambda f, w: func.grad(lambda w: func.grad(f)(w).sum())(w)),
    "backward": Row(backward),
    "autograd.grad, create_graph": Row(create_graph),
    "autograd.grad, is_grads_batched": Row(batched),
    "autograd.functional.jacobian": Row(functional.jacobian),
    "autograd.functional.jacobian, vectorize": Row(
        lambda f, w: functional.jacobian(f, w, vectorize=True)
    ),
    "autograd.functional.hessian": Row(functional.hessian),
    "autograd.functional.hessian, forward mode": Row(
        lambda f, w: functional.hessian(
            f, w, vectorize=True, outer_jacobian_strategy="forward-mode"
        )
    ),
    "autograd.functional.jvp": Row(lambda f, w: functional.jvp(f, w, ones(w))[1]),
    "autograd.functional.hvp": Row(lambda f, w: functional.hvp(f, w, ones(w))[1]),
    "autograd.forward_ad": Row(dual),
    "utils.checkpoint": Row(lambda f, w: recomputed(False, f, w)),
    "utils.checkpoint, reentrant": Row(lambda f, w: recomputed(True, f, w)),
    "graph.save_on_cpu": Row(
        lambda f, w: differentiated_within(torch.autograd.graph.save_on_cpu(), f, w)
    ),
    "detect_anomaly": Row(
        lambda f, w: differentiated_within(torch.autograd.detect_anomaly(check_nan=True), f, w)
    ),
    "no_grad": Row(lambda f, w: within(torch.no_grad(), f, w)),
    "inference_mode": Row(
        lambda f, w: within(torch.inference_mode(), f, w), {"inner_loop": NOTHING_RECORDED}
    ),
    "autocast": Row(lambda f, w: within(torch.autocast("cpu", dtype=torch.bfloat16), f, w)),
    "set_default_dtype": Row(default_dtype),
    'device("cpu")': Row(lambda f, w: within(torch.device("cpu"), f, w)),
    'device("meta")': Row(lambda f, w: within(torch.device("meta"), f, w)),
    "nn.Parameter": Row(lambda f, w: f(torch.nn.Parameter(w)).detach()),
    "a subclass of Tensor": Row(lambda f, w: f(w.as_subclass(Labelled)).as_subclass(torch.Tensor)),
    "FlopCounterMode": Row(lambda f, w: within(FlopCounterMode(display=False), f, w)),
    "make_fx": Row(lambda f, w: make_fx(lambda w: f(w))(w)(w)),
    "make_fx of grad": Row(lambda f, w: make_fx(lambda w: func.grad(f)(w))(w)(w)),
    "torch.compile": Row(lambda f, w: dynamo(f)(w), slow=True),
    "backward of torch.compile": Row(lambda f, w: backward(dynamo(f), w), slow=True),
    "torch.compile of grad": Row(lambda f, w: dynamo(func.grad(f))(w), slow=True),
    "torch.jit.trace": Row(
        lambda f, w: torch.jit.trace(f, w)(2 * w), {"compile": RIGHT, "": SCRIPT}
    ),
}
