"""Every library's model has the meta-gradient of the same network worked out in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import zoo
from frameworks import require
from metaframe import ANIL, MAML, MetaSGD, head_names, nn
from metaframe.backend import load_backend
from zoo import Library, built, every_library

LR, STEPS = 0.1, 2
RATES = dict.fromkeys(zoo.NAMES, LR)


def close(found: zoo.Values, expected: zoo.Values, tolerance: float = 1e-10) -> None:
    assert sorted(found) == sorted(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=tolerance, err_msg=name)


@pytest.fixture(scope="module")
def second_order() -> zoo.Values:
    return zoo.differences(lambda v: zoo.meta_cost(v, RATES, STEPS, zoo.tasks()), zoo.weights())


@every_library()
def test_second_order(library: Library, second_order: zoo.Values) -> None:
    maml = MAML(built(library), inner_lr=LR, inner_steps=STEPS)
    result = maml.meta_value_and_grad(nn.mse, zoo.tasks())
    backend = load_backend(library.backend)
    close(library.canonical(result.grads, backend), second_order)
    costs = backend.to_numpy(result.aux["costs"])
    assert costs.shape == (3,)
    expected = zoo.meta_cost(zoo.weights(), RATES, STEPS, zoo.tasks())
    np.testing.assert_allclose([costs.mean(), backend.to_numpy(result.cost)], expected, rtol=1e-13)


@every_library()
def test_first_order_is_the_gradient_at_the_adapted_point(
    library: Library, second_order: zoo.Values
) -> None:
    points = [(zoo.adapted(zoo.weights(), t, RATES, STEPS), t) for t in zoo.tasks()]
    grads = [zoo.gradient(v, t.query_x, t.query_y) for v, t in points]
    expected = {name: np.mean([g[name] for g in grads], axis=0) for name in zoo.NAMES}
    maml = MAML(built(library), inner_lr=LR, inner_steps=STEPS, first_order=True)
    result = maml.meta_value_and_grad(nn.mse, zoo.tasks())
    found = library.canonical(result.grads, load_backend(library.backend))
    close(found, expected, 1e-13)
    assert np.abs(found["w1"] - second_order["w1"]).max() > 1e-3


@every_library()
def test_learned_rates(library: Library) -> None:
    start = {name: np.full_like(value, LR) for name, value in zoo.weights().items()}
    maml = MetaSGD(built(library), LR, STEPS)
    result = maml.meta_value_and_grad(nn.mse, zoo.tasks())
    backend = load_backend(library.backend)
    expected = zoo.differences(
        lambda rates: zoo.meta_cost(zoo.weights(), rates, STEPS, zoo.tasks()), start
    )
    close(library.canonical(result.grads, backend, "learned/"), expected)
    assert list(result.grads) == list(maml.meta_parameters())


@every_library()
def test_head_only(library: Library) -> None:
    model = built(library)
    head = library.head(model)
    assert sorted(head_names(model, head)) == sorted(library.names[2:])
    maml = ANIL(model, head, inner_lr=LR, inner_steps=STEPS)
    result = maml.meta_value_and_grad(nn.mse, zoo.tasks())
    rates = {**RATES, "w1": 0.0, "b1": 0.0}
    expected = zoo.differences(lambda v: zoo.meta_cost(v, rates, STEPS, zoo.tasks()), zoo.weights())
    found = library.canonical(result.grads, load_backend(library.backend))
    close(found, expected)
    assert np.abs(found["w1"]).max() > 1e-3


@every_library()
def test_learner_takes_the_same_steps(library: Library) -> None:
    require(library.backend)
    backend, task = load_backend(library.backend), zoo.tasks()[0]
    sx, sy, qx = map(backend.asarray, (task.support_x, task.support_y, task.query_x))
    maml = MAML(built(library), inner_lr=LR, inner_steps=STEPS)
    before = library.canonical(maml.meta_parameters(), backend)
    learner = maml.clone().adapt_on(nn.mse, sx, sy)
    expected = zoo.adapted(zoo.weights(), task, RATES, STEPS)
    close(library.canonical(learner.params, backend), expected, 1e-14)
    predicted = backend.to_numpy(learner(qx))
    np.testing.assert_allclose(predicted, zoo.predict(expected, task.query_x), atol=1e-13)
    unadapted = backend.to_numpy(maml(qx))
    np.testing.assert_allclose(unadapted, zoo.predict(zoo.weights(), task.query_x), atol=1e-13)
    close(library.canonical(maml.meta_parameters(), backend), before, 0.0)
    other = maml.clone().adapt(lambda learner: nn.mse(learner(sx), sy))
    other.adapt(lambda learner: nn.mse(learner(sx), sy))
    close(library.canonical(other.params, backend), expected, 1e-14)


@every_library()
def test_assigned_values_are_the_models(library: Library) -> None:
    maml = MAML(built(library))
    backend = load_backend(library.backend)
    doubled: dict[str, Any] = {
        name: 2.0 * backend.stop_gradient(x) for name, x in maml.meta_parameters().items()
    }
    maml.assign(doubled)
    found = library.canonical(MAML(maml.module).meta_parameters(), backend)
    close(found, {name: 2 * x for name, x in zoo.weights().items()}, 0.0)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"chunk_size": 2},
        {"mode": "remat"},
        {"task_map": "scan"},
        pytest.param({"task_map": "loop"}, marks=pytest.mark.slow),
        pytest.param({"compiled": True}, marks=pytest.mark.slow),
        pytest.param({"mode": "mixed"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_every_way_to_run(backend_name: str, how: dict[str, Any], second_order: zoo.Values) -> None:
    library = zoo.PAIRS[backend_name]
    maml = MAML(built(library), inner_lr=LR, inner_steps=STEPS)
    for _ in range(2):  # the second call finds what the first compiled
        result = maml.meta_value_and_grad(nn.mse, zoo.tasks(), **how)
        close(library.canonical(result.grads, load_backend(backend_name)), second_order)
