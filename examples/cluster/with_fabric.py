"""Lightning Fabric starts the processes, metaframe shares the tasks among them.

    pip install lightning-fabric
    python examples/cluster/with_fabric.py --processes 2

Do not hand the model to `fabric.setup`: it would wrap it in DDP, whose hooks see `backward()`
alone.
"""

from __future__ import annotations

import argparse

import torch
from lightning_fabric import Fabric

from metaframe import MAML, optim
from metaframe.tasks import SinusoidTaskSampler
from metaframe.training import MetaTrainer, StepSettings


def main() -> None:
    """Train a little and print the last loss."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--iterations", type=int, default=20)
    options = parser.parse_args()
    fabric = Fabric(accelerator="cpu", strategy="ddp", devices=options.processes)
    fabric.launch()
    torch.manual_seed(0)  # the same model everywhere; the trainer checks
    model = torch.nn.Sequential(torch.nn.Linear(1, 40), torch.nn.Tanh(), torch.nn.Linear(40, 1))
    trainer = MetaTrainer(
        MAML(model, inner_lr=0.01),
        optim.adam(1e-3),
        torch.nn.functional.mse_loss,
        SinusoidTaskSampler(seed=0),
        settings=StepSettings(distributed=True),
    )
    history = trainer.fit(options.iterations, meta_batch_size=5)
    fabric.print(f"loss {history.meta_loss[-1]:.6f} with {fabric.world_size} processes")


if __name__ == "__main__":
    main()
