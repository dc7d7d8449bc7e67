"""Checks of the arguments of a trainer and an evaluation."""

from __future__ import annotations

from typing import Any

from metaframe import arguments
from metaframe.errors import InputTypeError
from metaframe.learners.meta_learner import MetaLearner


def learner(maml: Any, loss_fn: Any, metric: Any) -> None:
    """A learner, and functions to judge it by."""
    if not isinstance(maml, MetaLearner):
        raise InputTypeError(
            f"maml must be a learner, received {type(maml).__qualname__}. Wrap a model in one: "
            "MAML(model, inner_lr=0.01)."
        )
    arguments.function(loss_fn, "loss_fn")
    if metric is not None:
        arguments.function(metric, "metric")


def sampler(task_sampler: Any) -> None:
    """Check the sampler of training tasks."""
    if not callable(getattr(task_sampler, "sample", None)):
        raise InputTypeError(
            "task_sampler must have a method sample(meta_batch_size), see TaskSampler; received "
            f"{type(task_sampler).__qualname__}."
        )
