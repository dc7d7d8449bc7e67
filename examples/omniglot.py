"""Few-shot classification of Omniglot characters, tested on alphabets never trained on.

Bring your own copy of the data: a folder with the official zips, or with what is in them.

    python examples/omniglot.py --data ~/omniglot --backend jax

Meta-trains on the small1 background set and on the alphabets it shares with small2, and tests on
Katakana, Sanskrit and Tagalog.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import metaframe
from metaframe import MAML, nn, optim
from metaframe.tasks import FewShotSampler, load_omniglot
from metaframe.training import Evaluation, MetaTrainer, evaluate

WAYS, SHOTS, QUERIES = 5, 1, 5
HELD_OUT = ("Japanese_(katakana)", "Sanskrit", "Tagalog")


def main(argv: list[str] | None = None) -> Evaluation:
    """Run the example; returns what it printed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with Omniglot")
    parser.add_argument("--backend", default="jax", choices=["jax", "torch", "tensorflow"])
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few iterations, as a smoke test")
    options = parser.parse_args(argv)
    iterations, meta_batch_size, test_tasks = (20, 4, 40) if options.quick else (1000, 16, 600)

    metaframe.set_backend(options.backend)
    data = load_omniglot(options.data, ("small1", "small2"))
    train, test = (
        FewShotSampler(
            data.images,
            data.labels,
            ways=WAYS,
            shots=SHOTS,
            queries=QUERIES,
            split=split,
            classes=data.split_alphabets(HELD_OUT),
            rotations=True,
            seed=options.seed,
        )
        for split in ("train", "test")
    )
    model = nn.conv4(WAYS, channels=options.channels, pooling="stride")
    maml = MAML((model, model.init(options.seed)), inner_lr=0.4)
    trainer = MetaTrainer(maml, optim.adam(1e-3), nn.cross_entropy, train)
    history = trainer.fit(iterations, meta_batch_size)
    print(f"meta-loss: {history.meta_loss[0]:.3f} at first, {history.meta_loss[-1]:.3f} at last")

    found = evaluate(maml, nn.cross_entropy, test, test_tasks, steps=3, metric=nn.accuracy)
    for steps, score in enumerate(found.curve):
        print(f"accuracy after {steps} steps: {100 * score.mean:.2f} ± {100 * score.ci95:.2f} %")
    return found


if __name__ == "__main__":
    main()
