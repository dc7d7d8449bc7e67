"""Learn a weight for each training example when some labels are wrong (Ren et al. 2018).

    python examples/example_weights.py --backend torch

Three of ten labels of the training digits are drawn at random. A small clean set is held out, and
the weights descend its loss after training: the gradient goes through every training step. Wrong
labels lose their weight without ever having been pointed out.
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import numpy as np
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score

import metaframe
from metaframe import inner_loop, nn, ops, optim, value_and_grad
from metaframe.backend import load_backend

INNER_RATE, OUTER_RATE = 0.5, 0.1


class Found(NamedTuple):
    """What the example found."""

    weights: Any
    cost: float
    auc: float


class Digits(NamedTuple):
    """Pixels in [0, 1] and labels as one-hot rows; which training labels are wrong."""

    x: Any
    y: Any
    held_out_x: Any
    held_out_y: Any
    wrong: Any


def data(seed: int, count: int) -> Digits:
    """`count` digits to train on, 30 % of them with a label drawn anew, and 100 clean ones."""
    rng = np.random.default_rng(seed)
    raw = load_digits()
    chosen = rng.permutation(len(raw.target))[: count + 100]
    x, labels = raw.data[chosen] / 16, raw.target[chosen]
    given = np.where(rng.random(count) < 0.3, rng.integers(0, 10, count), labels[:count])
    classes = np.eye(10)
    return Digits(
        x[:count], classes[given], x[count:], classes[labels[count:]], given != labels[:count]
    )


def costs(x: Any, y: Any, w: Any) -> Any:
    """The cross-entropy of softmax regression, one for each example."""
    return -ops.sum(y * nn.log_softmax(ops.matmul(x, w)), -1)


def weighted_cost(batch: Any, w: Any) -> Any:
    """What training minimises."""
    x, y, weights = batch
    return ops.mean(weights * costs(x, y, w))


def held_out_cost(logits: Any, digits: Any, steps: int) -> Any:
    """The loss on clean digits after training with weights `2 sigmoid(logits)`, 1 at first."""
    batch = (digits["x"], digits["y"], 2 * ops.sigmoid(logits))
    start = ops.zeros((64, 10))
    w = inner_loop(weighted_cost, start, batch, steps=steps, lr=INNER_RATE, mode="remat")
    return ops.mean(costs(digits["held_out_x"], digits["held_out_y"], w))


def main(argv: list[str] | None = None) -> Found:
    """Run the example; returns what it printed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backend", default="jax", choices=["jax", "torch", "tensorflow"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="fewer digits and steps")
    options = parser.parse_args(argv)
    backend = load_backend(options.backend)
    sizes = (200, 10, 5) if options.quick else (1000, 20, 30)
    with backend.double_precision(), metaframe.use_backend(options.backend, dtype="float64"):
        return run(options.seed, *sizes)


def run(seed: int, count: int, inner_steps: int, outer_steps: int) -> Found:
    """Learn the weights of `count` digits by Adam."""
    digits = data(seed, count)
    wrong = digits.wrong
    arrays = {name: ops.asarray(x) for name, x in digits._asdict().items() if name != "wrong"}
    gradient = value_and_grad(held_out_cost)
    if metaframe.current_backend().name != "torch":  # where a compiled loop would be unrolled
        gradient = metaframe.compile(gradient)
    rule, logits = optim.adam(OUTER_RATE), ops.asarray(np.zeros(count))
    state = rule.init(logits)
    for step in range(outer_steps):
        cost, slopes, _ = gradient(logits, arrays, inner_steps)
        updates, state = rule.update(slopes, state, logits)
        logits = metaframe.apply_updates(logits, updates)
        if step % 10 == 0:
            print(f"step {step}: loss on clean digits {float(cost):.4f}")
    weights = ops.to_numpy(2 * ops.sigmoid(logits))
    auc = float(roc_auc_score(~wrong, weights))
    right = weights[~wrong].mean()
    print(f"mean weight of right labels {right:.3f}, of wrong ones {weights[wrong].mean():.3f}")
    print(f"a right label outweighs a wrong one with probability {auc:.4f}")
    return Found(weights, float(cost), auc)


if __name__ == "__main__":
    main()
