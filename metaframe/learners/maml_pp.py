"""MAML++: switches that make MAML train stably (Antoniou et al. 2018, arXiv 1810.09502)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np

from metaframe import arguments, ops, tree
from metaframe.backend.types import Array, Arrays
from metaframe.core.inner_loop import StepView
from metaframe.core.optim import Grads, Optimizer, Params, Rate, State, gradient_descent_update
from metaframe.core.task_program import Outcome, TaskRun, adapted_cost
from metaframe.learners.functions import LearningRate
from metaframe.learners.maml import MAML
from metaframe.learners.meta_learner import Phase
from metaframe.learners.method import Method
from metaframe.learners.norms import Norm
from metaframe.learners.registry import Algorithm, register_algorithm
from metaframe.models.lookup import adapter_of
from metaframe.models.per_step import StepAffine, row

LEAST_WEIGHT = 0.03
"""Times 1/K, what a step before the last keeps while its weight falls (the authors' code)."""


class MAMLPlusPlus(MAML):
    """MAML with a learned rate for each parameter and step, a multi-step loss and annealed order.

        theta_k = theta_{k-1} - alpha_k * grad L_support(theta_{k-1}),   k = 1 .. K
        minimise  sum_k w_k L_query(theta_k)

    Each change is a switch. With all of them off it is `MAML`.

    - `learn_rates`: alpha_k is learned, one number a parameter tensor and step ("LSLR" in the
      paper), as meta-parameter "learned/<name>" of shape (K,). Steps beyond K use the last.
    - `learn_norms`: scale and shift of every batch normalisation are learned for each point
      theta_0 .. theta_K ("BNWB"), and do not adapt: meta-parameters of shape (K + 1, channels)
      under the names of the model's own, which stay as they are.
    - `multi_step_epochs` = E: the weights start equal and move to the last step, see
      `multi_step_weights`; from epoch E on the loss is that of the last step alone.
    - `second_order_from` = n: before epoch n gradients are first order.

    The last two depend on `epoch`, which starts at 0 and which the training loop sets:
    `MetaTrainer` does, by its `steps_per_epoch`. The multi-step loss is what `meta_value_and_grad`
    returns. A learner ends with the parameters after its last step, so `backward()` through it
    gives the gradient of the query loss there alone, in every epoch.
    Running statistics for each step ("BNRS") are `norm="per-step"`. The cosine schedule is the
    outer optimizer's.

    Args:
        module: see `MAML`.
        inner_lr: where every rate starts, see `MAML`; an array has one number a step.
        inner_steps: K; the paper takes 5.
        first_order: see `MAML`; for all epochs.
        adapt_names: see `MAML`.
        allow_unused: see `MAML`.
        norm: see `MAML`.
        learn_rates: see above.
        learn_norms: see above. For torch and Flax modules and models of `metaframe.nn`.
        multi_step_epochs: see above; the authors take 10 for Omniglot and 15 for miniImageNet. 0
            switches it off.
        second_order_from: see above; the paper takes 50. 0 switches it off.

    >>> import torch
    >>> maml = MAMLPlusPlus(torch.nn.Linear(1, 1), inner_steps=3, multi_step_epochs=10)
    >>> maml.meta_parameters()["learned/weight"].shape
    torch.Size([3])
    >>> maml.epoch = 10
    """

    def __init__(
        self,
        module: Any,
        inner_lr: LearningRate = 0.01,
        inner_steps: int = 5,
        first_order: bool = False,
        adapt_names: Iterable[str] | None = None,
        allow_unused: bool = True,
        *,
        norm: Norm = "batch",
        learn_rates: bool = True,
        learn_norms: bool = False,
        multi_step_epochs: int = 0,
        second_order_from: int = 0,
    ) -> None:
        arguments.integer(multi_step_epochs, "multi_step_epochs", at_least=0)
        arguments.integer(second_order_from, "second_order_from", at_least=0)
        adapter = adapter_of(module)
        if learn_norms:
            adapter = StepAffine(adapter, inner_steps)
        super().__init__(
            adapter,
            inner_lr,
            inner_steps,
            first_order,
            adapt_names,
            allow_unused,
            norm=norm,
            update=rate_for_each_step() if learn_rates else gradient_descent_update,
        )
        if isinstance(adapter, StepAffine):
            self.norms = adapter.tables.model
        self._first_order = first_order
        self._multi_step_epochs = multi_step_epochs
        self._second_order_from = second_order_from
        if learn_rates:
            params, steps = self._adapter.params(), (inner_steps,)
            like = {n: ops.zeros(steps, like=params[n]) for n in self.config.names}
            self.rates = self._learn(self.config.starting_rates(like))
        # One object, since another method is another program.
        self._multi_step = Method(partial(multi_step_loss, inner_steps=inner_steps))
        self._follow(self._phase)

    def _phase(self, epoch: int) -> Phase:
        first_order = self._first_order or epoch < self._second_order_from
        config = self.config
        if first_order != config.first_order:  # another config is another program
            config = dataclasses.replace(config, first_order=first_order)
        if epoch >= self._multi_step_epochs:
            return Phase(config, Method(), {})
        weights = multi_step_weights(config.inner_steps, epoch, self._multi_step_epochs)
        # The loss before the first step has no weight.
        weights = np.concatenate([[0.0], weights])
        return Phase(config, self._multi_step, {"weights": weights})


def multi_step_weights(steps: int, epoch: int, epochs: int) -> np.ndarray[Any, Any]:
    """The weight of the query loss after each of K steps, in an epoch e of E.

        w_k = max((1 - e / E) / K, 0.03 / K),   k < K
        w_K = min((1 + (K - 1) e / E) / K, 1 - (K - 1) 0.03 / K)

    The paper says that the weights start equal and move to the last step; the numbers are those of
    the authors' code. They sum to one, and from epoch E on only the last is not zero.

    Args:
        steps: K.
        epoch: e, 0 or more.
        epochs: E, 0 for no annealing.

    >>> multi_step_weights(4, 0, 10).tolist(), multi_step_weights(4, 10, 10).tolist()
    ([0.25, 0.25, 0.25, 0.25], [0.0, 0.0, 0.0, 1.0])
    """
    if epoch >= epochs:
        return np.array([0.0] * (steps - 1) + [1.0])
    done, least = epoch / epochs, LEAST_WEIGHT / steps
    weights = np.full(steps, max((1 - done) / steps, least))
    weights[-1] = min((1 + (steps - 1) * done) / steps, 1 - (steps - 1) * least)
    return weights


def multi_step_loss(run: TaskRun, *, inner_steps: int) -> Outcome:
    """The weighted sum of the query losses after each step.

    With another number of steps than was configured, as in an evaluation, it is the last alone.
    """
    if run.steps != inner_steps:
        return adapted_cost(run)
    weights = run.schedule["weights"]

    def observe(at: Arrays, view: StepView | None, index: Array) -> Arrays:
        del view
        return (row(weights, index) * run.outer(at, index)[0],)

    found = run.adapted(observe)
    (total,) = found.total
    loss, report = run.outer(found.params, None)
    return Outcome(total + weights[-1] * loss, found.params, report)


def rate_for_each_step() -> Optimizer:
    """Gradient descent with K learning rates a parameter, one a step; steps beyond take the last.

    They come as the learning rate, an array (K,) in the place of each parameter.
    """
    return Optimizer(_step_count, _rated_step)


def _step_count(params: Params) -> State:
    return ops.sum(ops.zeros_like(tree.leaves(params)[0]))


def _rated_step(
    grads: Grads, state: State, params: Params = None, lr: Rate = None
) -> tuple[Params, State]:
    del params

    def step(g: Array, rates: Array) -> Array:
        return -row(rates, state) * g

    return tree.map(step, grads, lr), state + 1


register_algorithm(
    Algorithm(
        "maml++",
        "learned rates for every step, multi-step loss, annealed order (arXiv 1810.09502)",
        lambda model, c: MAMLPlusPlus(
            model,
            c.inner_lr,
            c.inner_steps,
            norm=c.norm,
            learn_norms=c.learn_norms,
            multi_step_epochs=c.multi_step_epochs,
            second_order_from=c.second_order_from,
        ),
        ("multi_step_epochs", "learn_norms", "second_order_from", "steps_per_epoch"),
        {"inner_steps": 5, "multi_step_epochs": 10},
    )
)
