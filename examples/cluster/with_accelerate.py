"""Hugging Face Accelerate joins the processes, metaframe shares the tasks among them.

    pip install accelerate
    torchrun --nproc-per-node 2 examples/cluster/with_accelerate.py

Do not hand the model to `accelerator.prepare`: it would wrap it in DDP, whose hooks see
`backward()` alone.
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator

from metaframe import MAML, optim
from metaframe.tasks import SinusoidTaskSampler
from metaframe.training import MetaTrainer, StepSettings


def main() -> None:
    """Train a little and print the last loss."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--iterations", type=int, default=20)
    options = parser.parse_args()
    accelerator = Accelerator(cpu=True)
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
    accelerator.print(
        f"loss {history.meta_loss[-1]:.6f} with {accelerator.num_processes} processes"
    )


if __name__ == "__main__":
    main()
