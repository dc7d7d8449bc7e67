"""Few-shot classification of Omniglot characters, meta-tested on alphabets never trained on.

Bring your own copy of the data: a folder with the official zips, or with what is in them.

    python examples/omniglot.py --data ~/omniglot --backend jax

Meta-trains on the small1 background set and on the alphabets it shares with small2, and tests on
Katakana, Sanskrit and Tagalog.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from few_shot import Result, Settings, report, run
from rich.console import Console

import metaframe
from metaframe import nn
from metaframe.tasks import FewShotSampler, load_omniglot

WAYS, SHOTS, QUERIES = 5, 1, 5
HELD_OUT = ("Japanese_(katakana)", "Sanskrit", "Tagalog")
# One task after the other: on a CPU, convolutions with weights of their own for every task are
# faster that way than vectorised.
SETTINGS = Settings(
    iterations=1000,
    meta_batch_size=16,
    inner_lr=0.4,
    inner_steps=1,
    eval_steps=3,
    eval_batch=20,
    task_map="scan",
)


def main(argv: list[str] | None = None) -> Result:
    """Run the example; returns what it printed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with Omniglot")
    parser.add_argument("--backend", default="jax", choices=["jax", "torch", "tensorflow"])
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few iterations, as a smoke test")
    parser.add_argument("--out", type=Path, default=Path("runs/omniglot"))
    options = parser.parse_args(argv)

    settings = replace(SETTINGS, seed=options.seed)
    if options.quick:
        settings = replace(settings, iterations=20, meta_batch_size=4, eval_tasks=40)
    metaframe.set_backend(options.backend)
    # torch takes minutes to compile a convolutional meta-step and gains nothing from it.
    settings = replace(settings, compiled=metaframe.current_backend().compiles_quickly)
    data = load_omniglot(options.data, ("small1", "small2"))
    classes = data.split_alphabets(HELD_OUT)
    train, test = (
        FewShotSampler(
            data.images,
            data.labels,
            ways=WAYS,
            shots=SHOTS,
            queries=QUERIES,
            split=split,
            classes=classes,
            rotations=True,
            seed=options.seed,
        )
        for split in ("train", "test")
    )
    model = nn.conv4(WAYS, channels=options.channels, pooling="stride")
    console = Console()
    result = run(model, train, test, settings, console)
    title = f"Omniglot, {WAYS}-way {SHOTS}-shot, MAML on {options.backend}"
    report(result, settings, title, options.out, console)
    return result


if __name__ == "__main__":
    main()
