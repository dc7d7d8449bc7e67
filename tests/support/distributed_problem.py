"""One small meta-learning problem in NumPy, and the cases that every engine runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from metaframe import fomaml_step, maml_step, nn, ops, reptile_step

ALGORITHMS = ("maml", "fomaml", "reptile")
TASKS = (8, 7, 3, 1)
DTYPES = ("float64", "float32")
STEPS, RATE = 2, 0.05


@dataclass(frozen=True)
class Case:
    algorithm: str
    tasks: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.algorithm}-{self.tasks}-{self.dtype}"


ALL = tuple(Case(a, n, d) for a in ALGORITHMS for n in TASKS for d in DTYPES)
ONE = Case("maml", 7, "float64")
"""With all cases also run compiled on torch, and eagerly on the others."""
FEW = (ONE, Case("reptile", 1, "float64"))


def batch(tasks: int, dtype: str) -> dict[str, Any]:
    rng = np.random.default_rng(3)
    parts = {}
    for part in ("support", "query"):
        x = rng.uniform(-2, 2, (max(TASKS), 6, 1))
        parts[part] = {"x": x, "y": np.sin(x + np.arange(max(TASKS))[:, None, None])}
    return {
        part: {k: values[:tasks].astype(dtype) for k, values in data.items()}
        for part, data in parts.items()
    }


def variables(dtype: str) -> dict[str, Any]:
    rng = np.random.default_rng(4)
    sizes = {"layer1": (1, 8), "head": (8, 1)}
    return {
        name: {
            "w": (rng.normal(size=shape) / np.sqrt(shape[0])).astype(dtype),
            "b": (rng.normal(size=shape[1:]) / 5).astype(dtype),
        }
        for name, shape in sizes.items()
    }


_model = nn.mlp([1, 8, 1], activation=ops.tanh)


def cost(data: Any, v: Any) -> Any:
    return nn.mse(_model.apply(v, data["x"]), data["y"])


def support_cost(task: Any, v: Any) -> Any:
    return cost(task["support"], v)


def query_cost(task: Any, v: Any) -> Any:
    return cost(task["query"], v)


def step(algorithm: str, **how: Any) -> Callable[[Any, Any], Any]:
    """`(batch, variables) -> (cost, grads)`."""
    how = {"batched": "vmap", **how}

    def run(batch: Any, v: Any) -> Any:
        if algorithm == "reptile":
            return reptile_step(batch, support_cost, v, STEPS, RATE, **how)[:2]
        run = maml_step if algorithm == "maml" else fomaml_step
        return run(batch, support_cost, query_cost, v, STEPS, RATE, **how)[:2]

    return run
