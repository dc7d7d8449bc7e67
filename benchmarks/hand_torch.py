"""The best PyTorch we could write by hand for the two workloads, one function a strategy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor import compile as inductor_compile
from torch.fx.experimental.proxy_tensor import make_fx

from benchmarks.harness import Program
from benchmarks.workloads import Case

Params = list[Tensor]
Cost = Callable[[Params, Tensor, Tensor], Tensor]
MetaGradient = Callable[..., list[Tensor]]


def programs(case: Case, params: list[Any], tasks: tuple[Any, ...]) -> dict[str, Program]:
    """By name; the compiled ones are the eager ones traced by `make_fx` and given to inductor."""
    cost, batched_cost = COSTS[case.workload.name]
    tape = {
        "eager loop over tasks": _loop(case, cost),
        "eager batched by hand": _batched(case, batched_cost),
    }
    functional = {"vmap(grad)": _vmapped(case, cost)}
    inputs = (*params, *tasks)
    found: dict[str, Program] = {name: _tracked(fn, params, tasks) for name, fn in tape.items()}
    for name, fn in functional.items():
        found[f"eager {name}"] = lambda fn=fn: fn(*inputs)
    if case.workload.name == "W1":
        functional["batched by hand"] = _batched_functional(case, batched_cost)
        for name, fn in functional.items():
            found[f"compiled {name}"] = _compiled(fn, inputs)
    return found


def _tracked(fn: MetaGradient, params: Params, tasks: tuple[Tensor, ...]) -> Program:
    tracked = [x.detach().clone().requires_grad_() for x in params]
    return lambda: fn(*tracked, *tasks)


def _compiled(fn: MetaGradient, inputs: tuple[Tensor, ...]) -> Program:
    """Compiled on the first call, so that the first call shows what compiling costs."""
    compiled: list[Any] = []

    def program() -> Any:
        with torch.no_grad():
            if not compiled:
                compiled.append(inductor_compile(make_fx(fn)(*inputs), list(inputs)))
            return compiled[0](*inputs)

    return program


def _loop(case: Case, cost: Cost) -> MetaGradient:
    lr, second = case.workload.inner_lr, case.order == 2

    def run(*arrays: Tensor) -> list[Tensor]:
        p, tasks = list(arrays[:-4]), arrays[-4:]
        total = torch.zeros((), dtype=p[0].dtype, device=p[0].device)
        grads = [torch.zeros_like(x) for x in p]
        for sx, sy, qx, qy in zip(*tasks, strict=True):
            q = p
            for _ in range(case.steps):
                inner = torch.autograd.grad(cost(q, sx, sy), q, create_graph=second)
                q = [x - lr * g for x, g in zip(q, inner, strict=True)]
            value = cost(q, qx, qy)
            for sum_, g in zip(grads, torch.autograd.grad(value, p), strict=True):
                sum_ += g
            total += value.detach()
        count = tasks[0].shape[0]
        return [total / count, *(g / count for g in grads)]

    return run


def _batched(case: Case, cost: Cost) -> MetaGradient:
    """Parameters with a task axis, one graph for all tasks."""
    lr, second = case.workload.inner_lr, case.order == 2

    def run(*arrays: Tensor) -> list[Tensor]:
        p, (sx, sy, qx, qy) = list(arrays[:-4]), arrays[-4:]
        count = sx.shape[0]
        q = [x.expand(count, *x.shape) for x in p]
        for _ in range(case.steps):
            inner = torch.autograd.grad(cost(q, sx, sy), q, create_graph=second)
            q = [x - lr * g for x, g in zip(q, inner, strict=True)]
        value = cost(q, qx, qy) / count
        return [value.detach(), *torch.autograd.grad(value, p)]

    return run


def _batched_functional(case: Case, cost: Cost) -> MetaGradient:
    """The same on `torch.func`, which `make_fx` can trace."""

    def outer(p: Params, sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor) -> tuple[Tensor, Tensor]:
        count = sx.shape[0]
        q = _adapted(case, cost, [x.expand(count, *x.shape) for x in p], sx, sy)
        value = cost(q, qx, qy) / count
        return value, value

    def run(*arrays: Tensor) -> list[Tensor]:
        grads, value = torch.func.grad(outer, has_aux=True)(list(arrays[:-4]), *arrays[-4:])
        return [value, *grads]

    return run


def _vmapped(case: Case, cost: Cost) -> MetaGradient:
    def task(p: Params, sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor) -> tuple[Tensor, Tensor]:
        value = cost(_adapted(case, cost, p, sx, sy), qx, qy)
        return value, value

    mapped = torch.func.vmap(torch.func.grad(task, has_aux=True), (None, 0, 0, 0, 0))

    def run(*arrays: Tensor) -> list[Tensor]:
        grads, values = mapped(list(arrays[:-4]), *arrays[-4:])
        return [values.mean(), *(g.mean(0) for g in grads)]

    return run


def _adapted(case: Case, cost: Cost, p: Params, x: Tensor, y: Tensor) -> Params:
    for _ in range(case.steps):
        grads = torch.func.grad(cost)(p, x, y)
        if case.order == 1:
            grads = [g.detach() for g in grads]
        p = [a - case.workload.inner_lr * g for a, g in zip(p, grads, strict=True)]
    return p


def _mlp_cost(p: Params, x: Tensor, y: Tensor) -> Tensor:
    b3, w3, b1, w1, b2, w2 = p
    h = torch.relu(torch.addmm(b1, x, w1))
    h = torch.relu(torch.addmm(b2, h, w2))
    return F.mse_loss(torch.addmm(b3, h, w3), y)


def _mlp_cost_batched(p: Params, x: Tensor, y: Tensor) -> Tensor:
    """Sum over tasks of each task's mean."""
    b3, w3, b1, w1, b2, w2 = p
    h = torch.relu(torch.baddbmm(b1[:, None], x, w1))
    h = torch.relu(torch.baddbmm(b2[:, None], h, w2))
    error = torch.baddbmm(b3[:, None], h, w3) - y
    return (error * error).sum() / x.shape[1]


