"""Few-shot classification of handwritten digits: one script, three frameworks, the same numbers.

    python examples/digits.py --backend torch

Every class is a digit in one of four rotations. The classes tasks are made of in meta-training and
in the test are disjoint. `metaframe train --dataset digits` does the same and keeps a run folder.
"""

from __future__ import annotations

import argparse

import metaframe
from metaframe import MAML, nn, ops, optim
from metaframe.tasks import digits_sampler
from metaframe.training import Evaluation, MetaTrainer, StepSettings, evaluate

WAYS, SHOTS, QUERIES = 5, 1, 10


def model() -> nn.Model:
    """A dense network on the 64 pixels."""
    network = nn.mlp([64, 128, 64, WAYS])
    return nn.Model(network.init, lambda params, x: network.apply(params, ops.reshape(x, (-1, 64))))


def main(argv: list[str] | None = None) -> Evaluation:
    """Run the example; returns what it printed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backend", default="jax", choices=["jax", "torch", "tensorflow"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few iterations, as a smoke test")
    options = parser.parse_args(argv)
    iterations, inner_steps, test_tasks = (100, 1, 100) if options.quick else (300, 3, 600)

    metaframe.set_backend(options.backend)
    train, test = (
        digits_sampler(ways=WAYS, shots=SHOTS, queries=QUERIES, split=split, seed=options.seed)
        for split in ("train", "test")
    )
    network = model()
    maml = MAML((network, network.init(options.seed)), inner_lr=0.1, inner_steps=inner_steps)
    # Hundreds of steps are worth compiling for on every backend.
    settings = StepSettings(compiled=True)
    trainer = MetaTrainer(maml, optim.adam(1e-3), nn.cross_entropy, train, settings=settings)
    history = trainer.fit(iterations, meta_batch_size=16)
    print(f"meta-loss: {history.meta_loss[0]:.3f} at first, {history.meta_loss[-1]:.3f} at last")

    found = evaluate(
        maml,
        nn.cross_entropy,
        test,
        test_tasks,
        steps=10,
        metric=nn.accuracy,
        settings=settings,
    )
    for steps in (0, inner_steps, 10):
        score = found.curve[steps]
        print(f"accuracy after {steps:2} steps: {100 * score.mean:.2f} ± {100 * score.ci95:.2f} %")
    return found


if __name__ == "__main__":
    main()
