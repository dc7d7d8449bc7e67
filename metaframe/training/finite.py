"""A step's numbers are finite, or an error says whose are not."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from metaframe import tree
from metaframe.errors import NonFiniteError
from metaframe.learners.learner import LossFn
from metaframe.learners.meta_learner import MetaLearner
from metaframe.learners.objective import as_batch
from metaframe.tasks import Task
from metaframe.training.step import StepReport

_REMEDIES = "Lower the inner or outer learning rate, clip gradients, or look at that task's data."


def is_finite(report: StepReport) -> bool:
    """True if every loss and the gradient are finite."""
    return bool(np.isfinite(report.task_losses).all()) and math.isfinite(report.grad_norm)


def check_finite(report: StepReport, step: int, blame: Callable[[], str]) -> None:
    """Check that the results of the step after `step` others are finite.

    Raises:
        NonFiniteError: it is not, naming the task; for a gradient the one that `blame` names.
    """
    losses = report.task_losses
    bad = np.flatnonzero(~np.isfinite(losses))
    if bad.size:
        raise NonFiniteError(
            f"step {step}: the loss of task {bad[0]} of the batch is {losses[bad[0]]}. The learner "
            f"is as it was after {step} steps. {_REMEDIES}"
        )
    if not math.isfinite(report.grad_norm):
        raise NonFiniteError(
            f"step {step}: the meta-gradient of {blame()} is not finite, with finite losses. The "
            f"learner is as it was after {step} steps. {_REMEDIES}"
        )


def task_to_blame(maml: MetaLearner, loss_fn: LossFn, batch: Task) -> str:
    """Which task's gradient it is; computed again, since a step only has the mean."""
    backend = maml.backend
    stacked = as_batch(batch, maml.meta_parameters(), backend)
    for i in range(len(tree.leaves(stacked)[0])):
        one = tree.map(lambda x, i=i: x[i : i + 1], stacked)
        grads = maml.meta_value_and_grad(loss_fn, one, compiled=False).grads
        if not all(np.isfinite(backend.to_numpy(g)).all() for g in grads.values()):
            return f"task {i} of the batch"
    return "the batch as a whole"