def _conv4_cost(p: Params, x: Tensor, y: Tensor) -> Tensor:
    *blocks, b, w = p
    x = x.permute(0, 3, 1, 2)
    for i in range(0, 12, 3):
        kernel, scale, shift = blocks[i : i + 3]
        x = F.conv2d(x, kernel.permute(3, 2, 0, 1), padding=1)
        x = F.batch_norm(x, None, None, scale, shift, training=True, eps=1e-5)
        x = torch.relu(F.max_pool2d(x, 2))
    return F.cross_entropy(x.flatten(1) @ w + b, y)


def _conv4_cost_batched(p: Params, x: Tensor, y: Tensor) -> Tensor:
    """Tasks as groups of channels; sum over tasks of each task's mean."""
    *blocks, b, w = p
    tasks, n = x.shape[:2]
    x = x.permute(1, 0, 4, 2, 3).flatten(1, 2)  # (n, tasks * channels, height, width)
    for i in range(0, 12, 3):
        kernel, scale, shift = blocks[i : i + 3]
        x = F.conv2d(x, kernel.permute(0, 4, 3, 1, 2).flatten(0, 1), padding=1, groups=tasks)
        x = F.batch_norm(x, None, None, scale.flatten(), shift.flatten(), training=True, eps=1e-5)
        x = torch.relu(F.max_pool2d(x, 2))
    features = x.reshape(n, tasks, -1).transpose(0, 1)
    logits = torch.baddbmm(b[:, None], features, w)
    return F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum") / n


COSTS: dict[str, tuple[Cost, Cost]] = {
    "W1": (_mlp_cost, _mlp_cost_batched),
    "W2": (_conv4_cost, _conv4_cost_batched),
}
