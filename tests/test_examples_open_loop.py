"""The numbers of the examples for open loops, against computations in NumPy and float64."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from documents import ROOT
from examples import EXAMPLES, complex_slopes, example
from frameworks import require, slow
from metaframe import nn, ops, tree
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


def along_random_directions(fn: Any, v: Any, grads: Any) -> None:
    """The slopes of `fn` at `v` along three directions, by complex steps, are those of `grads`."""
    rng, leaves = np.random.default_rng(1), tree.leaves(v)
    for _ in range(3):
        moves = [rng.normal(size=x.shape) for x in leaves]
        moved = [x + 1e-30j * move for x, move in zip(leaves, moves, strict=True)]
        slope = fn(tree.unflatten(tree.structure(v), moved)).imag / 1e-30
        parts = zip(tree.leaves(grads), moves, strict=True)
        found = sum(np.sum(g * move) for g, move in parts)
        np.testing.assert_allclose(found, slope, rtol=1e-9)


class Adam:
    """Adam by its formula (Kingma and Ba 2015), for complex arrays too."""

    def __init__(self, rate: Any) -> None:
        self.rate, self.steps, self.mean, self.square = rate, 0, 0.0, 0.0

    def step(self, x: Any, gradient: Any, rate: Any = None) -> Any:
        self.steps += 1
        self.mean = 0.9 * self.mean + 0.1 * gradient
        self.square = 0.999 * self.square + 0.001 * gradient * gradient
        root = np.sqrt(self.square / (1 - 0.999**self.steps))
        rate = self.rate if rate is None else rate
        return x - rate * self.mean / (1 - 0.9**self.steps) / (root + 1e-8)


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


def started(model: nn.Model) -> dict[str, dict[str, Any]]:
    """The first parameters of a model in NumPy."""
    params = tree.map(ops.to_numpy, model.init(0))
    return {layer: dict(values) for layer, values in params.items()}


def mlp(v: Any, x: Any) -> tuple[Any, Any]:
    """What `nn.mlp` with one hidden layer of tanh returns, and the hidden layer."""
    hidden = np.tanh(x @ v["layer1"]["w"] + v["layer1"]["b"])
    return hidden @ v["head"]["w"] + v["head"]["b"], hidden


def mlp_slopes(v: Any, x: Any, hidden: Any, error: Any) -> dict[str, dict[str, Any]]:
    """The gradient by the parameters of a cost whose gradient by the outputs is `error`."""
    back = error @ v["head"]["w"].T * (1 - hidden**2)
    return {
        "head": {"w": hidden.T @ error, "b": error.sum(0)},
        "layer1": {"w": x.T @ back, "b": back.sum(0)},
    }


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
    """The costs and the last weights of a training by the learned rule, by its formula."""
    w, b = np.zeros((1, 8)), np.zeros(1)
    mean, size, costs = np.zeros(9), np.zeros(9), []
    for _ in range(steps):
        error = x @ w.T + b - y
        costs.append((error**2).mean())
        gradient = np.append(2 * error.T @ x / len(x), 2 * error.mean())
        mean, size = 0.9 * mean + 0.1 * gradient, 0.99 * size + 0.01 * gradient**2
        seen = np.stack([gradient, mean], -1) / np.sqrt(size + 1e-12)[:, None]
        scale, shift = mlp(network, seen)[0].T
        move = -0.05 * np.exp(scale) * (seen[:, 1] + shift)
        w, b = w + move[:8], b + move[8:]
    return np.array(costs), w


@pytest.mark.parametrize("backend_name", ["jax", slow("torch"), slow("tensorflow")], indirect=True)
def test_learned_optimizer(backend_name: str, capsys: Say) -> None:
    """100 steps on the backend, on torch and by the formula go through the same points."""
    require("torch")
    module = example("learned_optimizer")
    found = module.main(["--backend", backend_name, "--quick"])
    x, y = tree.map(lambda a: a[0], module.problems(1, 1))
    costs, weights = learned_steps(found.network, x, y, 100)
    np.testing.assert_allclose(found.costs, costs, rtol=1e-9)
    np.testing.assert_allclose(found.weights, weights, atol=1e-9)
    np.testing.assert_allclose(found.weights_on_torch, weights, atol=1e-9)
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


class PolicyByHand:
    """The policy of the example in NumPy, for complex parameters too."""

    def __init__(self, module: Any) -> None:
        self.scale, self.rate = module.SCALE, module.INNER_RATE

    def off(self, v: Any, paths: Any) -> tuple[Any, Any, Any]:
        x, actions = (paths[name].reshape(-1, 2) for name in ("observed", "actions"))
        mean, hidden = mlp(v, x)
        return x, hidden, (actions - mean) / self.scale

    def adapt(self, v: Any, paths: Any) -> Any:
        x, hidden, unit = self.off(v, paths)
        error = -unit / self.scale * paths["advantages"].reshape(-1, 1) / len(unit)
        slopes = mlp_slopes(v, x, hidden, error)
        return tree.map(lambda p, g: p - self.rate * g, v, slopes)

    def outer_cost(self, v: Any, task: Any) -> Any:
        for k in range(2):
            v = self.adapt(v, {name: rows[k] for name, rows in task["inner"].items()})
        squares = (self.off(v, task["outer"])[2] ** 2).sum(-1)
        return (squares / 2 * task["outer"]["advantages"].ravel()).mean()


@compiles_on_tensorflow
def test_policy(backend: Backend, capsys: Say) -> None:
    """A meta-step over two goals, drawn and differentiated in NumPy."""
    module = example("policy")
    found = module.main(["--backend", backend.name, "--quick"])
    start = started(module.POLICY)
    by_hand, rng = PolicyByHand(module), np.random.default_rng(0)
    module.mean_action = lambda v, x: mlp(v, x)[0]
    collected = [module.collected(by_hand.adapt, start, g, rng) for g in module.goals(rng, 2)]
    returns = np.mean([values for _, values in collected], 0)
    np.testing.assert_allclose(found.returns, [returns], rtol=1e-9)

    def objective(v: Any) -> Any:
        return sum(by_hand.outer_cost(v, task) for task, _ in collected) / 2

    along_random_directions(objective, start, found.grads)
    shown = ", ".join(f"{value:.4f}" for value in returns)
    assert f"inner steps {shown}" in capsys.readouterr().out


def siren(v: Any, x: Any) -> tuple[Any, list[Any]]:
    """A SIREN with two hidden layers, and the inputs of each layer before the activation."""
    first = 30 * (x @ v["layer1"]["w"] + v["layer1"]["b"])
    second = 30 * (np.sin(first) @ v["layer2"]["w"] + v["layer2"]["b"])
    return np.sin(second) @ v["head"]["w"] + v["head"]["b"], [first, second]


def fitted(v: Any, x: Any, y: Any, rate: Any, steps: int) -> Any:
    """The error after gradient descent by hand, for complex parameters too."""
    for _ in range(steps):
        out, (first, second) = siren(v, x)
        error = 2 * (out - y) / y.size
        back2 = error @ v["head"]["w"].T * 30 * np.cos(second)
        back1 = back2 @ v["layer2"]["w"].T * 30 * np.cos(first)
        slopes = {
            "head": {"w": np.sin(second).T @ error, "b": error.sum(0)},
            "layer1": {"w": x.T @ back1, "b": back1.sum(0)},
            "layer2": {"w": np.sin(first).T @ back2, "b": back2.sum(0)},
        }
        v = tree.map(lambda p, g: p - rate * g, v, slopes)
    return ((siren(v, x)[0] - y) ** 2).mean()


@compiles_on_tensorflow
def test_siren(backend: Backend, capsys: Say) -> None:
    """The meta-gradient on two patches, and the PSNR on two others, by hand."""
    module = example("siren")
    found = module.main(["--backend", backend.name, "--quick"])
    rng, x = np.random.default_rng(0), module.coordinates()
    test, train = (module.patches(rng, 2, test) for test in (True, False))

    def cost(v: Any, log_rate: Any, patches: Any) -> Any:
        return sum(fitted(v, x, y, np.exp(log_rate), module.STEPS) for y in patches) / 2

    start, rate = started(module.MODEL), np.log(1e-3)
    slope = complex_slopes(lambda r: cost(start, r, train), np.array(rate))
    np.testing.assert_allclose(found.grads["log_rate"], slope, rtol=1e-10)
    along_random_directions(lambda v: cost(v, rate, train), start, found.grads["params"])
    learned = {layer: dict(values) for layer, values in found.variables["params"].items()}
    psnr = -10 * np.log10(cost(learned, found.variables["log_rate"], test))
    np.testing.assert_allclose(found.psnr, psnr, rtol=1e-10)
    assert f"new patches: {psnr:.4f} dB" in capsys.readouterr().out


class CoolingByHand:
    """The network that solves u' = r (cos t - u), in NumPy."""

    def __init__(self, module: Any, start: Any) -> None:
        self.t, self.spec, self.module = module.times(), tree.structure(start), module
        self.shapes = [x.shape for x in tree.leaves(start)]

    def unflattened(self, flat: Any) -> Any:
        ends = np.cumsum([np.prod(shape, dtype=int) for shape in self.shapes])[:-1]
        parts = zip(np.split(flat, ends), self.shapes, strict=True)
        return tree.unflatten(self.spec, [x.reshape(shape) for x, shape in parts])

    def solution(self, flat: Any) -> Any:
        return self.t * mlp(self.unflattened(flat), self.t)[0]

    def residual(self, rate: float, flat: Any) -> Any:
        v = self.unflattened(flat)
        out, hidden = mlp(v, self.t)
        slope = out + self.t * ((1 - hidden**2) * v["layer1"]["w"] @ v["head"]["w"])
        return ((slope - rate * (np.cos(self.t) - self.t * out)) ** 2).mean()

    def solved(self, rate: float, flat: Any) -> Any:
        moving = np.zeros(flat.shape)
        for _ in range(self.module.STEPS):
            moving = 0.9 * moving + complex_slopes(lambda x: self.residual(rate, x), flat)
            flat = flat - self.module.RATE * moving
        return flat


