"""The best JAX we could write by hand for the two workloads, one function a strategy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from benchmarks.harness import Program
from benchmarks.workloads import Case

Params = list[Array]
Cost = Callable[[Params, Array, Array], Array]


def programs(case: Case, params: list[Any], tasks: tuple[Any, ...]) -> dict[str, Program]:
    """By name; "eager" ones are for the overhead of metaframe's own Python."""
    cost = COSTS[case.workload.name]
    task_cost = _task_cost(case, cost, lax_loop=False)
    scanned = _task_cost(case, cost, lax_loop=True)

    def mean(p: Params, tasks: tuple[Array, ...], fn: Any = task_cost) -> Array:
        return jnp.mean(jax.vmap(fn, (None, 0))(p, tasks))

    def each(p: Params, tasks: tuple[Array, ...]) -> Any:
        costs, grads = jax.vmap(jax.value_and_grad(task_cost), (None, 0))(p, tasks)
        return jnp.mean(costs), [jnp.mean(g, 0) for g in grads]

    def one_by_one(p: Params, tasks: tuple[Array, ...]) -> Any:
        def body(total: Any, task: Any) -> Any:
            found = jax.value_and_grad(task_cost)(p, task)
            return jax.tree.map(jnp.add, total, found), None

        zero = (jnp.zeros((), p[0].dtype), [jnp.zeros_like(x) for x in p])
        total, _ = lax.scan(body, zero, tasks)
        return jax.tree.map(lambda x: x / tasks[0].shape[0], total)

    found: dict[str, Any] = {"jit vmap(grad)": jax.jit(each)}
    if case.workload.name == "W1":
        found |= {
            "jit grad(vmap)": jax.jit(jax.value_and_grad(mean)),
            "jit grad(vmap), lax.scan": jax.jit(
                jax.value_and_grad(lambda p, t: mean(p, t, scanned))
            ),
            "eager vmap(grad)": each,
        }
    else:
        found["jit scan over tasks"] = jax.jit(one_by_one)
        if case.workload.name == "W2" and case.steps > 1:
            del found["jit vmap(grad)"]  # 2 GB and no faster
    return {name: _bound(fn, params, tasks) for name, fn in found.items()}


def _bound(fn: Any, params: Params, tasks: tuple[Array, ...]) -> Program:
    def program() -> Any:
        cost, grads = fn(params, tasks)
        return (cost, *grads)

    return program


def _task_cost(case: Case, cost: Cost, lax_loop: bool) -> Any:
    lr, steps, order = case.workload.inner_lr, case.steps, case.order

    def run(p: Params, task: tuple[Array, ...]) -> Array:
        sx, sy, qx, qy = task

        def step(q: Params) -> Params:
            grads = jax.grad(cost)(q, sx, sy)
            if order == 1:
                grads = lax.stop_gradient(grads)
            return [x - lr * g for x, g in zip(q, grads, strict=True)]

        if lax_loop:
            p, _ = lax.scan(lambda q, _: (step(q), None), p, None, length=steps)
        else:
            for _ in range(steps):
                p = step(p)
        return cost(p, qx, qy)

    return run


def _mlp_cost(p: Params, x: Array, y: Array) -> Array:
    b3, w3, b1, w1, b2, w2 = p
    h = jax.nn.relu(x @ w1 + b1)
    h = jax.nn.relu(h @ w2 + b2)
    return jnp.mean((h @ w3 + b3 - y) ** 2)


def _conv4_cost(p: Params, x: Array, y: Array) -> Array:
    *blocks, b, w = p
    for i in range(0, 12, 3):
        kernel, scale, shift = blocks[i : i + 3]
        x = _convolution(x, kernel)
        mean = jnp.mean(x, (0, 1, 2))
        var = jnp.mean((x - mean) ** 2, (0, 1, 2))
        x = (x - mean) * (scale * lax.rsqrt(var + 1e-5)) + shift
        n, height, width, c = x.shape
        x = x[:, : height // 2 * 2, : width // 2 * 2]
        x = x.reshape(n, height // 2, 2, width // 2, 2, c)
        # Not x.max((2, 4)): jit loses part of its second derivative, which the check notices.
        rows = _larger(x[:, :, 0], x[:, :, 1])
        x = jax.nn.relu(_larger(rows[:, :, :, 0], rows[:, :, :, 1]))
    logits = jax.nn.log_softmax(x.reshape(x.shape[0], -1) @ w + b)
    return -jnp.mean(jnp.take_along_axis(logits, y[:, None], 1))


def _larger(x: Array, y: Array) -> Array:
    return jnp.where(x >= y, x, y)


def _convolution(x: Array, kernel: Array) -> Array:
    """As im2col and one matrix product: XLA's own CPU convolution is ten times slower here."""
    height, width, c = x.shape[1:]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    patches = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return jnp.concatenate(patches, -1) @ kernel.reshape(9 * c, -1)


COSTS: dict[str, Cost] = {"W1": _mlp_cost, "W2": _conv4_cost}


def from_numpy(x: np.ndarray[Any, Any]) -> Array:
    return jnp.asarray(x)
