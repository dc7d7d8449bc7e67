"""Learners opened: a support loss, a call, weights, outer variables, rates and minibatches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import metaframe
import zoo
from metaframe import MAML, ImplicitMAML, MetaTrainer, Reptile, nn, ops, optim
from metaframe.backend import Backend
from metaframe.errors import InputError, InputTypeError
from metaframe.learners import Minibatches, TaskLoss
from metaframe.models._pair import PairAdapter
from metaframe.tasks import Task, stack_tasks
from metaframe.training import StepSettings, evaluate

LEARNED = {"rate": 0.1, "loss": {"scale": np.array([0.1, -0.2])}}
WEIGHTS = [1.0, 2.0, 0.5]
ROWS = np.array([[0, 3, 5], [4, 1, 1]])


def network(params: Any, x: Any) -> Any:
    hidden = ops.tanh(ops.matmul(x, params["w1"]) + params["b1"])
    return ops.matmul(hidden, params["w2"]) + params["b2"]


def scaled(prediction: Any, target: Any, learned: Any) -> Any:
    errors = ops.square(prediction - target)
    return ops.mean(errors * ops.exp(learned["loss"]["scale"]))


def call(model: Any, x: Any) -> Any:
    return model(x["features"])


def rate(learned: Any) -> Any:
    return learned["rate"]


def in_a_dict(task: Task) -> Task:
    return Task(
        {"features": task.support_x}, task.support_y, {"features": task.query_x}, task.query_y
    )


TASKS = [in_a_dict(task) for task in zoo.tasks()]


@pytest.fixture
def model(backend: Backend) -> Any:
    return network, {name: backend.asarray(x) for name, x in zoo.weights().items()}


def values(maml: Any, backend: Backend) -> dict[str, Any]:
    return {name: backend.to_numpy(x).copy() for name, x in maml.meta_arrays().items()}


def cost_in_numpy(values: Any, rows: Any = ROWS, weights: Any = WEIGHTS) -> float:
    """The weighted meta-objective, with the gradient of the support loss written out."""
    total = 0.0
    for task, weight in zip(zoo.tasks(), weights, strict=True):
        v = {name: values[name] for name in zoo.NAMES}
        for chosen in rows:
            x, y = task.support_x[chosen], task.support_y[chosen]
            scale = np.exp(values["learned/loss/scale"])
            g = zoo.backward(v, x, 2 * (zoo.predict(v, x) - y) * scale / y.size)
            v = {name: v[name] - values["learned/rate"] * g[name] for name in v}
        total += weight * zoo.loss(v, task.query_x, task.query_y) / len(TASKS)
    return total


@pytest.mark.parametrize(
    ("compiled", "task_map", "mode"),
    [
        (None, "vmap", "remat"),
        (None, "scan", "reverse"),
        pytest.param(True, "vmap", "reverse", marks=pytest.mark.slow),
    ],
)
def test_everything_at_once(
    compiled: bool | None, task_map: Any, mode: Any, model: Any, backend: Backend
) -> None:
    maml = MAML(model, rate, 2, learned=LEARNED, inner_batches=ROWS)
    result = maml.meta_value_and_grad(
        nn.mse,
        TASKS,
        support_loss=scaled,
        call=call,
        weights=WEIGHTS,
        metric=nn.mse,
        compiled=compiled,
        task_map=task_map,
        mode=mode,
    )
    at = values(maml, backend)
    expected = zoo.differences(cost_in_numpy, at)
    assert set(result.grads) == set(expected)
    np.testing.assert_allclose(backend.to_numpy(result.cost), cost_in_numpy(at), rtol=1e-12)
    largest = max(float(np.abs(g).max()) for g in expected.values())
    for name, g in expected.items():
        found = backend.to_numpy(result.grads[name])
        np.testing.assert_allclose(found, g, rtol=0, atol=1e-10 * largest, err_msg=name)
    costs, scores = (backend.to_numpy(result.aux[name]) for name in ("costs", "scores"))
    np.testing.assert_array_equal(costs, scores)
    np.testing.assert_allclose(np.mean(costs * WEIGHTS), cost_in_numpy(at), rtol=1e-12)


def test_a_learner_does_the_same(model: Any, backend: Backend) -> None:
    maml = MAML(model, rate, 3, learned=LEARNED, inner_batches=Minibatches(4, seed=1))

    def task_loss(params: Any, task: Any) -> Any:
        learner = maml.clone(params)
        learner.adapt_on(scaled, task.support_x, task.support_y, steps=1, call=call)
        learner.adapt_on(scaled, task.support_x, task.support_y, steps=2, call=call)
        return nn.mse(call(learner, task.query_x), task.query_y)

    batch = metaframe.tree.map(backend.asarray, stack_tasks(TASKS[:1]))
    step: Any = metaframe.meta_value_and_grad(task_loss, task_map="loop")
    step = metaframe.compile(step) if backend.compiles_quickly else step
    by_hand = step(maml.meta_arrays(), batch)
    result = maml.meta_value_and_grad(
        nn.mse, batch, support_loss=scaled, call=call, task_map="loop"
    )
    for name, g in result.grads.items():
        np.testing.assert_allclose(
            backend.to_numpy(by_hand.grads[name]), backend.to_numpy(g), rtol=0, atol=1e-13
        )
    assert float(abs(backend.to_numpy(result.grads["learned/rate"]))) > 1e-3


def test_the_rate_of_one_call(model: Any, backend: Backend) -> None:
    task = zoo.tasks(1)[0]
    start, learner = zoo.weights(), MAML(model, 0.5, 1).clone()
    x, y = backend.asarray(task.support_x), backend.asarray(task.support_y)
    learner.adapt(lambda learner: nn.mse(learner(x), y), lr=0.1)
    learner.adapt(lambda learner: nn.mse(learner(x), y), lr=dict.fromkeys(zoo.NAMES, 0.2))
    learner.adapt_on(nn.mse, x, y, steps=1, lr=0.3)
    learner.adapt_on(nn.mse, x, y)
    v = start
    for lr in (0.1, 0.2, 0.3, 0.5):
        g = zoo.gradient(v, task.support_x, task.support_y)
        v = {name: v[name] - lr * g[name] for name in v}
    for name, expected in v.items():
        np.testing.assert_allclose(
            backend.to_numpy(learner.params[name]), expected, rtol=0, atol=1e-14
        )


def test_weights_of_a_function_and_aux(model: Any, backend: Backend) -> None:
    maml = MAML(model, 0.1, 1, learned={"log_weight": 0.0})

    def weight(task: Any, learned: Any) -> Any:
        return ops.exp(learned["log_weight"]) * ops.mean(ops.square(task.query_y))

    def logged(prediction: Any, target: Any) -> Any:
        return nn.mse(prediction, target), {"first": prediction[0], "two": [target[1]]}

    result = maml.meta_value_and_grad(
        logged, TASKS, call=call, weights=weight, has_aux=True, task_map="vmap"
    )
    given = [float(np.mean(task.query_y**2)) for task in zoo.tasks()]
    plain = maml.meta_value_and_grad(nn.mse, TASKS, call=call, weights=given, task_map="vmap")
    for name in zoo.NAMES:
        np.testing.assert_allclose(
            backend.to_numpy(result.grads[name]), backend.to_numpy(plain.grads[name]), atol=1e-15
        )
    # d/dz mean exp(z) w L = the cost itself, at z = 0.
    np.testing.assert_allclose(
        backend.to_numpy(result.grads["learned/log_weight"]),
        backend.to_numpy(result.cost),
        rtol=1e-14,
    )
    assert tuple(result.aux["aux"]["first"].shape) == (3, 2)
    np.testing.assert_array_equal(
        backend.to_numpy(result.aux["aux"]["two"][0]), [task.query_y[1] for task in zoo.tasks()]
    )


def test_a_trainer_takes_them(model: Any, backend: Backend) -> None:
    maml = MAML(model, rate, 2, learned=LEARNED, inner_batches=ROWS)
    trainer = MetaTrainer(
        maml,
        optim.sgd(0.5),
        nn.mse,
        zoo.Fixed(),
        support_loss=scaled,
        call=call,
        weights=lambda task: ops.mean(ops.square(task.query_y)),
        settings=StepSettings(task_map="vmap"),
    )
    before = values(maml, backend)
    given = [float(np.mean(task.query_y**2)) for task in zoo.tasks()]

    def cost(at: Any) -> float:
        return cost_in_numpy(at, weights=given)

    expected = zoo.differences(cost, before)
    assert trainer.meta_step(TASKS) == pytest.approx(cost(before), rel=1e-12)
    after = values(maml, backend)
    for name, g in expected.items():
        np.testing.assert_allclose(after[name], before[name] - 0.5 * g, rtol=0, atol=1e-9)
    found = evaluate(maml, TaskLoss(nn.mse, scaled, call), TASKS, steps=3)
    for steps, loss in enumerate(np.mean(found.losses, axis=0)):  # the rows start over
        rows = [*ROWS, ROWS[0]][:steps]
        assert loss == pytest.approx(cost_in_numpy(after, rows, [1.0] * 3), rel=1e-10)
    expected_loss = float(np.mean(found.losses, axis=0)[2])
    assert trainer.evaluate(TASKS) == pytest.approx(expected_loss, rel=1e-12)


def test_reptile_as_the_paper_trains_it(model: Any, backend: Backend) -> None:
    """Adam without momentum inside, minibatches, and the outer step theta += eps (mean - theta)."""
    epsilon, lr, steps = 0.7, 0.01, 4
    maml = Reptile(
        model, None, steps, update=optim.adam(lr, b1=0.0), inner_batches=Minibatches(4, seed=3)
    )
    trainer = MetaTrainer(
        maml,
        optim.sgd(),
        nn.mse,
        zoo.Fixed(),
        schedule=lambda step: epsilon,
        settings=StepSettings(task_map="loop"),
    )
    trainer.meta_step(zoo.tasks())
    table, ends = Minibatches(4, seed=3)(steps, 6), []
    assert sorted(table.ravel()[:6]) == list(range(6))
    for task in zoo.tasks():
        v = zoo.weights()
        second = {name: np.zeros_like(x) for name, x in v.items()}
        for k, rows in enumerate(table):
            g = zoo.gradient(v, task.support_x[rows], task.support_y[rows])
            second = {n: 0.999 * second[n] + 0.001 * g[n] ** 2 for n in v}
            unbiased = {n: second[n] / (1 - 0.999 ** (k + 1)) for n in v}
            v = {n: v[n] - lr * g[n] / (np.sqrt(unbiased[n]) + 1e-8) for n in v}
        ends.append(v)
    for name, start in zoo.weights().items():
        mean = np.mean([end[name] for end in ends], axis=0)
        found = values(maml, backend)[name]
        np.testing.assert_allclose(found, start + epsilon * (mean - start), rtol=0, atol=1e-10)


def test_the_implicit_gradient_of_outer_variables(backend: Backend) -> None:
    """A linear model has its solution in closed form."""
    rng = np.random.default_rng(0)
    x, y, x2, y2 = (rng.normal(size=size) for size in ((5, 2), (5, 1), (4, 2), (4, 1)))
    strength = 2.0

    def cost(z: float) -> float:
        pull = np.exp(z) * 2 / len(x)
        solution = np.linalg.solve(pull * x.T @ x + strength * np.eye(2), pull * x.T @ y)
        return float(np.mean((x2 @ solution - y2) ** 2))

    maml = ImplicitMAML(
        (lambda params, x: ops.matmul(x, params["w"]), {"w": backend.asarray(np.zeros((2, 1)))}),
        0.1,
        200,
        proximal=strength,
        cg_steps=2,
        learned={"z": 0.3},
    )
    result = maml.meta_value_and_grad(
        nn.mse,
        [Task(x, y, x2, y2)],
        support_loss=lambda p, t, learned: ops.exp(learned["z"]) * nn.mse(p, t),
    )
    step = 1e-3
    expected = (8 * (cost(0.3 + step) - cost(0.3 - step)) - cost(0.3 + 2 * step)) / (12 * step)
    expected += cost(0.3 - 2 * step) / (12 * step)
    found = float(backend.to_numpy(result.grads["learned/z"]))
    assert found == pytest.approx(expected, rel=1e-9)


def test_an_update_rule_of_ones_own_gets_anything(model: Any, backend: Backend) -> None:
    """A learned optimizer: its parameters come as the learning rate."""

    def update(grads: Any, state: Any, params: Any, lr: Any) -> Any:
        return {n: -lr["step"] * ops.tanh(lr["slope"] * g) for n, g in grads.items()}, state

    rule = optim.Optimizer(lambda params: (), update)
    learned = {"rule": {"step": 0.1, "slope": np.array(2.0)}}
    maml = MAML(model, lambda learned: learned["rule"], 2, update=rule, learned=learned)
    result = maml.meta_value_and_grad(nn.mse, zoo.tasks(), task_map="vmap")

    def cost(at: Any) -> float:
        total = 0.0
        for task in zoo.tasks():
            v = {name: at[name] for name in zoo.NAMES}
            for _ in range(2):
                g = zoo.gradient(v, task.support_x, task.support_y)
                step, slope = at["learned/rule/step"], at["learned/rule/slope"]
                v = {n: v[n] - step * np.tanh(slope * g[n]) for n in v}
            total += zoo.loss(v, task.query_x, task.query_y) / 3
        return total

    expected = zoo.differences(cost, values(maml, backend))
    for name, g in expected.items():
        np.testing.assert_allclose(backend.to_numpy(result.grads[name]), g, rtol=0, atol=1e-10)


def test_statistics_of_the_query_set(backend: Backend) -> None:
    def normalised(params: Any, x: Any) -> Any:
        found = ops.matmul(x, params["w"])
        return nn.batch_norm(found, params["norm"]["scale"], params["norm"]["shift"])

    start = {"w": np.ones((3, 2)), "norm": {"scale": np.ones(2), "shift": np.zeros(2)}}
    model = PairAdapter(normalised, metaframe.tree.map(backend.asarray, start), ("norm",))
    tasks, maml = zoo.tasks(), MAML(model, 0.1, 2)
    found = maml.meta_value_and_grad(nn.mse, tasks, statistics=True).aux["statistics"]
    assert sorted(found) == ["norm/mean", "norm/var"]
    for i, task in enumerate(tasks):
        learner = maml.clone().adapt_on(nn.mse, task.support_x, task.support_y)
        outputs = task.query_x @ backend.to_numpy(learner.params["w"])
        for name, expected in (("mean", outputs.mean(0)), ("var", outputs.var(0))):
            row = backend.to_numpy(found[f"norm/{name}"])[i]
            np.testing.assert_allclose(row, expected, rtol=0, atol=1e-12)


def test_a_loss_network_of_torch() -> None:
    """`backward()` through a learner reaches the wrapper's copy of the network, and no other."""
    import torch

    torch.manual_seed(0)
    judge, model = torch.nn.Linear(4, 1).double(), torch_model()
    learned = {"rate": 0.1, "judge": metaframe.named_params(judge)}
    maml = MAML(model, rate, 2, learned=learned)

    def support_loss(prediction: Any, target: Any, learned: Any) -> Any:
        pair = torch.cat([prediction, target], dim=1)
        return metaframe.functional_forward(judge, learned["judge"], pair).square().mean()

    task = metaframe.tree.map(torch.from_numpy, zoo.tasks(1)[0])
    learner = maml.clone().adapt_on(support_loss, task.support_x, task.support_y)
    nn.mse(learner(task.query_x), task.query_y).backward()
    expected = maml.meta_value_and_grad(nn.mse, [task], support_loss=support_loss).grads
    assert {name for name, _ in maml.named_parameters()} >= {"learned.rate", "learned.judge/bias"}
    for name, parameter in maml.meta_parameters().items():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=1e-13)
    before = judge.weight.clone()
    torch.optim.SGD(maml.parameters(), lr=1.0).step()
    assert torch.equal(judge.weight, before)
    assert judge.weight.grad is None
    assert not torch.equal(maml.learned["judge/weight"], before)


