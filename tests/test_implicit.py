"""`implicit_loop`: the derivative of a minimum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from frameworks import slow
from metaframe import compile as compile_whole
from metaframe import (
    implicit_loop,
    inner_loop,
    nn,
    ops,
    optim,
    per_step,
    value_and_grad,
)
from metaframe.errors import InputError

Call = Callable[..., Any]
RNG = np.random.default_rng(3)
A = RNG.normal(size=(3, 3))
H = A @ A.T + np.eye(3)


def quadratic(batch: Any, v: Any) -> Any:
    """`v' H v / 2 - b' v`, with its minimum at `H^-1 b`."""
    h, b = batch
    return ops.sum(v * ops.matmul(h, v)) / 2 - ops.sum(b * v)


SOLVERS: list[dict[str, Any]] = [
    {"solver": "cg", "solver_steps": 3},
    {"solver": "neumann", "solver_steps": 400},
]


@pytest.mark.parametrize("how", SOLVERS, ids=lambda how: how["solver"])
def test_the_minimum_of_a_quadratic(how: Any, arr: Call, to_np: Call) -> None:
    """`d(c' H^-1 b)`: by b it is `H^-1 c`, by H minus the outer product with the solution."""
    b, c = RNG.normal(size=3), RNG.normal(size=3)

    def end(given: Any) -> Any:
        rate = 1 / float(np.linalg.eigvalsh(H).max())
        v = implicit_loop(
            quadratic, given["v"], (given["h"], given["b"]), steps=400, lr=rate, **how
        )
        return ops.sum(v * arr(c))

    given = {"h": H, "b": b, "v": np.zeros(3)}
    found = to_np(value_and_grad(end)(arr(given)))
    solution, u = np.linalg.solve(H, b), np.linalg.solve(H, c)
    np.testing.assert_allclose(found.cost, c @ solution, rtol=1e-10)
    np.testing.assert_allclose(found.grads["b"], u, rtol=1e-10)
    # The gradient of the quadratic is (H + H') v / 2 - b.
    outer = np.outer(u, solution)
    np.testing.assert_allclose(found.grads["h"], -(outer + outer.T) / 2, rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(found.grads["v"], 0.0)


def test_damping(arr: Call, to_np: Call) -> None:
    c = RNG.normal(size=3)

    def end(b: Any) -> Any:
        how = {"solver_steps": 3, "damping": 0.5}
        v = implicit_loop(quadratic, arr(np.zeros(3)), (arr(H), b), steps=1, lr=0.0, **how)
        return ops.sum(v * arr(c))

    found = to_np(value_and_grad(end)(arr(np.ones(3))).grads)
    np.testing.assert_allclose(found, np.linalg.solve(H + 0.5 * np.eye(3), c), rtol=1e-10)


X = RNG.normal(size=(40, 3))
LABELS = (X @ [1.0, -2.0, 0.5] + RNG.normal(size=40) > 0).astype(float)


def logistic(batch: Any, w: Any) -> Any:
    loss = nn.binary_cross_entropy(ops.matmul(batch["x"], w["w"]), batch["y"])
    return loss + w["decay"] * ops.sum(ops.square(w["w"]))


@pytest.mark.parametrize("backend_name", ["torch", "jax", slow("tensorflow")], indirect=True)
def test_implicit_and_unrolled_hypergradients(arr: Call, to_np: Call, backend: Any) -> None:
    """Of the weight decay of a logistic regression, a variable that does not adapt."""
    batch = arr({"x": X[:20], "y": LABELS[:20]})
    valid = {"x": X[20:], "y": LABELS[20:]}

    def end(decay: Any, how: Any, **settings: Any) -> Any:
        v = {"w": arr(np.zeros(3)), "decay": decay}
        v = how(logistic, v, batch, steps=300, lr=1.0, inner_v="w", **settings)
        return logistic(arr(valid), {**v, "decay": 0.0})

    def gradient(how: Any, **settings: Any) -> Any:
        run = value_and_grad(lambda decay: end(decay, how, **settings))
        run = run if backend.name == "torch" else compile_whole(run)
        return to_np(run(arr(0.05)).grads)

    unrolled = gradient(inner_loop)
    np.testing.assert_allclose(gradient(implicit_loop, solver_steps=5), unrolled, rtol=1e-6)
    neumann = gradient(implicit_loop, solver="neumann", solver_steps=200)
    np.testing.assert_allclose(neumann, unrolled, rtol=1e-6)


def test_it_may_be_differentiated_again(arr: Call, to_np: Call) -> None:
    """The minimum of (w - 3)^2 + b w^2 is w = 3 / (1 + b)."""

    def cost(b: Any, w: Any) -> Any:
        return ops.sum(ops.square(w - 3.0) + b * ops.square(w))

    def minimum(b: Any) -> Any:
        v = implicit_loop(cost, arr(np.zeros(2)), b, steps=300, lr=0.1, solver_steps=1)
        return ops.sum(v) / 2

    def slope(b: Any) -> Any:
        return value_and_grad(minimum)(b).grads

    found = to_np(value_and_grad(slope)(arr(0.5)))
    np.testing.assert_allclose(found.cost, -3 / 1.5**2, rtol=1e-10)
    np.testing.assert_allclose(found.grads, 6 / 1.5**3, rtol=1e-10)


def test_what_the_cost_closes_over(arr: Call, to_np: Call, backend: Any) -> None:
    """Differentiated on JAX and refused elsewhere, and never lost; constants may be closed over."""

    def minimum(b: Any) -> Any:
        def cost(none: Any, w: Any) -> Any:
            del none
            return ops.sum(ops.square(w - 3.0) + b * ops.square(w))

        return ops.sum(implicit_loop(cost, arr(np.zeros(1)), (), steps=300, lr=0.1))

    np.testing.assert_allclose(to_np(minimum(arr(0.5))), 2.0, rtol=1e-10)
    if backend.name == "jax":
        found = value_and_grad(minimum)(arr(0.5))
        np.testing.assert_allclose(to_np(found.grads), -3 / 1.5**2, rtol=1e-10)
        return
    with pytest.raises(InputError, match="closes over"):
        value_and_grad(minimum)(arr(0.5))


def test_implicit_loop_refuses(arr: Call) -> None:
    v, batch = arr(np.zeros(3)), (arr(H), arr(np.ones(3)))
    for match, how in (
        ("solver", {"solver": "lu"}),
        ("solver_steps", {"solver_steps": 0}),
        ("damping", {"damping": -1.0}),
        ("neumann.*one number", {"solver": "neumann", "lr": [0.1]}),
        ("neumann.*one number", {"solver": "neumann", "lr": np.full(3, 0.1)}),
        ("neumann.*one number", {"solver": "neumann", "lr": None, "update": optim.sgd(0.1)}),
        ("per_step", {"lr": per_step(np.ones(2)), "steps": 2}),
    ):
        with pytest.raises(InputError, match=match):
            implicit_loop(quadratic, v, batch, **{"steps": 1, "lr": 0.1, **how})
