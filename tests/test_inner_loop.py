"""`inner_loop` on its own: what it is a function of, and every kind of update rule."""

from __future__ import annotations

import importlib
import math
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from frameworks import require, slow
from meta_problems import classification, quick
from metaframe import (
    apply_updates,
    inner_loop,
    maml_step,
    meta_value_and_grad,
    nn,
    ops,
    optim,
    tree,
    use_backend,
)
from metaframe import compile as metaframe_compile
from metaframe.backend import Backend
from metaframe.errors import BackendError, InputError, InputTypeError
from metaframe.testing.conformance.closed_form import (
    RATE,
    SIZE,
    Problem,
    assert_close,
    mask,
    support_cost,
    unpacked,
)

Call = Callable[..., Any]

MODES = ["reverse", "remat", "mixed"]


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def task(arr: Call) -> Any:
    """The first task of the closed form, without a task axis."""
    return arr(tree.map(lambda x: x[0], Problem().batch))


# -- values ----------------------------------------------------------------------------------


def test_chosen_variables(arr: Call, to_np: Call, task: Any) -> None:
    problem = Problem(adapted=mask("body/b", "body/w"))
    v = arr(problem.variables)
    found = inner_loop(support_cost, v, task, steps=2, lr=RATE, inner_v="head", keep_inner_v=False)
    assert_close(to_np(found), unpacked(problem.points(0)[-1][0]))
    assert found["head"] is v["head"]


def test_any_structure(arr: Call, to_np: Call) -> None:
    pair = namedtuple("pair", ["first", "second"])
    v = arr({"a": pair(np.array(1.0), [2.0]), "b": (np.ones((2, 2)), None)})

    def cost(batch: Any, v: Any) -> Any:
        squares = (ops.sum(ops.square(x)) for x in tree.leaves(v))
        return batch * sum(squares) / 2

    found = to_np(inner_loop(cost, v, arr(np.array(1.0)), steps=1, lr=0.25))
    assert tree.structure(found) == tree.structure(v)
    assert isinstance(found["a"], pair)
    for after, before in zip(tree.leaves(found), tree.leaves(to_np(v)), strict=True):
        np.testing.assert_array_equal(after, 0.75 * before)


def test_nothing_is_changed_in_place(arr: Call, to_np: Call, task: Any, mode: Any) -> None:
    v = arr(Problem().variables)
    before = tree.map(np.copy, to_np((v, task)))
    inner_loop(support_cost, v, task, steps=2, lr=RATE, update=optim.adam(), mode=mode)
    for a, b in zip(tree.leaves(to_np((v, task))), tree.leaves(before), strict=True):
        np.testing.assert_array_equal(a, b)


# -- derivatives -----------------------------------------------------------------------------


def test_a_learnable_rate_for_each_variable(backend: Any, arr: Call, to_np: Call) -> None:
    """MetaSGD: the gradient by a rate of the shape of its variable."""
    problem = Problem(steps=1, tasks=1, rate=np.linspace(0.01, 0.1, SIZE))
    weight = np.random.default_rng(8).normal(size=SIZE)

    def meta_cost(given: Any, task: Any) -> Any:
        v = inner_loop(support_cost, given["v"], task, steps=1, lr=given["rates"], mode="remat")
        pairs = zip(tree.leaves(v), tree.leaves(task["weight"]), strict=True)
        return sum(ops.sum(x * w) for x, w in pairs)

    given = {"v": problem.variables, "rates": unpacked(np.asarray(problem.rate))}
    tasks = {**problem.batch, "weight": unpacked(weight[None])}
    step = quick(backend, meta_value_and_grad(meta_cost))
    _, grads, _ = to_np(step(arr(given), arr(tasks)))
    assert_close(grads["v"], unpacked(problem.points(0)[-1][1].T @ weight))
    assert_close(grads["rates"], unpacked(-weight * problem.support.gradient(0, problem.theta)))