def test_statistics_of_minibatches_are_of_the_whole_support_set() -> None:
    import torch

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).double()
    maml = MAML(model, 0.1, 2, norm="support", inner_batches=ROWS)
    task = metaframe.tree.map(torch.from_numpy, zoo.tasks(1)[0])
    learner = maml.clone().adapt_on(nn.mse, task.support_x, task.support_y)
    by_hand = nn.mse(learner(task.query_x), task.query_y)
    result = maml.meta_value_and_grad(nn.mse, [task])
    torch.testing.assert_close(by_hand.detach(), result.cost, rtol=0, atol=1e-14)


def torch_model() -> Any:
    import torch

    return torch.nn.Linear(3, 2).double()


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "learned-is-an-array": (
        lambda m: MAML(m, learned=np.ones(2)),
        InputTypeError,
        "learned is a mapping",
    ),
    "learned-is-empty": (lambda m: MAML(m, learned={}), InputError, "learned is empty"),
    "learned-integers": (
        lambda m: MAML(m, learned={"n": np.arange(2)}),
        InputTypeError,
        r"learned\['n'\]",
    ),
    "rate-without-learned": (lambda m: MAML(m, rate), InputError, "inner_lr is a function"),
    "batches-of-nothing": (lambda m: MAML(m, inner_batches=0), InputError, "size of inner_batches"),
    "batches-text": (lambda m: MAML(m, inner_batches="4"), InputTypeError, "inner_batches"),
    "rows-of-one-axis": (lambda m: MAML(m, inner_batches=[1, 2]), InputError, "inner_batches"),
    "batches-per-step-norm": (
        lambda m: MAML(m, inner_batches=2, norm="per-step"),
        InputError,
        "per-step",
    ),
    "batches-too-large": (
        lambda m: MAML(m, inner_batches=7).meta_value_and_grad(nn.mse, zoo.tasks()),
        InputError,
        "takes 7 examples",
    ),
    "rows-beyond": (
        lambda m: MAML(m, inner_batches=[[6]]).meta_value_and_grad(nn.mse, zoo.tasks()),
        InputError,
        "example 6",
    ),
    "loss-wants-learned": (
        lambda m: MAML(m).meta_value_and_grad(nn.mse, zoo.tasks(), support_loss=scaled),
        InputError,
        "support_loss has an argument 'learned'",
    ),
    "too-few-weights": (
        lambda m: MAML(m).meta_value_and_grad(nn.mse, zoo.tasks(), weights=[1.0, 2.0]),
        InputError,
        r"weights has shape \(2,\), and there are 3 tasks",
    ),
    "support-loss-no-function": (
        lambda m: MAML(m).meta_value_and_grad(nn.mse, zoo.tasks(), support_loss=3),
        InputTypeError,
        "support_loss must be a function",
    ),
    "metric-no-function": (
        lambda m: MAML(m).meta_value_and_grad(nn.mse, zoo.tasks(), metric=3),
        InputTypeError,
        "metric must be a function",
    ),
    "no-statistics": (
        lambda m: MAML(m).meta_value_and_grad(nn.mse, zoo.tasks(), statistics=True),
        InputError,
        "statistics=True",
    ),
    "support-loss-no-scalar": (
        lambda m: MAML(m).meta_value_and_grad(
            nn.mse, zoo.tasks(), support_loss=lambda p, y: p - y, compiled=False
        ),
        InputError,
        "support_loss",
    ),
    "aux-no-pair": (
        lambda m: MAML(m).meta_value_and_grad(nn.mse, zoo.tasks(), has_aux=True, compiled=False),
        InputTypeError,
        "has_aux=True",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case: str) -> None:
    make, kind, words = BAD[case]
    with pytest.raises(kind, match=words):
        make(torch_model())
