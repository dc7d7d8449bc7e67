"""The sinusoid of the MAML paper reaches its loss, on every backend, in the time promised."""

from __future__ import annotations

import logging
import time
from typing import Any

import pytest

import metaframe
from metaframe import MAML, nn, optim
from metaframe.backend import use_backend
from metaframe.tasks import SinusoidTaskSampler, stack_tasks

ITERATIONS, TASKS, HELD_OUT = 3000, 25, 2000
LR = 0.01

logger = logging.getLogger(__name__)

pytestmark = pytest.mark.slow


def network(backend_name: str) -> Any:
    # Selected for the model alone: the tasks stay in NumPy and become arrays stacked, which is
    # four conversions an iteration and not a hundred.
    model = nn.mlp([1, 40, 40, 1])
    with use_backend(backend_name):
        return model, model.init(0)


def trained(maml: MAML, steps: int) -> MAML:
    """Meta-trained with Adam; with no inner steps, trained on all tasks as one."""
    outer = optim.adam(1e-3)

    @metaframe.compile
    def descend(params: Any, grads: Any, state: Any) -> Any:
        updates, state = outer.update(grads, state, params)
        return metaframe.apply_updates(params, updates), state

    sampler = SinusoidTaskSampler(k_support=10, k_query=10, seed=0)
    params = maml.meta_parameters()
    state = outer.init(params)
    for _ in range(ITERATIONS):
        tasks = stack_tasks(sampler.sample(TASKS))
        _, grads, _ = maml.meta_value_and_grad(nn.mse, tasks, steps=steps, compiled=True)
        params, state = descend(params, grads, state)
        maml.assign(params)
    return maml


def held_out(maml: MAML, steps: int) -> float:
    """Mean squared error on tasks never trained on, after `steps` inner steps."""
    sampler = SinusoidTaskSampler(k_support=10, k_query=10, seed=1, split="test")
    result = maml.meta_value_and_grad(
        nn.mse, stack_tasks(sampler.sample(HELD_OUT)), steps=steps, compiled=True
    )
    return float(metaframe.ops.to_numpy(result.cost))


def test_one_step_is_enough(backend_name: str) -> None:
    # Of the processor, which is the same on a machine that does other things as well.
    start = time.process_time()
    maml = trained(MAML(network(backend_name), LR), 1)
    seconds = time.process_time() - start
    before, after = held_out(maml, 0), held_out(maml, 1)
    pretrained = held_out(trained(MAML(network(backend_name), LR), 0), 1)
    figures = {"before": before, "after": after, "pretrained": pretrained, "seconds": seconds}
    logger.info("%s: %s", backend_name, figures)
    assert before > 2.5
    assert after <= 0.9
    assert pretrained >= 3 * after
    assert seconds < 60