@pytest.mark.parametrize("optimizer", ["adamw", slow("momentum"), slow("rmsprop")])
def test_first_order_is_the_gradient_at_the_adapted_point(
    backend: Any, arr: Call, to_np: Call, optimizer: str
) -> None:
    """Whatever the update rule does to the variables, weight decay included."""
    problem = Problem(steps=2, tasks=1)
    rule = {
        "adamw": optim.adamw(weight_decay=0.5),
        "momentum": optim.momentum(),
        "rmsprop": optim.rmsprop(),
    }[optimizer]

    def meta_cost(order: Any) -> Call:
        def cost(v: Any, task: Any) -> Any:
            adapted = inner_loop(support_cost, v, task, steps=2, lr=RATE, update=rule, order=order)
            return support_cost(task, adapted), adapted

        return quick(backend, meta_value_and_grad(cost, has_aux=True))

    args = arr(problem.variables), arr(problem.batch)
    _, first, adapted = to_np(meta_cost(1)(*args))
    _, second, _ = to_np(meta_cost(2)(*args))
    flat = np.concatenate([np.ravel(x) for x in tree.leaves(adapted)])
    exact = problem.support.gradient(0, flat)
    assert_close(first, unpacked(exact))
    curvature = np.concatenate([np.ravel(x) for x in tree.leaves(second)]) - exact
    assert np.linalg.norm(curvature) > 1e-3 * np.linalg.norm(exact)


@pytest.mark.parametrize("task_map", ["vmap", slow("scan"), slow("loop")])
def test_labels_in_the_batch(
    backend: Any, arr: Call, to_np: Call, mode: Any, task_map: Any
) -> None:
    """Integers are no differentiable input: they have no cotangent and must not get one."""
    model = nn.mlp([4, 5, 3], activation=ops.tanh)
    made = classification()
    batch = {
        part: {"x": data["x"].reshape(2, 6, -1)[..., :4], "y": data["y"]}
        for part, data in made.batch.items()
    }
    rng = np.random.default_rng(0)
    variables = {
        "layer1": {"w": rng.normal(size=(4, 5)), "b": np.zeros(5)},
        "head": {"w": rng.normal(size=(5, 3)), "b": np.zeros(3)},
    }

    def cost(data: Any, v: Any) -> Any:
        return nn.cross_entropy(model.apply(v, data["x"]), data["y"])

    def run(kind: Any) -> Any:
        def meta_cost(v: Any, task: Any) -> Any:
            rule = optim.momentum()
            v = inner_loop(cost, v, task["support"], steps=2, lr=0.1, update=rule, mode=kind)
            return cost(task["query"], v)

        step = quick(backend, meta_value_and_grad(meta_cost, task_map=task_map))
        return to_np(step(arr(variables), arr(batch))[:2])

    assert_close(run(mode), reference_with_labels(cost, batch, variables))


def reference_with_labels(cost: Call, batch: Any, variables: Any) -> Any:
    """The plain loop on torch."""
    require("torch")
    with use_backend("torch", dtype="float64") as torch:

        def meta_cost(v: Any, task: Any) -> Any:
            rule = optim.momentum()
            v = inner_loop(cost, v, task["support"], steps=2, lr=0.1, update=rule)
            return cost(task["query"], v)

        v, tasks = tree.map(torch.asarray, (variables, batch))
        found = meta_value_and_grad(meta_cost, task_map="loop")(v, tasks)
        return tree.map(torch.to_numpy, found[:2])


def with_loss_of_torch(loss: Call, task_map: Any) -> Call:
    """The meta-gradient through one step in mode "mixed", with `loss(u * x, y)` as inner cost."""

    def meta_cost(v: Any, task: Any) -> Any:
        def cost(batch: Any, inner: Any) -> Any:
            return loss(inner["u"] * batch["x"], batch["y"])

        return inner_loop(cost, v, task, steps=1, lr=0.1, mode="mixed")["u"]

    return meta_value_and_grad(meta_cost, task_map=task_map)


@pytest.mark.parametrize("task_map", ["vmap", "loop"])
def test_mixed_mode_with_a_constant_target(task_map: Any) -> None:
    """torch: in forward mode its mse_loss fails if the target has no tangent."""
    require("torch")
    functional = importlib.import_module("torch.nn.functional")
    x = np.array([[0.5, 1.0, -2.0]])
    with use_backend("torch", dtype="float64") as torch:
        v, tasks = tree.map(torch.asarray, ({"u": np.array(0.7)}, {"x": x, "y": np.ones((1, 3))}))
        _, grads, _ = with_loss_of_torch(functional.mse_loss, task_map)(v, tasks)
        assert_close(torch.to_numpy(grads["u"]), np.asarray(1 - 0.2 * np.mean(x**2)))


