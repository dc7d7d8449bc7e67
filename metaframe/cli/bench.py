"""A quick timing of the meta-step, wherever metaframe is installed."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from metaframe.cli.config import RunConfig
from metaframe.cli.experiment import Experiment, selected
from metaframe.training.batches import sample_batch


def time_steps(config: RunConfig, steps: int) -> dict[str, Any]:
    """Seconds of the first step, which compiles, and the median of `steps` further ones."""
    with selected(config):
        trainer = Experiment(config).trainer
        batch = sample_batch(trainer.task_sampler, config.meta_batch_size)

        def timed() -> float:
            started = time.perf_counter()
            trainer.meta_step(batch)
            return time.perf_counter() - started

        first = timed()
        median = float(np.median([timed() for _ in range(steps)]))
    return {
        "backend": config.backend,
        "tasks": config.meta_batch_size,
        "steps": steps,
        "first_s": round(first, 3),
        "step_ms": round(1000 * median, 3),
    }
