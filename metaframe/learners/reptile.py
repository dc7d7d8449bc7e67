"""Reptile around a model of any framework (Nichol et al. 2018, arXiv 1803.02999)."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from metaframe import optim
from metaframe.backend.types import Array, Arrays
from metaframe.core import checks, rates
from metaframe.core.inner_loop import StepView
from metaframe.core.task_program import Outcome, TaskRun, with_gradient
from metaframe.errors import InputError
from metaframe.learners.functions import LearningRate, Params
from metaframe.learners.maml import MAML
from metaframe.learners.method import Method, Support
from metaframe.learners.norms import Norm
from metaframe.learners.registry import Algorithm, register_algorithm
from metaframe.learners.settings import AdaptConfig


class Reptile(MAML):
    """Moves the meta-parameters towards the adapted ones; takes first derivatives only.

        theta_K = K steps from theta on the support set
        grads = (theta - mean_i theta_K,i) / alpha

    `meta_value_and_grad` returns that direction as `grads`, added up from the updates as
    `metaframe.reptile_step(direction="displacement")` does: gradient descent on it with rate
    epsilon * alpha is the paper's `theta + epsilon * mean_i (theta_K,i - theta)`. It depends on
    the support set alone; the query set gives the cost that is returned.

    With `inner_lr=None` alpha is 1: the update rule brings its own rate, and gradient descent with
    rate epsilon is the paper's outer step. The paper trains so, with minibatches of a larger
    support set, and an epsilon that falls from 1 to 0:

        maml = Reptile(model, None, 8, update=optim.adam(1e-3, b1=0.0), inner_batches=10)
        MetaTrainer(maml, optim.sgd(), ..., schedule=lambda step: 1 - step / total)

    The direction is no derivative of a loss, so `backward()` cannot give it: a learner's adapted
    parameters are constants.

    Args:
        module: see `MAML`.
        inner_lr: alpha, positive; see `MAML`. `None` if `update` brings its own.
        inner_steps: K. With one step the direction is a plain gradient of the mean support loss.
        adapt_names: see `MAML`; the direction is zero for the others.
        allow_unused: see `MAML`.
        norm: see `MAML`.
        update: the inner update rule, see `MAML`; the paper takes `optim.adam(b1=0.0)`. Its state
            starts anew for every task.
        inner_batches: see `MAML`.

    >>> import torch
    >>> from metaframe.tasks import Task
    >>> maml = Reptile(torch.nn.Linear(1, 1), inner_lr=0.1, inner_steps=8)
    >>> x = torch.linspace(-1, 1, 8)[:, None]
    >>> cost, direction, _ = maml.meta_value_and_grad(torch.nn.functional.mse_loss,
    ...                                               [Task(x, 2 * x, x, 2 * x)])
    >>> sorted(direction)
    ['bias', 'weight']
    """

    def __init__(
        self,
        module: Any,
        inner_lr: LearningRate | None = 0.01,
        inner_steps: int = 5,
        adapt_names: Iterable[str] | None = None,
        allow_unused: bool = True,
        *,
        norm: Norm = "batch",
        update: Any = optim.gradient_descent_update,
        inner_batches: Any = None,
    ) -> None:
        if inner_lr is not None:
            rates.refuse_zero(checks.learning_rate(inner_lr, "inner_lr"), "inner_lr", "Reptile")
        super().__init__(
            module,
            inner_lr,
            inner_steps,
            True,
            adapt_names,
            allow_unused,
            norm=norm,
            update=update,
            inner_batches=inner_batches,
        )
        self._method = Method(partial(displacement, config=self.config), finish=_constants)


def displacement(run: TaskRun, *, config: AdaptConfig) -> Outcome:
    """A cost with the value of the query loss and the gradient of Reptile's direction."""
    if run.steps == 0:
        raise InputError(
            "Reptile's direction is the sum of its inner updates: take one step or more."
        )
    found, names = run.adapted(_updates), sorted(config.names)
    loss, report = run.outer(found.params, None)
    moved = dict(zip(names, found.total, strict=True))
    if config.inner_lr is not None:
        start = dict(zip(names, run.start, strict=True))
        moved = rates.divided(moved, rates.spread(config.rate({}), start, name="inner_lr"))
    direction = [-moved[name] for name in names]
    return Outcome(with_gradient(loss, run.start, direction), found.params, report)


def _updates(at: Arrays, view: StepView | None, index: Array) -> Arrays:
    del at, index
    return view.updates if view is not None else ()


def _constants(support: Support, start: Params, params: Params) -> Params:
    del start
    return {name: support.backend.stop_gradient(x) for name, x in params.items()}


register_algorithm(
    Algorithm(
        "reptile",
        "moves towards the adapted parameters (arXiv 1803.02999)",
        lambda model, c: Reptile(model, c.inner_lr, c.inner_steps, norm=c.norm),
        # After one step it moves along the plain gradient of the support loss, and learns nothing
        # of adaptation.
        defaults={"inner_steps": 5},
        ignores=("mode",),
        exact=False,
    )
)
