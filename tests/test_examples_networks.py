"""The numbers of the examples with networks, against computations in NumPy or plain torch."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from documents import ROOT
from examples import (
    EXAMPLES,
    along_random_directions,
    complex_slopes,
    example,
    mlp,
    mlp_slopes,
    started,
)
from frameworks import require, slow
from metaframe import tree
from metaframe.backend import Backend

Say = pytest.CaptureFixture[str]
compiles_on_tensorflow = pytest.mark.parametrize(
    "backend_name", ["torch", "jax", slow("tensorflow")], indirect=True
)
"""All backends, by default those that need no long compilation here."""


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


FULL: dict[str, Callable[[Any], bool]] = {
    "data_selection": lambda found: found.cost_without < found.cost,
    "example_weights": lambda found: found.auc > 0.9,
    "learned_schedule": lambda found: found.costs[-1] < 0.75 * found.costs[0],
    "lora": lambda found: found.after < found.before / 10,
    "physics": lambda found: found.errors[-1] < found.errors[0] / 4,
    "policy": lambda found: found.returns[-1][-1] > found.returns[0][0] / 2,
    "siren": lambda found: found.psnr > 28,
}
"""What the full form of an example, on its own backend, has to reach."""


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_full_form(name: str) -> None:
    for framework in ("torch", "jax"):
        require(framework)
    assert FULL[name](example(name).main([]))


def test_every_example_is_listed_and_checked() -> None:
    """In the page on open loops, and by a test of its own."""
    others = {"digits", "omniglot", "sinusoid"}  # in test_examples.py
    scripts = {path.stem for path in EXAMPLES.glob("*.py")} - others
    page = (ROOT / "docs/open_loop.md").read_text()
    assert set(re.findall(r"^\| `(\w+)\.py`", page, re.MULTILINE)) == scripts
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_examples_*.py"))
    assert {name for name in scripts if f"def test_{name}(" in tests} == scripts
