"""A quick timing of the meta-step, wherever metaframe is installed."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from metaframe import optim
from metaframe.backend.selection import use_backend
from metaframe.cli.experiment import step_settings
from metaframe.cli.run_config import RunConfig
from metaframe.cli.workloads import SEED, Workload
from metaframe.core.task_map import strategy
from metaframe.learners import MAML
from metaframe.tasks import Task
from metaframe.training import MetaTrainer


def time_steps(workload: Workload, config: RunConfig, steps: int) -> dict[str, Any]:
    """Seconds of the first step, which compiles, and the median of `steps` further ones.

    Of `config` count the backend, the device, the inner steps and how steps run.
    """
    assert config.backend is not None, "a resolved configuration has a backend"
    with use_backend(config.backend, device=config.device, dtype="float32"):
        model = (workload.model, workload.model.init(SEED))
        maml = MAML(model, workload.inner_lr, config.inner_steps)
        settings = step_settings(config, convolutional=workload.convolutional)
        sampler = _Same(Task(*workload.tasks))
        trainer = MetaTrainer(maml, optim.adam(1e-3), workload.loss, sampler, settings=settings)

        def timed() -> float:
            started = time.perf_counter()
            trainer.meta_step(sampler.batch)
            return time.perf_counter() - started

        first = timed()
        median = float(np.median([timed() for _ in range(steps)]))
    return {
        "workload": workload.name,
        "backend": config.backend,
        "parameters": sum(int(np.prod(p.shape)) for p in maml.meta_parameters().values()),
        "tasks": len(workload.tasks[0]),
        "inner_steps": config.inner_steps,
        "task_map": strategy(settings.task_map, tuple(maml.meta_parameters().values())),
        "compiled": settings.for_learner(maml).compiled,
        "steps": steps,
        "first_s": round(first, 3),
        "step_ms": round(1000 * median, 3),
    }


class _Same:
    """A sampler of one batch."""

    def __init__(self, batch: Task) -> None:
        self.batch = batch

    def sample(self, meta_batch_size: int) -> list[Task]:
        return [self.batch] * meta_batch_size
