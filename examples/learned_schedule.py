"""Learn a learning-rate schedule through 500 steps of Adam.

    python examples/learned_schedule.py --backend torch

A small network fits a noisy curve from minibatches of 16 points. Its learning rate is piecewise
linear in the logarithm, with six knots, and the knots descend the held-out loss after training.
`mode="replay"` runs segments of the loop again on the way back, so memory hardly grows with steps.
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import numpy as np

import metaframe
from metaframe import nn, ops, optim, per_step, unroll, value_and_grad
from metaframe.backend import load_backend

KNOTS, OUTER_RATE = 6, 0.05
MODEL = nn.mlp([1, 16, 1], activation=ops.tanh)


class Found(NamedTuple):
    """What the example found."""

    knots: Any
    costs: list[float]


class Data(NamedTuple):
    """Minibatches of shape (steps, 16, 1), and what is held out."""

    x: Any
    y: Any
    held_out_x: Any
    held_out_y: Any


def data(seed: int, steps: int) -> Data:
    """Noisy points on a curve, and points without noise."""
    rng = np.random.default_rng(seed)
    x, held_out_x = rng.uniform(-2, 2, (steps, 16, 1)), np.linspace(-2, 2, 64)[:, None]
    noise = 0.3 * rng.normal(size=x.shape)
    return Data(x, np.sin(3 * x) + noise, held_out_x, np.sin(3 * held_out_x))


def interpolation(steps: int) -> Any:
    """The matrix from values at the knots to values at the steps, of shape (steps, KNOTS)."""
    places = np.linspace(0, KNOTS - 1, steps)
    return np.maximum(0, 1 - np.abs(places[:, None] - np.arange(KNOTS)))


def cost(batch: Any, v: Any) -> Any:
    """The squared error of the network."""
    x, y = batch
    return nn.mse(MODEL.apply(v, x), y)


def held_out_cost(knots: Any, start: Any, points: Any, interpolate: Any) -> Any:
    """The loss after training with the schedule that the knots give."""
    rates = ops.exp(ops.matmul(interpolate, knots))
    batches = per_step((points["x"], points["y"]))
    how = {"lr": per_step(rates), "update": optim.adam(), "mode": "replay"}
    found = unroll(cost, start, batches, **how)
    return cost((points["held_out_x"], points["held_out_y"]), found.variables)


def main(argv: list[str] | None = None) -> Found:
    """Run the example; returns what it printed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backend", default="jax", choices=["jax", "torch", "tensorflow"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="100 inner steps, one outer step")
    options = parser.parse_args(argv)
    backend = load_backend(options.backend)
    with backend.double_precision(), metaframe.use_backend(options.backend, dtype="float64"):
        return run(options.seed, *((100, 1) if options.quick else (500, 100)))


def run(seed: int, steps: int, outer_steps: int) -> Found:
    """Learn the knots by Adam, from a constant rate of 0.01."""
    start, points = MODEL.init(seed), metaframe.tree.map(ops.asarray, data(seed, steps)._asdict())
    gradient = value_and_grad(held_out_cost)
    if metaframe.current_backend().name != "torch":  # where a compiled loop would be unrolled
        gradient = metaframe.compile(gradient)
    rule, knots = optim.adam(OUTER_RATE), ops.asarray(np.full(KNOTS, np.log(0.01)))
    state, costs, interpolate = rule.init(knots), [], ops.asarray(interpolation(steps))
    for step in range(outer_steps + 1):
        value, slopes, _ = gradient(knots, start, points, interpolate)
        costs.append(float(value))
        if step % 10 == 0:
            print(f"held-out loss after {step} outer steps: {costs[-1]:.6f}")
        if step < outer_steps:
            updates, state = rule.update(slopes, state, knots)
            knots = metaframe.apply_updates(knots, updates)
    rates = ", ".join(f"{rate:.4f}" for rate in np.exp(ops.to_numpy(knots)))
    print(f"held-out loss by a constant rate {costs[0]:.6f}, by the schedule {costs[-1]:.6f}")
    print(f"learning rates at the knots: {rates}")
    return Found(ops.to_numpy(knots), costs)


if __name__ == "__main__":
    main()
