"""From a RunConfig to the objects that train and evaluate."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from metaframe import nn, optim, tree
from metaframe.backend.registry import known_backends, load_backend
from metaframe.backend.selection import use_backend
from metaframe.cli import datasets
from metaframe.cli.applicable import algorithm, check_fit, defaults, has_use
from metaframe.cli.errors import UsageError, suggestion
from metaframe.cli.run_config import RunConfig, check_keys, read_toml
from metaframe.distributed import Workers, place, session
from metaframe.models.precision import mixed_precision
from metaframe.tasks import IndexedSampler, Task
from metaframe.training import Evaluation, MetaTrainer, Schedule, StepSettings, evaluate, schedules
from metaframe.training.report import on_host

PREFERRED = ("jax", "torch", "tensorflow")
"""The order in which an installed backend is chosen if none is named."""


def resolve(
    flags: Mapping[str, Any],
    file: str | Path | None = None,
    preset: Mapping[str, Any] | None = None,
) -> RunConfig:
    """The settings of a run: defaults < preset < file < flags.

    Of the preset, or of a run folder in its place, what the data set or the algorithm has no use
    for is left out; in the file and the flags it is refused. The evaluation takes as many inner
    steps as training at least, unless it is said how many.

    Raises:
        UsageError: an unknown key or name, or a value that does not fit.
    """
    own = {**(read_toml(file) if file else {}), **flags}
    given = {**(preset or {}), **own}
    check_keys(given, "the command line")
    data = str(given.get("dataset", RunConfig.dataset))
    chosen = str(given.get("algorithm", RunConfig.algorithm))
    given = {n: v for n, v in given.items() if n in own or has_use(n, data, chosen)}
    config = RunConfig(**{**defaults(data, chosen), **given})
    if "eval_steps" not in given:
        steps = max(config.eval_steps, config.inner_steps)
        config = dataclasses.replace(config, eval_steps=steps)
    check_fit(config, own)
    if config.data is not None:  # found again from wherever the run is continued
        config = dataclasses.replace(config, data=os.path.abspath(os.path.expanduser(config.data)))
    backend = config.backend or _installed()
    if backend not in known_backends():
        raise UsageError(f"no backend called {backend!r}. {suggestion(backend, known_backends())}")
    return dataclasses.replace(config, backend=backend)


def _installed() -> str:
    for name in PREFERRED:
        if importlib.util.find_spec(name) is not None:
            return name
    raise UsageError(f"no framework is installed; install one of {', '.join(PREFERRED)}.")


class Experiment:
    """The learner, the samplers and the trainer of one run. Made within `selected`."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.dataset = datasets.dataset(config.dataset)
        self.loss_fn = nn.mse if self.dataset.regression else nn.cross_entropy
        self.metric = None if self.dataset.regression else nn.accuracy
        model = self.dataset.model(config)
        pair: Any = (model, model.init(config.seed))
        if config.precision == "bfloat16":
            pair = mixed_precision(pair)
        self.learner = algorithm(config.algorithm).build(pair, config)

    @functools.cached_property
    def settings(self) -> StepSettings:
        """The settings of steps."""
        return step_settings(self.config, convolutional=self.dataset.convolutional)

    @functools.cached_property
    def trainer(self) -> MetaTrainer:
        """The trainer, with Adam as outer optimizer."""
        c = self.config
        optimizer = optim.adam()
        if c.clip_norm is not None or c.clip_value is not None:
            optimizer = optim.clipped(optimizer, norm=c.clip_norm, value=c.clip_value)
        return MetaTrainer(
            self.learner,
            optimizer,
            self.loss_fn,
            self.sampler("train"),
            metric=self.metric,
            schedule=schedule(c),
            steps_per_epoch=c.steps_per_epoch,
            settings=self.settings,
        )

    def check(self) -> dict[str, str]:
        """Make what else can fail before the first step: the trainer, and a task of each split.

        Returns:
            A digest of each of these tasks, by which processes find that their data differs.
        """
        _ = self.trainer
        splits = ("train", *(["validation"] if self.config.eval_every else []))
        return {split: self._digest(self.sampler(split).task(0)) for split in splits}

    def _digest(self, task: Task) -> str:
        whole, backend = hashlib.sha256(), self.learner.backend
        for x in tree.leaves(task):
            whole.update(np.ascontiguousarray(on_host(x, backend)).tobytes())
        return whole.hexdigest()

    def sampler(self, split: Any) -> IndexedSampler:
        """The tasks of a split; those that are measured on have a seed of their own."""
        seed = self.config.seed if split == "train" else self.config.eval_seed
        return self.dataset.sampler(self.config, split, seed)

    @property
    def eval_steps(self) -> int:
        """Inner steps in the evaluation; none for an algorithm without an inner loop."""
        return self.config.eval_steps if self.learner.config.names else 0

    def evaluate(self) -> Evaluation:
        """Measure the learner on held-out tasks."""
        return evaluate(
            self.learner,
            self.loss_fn,
            datasets.test_tasks(self.config),
            self.config.eval_tasks,
            steps=self.eval_steps,
            metric=self.metric,
            settings=self.settings,
        )


def step_settings(c: RunConfig, *, convolutional: bool) -> StepSettings:
    """The settings of steps, with what is left to us decided."""
    # A run is long enough for any compiler, except for convolutions on one that is slow.
    compiled = c.compiled if convolutional else c.compiled is not False
    return StepSettings(c.task_map, c.chunk_size, c.mode, compiled, place() is not None)


@contextmanager
def selected(config: RunConfig) -> Iterator[Workers]:
    """The run's backend, device and dtype, and the other processes of the run, for a block of code.

    Yields:
        Who shares the work; this process alone if it was started alone.
    """
    name = config.backend or _installed()
    backend, double = load_backend(name), config.precision == "float64"
    dtype = "float64" if double else "float32"
    # First of all: JAX and TensorFlow join others only before they make an array.
    with (
        backend.double_precision() if double else nullcontext(),
        session(name, timeout=config.timeout) as workers,
        use_backend(name, device=config.device, dtype=dtype),
    ):
        yield workers


def schedule(config: RunConfig) -> Schedule:
    """The outer learning rate of every step."""
    rates = schedules.constant(config.outer_lr)
    if config.schedule == "cosine":
        rates = schedules.cosine(config.outer_lr, config.iterations)
    return schedules.warmup(rates, config.warmup_steps)
