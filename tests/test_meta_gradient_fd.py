"""Meta-gradients against finite differences, in float64 to 1e-10 of the gradient's norm.

The derivative of the meta-cost along random directions, by a fourth-order stencil, against the
meta-gradient's component along them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from frameworks import BACKENDS, hardly_depends_on_the_backend
from meta_problems import (
    OPTIMIZERS,
    MetaProblem,
    classification,
    meta_step,
    quick,
    regression,
)
from metaframe import ops, tree

Call = Callable[..., Any]

SLOW = pytest.mark.slow


def check_gradient(
    backend: Any, arr: Call, problem: MetaProblem, step: Call, *, size: float, directions: int = 2
) -> None:
    """`size` is the stencil's step along a direction of norm 1."""
    run = quick(backend, step)
    batch = arr(problem.batch)
    start, spec = tree.flatten(problem.variables)
    rng = np.random.default_rng(11)

    def at(moved: list[Any]) -> tuple[float, list[Any]]:
        cost, grads = run(batch, arr(tree.unflatten(spec, moved)))
        return float(backend.to_numpy(cost)), [backend.to_numpy(g) for g in tree.leaves(grads)]

    _, grads = at(list(start))
    norm = np.sqrt(sum(np.sum(g**2) for g in grads))
    assert norm > 1e-3
    for _ in range(directions):
        direction = [rng.normal(size=np.shape(x)) for x in start]
        length = np.sqrt(sum(np.sum(d**2) for d in direction))
        direction = [d / length for d in direction]

        def along(t: float, direction: list[Any] = direction) -> float:
            return at([x + t * d for x, d in zip(start, direction, strict=True)])[0]

        near, far = along(size) - along(-size), along(2 * size) - along(-2 * size)
        slope = (8 * near - far) / (12 * size)
        component = sum(np.sum(g * d) for g, d in zip(grads, direction, strict=True))
        assert abs(slope - component) <= 1e-10 * norm


# Compiling takes the time here. By default torch, which need not, runs every optimizer; the
# other two take the one with the most in it, and the rest in the slow tests.
GRID = [
    pytest.param(
        name,
        optimizer,
        steps,
        marks=() if steps == 2 and (name == "torch" or optimizer == "adamw") else SLOW,
    )
    for name in BACKENDS
    for optimizer in OPTIMIZERS
    for steps in (1, 2, 5)
]


@pytest.mark.parametrize(("backend_name", "optimizer", "steps"), GRID, indirect=["backend_name"])
def test_mlp(backend: Any, arr: Call, optimizer: str, steps: int) -> None:
    problem = regression()
    step = meta_step(problem, steps, optimizer=optimizer)
    check_gradient(backend, arr, problem, step, size=2e-4)


@pytest.fixture
def smooth(monkeypatch: pytest.MonkeyPatch) -> None:
    """The models' relu replaced: a stencil across its kink measures the kink."""
    monkeypatch.setattr("metaframe.nn.models.relu", ops.tanh)


@pytest.mark.usefixtures("smooth")
@hardly_depends_on_the_backend  # `test_backends_agree.py` compares the other two with torch
@pytest.mark.parametrize(
    ("optimizer", "steps"),
    [
        ("sgd", 1),
        *(pytest.param("sgd", k, marks=SLOW) for k in (2, 5)),
        *(pytest.param(name, 2, marks=SLOW) for name in OPTIMIZERS if name != "sgd"),
    ],
)
def test_conv4_with_batch_statistics(backend: Any, arr: Call, optimizer: str, steps: int) -> None:
    problem = classification()
    step = meta_step(problem, steps, optimizer=optimizer)
    check_gradient(backend, arr, problem, step, size=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["remat", "mixed"])
def test_modes_with_a_stateful_optimizer(backend: Any, arr: Call, mode: str) -> None:
    problem = regression()
    step = meta_step(problem, 2, optimizer="adam", mode=mode)
    check_gradient(backend, arr, problem, step, size=2e-4, directions=1)


def test_gradients_of_zero_make_no_nan(backend: Any, arr: Call, to_np: Call) -> None:
    """At the optimum, and for a variable the cost ignores, every square root is one of zero."""
    problem = MetaProblem(
        batch={part: {"y": np.zeros((2, 3))} for part in ("support", "query")},
        variables={"w": np.zeros(3), "unused": np.zeros(2)},
        cost=lambda data, v: ops.mean(ops.square(v["w"] - data["y"])),
    )
    steps = {name: meta_step(problem, 2, optimizer=name) for name in OPTIMIZERS}

    def every_optimizer(batch: Any, variables: Any) -> Any:
        return {name: step(batch, variables) for name, step in steps.items()}

    found = to_np(quick(backend, every_optimizer)(arr(problem.batch), arr(problem.variables)))
    for name, results in found.items():
        assert all(np.all(x == 0.0) for x in tree.leaves(results)), name
