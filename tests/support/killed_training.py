"""Training that is killed: a module of its own, which a server of processes loads once."""

from __future__ import annotations

from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch._decomp  # the first step loads it, for seconds

import metaframe
from metaframe import MAML, nn, ops, optim
from metaframe.tasks import SinusoidTaskSampler
from metaframe.training import Callback, Checkpoints, MetaTrainer, load_checkpoint
from metaframe.training.checkpoint import checkpoint_files


class Ready(Callback):
    """Says after the first step, which is saved by then, that the process may be killed."""

    def __init__(self, told: Connection) -> None:
        self._told: Connection | None = told

    def on_step(self, run: Any) -> None:
        if self._told is not None:
            self._told.send("ready")
        self._told = None


def train(folder: Path, steps: int, told: Connection) -> None:
    """Go on from the newest checkpoint in `folder` to this many steps, saving after each."""
    metaframe.set_backend("torch")
    torch.set_num_threads(1)
    torch.manual_seed(0)  # its state is saved too, and differs from process to process
    model = nn.mlp([1, 32, 1], activation=ops.tanh)
    maml = MAML((model, model.init(0)), 0.01)
    trainer = MetaTrainer(maml, optim.adam(1e-2), nn.mse, SinusoidTaskSampler(seed=0))
    if files := checkpoint_files(folder):
        load_checkpoint(files[-1], trainer)
    saver = Checkpoints(folder, every=1, keep=2)
    trainer.fit(steps - trainer.step, 2, callbacks=[saver, Ready(told)])
