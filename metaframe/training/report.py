"""The request for an outer step, and its report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from metaframe.backend.contract import Backend
from metaframe.backend.types import Array
from metaframe.errors import InputError
from metaframe.learners.programs import MetaGradient

Gradient = Callable[[int | None], MetaGradient]
"""The meta-gradient as the learner computes it now; a schedule or a flag may change it.

Its argument: how many tasks there are in all, where a batch holds this process's share of them.
"""


class StepReport(NamedTuple):
    """The results of one outer step, before the update.

    >>> StepReport(0.5, np.array([0.25, 0.75]), None, 2.0).loss
    0.5
    """

    loss: float
    """Mean query loss after adaptation."""
    task_losses: np.ndarray[Any, Any]
    """The query loss of each task, (tasks,)."""
    task_scores: np.ndarray[Any, Any] | None
    """The metric of each task, (tasks,); None without a metric."""
    grad_norm: float
    """Euclidean norm of the whole meta-gradient."""


class Outcome(NamedTuple):
    """A step that was computed and is not yet in effect."""

    report: StepReport
    apply: Callable[[], None]


NO_SCHEDULE = (
    "schedule= is for optimizers of metaframe.optim made without a learning rate. Schedule another "
    "optimizer by its own means: optax by a schedule in the place of the rate, a framework's own "
    "optimizer in a callback."
)


def refuse_rate(rate: float | None) -> None:
    """A rate that the optimizer has no use for is an error."""
    if rate is not None:
        raise InputError(NO_SCHEDULE)


def on_host(x: Array, backend: Backend) -> np.ndarray[Any, Any]:
    """`x` in NumPy; bfloat16, which that lacks, as float32, which holds it exactly."""
    wide = backend.dtype_name(x) == "bfloat16"
    return backend.to_numpy(backend.ops.astype(x, "float32") if wide else x)
