"""Learn one weight decay per feature, by the implicit gradient and by the unrolled one.

    python examples/implicit_hyperparameters.py --backend torch

The inner problem is logistic regression on the breast cancer data of scikit-learn. The outer
variables are 30 weight decays, and the outer cost is the loss on patients that were held out.
`unroll` differentiates through every step of training; `implicit_loop` differentiates the minimum
that the steps reach. At the minimum both are the same gradient.
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import numpy as np
from sklearn.datasets import load_breast_cancer

import metaframe
from metaframe import implicit_loop, nn, ops, unroll, value_and_grad
from metaframe.backend import load_backend

INNER_RATE, OUTER_RATE = 0.4, 3.0


class Found(NamedTuple):
    """What the example found."""

    log_decays: Any
    cost: float
    implicit: Any
    unrolled: Any
    difference: float


def data(seed: int) -> tuple[Any, Any]:
    """Standardised features and labels, 400 patients to train on and 169 held out."""
    raw = load_breast_cancer()
    x = (raw.data - raw.data.mean(0)) / raw.data.std(0)
    order = np.random.default_rng(seed).permutation(len(x))
    x, y = x[order], raw.target[order].astype(float)
    return (x[:400], y[:400]), (x[400:], y[400:])


def loss(batch: Any, w: Any) -> Any:
    """The loss of logistic regression."""
    inputs, targets = batch
    return nn.binary_cross_entropy(ops.matmul(inputs, w), targets)


def cost(batch: Any, v: Any) -> Any:
    """The loss with weight decay, which training minimises."""
    return loss(batch, v["w"]) + ops.sum(ops.exp(v["log_decays"]) * ops.square(v["w"])) / 2


def by_the_minimum(log_decays: Any, train: Any, held_out: Any, steps: int) -> Any:
    """The held-out loss, differentiated through the minimum that training reaches."""
    v = {"w": ops.zeros_like(log_decays), "log_decays": log_decays}
    how = {"steps": steps, "lr": INNER_RATE, "solver_steps": 30}
    return loss(held_out, implicit_loop(cost, v, train, inner_v="w", **how)["w"])


def by_the_steps(log_decays: Any, train: Any, held_out: Any, steps: int) -> Any:
    """The same loss, differentiated through every step of training."""
    v = {"w": ops.zeros_like(log_decays), "log_decays": log_decays}
    how = {"steps": steps, "lr": INNER_RATE}
    return loss(held_out, unroll(cost, v, train, inner_v="w", **how).variables["w"])


def main(argv: list[str] | None = None) -> Found:
    """Run the example; returns what it printed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backend", default="jax", choices=["jax", "torch", "tensorflow"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="200 inner steps, and no outer one")
    options = parser.parse_args(argv)
    backend = load_backend(options.backend)
    with backend.double_precision(), metaframe.use_backend(options.backend, dtype="float64"):
        return run(options.seed, *((200, 0) if options.quick else (1000, 20)))


def run(seed: int, inner_steps: int, outer_steps: int) -> Found:
    """Learn the decays by the implicit gradient; compare it with the unrolled one at the end."""
    train, held_out = metaframe.tree.map(ops.asarray, data(seed))
    # On torch a compiled loop is unrolled, and 1,000 steps take long to compile.
    eager = metaframe.current_backend().name == "torch"
    minimum, steps = value_and_grad(by_the_minimum), value_and_grad(by_the_steps)
    if not eager:
        minimum, steps = metaframe.compile(minimum), metaframe.compile(steps)

    log_decays = ops.asarray(np.full(30, np.log(0.3)))
    for step in range(outer_steps + 1):
        value, implicit, _ = minimum(log_decays, train, held_out, inner_steps)
        print(f"held-out loss after {step} outer steps: {float(value):.6f}")
        if step < outer_steps:
            log_decays = log_decays - OUTER_RATE * implicit
    unrolled = steps(log_decays, train, held_out, inner_steps).grads
    log_decays, implicit, unrolled = map(ops.to_numpy, (log_decays, implicit, unrolled))
    difference = float(np.abs(implicit - unrolled).max() / np.abs(unrolled).max())
    print(f"implicit against unrolled gradient: relative difference {difference:.1e}")
    return Found(log_decays, float(value), implicit, unrolled, difference)


if __name__ == "__main__":
    main()
