"""The numbers of the examples for training and optimizers, against NumPy and float64."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from examples import Adam, complex_slopes, example, mlp, mlp_slopes, started
from frameworks import require, slow
from metaframe import tree
from metaframe.backend import Backend

Say = pytest.CaptureFixture[str]
compiles_on_tensorflow = pytest.mark.parametrize(
    "backend_name", ["torch", "jax", slow("tensorflow")], indirect=True
)
"""All backends, by default those that need no long compilation here."""


def sigmoid(z: Any) -> Any:
    return 1 / (1 + np.exp(-z))


def logistic_loss(z: Any, y: Any) -> Any:
    return np.mean(np.log1p(np.exp(z)) - y * z)


def logistic_minimum(
    x: Any, y: Any, decays: Any, weights: Any = 1.0, start: Any = None, iterations: int = 12
) -> Any:
    """The minimum of the regularised loss by Newton's method."""
    w = np.zeros(x.shape[1]) if start is None else start
    for _ in range(iterations):
        p = sigmoid(x @ w)
        gradient = x.T @ (weights * (p - y)) / len(x) + decays * w
        hessian = (x.T * (weights * p * (1 - p))) @ x / len(x) + np.diag(decays)
        w = w - np.linalg.solve(hessian, gradient)
    return w


def adjoint(w: Any, train: Any, held_out: Any, decays: Any) -> Any:
    """The Hessian's inverse at a minimum, times the gradient of the held-out loss."""
    (x, _), (held_x, held_y) = train, held_out
    p = sigmoid(x @ w)
    hessian = (x.T * (p * (1 - p))) @ x / len(x) + np.diag(decays)
    return np.linalg.solve(hessian, held_x.T @ (sigmoid(held_x @ w) - held_y) / len(held_x))


@pytest.mark.parametrize("flags", [["--quick"], slow([])], ids=["quick", "full"])
def test_implicit_hyperparameters(flags: list[str], backend_name: str, capsys: Say) -> None:
    """Both gradients are that of Newton's minimum, with the Hessian written out.

    The full form has 1,000 inner steps.
    """
    module = example("implicit_hyperparameters")
    found = module.main(["--backend", backend_name, *flags])
    (x, y), (held_x, held_y) = module.data(0)
    decays = np.exp(found.log_decays)
    w = logistic_minimum(x, y, decays)
    expected = -decays * w * adjoint(w, (x, y), (held_x, held_y), decays)
    np.testing.assert_allclose(found.cost, logistic_loss(held_x @ w, held_y), rtol=1e-10)
    for gradient in (found.implicit, found.unrolled):
        np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-6 * abs(expected).max())
    assert found.difference < 1e-6
    said = capsys.readouterr().out
    assert f"relative difference {found.difference:.1e}" in said
    losses = [float(x) for x in re.findall(r"outer steps: (.*)", said)]
    assert losses == sorted(losses, reverse=True)


def softmax(z: Any) -> Any:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def slopes_of_weights(digits: Any, weights: Any, steps: int, lr: float) -> tuple[Any, Any]:
    """The loss on clean digits and its gradient by the weights, back through each step by hand."""
    x, y, n = digits.x, digits.y, len(digits.x)
    points = [np.zeros((64, 10))]
    for _ in range(steps):
        error = weights[:, None] * (softmax(x @ points[-1]) - y)
        points.append(points[-1] - lr * x.T @ error / n)
    p = softmax(digits.held_out_x @ points[-1])
    cost = -np.log(p[digits.held_out_y > 0]).mean()
    back = digits.held_out_x.T @ (p - digits.held_out_y) / len(p)
    slopes = np.zeros(n)
    for w in points[-2::-1]:
        p, moved = softmax(x @ w), x @ back
        slopes -= lr * ((p - y) * moved).sum(-1) / n
        curved = p * moved - p * (p * moved).sum(-1, keepdims=True)
        back = back - lr * x.T @ (weights[:, None] * curved) / n
    return cost, slopes


def test_example_weights(backend_name: str, capsys: Say) -> None:
    """Five outer steps of Adam, each through ten inner ones."""
    module = example("example_weights")
    found = module.main(["--backend", backend_name, "--quick"])
    digits = module.data(seed=0, count=200)
    logits, adam = np.zeros(200), Adam(module.OUTER_RATE)
    for _ in range(5):
        weights = 2 * sigmoid(logits)
        cost, slopes = slopes_of_weights(digits, weights, 10, module.INNER_RATE)
        logits = adam.step(logits, slopes * weights * (1 - weights / 2))
    weights = 2 * sigmoid(logits)
    np.testing.assert_allclose(found.cost, cost, rtol=1e-12)
    np.testing.assert_allclose(found.weights, weights, rtol=1e-9)
    right, wrong = weights[~digits.wrong], weights[digits.wrong]
    auc = (right[:, None] > wrong).mean()
    assert auc > 0.9
    assert f"with probability {auc:.4f}" in capsys.readouterr().out


