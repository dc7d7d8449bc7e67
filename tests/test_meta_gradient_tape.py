"""Meta-gradients on torch that are differentiated further, by the tape and outside of it."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest

from frameworks import require
from metaframe import inner_loop, meta_value_and_grad, tree
from metaframe.backend import use_backend
from metaframe.core.inner_loop import Mode


# lr comes by the closure
@pytest.mark.filterwarnings("ignore:a function of one task, or a compiled")
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
