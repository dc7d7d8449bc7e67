"""Steps and core on ivy's containers and arrays, against finite differences in NumPy."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import metaframe
from metaframe import optim
from metaframe.errors import BackendError, InputTypeError, UnknownKeyError

TASKS, POINTS, LR, STEPS = 3, 5, 0.3, 2
rng = np.random.default_rng(0)
X, Y = rng.normal(size=(2, TASKS, POINTS, 1))
W, B = np.array([[0.7]]), np.array([-0.2])


def numpy_cost(x: Any, y: Any, w: Any, b: Any) -> Any:
    return np.mean((np.tanh(x @ w + b) - y) ** 2)


def numpy_meta_cost(w: Any, b: Any) -> float:
    """The mean over tasks of the cost after adaptation, with the inner gradient by hand."""
    costs = []
    for x, y in zip(X, Y, strict=True):
        v, c = w, b
        for _ in range(STEPS):
            h = np.tanh(x @ v + c)
            e = 2 * (h - y) * (1 - h**2) / POINTS
            v, c = v - LR * x.T @ e, c - LR * e.sum(0)
        costs.append(numpy_cost(x, y, v, c))
    return float(np.mean(costs))


def slope(fn: Callable[[float], float], h: float = 1e-3) -> float:
    """The derivative at 0, by the fourth-order stencil."""
    return (8 * (fn(h) - fn(-h)) - (fn(2 * h) - fn(-2 * h))) / (12 * h)


EXACT = {
    "w": slope(lambda h: numpy_meta_cost(W + h, B)),
    "b": slope(lambda h: numpy_meta_cost(W, B + h)),
}


@pytest.fixture
def cost(ivy: ModuleType) -> Callable[[Any, Any], Any]:
    """Written with ivy's functions, operators, methods and Containers."""

    def cost(batch: Any, v: Any) -> Any:
        hidden = ivy.tanh(ivy.matmul(batch["x"], v.layer.w) + v.layer.b)
        return ivy.square(hidden - batch["y"]).mean()

    return cost


@pytest.fixture
def batch(ivy: ModuleType) -> Any:
    return ivy.Container({"x": ivy.array(X), "y": ivy.array(Y)})


@pytest.fixture
def variables(ivy: ModuleType) -> Any:
    return ivy.Container({"layer": {"w": ivy.array(W), "b": ivy.array(B)}})


def values(ivy: ModuleType, x: Any) -> Any:
    assert isinstance(x, ivy.Array)
    return ivy.to_numpy(x)


def check(ivy: ModuleType, cost: Any, grads: Any) -> None:
    assert isinstance(grads, ivy.Container)
    np.testing.assert_allclose(values(ivy, cost), numpy_meta_cost(W, B), rtol=1e-12)
    for name, exact in EXACT.items():
        found = values(ivy, grads["layer"][name])
        assert found.shape == {"w": (1, 1), "b": (1,)}[name]
        np.testing.assert_allclose(found.item(), exact, rtol=1e-9)


@pytest.mark.parametrize("batched", [True, False, "vmap", "scan"])
def test_maml_step(
    ivy: ModuleType,
    cost: Any,
    batch: Any,
    variables: Any,
    batched: Any,
    request: pytest.FixtureRequest,
) -> None:
    if batched == "scan":
        # ivy compares the devices of its arguments, which JAX's traced arrays do not have.
        ivy.set_soft_device_mode(True)
        request.addfinalizer(ivy.unset_soft_device_mode)
    if batched is True:  # a bias needs an axis that broadcasts over points
        tiled = {"w": np.tile(W, (TASKS, 1, 1)), "b": np.tile(B, (TASKS, 1, 1))}
        variables = ivy.Container({"layer": {k: ivy.array(x) for k, x in tiled.items()}})
    found = metaframe.maml_step(
        batch, cost, None, variables, STEPS, LR, batched=batched, return_inner_v="all"
    )
    assert isinstance(found[2], ivy.Container)
    assert values(ivy, found[2]["layer"]["w"]).shape[0] == TASKS
    if batched is True:
        found[1]["layer"]["b"] = found[1]["layer"]["b"].squeeze(axis=0)
    check(ivy, *found[:2])


def test_functions_that_look_at_values(ivy: ModuleType, batch: Any, variables: Any) -> None:
    """The power does, on torch, and runs task by task there."""

    def cost(batch: Any, v: Any) -> Any:
        return ((ivy.tanh(batch["x"] @ v.layer.w + v.layer.b) - batch["y"]) ** 2).mean()

    found = metaframe.maml_step(batch, cost, None, variables, STEPS, LR, batched=False)
    check(ivy, *found[:2])


def test_ivys_own_update(ivy: ModuleType, cost: Any, batch: Any, variables: Any) -> None:
    found = metaframe.maml_step(
        *(batch, cost, cost, variables, STEPS, LR),
        batched=False,
        inner_optimization_step=ivy.gradient_descent_update,
    )
    check(ivy, *found[:2])


def test_a_rate_of_ivy(ivy: ModuleType, cost: Any, batch: Any, variables: Any) -> None:
    rate = ivy.array(LR, dtype="float64")
    for update in (metaframe.gradient_descent_update, optim.sgd(), optim.momentum(decay=0.0)):
        found = metaframe.maml_step(
            *(batch, cost, cost, variables, STEPS, rate),
            batched="vmap",
            inner_optimization_step=update,
        )
        check(ivy, *found[:2])