@pytest.mark.parametrize("task_map", ["vmap", "loop"])
def test_mixed_mode_with_an_integer_target(execution: Call, task_map: Any) -> None:
    """torch: zeros without memory are the tangent, which mse_loss writes to, or a program reads."""
    require("torch")
    functional = importlib.import_module("torch.nn.functional")
    x = np.array([[0.5, 1.0, -2.0]])
    with use_backend("torch", dtype="float64") as torch:
        v, tasks = tree.map(torch.asarray, ({"u": np.array(0.7)}, {"x": x}))
        tasks = {**tasks, "y": torch.asarray(np.ones((1, 3), np.int64))}
        cost = with_loss_of_torch(lambda p, y: functional.mse_loss(p, y.double()), task_map)
        assert_close(
            torch.to_numpy(execution(cost)(v, tasks).grads["u"]),
            np.asarray(1 - 0.2 * np.mean(x**2)),
        )


def test_mixed_mode_without_a_forward_derivative(execution: Call) -> None:
    require("torch")
    huber_loss = importlib.import_module("torch.nn.functional").huber_loss
    with use_backend("torch", dtype="float64") as torch:
        v, tasks = tree.map(torch.asarray, ({"u": np.array(0.7)}, {"x": np.ones((1, 3))}))
        tasks = {**tasks, "y": torch.asarray(np.ones((1, 3)))}
        with pytest.raises(BackendError, match=r'no forward mode.*mode="remat"'):
            execution(with_loss_of_torch(huber_loss, "vmap"))(v, tasks)


# -- update rules ----------------------------------------------------------------------------


def test_a_function_as_update(backend: Any, arr: Call, to_np: Call, task: Any, mode: Any) -> None:
    problem = Problem()

    def update(v: Any, grads: Any, lr: Any, *, stop_gradients: bool) -> Any:
        assert stop_gradients is False
        return tree.map(lambda x, g: x - lr * g, v, grads)

    v = arr(problem.variables)
    found = inner_loop(support_cost, v, task, steps=2, lr=RATE, update=update, mode=mode)
    assert_close(to_np(found), unpacked(problem.points(0)[-1][0]))


def test_adam_without_momentum(arr: Call, to_np: Call) -> None:
    """With b1 = 0 the first step is the sign of the gradient."""
    rule, v, grads = optim.adam(0.1, b1=0.0), arr({"w": [1.0, 2.0]}), arr({"w": [3.0, -4.0]})
    updates, state = rule.update(grads, rule.init(v))
    np.testing.assert_allclose(to_np(updates["w"]), [-0.1, 0.1], rtol=1e-8)
    updates, _ = rule.update(grads, state)
    np.testing.assert_allclose(to_np(updates["w"]), [-0.1, 0.1], rtol=1e-8)


def test_adam_counts_beyond_half_precision(backend: Backend, to_np: Call) -> None:
    """bfloat16 counts to 256, and the bias correction would stay what it is there."""
    params = {"a": backend.asarray([1.0], "bfloat16"), "b": backend.asarray([1.0], "float32")}
    rule = optim.adam(0.1)
    state = rule.init(params)
    state = state._replace(count=state.count + 256)
    updates, state = rule.update(params, state)
    assert backend.dtype_name(state.count) == "float32"
    assert float(to_np(state.count)) == 257
    dtypes = {name: backend.dtype_name(x) for name, x in updates.items()}
    assert dtypes == {"a": "bfloat16", "b": "float32"}
    mean, square = 0.1 / (1 - 0.9**257), 0.001 / (1 - 0.999**257)
    np.testing.assert_allclose(to_np(updates["b"]), [-0.1 * mean / square**0.5], rtol=1e-5)


def test_a_norm_beyond_half_precision(backend: Backend, to_np: Call) -> None:
    grads = [backend.asarray([200.0] * 4, "float16"), backend.asarray([300.0], "float32")]
    assert float(to_np(optim.global_norm(grads))) == 500.0
    clipped, _ = optim.clip_by_global_norm(grads, 250.0)
    assert backend.dtype_name(clipped) == "float16"
    np.testing.assert_array_equal(to_np(clipped), [100.0] * 4)


def test_limits_of_clipping(backend: Backend, arr: Call, to_np: Call) -> None:
    """Infinity is no limit; and what stops the training is none either."""
    del backend
    grads = arr({"w": [3.0, -4.0]})
    for clip in (optim.clip_by_global_norm, optim.clip_by_value):
        np.testing.assert_array_equal(to_np(clip(grads, math.inf)["w"]), [3.0, -4.0])
        for limit in (0.0, -1.0, math.nan):
            with pytest.raises(InputError, match="must be above 0, received"):
                clip(grads, limit)
    for limits in ({"norm": 0.0}, {"value": 0}, {"norm": 1.0, "value": -1.0}):
        with pytest.raises(InputError, match="must be above 0, received"):
            optim.clipped(optim.sgd(0.1), **limits)