def trained_by_adam(knots: Any, start: Any, data: Any, interpolate: Any) -> Any:
    """The held-out loss after training by hand, for complex knots too."""
    v, rules = start, [Adam(None) for _ in tree.leaves(start)]
    for x, y, rate in zip(data.x, data.y, np.exp(interpolate @ knots), strict=True):
        out, hidden = mlp(v, x)
        slopes = tree.leaves(mlp_slopes(v, x, hidden, 2 * (out - y) / y.size))
        moves = zip(rules, tree.leaves(v), slopes, strict=True)
        moved = [rule.step(leaf, slope, rate) for rule, leaf, slope in moves]
        v = tree.unflatten(tree.structure(v), moved)
    return ((mlp(v, data.held_out_x)[0] - data.held_out_y) ** 2).mean()


@compiles_on_tensorflow
@pytest.mark.parametrize("steps", [100, slow(500)])
def test_learned_schedule(steps: int, backend: Backend, capsys: Say) -> None:
    """An outer step through so many of Adam, by complex steps through the training."""
    module = example("learned_schedule")
    found = module.run(seed=0, steps=steps, outer_steps=1)
    data, interpolate = module.data(0, steps), module.interpolation(steps)
    start = started(module.MODEL)

    def objective(knots: Any) -> Any:
        return trained_by_adam(knots, start, data, interpolate)

    knots = np.full(module.KNOTS, np.log(0.01))
    learned = Adam(module.OUTER_RATE).step(knots, complex_slopes(objective, knots))
    costs = [objective(knots), objective(learned)]
    np.testing.assert_allclose(found.knots, learned, rtol=1e-9)
    assert costs[1] < costs[0]
    np.testing.assert_allclose(found.costs, costs, rtol=1e-9)
    assert f"by the schedule {costs[1]:.6f}" in capsys.readouterr().out


def learned_steps(network: Any, x: Any, y: Any, steps: int) -> tuple[Any, Any]:
    """The costs and the weights before each step of the learned rule, by its formula."""
    w, b = np.zeros((1, 8)), np.zeros(1)
    mean, size, costs, path = np.zeros(9), np.zeros(9), [], []
    for _ in range(steps):
        error = x @ w.T + b - y
        costs.append((error**2).mean())
        path.append(w)
        gradient = np.append(2 * error.T @ x / len(x), 2 * error.mean())
        mean, size = 0.9 * mean + 0.1 * gradient, 0.99 * size + 0.01 * gradient**2
        seen = np.stack([gradient, mean], -1) / np.sqrt(size + 1e-12)[:, None]
        scale, shift = mlp(network, seen)[0].T
        move = -0.05 * np.exp(scale) * (seen[:, 1] + shift)
        w, b = w + move[:8], b + move[8:]
    return np.array(costs), np.stack(path)


@pytest.mark.parametrize("backend_name", ["jax", slow("torch"), slow("tensorflow")], indirect=True)
def test_learned_optimizer(backend_name: str, capsys: Say) -> None:
    """100 steps on the backend, on torch and by the formula go through the same points."""
    require("torch")
    module = example("learned_optimizer")
    found = module.main(["--backend", backend_name, "--quick"])
    x, y = tree.map(lambda a: a[0], module.problems(1, 1))
    costs, path = learned_steps(found.network, x, y, 100)
    np.testing.assert_allclose(found.costs, costs, rtol=1e-9)
    np.testing.assert_allclose(found.path, path, atol=1e-9)
    np.testing.assert_allclose(found.path_on_torch, path, atol=1e-9)
    assert f"learned optimizer: {costs.mean():.6f}" in capsys.readouterr().out


@pytest.mark.slow
def test_the_learned_optimizer_learns(capsys: Say) -> None:
    """500 meta-training steps on JAX leave at most a third of the cost on the way."""
    require("jax")
    example("learned_optimizer").main(["--backend", "jax"])
    costs = [float(x) for x in re.findall(r": mean cost (.*)", capsys.readouterr().out)]
    assert costs[-1] < costs[0] / 3


def ranks(x: Any) -> Any:
    return np.argsort(np.argsort(x))


def test_data_selection(backend_name: str, capsys: Say) -> None:
    """The ranking is that of 512 trainings, each without one example, by Newton's method."""
    module = example("data_selection")
    found = module.main(["--backend", backend_name, "--quick"])
    (x, y), (held_x, held_y) = module.data(0)
    decays = np.full(30, module.DECAY)

    def without(dropped: Any, start: Any = None, iterations: int = 12) -> float:
        weights = np.ones(512)
        weights[dropped] = 0
        w = logistic_minimum(x, y, decays, weights, start, iterations)
        return float(logistic_loss(held_x @ w, held_y))

    minimum = logistic_minimum(x, y, decays)
    whole = logistic_loss(held_x @ minimum, held_y)
    changes = np.array([without(i, minimum, 3) for i in range(512)]) - whole
    assert np.corrcoef(ranks(found.changes), ranks(changes))[0, 1] > 0.999
    u = adjoint(minimum, (x, y), (held_x, held_y), decays)
    slopes = -(sigmoid(x @ minimum) - y) * (x @ u) / 512
    np.testing.assert_allclose(found.changes, -slopes, rtol=0, atol=1e-4 * abs(slopes).max())
    np.testing.assert_allclose(found.cost, whole, rtol=1e-5)
    worst = without(np.argsort(changes)[: module.DROPPED])
    assert worst < whole
    np.testing.assert_allclose(found.cost_without, worst, rtol=1e-4)
    assert f"that harm most: {found.cost_without:.6f}" in capsys.readouterr().out
