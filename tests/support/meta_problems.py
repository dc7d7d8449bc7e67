"""Meta-learning problems for checks without a closed form: an MLP, a Conv4 and a transformer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from metaframe import compile as compile_whole
from metaframe import maml_step, nn, ops, optim
from metaframe.backend import Backend

Values = np.ndarray[Any, Any]

OPTIMIZERS: dict[str, Callable[[], optim.Optimizer]] = {
    "sgd": optim.sgd,
    "momentum": optim.momentum,
    "nesterov": lambda: optim.momentum(nesterov=True),
    "adam": optim.adam,
    "adamw": optim.adamw,
    "rmsprop": optim.rmsprop,
    "adagrad": optim.adagrad,
    "clipped_norm": lambda: optim.clipped(optim.sgd(), norm=0.5),
    "clipped_adam": lambda: optim.clipped(optim.adam(), norm=0.5),
}


@dataclass(frozen=True)
class MetaProblem:
    """One meta-learning problem, the same numbers on every backend."""

    batch: dict[str, Any]
    variables: dict[str, Any]
    cost: Callable[[Any, Any], Any]
    rate: float = 0.05


def _tasks(name: str, make: Callable[[np.random.Generator], dict[str, Values]]) -> dict[str, Any]:
    rng = np.random.default_rng([len(name), 7])
    return {part: make(rng) for part in ("support", "query")}


def regression(tasks: int = 3) -> MetaProblem:
    """Sinusoids of several phases with a two-layer MLP; everything is smooth."""
    model = nn.mlp([1, 6, 6, 1], activation=ops.tanh)

    def draw(rng: np.random.Generator) -> dict[str, Values]:
        x = rng.uniform(-2, 2, (tasks, 5, 1))
        return {"x": x, "y": np.sin(x + np.arange(tasks)[:, None, None])}

    def cost(data: Any, v: Any) -> Any:
        return nn.mse(model.apply(v, data["x"]), data["y"])

    sizes = {"layer1": (1, 6), "layer2": (6, 6), "head": (6, 1)}
    rng = np.random.default_rng(5)
    variables = {
        name: {"w": rng.normal(size=shape) / np.sqrt(shape[0]), "b": rng.normal(size=shape[1:]) / 5}
        for name, shape in sizes.items()
    }
    return MetaProblem(_tasks("regression", draw), variables, cost)


def classification(tasks: int = 2, *, channels: int = 2) -> MetaProblem:
    """Images, convolutions, batch statistics and integer labels, with `nn.conv4`."""
    model = nn.conv4(ways=3, channels=channels, image_size=8, pooling="stride")

    def draw(rng: np.random.Generator) -> dict[str, Values]:
        labels = np.tile(np.arange(3, dtype=np.int32), (tasks, 2))
        return {"x": rng.normal(size=(tasks, 6, 8, 8, 1)), "y": labels}

    def cost(data: Any, v: Any) -> Any:
        return nn.cross_entropy(model.apply(v, data["x"]), data["y"])

    rng = np.random.default_rng(6)
    blocks = {
        f"block{i}": {
            "kernel": rng.normal(size=(3, 3, inputs, channels)) / 3,
            "scale": 1 + rng.normal(size=channels) / 10,
            "shift": rng.normal(size=channels) / 10,
        }
        for i, inputs in enumerate((1, *[channels] * 3), start=1)
    }
    head = {"w": rng.normal(size=(channels, 3)), "b": rng.normal(size=3) / 10}
    return MetaProblem(_tasks("classification", draw), {**blocks, "head": head}, cost)


def sequences(tasks: int = 2) -> MetaProblem:
    """Sequences and their classes with a transformer of one block: attention, layer norms, MLP."""
    width, inner, length = 4, 6, 3

    def draw(rng: np.random.Generator) -> dict[str, Values]:
        labels = np.tile(np.arange(2, dtype=np.int32), (tasks, 2))
        return {"x": rng.normal(size=(tasks, 4, length, 2)), "y": labels}

    def normalised(x: Any, v: Any) -> Any:
        return nn.layer_norm(x, v["scale"], v["shift"])

    def heads(x: Any, v: Any) -> Any:
        """(examples, 2 heads, length, width / 2)."""
        split = ops.reshape(nn.dense(x, v["w"], v["b"]), (-1, length, 2, width // 2))
        return ops.transpose(split, (0, 2, 1, 3))

    def logits(v: Any, x: Any) -> Any:
        x = nn.dense(x, v["embed"]["w"], v["embed"]["b"]) + v["position"]
        before = normalised(x, v["norm1"])
        mixed = nn.attention(*(heads(before, v[name]) for name in ("query", "key", "value")))
        joined = ops.reshape(ops.transpose(mixed, (0, 2, 1, 3)), (-1, length, width))
        x = x + nn.dense(joined, v["out"]["w"], v["out"]["b"])
        hidden = nn.gelu(nn.dense(normalised(x, v["norm2"]), v["up"]["w"], v["up"]["b"]))
        x = x + nn.dense(hidden, v["down"]["w"], v["down"]["b"])
        return nn.dense(ops.mean(x, axis=1), v["head"]["w"], v["head"]["b"])

    def cost(data: Any, v: Any) -> Any:
        return nn.cross_entropy(logits(v, data["x"]), data["y"])

    rng = np.random.default_rng(8)
    sizes = {"embed": (2, width), "up": (width, inner), "down": (inner, width), "head": (width, 2)}
    sizes |= dict.fromkeys(("query", "key", "value", "out"), (width, width))
    variables: dict[str, Any] = {
        name: {"w": rng.normal(size=shape) / np.sqrt(shape[0]), "b": rng.normal(size=shape[1:]) / 5}
        for name, shape in sizes.items()
    }
    for name in ("norm1", "norm2"):
        variables[name] = {
            "scale": 1 + rng.normal(size=width) / 10,
            "shift": rng.normal(size=width),
        }
    variables["position"] = rng.normal(size=(length, width)) / 5
    return MetaProblem(_tasks("sequences", draw), variables, cost)


def meta_step(
    problem: MetaProblem, steps: int, *, optimizer: str = "sgd", batched: Any = "vmap", **how: Any
) -> Callable[[Any, Any], tuple[Any, Any]]:
    """`(batch, variables) -> (cost, grads)` of `maml_step` on the problem."""

    def cost(part: Any, v: Any) -> Any:
        if batched is not False:
            return problem.cost(part, v)
        return problem.cost({name: x[0] for name, x in part.items()}, v)

    def step(batch: Any, variables: Any) -> tuple[Any, Any]:
        found = maml_step(
            batch,
            lambda task, v: cost(task["support"], v),
            lambda task, v: cost(task["query"], v),
            variables,
            steps,
            problem.rate,
            inner_optimization_step=OPTIMIZERS[optimizer](),
            batched=batched,
            **how,
        )
        return found[0], found[1]

    return step


def quick(backend: Backend, step: Callable[..., Any]) -> Callable[..., Any]:
    """The way of running `step` many times that takes a test the least: not all compile alike."""
    return step if backend.name == "torch" else compile_whole(step)
