"""Regression of sinusoids (Finn et al. 2017, section 5.1): one script, the same number everywhere.

    python examples/sinusoid.py --backend torch

A task is a sinusoid with its own amplitude and phase, ten points to adapt on, ten to be judged on.
"""

from __future__ import annotations

import argparse

import metaframe
from metaframe import MAML, nn, optim
from metaframe.tasks import SinusoidTaskSampler
from metaframe.training import Evaluation, MetaTrainer, StepSettings, evaluate


def main(argv: list[str] | None = None) -> Evaluation:
    """Run the example; returns what it printed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backend", default="jax", choices=["jax", "torch", "tensorflow"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few iterations, as a smoke test")
    options = parser.parse_args(argv)
    iterations, test_tasks = (30, 100) if options.quick else (5000, 600)

    metaframe.set_backend(options.backend)
    train, test = (
        SinusoidTaskSampler(k_support=10, k_query=10, seed=options.seed, split=split)
        for split in ("train", "test")
    )
    model = nn.mlp([1, 40, 40, 1])
    maml = MAML((model, model.init(options.seed)), inner_lr=0.01, inner_steps=1)
    # A short run on torch is over before it is compiled.
    settings = StepSettings(compiled=None if options.quick else True)
    trainer = MetaTrainer(maml, optim.adam(1e-3), nn.mse, train, settings=settings)
    trainer.fit(iterations, meta_batch_size=25)

    found = evaluate(maml, nn.mse, test, test_tasks, steps=5, settings=settings)
    for steps in (0, 1, 5):
        error = found.curve[steps]
        print(f"squared error after {steps} steps: {error.mean:.4f} ± {error.ci95:.4f}")
    return found


if __name__ == "__main__":
    main()
