"""The gradient doctor on small slopes, rounding, and points where the slope is 0."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from frameworks import require
from metaframe import ops, tree
from metaframe.backend import load_backend
from metaframe.testing import Adaptation, Report, assert_meta_gradient, check_meta_gradient
from metaframe.testing.differences import Component, slope

Call = Callable[..., Any]

NO_STEPS = Adaptation(steps=0)
TASKS = np.array([1.0, 2.0])


def on_torch(structure: Any) -> Any:
    require("torch")
    return tree.map(load_backend("torch").asarray, structure)


def check(
    cost: Call, variables: Any, adaptation: Adaptation = NO_STEPS, batch: Any = TASKS, **how: Any
) -> Report:
    variables = {name: np.array(x) for name, x in variables.items()}
    given = on_torch(variables), on_torch(batch), adaptation
    return check_meta_gradient(cost, *given, executions=(), **how)


# -- a small slope beside a large one ----------------------------------------------------------

FAR_OFF = {"b": 0.3, "w": -900.0}
"""Where the slope in `w` is 2e7 times that in `b`."""


def steep(task: Any, v: Any) -> Any:
    return 1e4 * (v["w"] - task) ** 2 + ops.sin(v["b"])


def cut_off(task: Any, v: Any) -> Any:
    return steep(task, {**v, "b": ops.stop_gradient(v["b"])})


def test_a_small_variable_that_is_disconnected() -> None:
    report = check(cut_off, FAR_OFF)
    assert report.kinds() == ("disconnected variable",), str(report)
    assert report.findings[0].where == "'b'"


def test_a_small_variable_that_a_step_leaves_out() -> None:
    torch = importlib.import_module("torch")

    def step(v: Any, batch: Any) -> Any:
        w = v["w"].detach().requires_grad_()
        total = torch.stack([steep(task, {**v, "w": w}) for task in batch]).mean()
        return total, {"b": torch.zeros_like(v["b"]), "w": torch.autograd.grad(total, w)[0]}

    report = check(steep, FAR_OFF, step=step)
    assert report.kinds() == ("disconnected variable",), str(report)


def test_a_small_variable_fails_the_assertion() -> None:
    variables = on_torch({name: np.array(x) for name, x in FAR_OFF.items()})
    with pytest.raises(AssertionError, match=r"wrong:\n  'b': 0 along .* say 0\.955"):
        assert_meta_gradient(cut_off, variables, on_torch(TASKS), NO_STEPS)


def test_a_slope_that_rounding_covers_is_left_open() -> None:
    report = check(lambda task, v: (v["w"] - task) ** 4 + 1e-10 * v["b"], {"b": 1.0, "w": 0.5})
    assert not report.ok
    assert report.findings == ()
    assert "not checked: finite differences in 'b': its gradient is so small" in str(report)


# -- less than float64 -------------------------------------------------------------------------


def in_float32(task: Any, v: Any) -> Any:
    return ((v["w"].float() - task.float()) ** 4).double()


def linear_in_float32(task: Any, v: Any) -> Any:
    return (v["w"].float() * task.float()).double() + 0.3


def partly_in_float32(task: Any, v: Any) -> Any:
    return (v["w"] - task) ** 4 + 0.01 * in_float32(task, v)


@pytest.mark.parametrize("cost", [in_float32, linear_in_float32, partly_in_float32])
@pytest.mark.parametrize("adaptation", [NO_STEPS, Adaptation()])
def test_a_cost_in_float32(cost: Call, adaptation: Adaptation) -> None:
    report = check(cost, {"w": 0.5}, adaptation)
    assert report.kinds() == ("lost precision",), str(report)
    assert not report.ok
    with pytest.raises(AssertionError, match="fewer digits than float64"):
        assert_meta_gradient(cost, on_torch({"w": np.array(0.5)}), on_torch(TASKS), adaptation)


def test_a_fault_in_float32_is_found_beside_it() -> None:
    def cost(task: Any, v: Any) -> Any:
        return in_float32(task, v) + ops.sin(ops.stop_gradient(v["b"]))

    report = check(cost, {"b": 0.3, "w": 0.5})
    assert set(report.kinds()) == {"disconnected variable", "lost precision"}, str(report)


def test_a_jump_is_not_called_a_loss_of_precision() -> None:
    report = check(lambda task, v: (v["w"] - task) ** 2 + 1e-3 * (v["w"] > 0), {"w": 0.0})
    assert report.kinds() == ("kink",)
    assert report.ok, str(report)


def test_a_kink_nearby_is_not_called_a_loss_of_precision() -> None:
    report = check(lambda task, v: 100 + task * v["w"].relu(), {"w": 3e-5})
    assert report.findings == ()
    assert report.ok, str(report)


# -- where the slope is 0 ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "cost",
    [
        lambda task, v: (v["w"] - task) ** 2 + v["s"] ** 2,
        lambda task, v: (v["w"] - task) ** 2 + 3 * ops.cos(v["s"]),
    ],
)
def test_a_stationary_variable_is_used(cost: Call) -> None:
    report = check(cost, {"s": 0.0, "w": 0.5}, Adaptation())
    assert report.ok
    assert report.findings == (), str(report)
    assert "the gradient in 's' is 0 to within" in str(report)


@pytest.mark.parametrize("size", [1.0, 1e3])
@pytest.mark.parametrize("steps", [0, 2])
def test_at_the_optimum(size: float, steps: int) -> None:
    """The cost is 0 there, and what rounds is what it is computed from."""
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(2, 8, 4)), size * rng.normal(size=(4, 3))
    report = check(
        lambda task, v: ops.mean((task["x"] @ v["w"] + v["b"] - task["y"]) ** 2),
        {"b": np.zeros(3), "w": w},
        Adaptation(steps=steps, lr=0.1),
        {"x": x, "y": x @ w},
    )
    assert report.ok, str(report)
    assert report.findings == ()


def test_at_the_optimum_of_a_sum() -> None:
    report = check(
        lambda task, v: ops.sum((v["w"] - task) ** 2), {"w": np.ones(2)}, batch=np.ones((3, 2))
    )
    assert report.ok, str(report)


def test_a_shift_that_normalisation_takes_out() -> None:
    """It moves the cost by rounding alone."""

    def cost(task: Any, v: Any) -> Any:
        hidden = task @ v["w"] + v["b"]
        hidden = hidden - ops.mean(hidden, axis=0)
        return ops.mean(ops.tanh(hidden / ops.sqrt(ops.mean(hidden**2, axis=0))) ** 2)

    rng = np.random.default_rng(0)
    variables = {"b": rng.normal(size=6), "w": rng.normal(size=(4, 6))}
    report = check(cost, variables, Adaptation(steps=3, lr=0.3), rng.normal(size=(2, 8, 4)))
    assert report.ok, str(report)
    assert report.findings == ()


# -- the slope itself --------------------------------------------------------------------------


@pytest.mark.parametrize(("noise", "lossy"), [(3e-8, True), (1e-10, None), (1e-12, False)])
def test_noise_is_not_mistaken_for_a_fault(noise: float, lossy: bool | None) -> None:
    """Nor for precision, where two estimates happen to be near each other."""
    rng = np.random.default_rng(0)
    found = [
        Component("w", slope(lambda t: math.exp(t) + noise * rng.normal()), 1.0, 1.0)
        for _ in range(300)
    ]
    assert all(c.agrees(1e-7) for c in found if c.known)
    if lossy is not None:
        assert sum(c.lossy == lossy and c.known != lossy for c in found) >= 0.98 * len(found)


def test_a_slope_that_falls_short_of_its_scale_is_known() -> None:
    """The finest step is only just fine enough, which the fall of the errors shows."""
    found = slope(lambda t: math.sin(300 * t))
    assert 1e-7 < found.error / found.value < 1e-4
    assert found.falling
    assert Component("w", found, 300.0, 300.0).known
    assert Component("w", found, 300.0, 300.0).agrees(1e-7)


@pytest.mark.parametrize(
    "fn",
    [
        lambda t: math.inf if t else 1.0,
        lambda t: math.nan,
        lambda t: math.sqrt(t) if t >= 0 else math.nan,
    ],
)
def test_no_slope_without_values(fn: Call) -> None:
    found = Component("w", slope(fn), 0.0, 0.0)
    assert not found.known
    assert not found.lossy


def test_what_does_not_move_the_cost() -> None:
    assert not slope(lambda t: 1.5).moved
    assert slope(lambda t: 1.5 + t**2).moved