@compiles_on_tensorflow
def test_physics(backend: Backend, capsys: Say) -> None:
    """Errors against the closed form; the meta-gradient by differences along itself."""
    module = example("physics")
    found = module.main(["--backend", backend.name, "--quick"])
    start = started(module.MODEL)
    by_hand = CoolingByHand(module, start)
    flat, learned, along = (
        np.concatenate([np.ravel(x) for x in tree.leaves(v)])
        for v in (start, found.params, found.grads)
    )
    rates, test = np.random.default_rng(0).uniform(0.5, 3, 2), np.linspace(0.6, 2.9, 2)

    def cost(size: float) -> float:
        at = flat + size * along
        return float(np.mean([by_hand.residual(r, by_hand.solved(r, at)) for r in rates]))

    h = 1e-3 / np.linalg.norm(along)
    slope = (8 * (cost(h) - cost(-h)) - (cost(2 * h) - cost(-2 * h))) / (12 * h)
    np.testing.assert_allclose(along @ along, slope, rtol=1e-9)
    for at, error in zip((flat, learned), found.errors, strict=True):
        off = [by_hand.solution(by_hand.solved(r, at)) - module.exact(r, by_hand.t) for r in test]
        np.testing.assert_allclose(error, np.sqrt(np.mean(np.square(off))), rtol=1e-9)
    assert f"after 1 meta-steps: {found.errors[1]:.6f}" in capsys.readouterr().out


