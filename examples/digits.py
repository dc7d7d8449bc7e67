"""Few-shot classification of handwritten digits, on any backend, in under two minutes.

Classes are scikit-learn's digits in four rotations. The digits met in meta-training and those it
is tested on are different ones.

    python examples/digits.py --backend jax
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from few_shot import Result, Settings, report, run
from rich.console import Console

import metaframe
from metaframe import nn, ops
from metaframe.tasks import digits_sampler

WAYS, SHOTS, QUERIES = 5, 1, 10
SETTINGS = Settings(iterations=400, meta_batch_size=16, inner_lr=0.1, inner_steps=3, eval_tasks=600)


def model() -> nn.Model:
    """A dense network on the 64 pixels."""
    network = nn.mlp([64, 128, 64, WAYS])
    return nn.Model(network.init, lambda params, x: network.apply(params, ops.reshape(x, (-1, 64))))


def main(argv: list[str] | None = None) -> Result:
    """Run the example; returns what it printed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backend", default="jax", choices=["jax", "torch", "tensorflow"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few iterations, as a smoke test")
    parser.add_argument("--out", type=Path, default=Path("runs/digits"))
    options = parser.parse_args(argv)

    settings = replace(SETTINGS, seed=options.seed)
    if options.quick:
        settings = replace(settings, iterations=100, inner_steps=1, eval_tasks=100)
    metaframe.set_backend(options.backend)
    train, test = (
        digits_sampler(ways=WAYS, shots=SHOTS, queries=QUERIES, split=split, seed=options.seed)
        for split in ("train", "test")
    )
    console = Console()
    result = run(model(), train, test, settings, console)
    title = f"digits, {WAYS}-way {SHOTS}-shot, MAML on {options.backend}"
    report(result, settings, title, options.out, console)
    return result


if __name__ == "__main__":
    main()