def test_choices(ivy: ModuleType, cost: Any, batch: Any, variables: Any) -> None:
    one = ivy.Container({"layer": {"w": True}})
    for choice in (one, "layer/w", ["layer/w"]):
        _, grads, inner = metaframe.maml_step(
            *(batch, cost, None, variables, 1, LR),
            batched="vmap",
            inner_v=choice,
            outer_v=choice,
            return_inner_v="first",
        )
        assert list(grads["layer"]) == ["w"]
        np.testing.assert_array_equal(values(ivy, inner["layer"]["b"])[0], B)
    with pytest.raises(UnknownKeyError, match="layer/w"):
        metaframe.maml_step(batch, cost, None, variables, 1, LR, batched="vmap", inner_v="layer/v")


def test_first_order(ivy: ModuleType, cost: Any, batch: Any, variables: Any) -> None:
    data = (batch, cost, None, variables, STEPS, LR)
    mean_cost, grads = metaframe.fomaml_step(*data, batched="vmap")
    looped = metaframe.fomaml_step(*data, batched=False)[1]
    np.testing.assert_allclose(values(ivy, mean_cost), numpy_meta_cost(W, B), rtol=1e-12)
    for name, exact in EXACT.items():
        found = values(ivy, grads["layer"][name])
        assert abs(found.item() - exact) > 1e-3
        np.testing.assert_allclose(found, values(ivy, looped["layer"][name]), rtol=1e-12)


def test_core(ivy: ModuleType, cost: Any, batch: Any, variables: Any) -> None:
    """The three functions under the steps, eagerly and compiled."""

    def task_cost(v: Any, task: Any) -> Any:
        assert isinstance(task, ivy.Container)
        adapted = metaframe.inner_loop(cost, v, task, steps=STEPS, lr=LR)
        assert isinstance(adapted["layer"]["w"], ivy.Array)
        return cost(task, adapted), {"adapted": adapted}

    step = metaframe.meta_value_and_grad(task_cost, has_aux=True)
    for run in (step, metaframe.compile(step)):
        mean_cost, grads, aux = run(variables, batch)
        check(ivy, mean_cost, grads)
        assert values(ivy, aux["adapted"]["layer"]["w"]).shape == (TASKS, 1, 1)
    means = metaframe.map_tasks(lambda task: task.mean())(batch)
    np.testing.assert_allclose(values(ivy, means["x"]), X.mean((1, 2)), rtol=1e-12)


def test_containers_of_the_frameworks_own_arrays(
    ivy: ModuleType, cost: Any, batch: Any, variables: Any
) -> None:
    def native(tree: Any) -> Any:
        return tree.cont_map(lambda x, _: x.data)

    def unwrapping(batch: Any, v: Any) -> Any:
        return cost(batch, v).data

    mean_cost, grads, _ = metaframe.maml_step(
        native(batch), unwrapping, None, native(variables), STEPS, LR, batched="vmap"
    )
    assert isinstance(grads, ivy.Container)
    assert not isinstance(mean_cost, ivy.Array)
    assert not isinstance(grads["layer"]["w"], ivy.Array)


def test_ivys_backend_decides_where_arrays_do_not(
    backend_name: str, ivy: ModuleType, cost: Any
) -> None:
    ivy.unset_backend()  # arrays made now hold NumPy's
    batch = ivy.Container({"x": ivy.array(X), "y": ivy.array(Y)})
    variables = ivy.Container({"layer": {"w": ivy.array(W), "b": ivy.array(B)}})
    with pytest.raises(BackendError, match="no backend is selected"):
        metaframe.maml_step(batch, cost, None, variables, STEPS, LR, batched="vmap")
    ivy.set_backend(backend_name)
    _, grads, _ = metaframe.maml_step(batch, cost, None, variables, STEPS, LR, batched="vmap")
    assert metaframe.current_backend(grads["layer"]["w"].data).name == backend_name
    found = values(ivy, grads["layer"]["w"])
    assert found.dtype == "float32"  # ivy's default
    np.testing.assert_allclose(found.item(), EXACT["w"], rtol=1e-4)


def test_numpy_has_no_gradients(ivy: ModuleType, cost: Any, batch: Any, variables: Any) -> None:
    ivy.set_backend("numpy")
    with pytest.raises(BackendError, match="ivy's backend is 'numpy'"):
        metaframe.maml_step(batch, cost, None, variables, STEPS, LR, batched="vmap")


def test_another_selection_is_an_error(
    backend_name: str, ivy: ModuleType, cost: Any, batch: Any, variables: Any
) -> None:
    del ivy
    other = "torch" if backend_name != "torch" else "jax"
    with metaframe.use_backend(other), pytest.raises(InputTypeError) as raised:
        metaframe.maml_step(batch, cost, None, variables, STEPS, LR, batched="vmap")
    assert f"'{other}' is selected" in str(raised.value)
    assert f"'{backend_name}'" in str(raised.value)


def test_a_copy_with_a_backend_of_its_own(backend_name: str, ivy: ModuleType) -> None:
    """`ivy.with_backend` has classes of its own, whatever ivy's backend is; costs have one axis."""
    ivy.set_backend("numpy")
    own = ivy.with_backend(backend_name)
    assert own.Container is not ivy.Container

    def cost(batch: Any, v: Any) -> Any:
        hidden = own.tanh(own.matmul(batch["x"], v.layer.w) + v.layer.b)
        return own.square(hidden - batch["y"]).mean().reshape((1,))

    batch = own.Container({"x": own.array(X), "y": own.array(Y)})
    variables = own.Container({"layer": {"w": own.array(W), "b": own.array(B)}})
    found = metaframe.maml_step(batch, cost, None, variables, STEPS, LR, batched=False)
    check(own, *found[:2])
    assert found[0].shape == ()
