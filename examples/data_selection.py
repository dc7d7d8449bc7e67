"""Find which of 512 training examples help a held-out loss, without training 512 times.

    python examples/data_selection.py --backend torch

Every example has a weight of 1. The gradient of the held-out loss after training by these weights
(a metagradient, Engstrom et al. 2025) says how the loss would move without each of them. A single
backward pass through training replaces 512 trainings. The data are scikit-learn's breast cancer
measurements.
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import numpy as np
from sklearn.datasets import load_breast_cancer

import metaframe
from metaframe import inner_loop, nn, ops, value_and_grad
from metaframe.backend import load_backend

COUNT, RATE, DECAY, DROPPED = 512, 0.4, 0.3, 50


class Found(NamedTuple):
    """What the example found."""

    changes: Any
    cost: float
    cost_without: float


def data(seed: int) -> tuple[Any, Any]:
    """Standardised features and labels of 512 patients to train on, and of 57 held out."""
    raw = load_breast_cancer()
    x = (raw.data - raw.data.mean(0)) / raw.data.std(0)
    order = np.random.default_rng(seed).permutation(len(x))
    x, y = x[order], raw.target[order].astype(float)
    return (x[:COUNT], y[:COUNT]), (x[COUNT:], y[COUNT:])


def cost(batch: Any, w: Any) -> Any:
    """The weighted loss of logistic regression, with weight decay."""
    (x, y), weights = batch
    z = ops.matmul(x, w)
    losses = ops.softplus(z) - y * z
    return ops.mean(weights * losses) + DECAY * ops.sum(ops.square(w)) / 2


def held_out_cost(weights: Any, train: Any, held_out: Any, steps: int) -> Any:
    """The loss on held-out data after training with these weights."""
    how = {"steps": steps, "lr": RATE, "mode": "replay"}
    w = inner_loop(cost, ops.zeros((30,)), (train, weights), **how)
    return nn.binary_cross_entropy(ops.matmul(held_out[0], w), held_out[1])


def main(argv: list[str] | None = None) -> Found:
    """Run the example; returns what it printed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backend", default="jax", choices=["jax", "torch", "tensorflow"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="100 training steps, not 1,000")
    options = parser.parse_args(argv)
    backend = load_backend(options.backend)
    with backend.double_precision(), metaframe.use_backend(options.backend, dtype="float64"):
        return run(options.seed, 100 if options.quick else 1000)


def run(seed: int, steps: int) -> Found:
    """Rank the examples, and train once more without those that harm most."""
    train, held_out = metaframe.tree.map(ops.asarray, data(seed))
    gradient = value_and_grad(held_out_cost)
    if metaframe.current_backend().name != "torch":  # where a compiled loop would be unrolled
        gradient = metaframe.compile(gradient)
    weights = np.ones(COUNT)
    value, slopes, _ = gradient(weights, train, held_out, steps)
    changes = -ops.to_numpy(slopes)  # of the loss, when an example's weight goes from 1 to 0
    order = np.argsort(changes)
    print(f"the loss falls most without the examples {order[:5].tolist()}")
    print(f"it rises most without {order[:-6:-1].tolist()}")
    weights[order[:DROPPED]] = 0
    without = float(gradient(weights, train, held_out, steps).cost)
    print(f"held-out loss with all {COUNT}: {float(value):.6f}")
    print(f"held-out loss without the {DROPPED} that harm most: {without:.6f}")
    return Found(changes, float(value), without)


if __name__ == "__main__":
    main()
