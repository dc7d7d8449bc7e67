"""Meta-train an optimizer on JAX, and step a torch module with it.

    python examples/learned_optimizer.py

The optimizer is a small network that sees, for each parameter, the gradient and its running mean in
units of their running size (Andrychowicz et al. 2016, Metz et al. 2020). It is written once, in
`metaframe.ops`: `unroll` takes it as an update rule, and `LearnedOptimizer` makes it a
`torch.optim.Optimizer`. Handed over, it walks through the same points as on the backend where it
was trained.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch

import metaframe
from metaframe import meta_value_and_grad, nn, ops, optim, tree, unroll
from metaframe.backend import load_backend

RATE, INNER_STEPS, TEST_STEPS = 0.05, 20, 100
NETWORK = nn.mlp([2, 8, 2], activation=ops.tanh)


class Found(NamedTuple):
    """The optimizer, and the weights before each step, (steps, 1, 8), by it and its torch form."""

    network: Any
    path: Any
    path_on_torch: Any
    costs: Any
    difference: float


def learned_rule(network: Any) -> optim.Optimizer:
    """The update rule that the parameters of `NETWORK` define."""

    def init(params: Any) -> Any:
        return {"mean": tree.map(ops.zeros_like, params), "size": tree.map(ops.zeros_like, params)}

    def update(grads: Any, state: Any, params: Any = None, lr: Any = None) -> tuple[Any, Any]:
        del params, lr
        mean = tree.map(lambda m, g: 0.9 * m + 0.1 * g, state["mean"], grads)
        size = tree.map(lambda s, g: 0.99 * s + 0.01 * g * g, state["size"], grads)
        return tree.map(move, grads, mean, size), {"mean": mean, "size": size}

    def move(gradient: Any, mean: Any, size: Any) -> Any:
        unit = ops.sqrt(size + 1e-12)
        seen = ops.stack([gradient / unit, mean / unit], -1)
        out = NETWORK.apply(network, seen)
        return -RATE * ops.exp(out[..., 0]) * (mean / unit + out[..., 1])

    return optim.Optimizer(init, update)


class LearnedOptimizer(torch.optim.Optimizer):
    """The same rule on the parameters of a torch module."""

    def __init__(self, params: Iterable[Any], network: Any) -> None:
        super().__init__(params, {})
        self.rule = learned_rule(network)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move each parameter along its `grad`."""
        del closure
        for parameter in (p for group in self.param_groups for p in group["params"]):
            state = self.state[parameter]
            before = state.get("rule") or self.rule.init(parameter)
            update, state["rule"] = self.rule.update(parameter.grad, before, parameter)
            parameter.add_(update)


def problems(seed: int, count: int) -> tuple[Any, Any]:
    """Linear problems with features of 8 scales: x (count, 32, 8), y (count, 32, 1)."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, 32, 8)) * np.geomspace(0.3, 3, 8)
    return x, x @ rng.normal(size=(count, 8, 1)) + 0.1 * rng.normal(size=(count, 32, 1))


def cost(batch: Any, v: Any) -> Any:
    """The squared error of a linear model with torch's names and shapes."""
    x, y = batch
    return nn.mse(ops.einsum("nd,od->no", x, v["weight"]) + v["bias"], y)


def cost_and_place(batch: Any, v: Any) -> tuple[Any, Any]:
    """The cost, and the weights that it is taken at."""
    return cost(batch, v), v["weight"]


def start() -> dict[str, Any]:
    """Where every training begins."""
    return {"weight": np.zeros((1, 8)), "bias": np.zeros(1)}


def training_cost(network: Any, problem: Any) -> Any:
    """The mean cost on the way through a training by the learned rule."""
    rule = learned_rule(network)
    return ops.mean(unroll(cost, start(), problem, steps=INNER_STEPS, lr=None, update=rule).costs)


def main(argv: list[str] | None = None) -> Found:
    """Run the example; returns what it printed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backend", default="jax", choices=["jax", "torch", "tensorflow"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="one step of meta-training")
    options = parser.parse_args(argv)
    backend = load_backend(options.backend)
    test = tree.map(lambda x: x[0], problems(options.seed + 1, 1))
    with backend.double_precision(), metaframe.use_backend(options.backend, dtype="float64"):
        network = meta_trained(options.seed, 1 if options.quick else 500)
        rule = learned_rule(network)
        how = {"steps": TEST_STEPS, "lr": None, "update": rule, "has_aux": True}
        found = unroll(cost_and_place, start(), test, **how)
        path, costs = ops.to_numpy(found.aux), ops.to_numpy(found.costs)
        on_torch = trained_on_torch(network, test)
        network = tree.map(ops.to_numpy, network)
    difference = float(np.abs(path - on_torch).max())
    print(f"mean cost of {TEST_STEPS} steps of the learned optimizer: {costs.mean():.6f}")
    print(f"difference of the weights on {options.backend} and on torch: {difference:.1e}")
    return Found(network, path, on_torch, costs, difference)


def meta_trained(seed: int, iterations: int) -> Any:
    """The optimizer's parameters after meta-training on 16 problems."""
    network, tasks = NETWORK.init(seed), tree.map(ops.asarray, problems(seed, 16))
    outer, gradient = optim.adam(3e-3), meta_value_and_grad(training_cost)
    if metaframe.current_backend().name != "torch":  # where a compiled loop would be unrolled
        gradient = metaframe.compile(gradient)
    state = outer.init(network)
    for iteration in range(iterations):
        value, grads, _ = gradient(network, tasks)
        updates, state = outer.update(grads, state, network)
        network = metaframe.apply_updates(network, updates)
        if iteration % 100 == 0:
            print(f"meta-training step {iteration}: mean cost {float(value):.4f}")
    return network


def trained_on_torch(network: Any, problem: Any) -> Any:
    """The weights of a `torch.nn.Linear` before each step of the optimizer that is handed over."""
    with metaframe.use_backend("torch", dtype="float64"):
        model = torch.nn.Linear(8, 1, dtype=torch.float64)
        torch.nn.init.zeros_(model.weight)
        torch.nn.init.zeros_(model.bias)
        optimizer = LearnedOptimizer(model.parameters(), metaframe.convert(network, to="torch"))
        path, (x, y) = [], map(torch.as_tensor, problem)
        for _ in range(TEST_STEPS):
            path.append(model.weight.detach().clone().numpy())
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
    return np.stack(path)


if __name__ == "__main__":
    main()