def test_a_rate_of_numpy_is_a_number(backend: Backend) -> None:
    """Its dtype does not decide that of the variables."""
    v = {"w": backend.asarray([1.0, 2.0], "float32")}
    rate = np.float64(0.1)
    step = optim.adam(rate)
    updates, _ = step.update(v, step.init(v))
    adapted = inner_loop(lambda _, v: ops.sum(ops.square(v["w"])), v, {}, steps=2, lr=rate)
    assert {backend.dtype_name(x["w"]) for x in (updates, adapted)} == {"float32"}


def test_an_update_function_without_the_arguments(arr: Call) -> None:
    with pytest.raises(InputTypeError, match=r"update\(v, grads, lr, stop_gradients=...\)"):
        inner_loop(support_cost, arr({"w": [1.0]}), {}, steps=1, lr=0.1, update=lambda v, g, r: v)


@pytest.mark.parametrize("decay", [{"b1": 1.0}, {"b2": -0.1}])
def test_a_decay_has_to_be_below_one(decay: dict[str, float]) -> None:
    with pytest.raises(InputError, match=r"b[12] has to be in \[0, 1\)"):
        optim.adam(0.1, **decay)


def test_an_optimizer_outside(arr: Call, to_np: Call) -> None:
    """The same pair of functions serves the outer loop."""
    v = arr({"w": np.array([1.0, -2.0])})
    rule = optim.momentum(0.5, decay=0.5)
    state = rule.init(v)
    for _ in range(2):
        updates, state = rule.update(v, state, v)
        v = apply_updates(v, updates)
    # w1 = w / 2; m2 = w / 2 + w1 = w; w2 = w1 - w / 2 = 0.
    assert_close(to_np(v), {"w": np.zeros(2)})


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("sgd", "reverse"),
        ("adam", "remat"),
        slow("adam", "reverse"),
        slow("adam", "mixed"),
        slow("sgd", "remat"),
        slow("sgd", "mixed"),
        *(slow("rmsprop", mode) for mode in MODES),
    ],
)
def test_optax(name: str, mode: Any) -> None:
    """An optax transformation, integer step counter and all, equals our rule of the same name."""
    require("jax")
    optax = importlib.import_module("optax")
    foreign, ours = {
        "sgd": (optax.sgd(RATE, momentum=0.9), optim.momentum()),
        "adam": (optax.adam(RATE), optim.adam()),
        "rmsprop": (optax.rmsprop(RATE, decay=0.9, eps_in_sqrt=False), optim.rmsprop()),
    }[name]
    problem = Problem(steps=3, tasks=2)

    def run(update: Any, lr: Any, kind: Any) -> Any:
        def meta_cost(v: Any, task: Any) -> Any:
            v = inner_loop(support_cost, v, task, steps=3, lr=lr, update=update, mode=kind)
            return support_cost(task, v)

        step = quick(jax, meta_value_and_grad(meta_cost))
        args = tree.map(jax.asarray, (problem.variables, problem.batch))
        return tree.map(jax.to_numpy, step(*args)[:2])

    with use_backend("jax", dtype="float64") as jax:
        # Not 1e-12: optax takes the power of 0.999 itself, with a digit or two less.
        assert_close(run(foreign, None, mode), run(ours, RATE, "reverse"), 1e-11)


@pytest.mark.parametrize("mode", MODES)
def test_an_eager_loop_on_jax_compiles_nothing_anew(mode: Any) -> None:
    """A program for each call would stay in JAX's caches, megabytes each."""
    require("jax")
    monitoring = importlib.import_module("jax.monitoring")
    compiled: list[str] = []

    def listen(event: str, duration: float, **_: Any) -> None:
        if "backend_compile" in event:
            compiled.append(event)

    def cost(task: Any, v: Any) -> Any:
        return ops.mean((v["w"] * task["x"]) ** 2)

    with use_backend("jax", dtype="float64") as jax:
        batch = {"x": jax.asarray(np.arange(6.0).reshape(2, 3))}
        v = {"w": jax.asarray(np.ones(3))}

        def steps() -> None:
            for batched in ("vmap", "scan"):
                maml_step(batch, cost, None, v, 9, 0.1, batched=batched, mode=mode)

        steps()
        monitoring.register_event_duration_secs_listener(listen)
        try:
            steps()
            assert compiled == []
            metaframe_compile(lambda x: x + 1)(batch["x"])
            assert compiled, "the listener hears of programs"
        finally:
            monitoring.unregister_event_duration_listener(listen)
