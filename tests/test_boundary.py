"""The transforms of the boundary, nested: each level differentiates all that is below it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from frameworks import require
from metaframe import inner_loop, meta_value_and_grad, tree
from metaframe.backend import use_backend
from metaframe.inner import Mode

Call = Callable[..., Any]
X = np.array([0.5, -1.25, 2.0])


def plain(backend: Any, x: Any) -> Any:
    return backend.ops.sum(x**4)


def with_a_rule(backend: Any, x: Any) -> Any:
    """The sum of x^4 again, the inner square with a derivative of its own."""

    def forward(xs: Any) -> Any:
        return (xs[0] * xs[0],)

    def backward(xs: Any, cotangents: Any) -> Any:
        return backend.vjp(forward, xs, cotangents)

    (square,) = backend.custom_vjp(forward, backward)((x,))
    return backend.ops.sum(square * square)


def derivative(backend: Any, fn: Call) -> Call:
    """`x -> sum of the gradient of fn`: differentiated again, the diagonal of the next order."""
    transformed = backend.value_and_grad(lambda xs: (fn(xs[0]), ()))
    return lambda x: backend.ops.sum(transformed((x,))[2][0])


@pytest.mark.parametrize("fn", [plain, with_a_rule])
@pytest.mark.parametrize("mapped", [False, True])
def test_three_derivatives(
    backend: Any, arr: Call, to_np: Call, execution: Call, fn: Call, mapped: bool
) -> None:
    def third(x: Any) -> Any:
        def second(x: Any) -> Any:
            return derivative(backend, lambda x: derivative(backend, lambda x: fn(backend, x))(x))(
                x
            )

        return backend.value_and_grad(lambda xs: (second(xs[0]), ()))((x,))[2]

    def run(x: Any) -> Any:
        return backend.vmap(lambda xs: third(xs[0]))((x,)) if mapped else third(x)

    x = np.stack([X, 2 * X]) if mapped else X
    (found,) = to_np(execution(run)(arr(x)))
    np.testing.assert_allclose(found, 24 * x, rtol=1e-12)


@pytest.mark.parametrize("mode", ["reverse", "remat", "mixed"])
def test_torch_differentiates_the_meta_gradient(mode: Mode) -> None:
    """For theta' = theta (1 - lr a), the gradient theta (1 - lr a)^2 is a function of lr and a."""
    require("torch")
    torch = importlib.import_module("torch")
    with use_backend("torch", dtype="float64"):
        theta, a = np.float64(1.5), np.array([0.5, 2.0])
        leaves = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (theta, 0.1, a)]
        v, lr, curvature = leaves

        def inner_cost(task: Any, v: Any) -> Any:
            return task["a"] * v["theta"] ** 2 / 2

        def task_cost(v: Any, task: Any) -> Any:
            adapted = inner_loop(inner_cost, v, task, steps=1, lr=lr, mode=mode)
            return adapted["theta"] ** 2 / 2

        step = meta_value_and_grad(task_cost)
        cost, grads, _ = step({"theta": v}, {"a": curvature})
        of_cost = torch.autograd.grad(cost, leaves, retain_graph=True)
        of_grad = torch.autograd.grad(grads["theta"], leaves)
    left = 1 - 0.1 * a
    for found, expected in zip(
        tree.leaves([of_cost, of_grad]),
        [
            theta * np.mean(left**2),
            -(theta**2) * np.mean(left * a),
            -(theta**2) * left * 0.1 / 2,
            np.mean(left**2),
            -2 * theta * np.mean(left * a),
            -2 * theta * left * 0.1 / 2,
        ],
        strict=True,
    ):
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
