"""`meta_value_and_grad` alone: means over tasks, what comes besides, what is differentiated."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from frameworks import require, slow
from metaframe import MetaResult, inner_loop, maml_step, meta_value_and_grad, ops, use_backend
from metaframe.testing.conformance.closed_form import (
    RATE,
    Problem,
    assert_close,
    query_cost,
    support_cost,
    unpacked,
)

Call = Callable[..., Any]


VARIABLES = {"bias": np.array(0.5), "w": np.array([1.0, -2.0])}
TASKS = {"x": np.arange(10.0).reshape(5, 2) / 5, "y": np.linspace(-1, 1, 5)}


@pytest.fixture(params=["vmap", "scan", "loop"])
def task_map(request: pytest.FixtureRequest) -> Any:
    return request.param


def squared_error(v: Any, task: Any) -> Any:
    return ops.square(ops.sum(v["w"] * task["x"]) + v["bias"] - task["y"])


def exact(count: int = 5) -> tuple[Any, dict[str, Any], Any]:
    x, y = TASKS["x"][:count], TASKS["y"][:count]
    off = x @ VARIABLES["w"] + VARIABLES["bias"] - y
    grads = {"bias": np.mean(2 * off), "w": np.mean(2 * off[:, None] * x, axis=0)}
    return np.mean(off**2), grads, off


def test_mean_and_gradient(arr: Call, to_np: Call, task_map: Any) -> None:
    result = meta_value_and_grad(squared_error, task_map=task_map)(arr(VARIABLES), arr(TASKS))
    assert isinstance(result, MetaResult)
    cost, grads, _ = exact()
    assert_close(to_np(result.cost), cost)
    assert_close(to_np(result.grads), grads)
    assert result.aux == ()


@pytest.mark.parametrize("count", [1, 3])
def test_number_of_tasks(arr: Call, to_np: Call, task_map: Any, count: int) -> None:
    step = meta_value_and_grad(squared_error, task_map=task_map)
    found = to_np(step(arr(VARIABLES), arr(TASKS), num_tasks=count))
    assert_close(found[:2], exact(count)[:2])


@pytest.mark.parametrize("chunk_size", [slow(None), 2])
def test_what_a_cost_returns_besides(
    arr: Call, to_np: Call, task_map: Any, chunk_size: int | None
) -> None:
    def with_aux(v: Any, task: Any) -> Any:
        off = ops.sum(v["w"] * task["x"]) + v["bias"] - task["y"]
        return ops.square(off), {"off": off, "seen": (task["x"], None)}

    step = meta_value_and_grad(with_aux, task_map=task_map, has_aux=True, chunk_size=chunk_size)
    found = to_np(step(arr(VARIABLES), arr(TASKS)))
    cost, grads, off = exact()
    assert_close(found[:2], [cost, grads])
    assert_close(found.aux["off"], off)
    np.testing.assert_array_equal(found.aux["seen"][0], TASKS["x"])
    assert found.aux["seen"][1] is None


@pytest.mark.parametrize(
    ("outer_v", "keep", "expected"),
    [("w", True, {"w"}), ("w", False, {"bias"}), ({"bias": True}, True, {"bias"})],
)
def test_chosen_variables(
    arr: Call, to_np: Call, outer_v: Any, keep: bool, expected: set[str]
) -> None:
    step = meta_value_and_grad(squared_error, outer_v=outer_v, keep_outer_v=keep)
    found = to_np(step(arr(VARIABLES), arr(TASKS)))
    grads = {name: g for name, g in exact()[1].items() if name in expected}
    assert_close(found[:2], [exact()[0], grads])


def test_labels_are_no_variables(arr: Call, to_np: Call, task_map: Any) -> None:
    def picked(v: Any, task: Any) -> Any:
        return ops.sum(ops.take(v["w"], task["label"]) ** 2)

    tasks = {"label": np.array([0, 1, 1, 1], np.int32)}
    found = to_np(meta_value_and_grad(picked, task_map=task_map)(arr(VARIABLES), arr(tasks)))
    assert_close(found[:2], [np.array(13 / 4), {"bias": np.array(0.0), "w": np.array([0.5, -3.0])}])


def test_an_inner_loop_makes_it_maml(arr: Call, to_np: Call, task_map: Any) -> None:
    problem = Problem()

    def meta_cost(v: Any, task: Any) -> Any:
        return query_cost(task, inner_loop(support_cost, v, task, steps=2, lr=RATE))

    step = meta_value_and_grad(meta_cost, task_map=task_map)
    found = to_np(step(arr(problem.variables), arr(problem.batch)))
    assert_close(found[:2], [problem.cost, unpacked(problem.maml)])


# -- costs that stay differentiable -------------------------------------------------------------
#
# The cost that `maml_step(stop_gradients=False)` returns, differentiated by the framework itself,
# once more gives the gradient that the step returned.


@pytest.mark.parametrize("outer_v", [None, "head"])  # what is held depends on the leaf as well
@pytest.mark.parametrize("batched", [True, False, "vmap", "scan"])
def test_torch_differentiates_the_cost(batched: Any, outer_v: Any) -> None:
    require("torch")
    torch = importlib.import_module("torch")
    with use_backend("torch", dtype="float64") as backend:
        problem = Problem()
        leaf = torch.tensor(problem.theta, requires_grad=True)
        v = _split(leaf, torch)
        if batched is True:
            v = _map(v, lambda x: x.expand(3, *x.shape))
        batch = _map(problem.batch, backend.asarray)
        arguments = (batch, support_cost, query_cost, v, 2, RATE)
        how = {"batched": batched, "outer_v": outer_v}
        kept, _, _ = maml_step(*arguments, **how, stop_gradients=False)
        stopped, _, _ = maml_step(*arguments, **how)
        (gradient,) = torch.autograd.grad(kept, leaf)
    assert not stopped.requires_grad
    assert_close(kept.detach().numpy(), np.asarray(problem.cost))
    assert_close(gradient.numpy(), problem.maml)


@pytest.mark.parametrize("batched", [True, slow(False), "vmap", slow("scan")])
def test_jax_differentiates_the_cost(batched: Any) -> None:
    require("jax")
    jax = importlib.import_module("jax")
    problem = Problem()
    batch = _map(problem.batch, jax.numpy.asarray)

    def cost(theta: Any, stop: bool) -> Any:
        v = _split(theta, jax.numpy)
        if batched is True:
            v = _map(v, lambda x: jax.numpy.broadcast_to(x, (3, *x.shape)))
        args = (batch, support_cost, query_cost, v, 2, RATE)
        return maml_step(*args, batched=batched, stop_gradients=stop)[0]

    theta = jax.numpy.asarray(problem.theta)
    assert_close(np.asarray(jax.grad(cost)(theta, False)), problem.maml)
    assert np.all(np.asarray(jax.grad(cost)(theta, True)) == 0.0)


@pytest.mark.parametrize("batched", [True, slow(False), "vmap", slow("scan")])
def test_tensorflow_differentiates_the_cost(batched: Any) -> None:
    require("tensorflow")
    tf = importlib.import_module("tensorflow")
    problem = Problem()
    theta = tf.constant(problem.theta)
    batch = _map(problem.batch, tf.constant)

    def gradient(stop: bool) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(theta)
            v = _split(theta, tf)
            if batched is True:
                v = _map(v, lambda x: tf.broadcast_to(x, (3, *x.shape)))
            args = (batch, support_cost, query_cost, v, 2, RATE)
            cost = maml_step(*args, batched=batched, stop_gradients=stop)[0]
        return tape.gradient(cost, theta)

    assert_close(gradient(stop=False).numpy(), problem.maml)
    assert gradient(stop=True) is None


def _split(theta: Any, library: Any) -> Any:
    return {
        "body": {"b": theta[:2], "w": library.reshape(theta[2:6], (2, 2))},
        "head": theta[6:],
    }


def _map(node: Any, fn: Call) -> Any:
    if isinstance(node, dict):
        return {key: _map(child, fn) for key, child in node.items()}
    return fn(node)
