"""The doctor on faults whose cause it names, and on right problems that only look like them."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest

from metaframe import meta_value_and_grad, ops
from metaframe.backend import load_backend
from metaframe.testing import Adaptation, check_meta_gradient
from test_testing_doctor import BATCH, TWO_STEPS, Call, V, check, cost, only, torch_arr

__all__ = ["torch_arr"]


# -- faults that have a cause ------------------------------------------------------------------


def test_a_cost_that_keeps_the_first_batch(backend: Any, arr: Call) -> None:
    """A closure, an attribute and a default argument, filled before or by the examination."""

    def planted(filled: bool, key: str = "x") -> Call:
        cache: dict[str, Any] = {}

        def keeping(task: Any, v: Any) -> Any:
            x = cache.setdefault(key, task["x"])
            return cost({"x": x}, v)

        if filled:
            keeping({"x": arr(BATCH)["x"][0]}, arr(V))
        return keeping

    for filled in (False, True):
        report = check(arr, planted(filled))
        assert not report.ok
        assert "kept batch" in report.kinds(), str(report)
        assert "'x'" in str(report)


def test_a_table_that_a_cost_keeps_is_no_fault(backend: Any, arr: Call) -> None:
    tables: dict[int, Any] = {}

    def planted(task: Any, v: Any) -> Any:
        table = tables.setdefault(2, arr({"t": np.array([1.0, 2.0])})["t"])
        return cost(task, v) * ops.sum(table)

    report = check(arr, planted)
    assert report.ok, str(report)
    assert report.findings == ()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("whole", [True, False])
def test_a_cost_in_a_short_float(backend: Any, arr: Call, dtype: str, whole: bool) -> None:
    def planted(task: Any, v: Any) -> Any:
        w, x = ops.astype(v["w"], dtype), ops.astype(task["x"], dtype)
        short = ops.tanh(w * x) if not whole else ops.sum(ops.tanh(w * x))
        value = ops.astype(short, "float64")
        return value if whole else ops.mean(value * ops.asarray(task["x"]))

    report = check_meta_gradient(
        planted, arr({"w": V["w"]}), arr(BATCH), Adaptation(steps=0), executions=()
    )
    assert not report.ok
    assert report.kinds() == ("lost precision",), str(report)
    assert "short float" in str(report)


@pytest.mark.parametrize("levels", [4.0, 8.0, 7.3])
def test_rounding_straight_through(backend: Any, arr: Call, levels: float) -> None:
    def planted(task: Any, v: Any) -> Any:
        down = ops.astype(ops.astype(v["w"] * levels, "int32"), "float64") / levels
        return cost(task, {**v, "w": v["w"] + ops.stop_gradient(down - v["w"])})

    report = check(arr, planted, Adaptation(steps=0))
    assert not report.ok
    assert "rounded values" in report.kinds(), str(report)
    assert report.findings[0].where == "'w'"


@pytest.mark.parametrize("leaf", ["b", "w"])
@pytest.mark.parametrize("place", ["gradient", "variable", "new value"])
def test_one_leaf_detached_in_an_update(backend: Any, arr: Call, leaf: str, place: str) -> None:
    def update(v: Any, grads: Any, lr: Any, stop_gradients: bool) -> Any:
        found = {}
        for name in v:
            x, g = v[name], grads[name]
            if name == leaf:
                x = ops.stop_gradient(x) if place == "variable" else x
                g = ops.stop_gradient(g) if place == "gradient" else g
            found[name] = x - lr * g
        if place == "new value":
            found[leaf] = ops.stop_gradient(found[leaf])
        return found

    def mixed(task: Any, v: Any) -> Any:
        return cost(task, v) + ops.sum(v["w"] * v["b"]) ** 2

    report = check(arr, mixed, Adaptation(steps=2, lr=0.1, update=update))
    only(report, "detached leaf", f"'{leaf}'", place, "update")


def test_one_leaf_detached_in_a_step(torch_arr: Call) -> None:
    def update(v: Any, grads: Any, lr: Any, stop_gradients: bool) -> Any:
        return {n: v[n] - lr * (grads[n].detach() if n == "b" else grads[n]) for n in v}

    adaptation = Adaptation(steps=2, lr=0.1, update=update)
    step = meta_value_and_grad(adaptation.task_cost(cost, load_backend("torch")), task_map="loop")
    only(check(torch_arr, step=step), "detached leaf", "'b'", "inner gradient")


def test_a_function_without_a_second_derivative(backend: Any, arr: Call) -> None:
    def planted(task: Any, v: Any) -> Any:
        def forward(xs: Any) -> Any:
            return (ops.tanh(xs[0]) ** 2,)

        def backward(xs: Any, bars: Any) -> Any:
            slope = 2 * ops.tanh(xs[0]) * (1 - ops.tanh(xs[0]) ** 2)
            return (ops.stop_gradient(slope) * bars[0],)

        inside = v["w"] * task["x"] + v["b"]
        return ops.mean(backend.custom_vjp(forward, backward)((inside,))[0] * task["x"])

    report = check(arr, planted)
    only(report, "no second derivative", "'b', 'w'", "custom function")
    assert check(arr, planted, Adaptation(steps=0)).ok


def test_a_function_that_can_be_differentiated_once(torch_arr: Call) -> None:
    torch = importlib.import_module("torch")

    class Square(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x: Any) -> Any:
            return x**2

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.save_for_backward(inputs[0])

        @staticmethod
        def backward(ctx: Any, bar: Any) -> Any:
            return Once.apply(ctx.saved_tensors[0], bar)

    class Once(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x: Any, bar: Any) -> Any:
            return 2 * x * bar

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            return None

        @staticmethod
        def backward(ctx: Any, bar: Any) -> Any:
            raise RuntimeError("trying to differentiate twice")

    def planted(task: Any, v: Any) -> Any:
        return Square.apply(v["w"] * task["x"] + v["b"]).mean()

    only(check(torch_arr, planted), "no second derivative", "trying to differentiate twice")


def test_a_step_that_assumes_its_number_of_tasks(torch_arr: Call) -> None:
    right = meta_value_and_grad(TWO_STEPS.task_cost(cost, load_backend("torch")), task_map="loop")

    def step(v: Any, batch: Any) -> Any:
        return right(v, {"x": batch["x"].reshape(3, 2)})

    report = check(torch_arr, step=step)
    assert report.ok, str(report)
    assert "all tasks at once and one by one" in str(report)

    def mixing(v: Any, batch: Any) -> Any:
        return step(v, {"x": batch["x"] - batch["x"].mean(0)})

    assert not check(torch_arr, step=mixing).ok


def test_a_padded_task_far_back_is_found(backend: Any, arr: Call) -> None:
    x = np.ones((9, 2)) * np.arange(1, 10)[:, None] / 10
    x[7] = np.nan
    report = check_meta_gradient(cost, arr(V), arr({"x": x}), TWO_STEPS, executions=())
    only(report, "not finite", "batch['x'], task 7")