def test_lora(capsys: Say) -> None:
    """The meta-gradient on two tasks is that of a loop in plain torch, tied weight and all."""
    require("torch")
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    module = example("lora")
    found = module.main(["--quick"])
    torch.manual_seed(0)
    model, rng = module.LanguageModel().double(), np.random.default_rng(0)
    params = dict(model.named_parameters())
    assert "head.weight" not in params  # it is "embedding.weight"
    adapted = [name for name in params if "lora" in name]

    def loss(v: Any, batch: Any) -> Any:
        given = {name: torch.as_tensor(x) for name, x in batch.items()}
        with sdpa_kernel(SDPBackend.MATH):  # torch's other kernels have no second derivative
            return torch.func.functional_call(model, v, (), given)["loss"]

    test, train = ([module.sampled(rng) for _ in range(2)] for _ in range(2))

    def after(params: Any, task: Any, steps: int) -> Any:
        v = dict(params)
        for _ in range(steps):
            parts = [v[name] for name in adapted]
            slopes = torch.autograd.grad(loss(v, task.support_x), parts, create_graph=True)
            pairs = zip(adapted, slopes, strict=True)
            v |= {name: v[name] - module.RATE * slope for name, slope in pairs}
        return loss(v, task.query_x)

    total = sum(after(params, task, module.STEPS) for task in train) / 2
    expected = torch.autograd.grad(total, list(params.values()))
    for name, slope in zip(params, expected, strict=True):
        assert (found.grads[name] - slope).abs().max() <= 1e-9 * slope.abs().max(), name
    learned = dict(found.model.named_parameters())
    assert found.model.head.weight is learned["embedding.weight"]
    for steps, value in ((0, found.before), (module.STEPS, found.after)):
        mean = sum(float(after(learned, task, steps).detach()) for task in test) / 2
        assert value == pytest.approx(mean, rel=1e-9)
    assert f"{found.after:.6f} after {module.STEPS} steps" in capsys.readouterr().out


def test_every_example_is_listed_and_checked() -> None:
    """In the page on open loops, and by a test of this module."""
    others = {"digits", "omniglot", "sinusoid"}  # in test_examples.py
    scripts = {path.stem for path in EXAMPLES.glob("*.py")} - others
    page = (ROOT / "docs/open_loop.md").read_text()
    assert set(re.findall(r"^\| `(\w+)\.py`", page, re.MULTILINE)) == scripts
    assert {name.removeprefix("test_") for name in globals()} >= scripts
