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

REMEDIES = "Lower the inner or outer learning rate, clip gradients, or look at that task's data."


def is_finite(report: StepReport) -> bool:
    """True if every loss and the gradient are finite."""
    return bool(np.isfinite(report.task_losses).all()) and math.isfinite(report.grad_norm)


Blame = Callable[[int | None], tuple[int | None, str]]
"""`task -> (task, what to do)`: of the task of a loss, or of None for a gradient."""


def check_finite(report: StepReport, step: int, blame: Blame) -> None:
    """Check that the results of the step after `step` others are finite.

    Raises:
        NonFiniteError: it is not, naming the task and what to do.
    """
    losses = report.task_losses
    bad = np.flatnonzero(~np.isfinite(losses))
    after = f"The learner is as it was after {step} steps."
    if bad.size:
        _, advice = blame(int(bad[0]))
        raise NonFiniteError(
            f"step {step}: the loss of task {bad[0]} of the batch is {losses[bad[0]]}. {after} "
            f"{advice}"
        )
    if not math.isfinite(report.grad_norm):
        task, advice = blame(None)
        whose = "the batch as a whole" if task is None else f"task {task} of the batch"
        raise NonFiniteError(
            f"step {step}: the meta-gradient of {whose} is not finite, with finite losses. {after} "
            f"{advice}"
        )


def remedy(maml: MetaLearner, batch: Task, task: int) -> str:
    """Advice about a loss of this task that is not finite, by what its data show."""
    backend = maml.backend
    one = tree.map(lambda x: x[task], as_batch(batch, maml.meta_parameters(), backend))
    for field in ("support_x", "support_y", "query_x", "query_y"):
        for leaf in tree.leaves(getattr(one, field)):
            values = backend.to_numpy(leaf)
            bad = 0 if values.dtype.kind not in "fc" else int((~np.isfinite(values)).sum())
            if bad:
                return f"Its {field} has {bad} values that are not finite: remove them."
    for part in ("support", "query"):
        found = _labels_out_of_range(maml, one, part)
        if found:
            return found
    return REMEDIES


def _labels_out_of_range(maml: MetaLearner, task: Task, part: str) -> str:
    """A sentence about labels that the model has no output for; "" if there are none."""
    labels = getattr(task, f"{part}_y")
    if not maml.backend.owns(labels) or maml.backend.is_floating(labels):
        return ""
    try:
        outputs = maml.clone()(getattr(task, f"{part}_x")).shape
    except Exception:  # noqa: BLE001  a model that is called in another way, or gives no array
        return ""
    values = maml.backend.to_numpy(labels)
    lowest, highest = int(values.min()), int(values.max())
    if len(outputs) != values.ndim + 1 or (lowest >= 0 and highest < outputs[-1]):
        return ""
    return (
        f"Its {part}_y has labels from {lowest} to {highest}, and the model has {outputs[-1]} "
        f"outputs: labels are integers from 0 to {int(outputs[-1]) - 1}."
    )


def task_to_blame(maml: MetaLearner, loss_fn: LossFn, batch: Task) -> int | None:
    """The task whose gradient it is; computed again, since a step only has the mean."""
    backend = maml.backend
    stacked = as_batch(batch, maml.meta_parameters(), backend)
    for i in range(len(tree.leaves(stacked)[0])):
        one = tree.map(lambda x, i=i: x[i : i + 1], stacked)
        grads = maml.meta_value_and_grad(loss_fn, one, compiled=False).grads
        if not all(np.isfinite(backend.to_numpy(g)).all() for g in grads.values()):
            return i
    return None
