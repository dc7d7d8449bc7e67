"""Ray Train starts the processes, metaframe shares the tasks among them.

    pip install "ray[train]"
    python examples/cluster/with_ray.py --processes 2

Do not hand the model to `ray.train.torch.prepare_model`: it would wrap it in DDP, whose hooks see
`backward()` alone.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.train.torch import TorchConfig, TorchTrainer

from metaframe import MAML, optim
from metaframe.tasks import SinusoidTaskSampler
from metaframe.training import MetaTrainer, StepSettings


def train(config: dict[str, Any]) -> None:
    """The work of every worker, in the process group that Ray has made."""
    torch.manual_seed(0)  # the same model everywhere; the trainer checks
    model = torch.nn.Sequential(torch.nn.Linear(1, 40), torch.nn.Tanh(), torch.nn.Linear(40, 1))
    trainer = MetaTrainer(
        MAML(model, inner_lr=0.01),
        optim.adam(1e-3),
        torch.nn.functional.mse_loss,
        SinusoidTaskSampler(seed=0),
        settings=StepSettings(distributed=True),
    )
    history = trainer.fit(config["iterations"], meta_batch_size=5)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = None
        if ray.train.get_context().get_world_rank() == 0:  # all have the same parameters
            torch.save(model.state_dict(), Path(folder) / "model.pt")
            checkpoint = ray.train.Checkpoint.from_directory(folder)
        # Ray keeps the numbers that come with a checkpoint.
        ray.train.report({"loss": history.meta_loss[-1]}, checkpoint=checkpoint)


def main() -> None:
    """Train a little and print the last loss."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--iterations", type=int, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = TorchTrainer(
            train,
            train_loop_config={"iterations": options.iterations},
            torch_config=TorchConfig(backend="gloo"),
            scaling_config=ray.train.ScalingConfig(num_workers=options.processes),
            run_config=ray.train.RunConfig(storage_path=folder),
        ).fit()
    print(f"loss {result.metrics['loss']:.6f} with {options.processes} processes")


if __name__ == "__main__":
    main()
