"""The scripts in examples/, loaded as modules, and what their numbers are checked against.

All in NumPy, and for complex numbers too: a derivative by a complex step is exact to rounding.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from metaframe import nn, ops, tree

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def example(name: str) -> ModuleType:
    """The module of an example."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def complex_slopes(fn: Callable[[Any], Any], x: Any) -> Any:
    """The gradient of a real function of one array by complex steps, which are exact to rounding.

    Args:
        fn: analytic, and written in NumPy without absolute values or conjugates.
        x: where, a real array.
    """
    slopes = np.zeros(x.shape)
    for place in np.ndindex(x.shape):
        moved = x.astype(complex)
        moved[place] += 1e-30j
        slopes[place] = fn(moved).imag / 1e-30
    return slopes


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
