"""Batch normalisation with values of its own for every inner step, against NumPy in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import zoo
from frameworks import hardly_depends_on_the_backend
from metaframe import (
    MAML,
    ImplicitMAML,
    MAMLPlusPlus,
    ProtoNet,
    named_buffers,
    nn,
    ops,
    optim,
    tree,
)
from metaframe.backend import Backend, load_backend
from metaframe.core.container import Container
from metaframe.errors import CheckpointError, InputError, NonFiniteError
from metaframe.tasks import Task
from metaframe.training import MetaTrainer, StepSettings, evaluate
from test_models_norm import MODELS, snapshot

LR, STEPS, EPS = 0.1, 2, 1e-5
ROWS = STEPS + 1
NAMES = {
    "w1": "layer1/w",
    "b1": "layer1/b",
    "scale": "layer1/scale",
    "shift": "layer1/shift",
    "w2": "head/w",
    "b2": "head/b",
}
Values = zoo.Values


def start(seed: int = 0) -> Values:
    rng = np.random.default_rng(seed)
    return {**zoo.weights(), "scale": rng.uniform(0.5, 1.5, 4), "shift": rng.normal(size=4)}


def tables(seed: int = 1) -> Values:
    """Statistics for each point."""
    rng = np.random.default_rng(seed)
    return {"mean": rng.normal(size=(ROWS, 4)), "var": rng.uniform(0.5, 2.0, (ROWS, 4))}


def at(values: Values, k: int) -> Values:
    """The values of point k: a row of every table, and the rest."""
    rows = {n: x[min(k, ROWS - 1)] for n, x in values.items() if _is_table(n, x)}
    return {**values, **rows}


def _is_table(name: str, x: Any) -> bool:
    return name in ("scale", "shift", "mean", "var") and x.ndim == 2


def run(v: Values, x: Any) -> tuple[Any, Any, Any]:
    """The normalised, the activated and the output, at one point."""
    normal = (x @ v["w1"] + v["b1"] - v["mean"]) / np.sqrt(v["var"] + EPS)
    active = np.tanh(normal * v["scale"] + v["shift"])
    return normal, active, active @ v["w2"] + v["b2"]


def loss(v: Values, x: Any, y: Any) -> float:
    return float(np.mean((run(v, x)[2] - y) ** 2))


def gradient(v: Values, x: Any, y: Any) -> Values:
    normal, active, output = run(v, x)
    error = 2 * (output - y) / y.size
    back = (error @ v["w2"].T) * (1 - active**2)
    through = back * v["scale"] / np.sqrt(v["var"] + EPS)
    return {
        "w1": x.T @ through,
        "b1": through.sum(0),
        "w2": active.T @ error,
        "b2": error.sum(0),
        "scale": (back * normal).sum(0),
        "shift": back.sum(0),
    }


def points(v: Values, task: Task, steps: int = STEPS) -> list[Values]:
    """theta_0 .. theta_K, each with its own rows; tables do not adapt."""
    visited = []
    for k in range(steps + 1):
        visited.append(at(v, k))
        grads = gradient(visited[-1], task.support_x, task.support_y)
        v = {n: x if _is_table(n, x) or n not in grads else x - LR * grads[n] for n, x in v.items()}
    return visited


def costs(v: Values, steps: int = STEPS) -> Any:
    """The mean query loss at every point."""
    rows = [
        [loss(p, task.query_x, task.query_y) for p in points(v, task, steps)]
        for task in zoo.tasks()
    ]
    return np.mean(rows, axis=0)


def pair(backend: Backend, v: Values) -> Any:
    def apply(params: Any, x: Any) -> Any:
        layer = params["layer1"]
        given = (layer["mean"], layer["var"]) if "mean" in layer else None
        hidden = nn.dense(x, layer["w"], layer["b"])
        hidden = nn.batch_norm(hidden, layer["scale"], layer["shift"], statistics=given)
        return nn.dense(ops.tanh(hidden), params["head"]["w"], params["head"]["b"])

    nested: Any = {"layer1": {}, "head": {}}
    for ours, chain in NAMES.items():
        layer, _, name = chain.partition("/")
        nested[layer][name] = backend.asarray(v[ours])
    return nn.Model(lambda seed: Container(nested), apply, ("layer1",)), nested


def with_statistics(maml: Any, backend: Backend, values: Values) -> Any:
    maml.assign_statistics({f"layer1/{n}": backend.asarray(x) for n, x in values.items()})
    return maml


def agree(found: Any, expected: Any, backend: Backend, tolerance: float = 1e-10) -> None:
    assert sorted(found) == sorted(NAMES[n] for n in expected)
    scale = max(np.abs(g).max() for g in expected.values())
    for name, value in expected.items():
        np.testing.assert_allclose(
            *(backend.to_numpy(found[NAMES[name]]), value),
            rtol=0,
            atol=tolerance * scale,
            err_msg=name,
        )


def test_meta_gradient(backend: Backend) -> None:
    v, statistics = start(), tables()
    maml = MAML(pair(backend, v), LR, STEPS, norm="per-step")
    with_statistics(maml, backend, statistics)
    result = maml.meta_value_and_grad(nn.mse, zoo.tasks())
    expected = costs({**v, **statistics})[-1]
    np.testing.assert_allclose(backend.to_numpy(result.cost), expected, rtol=1e-12)
    slopes = zoo.differences(lambda v: float(costs({**v, **statistics})[-1]), v)
    agree(result.grads, slopes, backend)


@pytest.mark.parametrize(
    "mode", ["reverse", *(pytest.param(m, marks=pytest.mark.slow) for m in ("remat", "mixed"))]
)
def test_scales_and_shifts_of_every_step(backend: Backend, mode: Any) -> None:
    """With the multi-step loss, so that every row has a gradient of its own."""
    rng = np.random.default_rng(3)
    learned = {n: rng.uniform(0.5, 1.5, (ROWS, 4)) for n in ("scale", "shift")}
    v, statistics = {**start(), **learned}, tables()
    maml = MAMLPlusPlus(
        pair(backend, start()),
        *(LR, STEPS),
        norm="per-step",
        learn_rates=False,
        learn_norms=True,
        multi_step_epochs=10,
    )
    maml.assign({NAMES[n]: backend.asarray(x) for n, x in learned.items()})
    with_statistics(maml, backend, statistics)
    assert "layer1/scale" not in maml.config.names

    def cost(v: Values) -> float:
        return float(costs({**v, **statistics})[1:].mean())

    result = maml.meta_value_and_grad(nn.mse, zoo.tasks(), mode=mode)
    np.testing.assert_allclose(backend.to_numpy(result.cost), cost(v), rtol=1e-12)
    slopes = zoo.differences(cost, v)
    assert np.abs(slopes["scale"][0]).max() > 1e-4  # by way of the second derivative alone
    agree(result.grads, slopes, backend)


def expected_statistics(v: Values, decay: float, old: Values) -> Values:
    """The statistics at each point: the support set before a step, the query set at the end."""
    seen: dict[str, list[Any]] = {"mean": [], "var": []}
    for task in zoo.tasks():
        inputs = [task.support_x] * STEPS + [task.query_x]
        hidden = [x @ p["w1"] + p["b1"] for x, p in zip(inputs, points(v, task), strict=True)]
        seen["mean"].append([h.mean(0) for h in hidden])
        seen["var"].append([h.var(0) for h in hidden])
    return {n: decay * old[n] + (1 - decay) * np.mean(seen[n], axis=0) for n in old}


def test_statistics_are_collected_for_every_point(backend: Backend) -> None:
    v, old = start(), tables()
    maml = MAML(pair(backend, v), LR, STEPS, norm="per-step")
    assert {n: x.shape for n, x in maml.statistics.items()} == {
        "layer1/mean": (ROWS, 4),
        "layer1/var": (ROWS, 4),
    }
    with_statistics(maml, backend, old)
    maml.collect_statistics(nn.mse, zoo.tasks(), decay=0.25)
    for name, value in expected_statistics({**v, **old}, 0.25, old).items():
        found = backend.to_numpy(maml.statistics[f"layer1/{name}"])
        np.testing.assert_allclose(found, value, rtol=0, atol=1e-12)


@hardly_depends_on_the_backend
def test_a_learner_and_an_evaluation_are_at_the_same_points(backend: Backend) -> None:
    v, statistics, task = start(), tables(), zoo.tasks()[0]
    maml = with_statistics(MAML(pair(backend, v), LR, STEPS, norm="per-step"), backend, statistics)
    x, y, query = map(backend.asarray, (task.support_x, task.support_y, task.query_x))
    learner, visited = maml.clone(), points({**v, **statistics}, task, 4)
    for k in range(5):  # steps beyond the last row take the last
        expected = run(visited[k], task.query_x)[2]
        np.testing.assert_allclose(backend.to_numpy(learner(query)), expected, rtol=0, atol=1e-12)
        np.testing.assert_allclose(
            backend.to_numpy(learner(query[:1])), expected[:1], rtol=0, atol=1e-12
        )
        learner.adapt_on(nn.mse, x, y, steps=1)
    found = evaluate(maml, nn.mse, zoo.tasks(), steps=4)
    np.testing.assert_allclose(found.losses.mean(0), costs({**v, **statistics}, 4), rtol=1e-12)
    np.testing.assert_allclose(found.inductive, found.losses[:, -1], rtol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_modules_of_the_frameworks(name: str) -> None:
    """Scales are one and shifts are zero there, and both adapt."""
    pytest.importorskip({"nnx": "flax.nnx", "linen": "flax.linen"}.get(name, name))
    framework, build = MODELS[name]
    backend, model = load_backend(framework), build()
    before = snapshot(model, backend)
    maml = MAML(model, LR, STEPS, norm="per-step")
    maml.collect_statistics(nn.mse, zoo.tasks(), decay=0.0)
    v = {**zoo.weights(), "scale": np.ones(4), "shift": np.zeros(4)}
    fresh = {"mean": np.zeros((ROWS, 4)), "var": np.ones((ROWS, 4))}
    statistics = expected_statistics({**v, **fresh}, 0.0, fresh)
    for key, table in maml.statistics.items():
        expected = statistics["mean" if key.endswith("mean") else "var"]  # or "variance"
        np.testing.assert_allclose(backend.to_numpy(table), expected, rtol=0, atol=1e-12)
    result = maml.meta_value_and_grad(nn.mse, zoo.tasks())
    expected = costs({**v, **statistics})[-1]
    np.testing.assert_allclose(backend.to_numpy(result.cost), expected, rtol=1e-12)
    learned = MAMLPlusPlus(model, LR, 6, learn_norms=True)
    assert sum(tuple(p.shape) == (7, 4) for p in learned.meta_parameters().values()) == 2
    for key, value in snapshot(model, backend).items():
        assert np.array_equal(value, before[key])
    assert set(named_buffers(model)) == set(before)


def test_backward_reaches_the_tables() -> None:
    """On torch they are parameters of the wrapper, saved with it."""
    import torch

    maml = MAMLPlusPlus(MODELS["torch"][1](), LR, STEPS, norm="per-step", learn_norms=True)
    maml.collect_statistics(nn.mse, zoo.tasks(), decay=0.0)
    task = tree.map(torch.from_numpy, zoo.tasks(1)[0])
    learner = maml.clone().adapt_on(nn.mse, task.support_x, task.support_y)
    nn.mse(learner(task.query_x), task.query_y).backward()
    expected = maml.meta_value_and_grad(nn.mse, [task], task_map="loop").grads
    for name, parameter in maml.meta_parameters().items():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=1e-13)
    registered = {id(p) for p in maml.parameters()}
    assert all(id(p) in registered for p in maml.meta_parameters().values())
    assert maml.state_dict()["norms.1.weight"].shape == (ROWS, 4)


@hardly_depends_on_the_backend
def test_training_collects_and_a_checkpoint_keeps(backend: Backend) -> None:
    def trainer(**settings: Any) -> MetaTrainer:
        maml = MAML(pair(backend, start()), LR, STEPS, **settings)
        return MetaTrainer(maml, optim.sgd(0.0), nn.mse, zoo.Fixed())

    driver = trainer(norm="per-step")
    driver.fit(2, 3)
    fresh = {"mean": np.zeros((ROWS, 4)), "var": np.ones((ROWS, 4))}
    first = expected_statistics({**start(), **fresh}, 0.0, fresh)
    second = expected_statistics({**start(), **first}, 0.9, first)
    resumed = trainer(norm="per-step")
    resumed.restore(*driver.state())
    for which in (driver, resumed):
        for name, value in second.items():
            found = backend.to_numpy(which.maml.statistics[f"layer1/{name}"])
            np.testing.assert_allclose(found, value, rtol=0, atol=1e-12)
    with pytest.raises(CheckpointError, match="another normalisation policy"):
        trainer().restore(*driver.state())
    bad = zoo.tasks(3)
    bad[1].support_x[0, 0] = np.nan
    with pytest.raises(NonFiniteError):
        driver.meta_step(bad)
    found = backend.to_numpy(driver.maml.statistics["layer1/mean"])
    np.testing.assert_allclose(found, second["mean"], rtol=0, atol=1e-12)


@hardly_depends_on_the_backend
@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_a_step_that_fails_moves_no_statistics(backend: Backend, error: type[Exception]) -> None:
    """Whatever it fails with, here in the optimizer, after they were collected."""

    def update(grads: Any, state: Any, params: Any, lr: Any) -> Any:
        del params, lr
        if failing:
            raise error
        return tree.map(lambda g: 0 * g, grads), state

    failing = False
    maml = MAML(pair(backend, start()), LR, STEPS, norm="per-step")
    optimizer = optim.Optimizer(lambda params: (), update, 0.0)
    settings = StepSettings(compiled=False)
    driver = MetaTrainer(maml, optimizer, nn.mse, zoo.Fixed(), settings=settings)
    driver.meta_step(zoo.tasks())
    before = {name: backend.to_numpy(x).copy() for name, x in maml.statistics.items()}
    failing = True
    with pytest.raises(error):
        driver.meta_step(zoo.tasks())
    assert driver.step == 1
    for name, value in maml.statistics.items():
        np.testing.assert_array_equal(backend.to_numpy(value), before[name])


@hardly_depends_on_the_backend
def test_policies_of_a_model_written_once(backend: Backend) -> None:
    """Recorded statistics of a batch, put in their places, give the batch's own normalisation."""
    model = nn.conv4(3, channels=2, image_size=16)
    x = backend.asarray(np.random.default_rng(0).normal(size=(6, 16, 16, 1)))
    y = backend.asarray(np.arange(6) % 3)
    found = model, model.init(0)
    own, frozen = (ops.to_numpy(MAML(found, norm=n)(x)) for n in ("batch", "frozen"))
    assert np.abs(own - frozen).max() > 1e-3
    learner = MAML(found, 0.0, norm="support").clone().adapt_on(nn.cross_entropy, x, y)
    np.testing.assert_allclose(ops.to_numpy(learner(x)), own, rtol=0, atol=1e-12)
    np.testing.assert_allclose(ops.to_numpy(learner(x[:1])), own[:1], rtol=0, atol=1e-12)
    task = Task(*(backend.to_numpy(part) for part in (x, y, x, y)))
    per_step = MAML(found, 0.0, norm="per-step")
    per_step.collect_statistics(nn.cross_entropy, [task], decay=0.0)
    np.testing.assert_allclose(ops.to_numpy(per_step(x)), own, rtol=0, atol=1e-12)
    assert ProtoNet(found, 3, norm="per-step").statistics["block1/mean"].shape == (1, 2)
    assert ImplicitMAML(found, norm="per-step").statistics["block1/mean"].shape == (17, 2)


def test_bad_arguments(backend: Backend) -> None:
    plain = zoo.pair(zoo.weights(), backend.name)
    for bad in ({"norm": "per-step"}, {"learn_norms": True}):
        with pytest.raises(InputError, match="needs batch normalisation that says where"):
            MAMLPlusPlus(plain, **bad)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"with norm='per-step', received 'batch'"):
        MAML(plain).collect_statistics(nn.mse, zoo.tasks())
    maml = MAML(pair(backend, start()), LR, STEPS, norm="per-step")
    with pytest.raises(InputError, match=r"decay must be in \[0, 1\], received 2"):
        maml.collect_statistics(nn.mse, zoo.tasks(), decay=2)
    with pytest.raises(InputError, match=r"the statistics are \['layer1/mean', 'layer1/var'\]"):
        maml.assign_statistics({})
    with pytest.raises(InputError, match=r"shape \(3, 4\), received shape \(4,\)"):
        with_statistics(maml, backend, {"mean": np.zeros(4), "var": np.zeros(4)})
