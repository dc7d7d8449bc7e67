"""Meta-learning of lines y = a x + b, and of which of two lines a point is on."""

from __future__ import annotations

from typing import Any

import numpy as np

import metaframe
from metaframe import ops
from metaframe.tasks import IndexedSampler, Task

LR = 0.1


class Lines(IndexedSampler):
    """A line a task: six points to adapt on, six to be judged by."""

    def draw(self, rng: np.random.Generator) -> Task:
        """One task."""
        slope, offset, x = rng.random(), rng.random(), rng.random(12)
        y = slope * x + offset
        return Task(x[:6], y[:6], x[6:], y[6:])


def support(task: Any) -> Any:
    """The support set."""
    return task["support"]


def query(task: Any) -> Any:
    """The query set."""
    return task["query"]


def cost(points: Any, v: Any) -> Any:
    """The mean squared error of the line v, squashed so that it is curved everywhere."""
    x, y = points
    return ops.mean(ops.square(ops.tanh(v["slope"] * x + v["offset"]) - y))


def task_cost(v: Any, task: Any) -> Any:
    """The query cost after two steps on the support set."""
    adapted = metaframe.inner_loop(cost, v, support(task), steps=2, lr=LR)
    return cost(query(task), adapted)


def new_meta_step() -> Any:
    """`(variables, batch) -> (cost, gradients, aux)`, compiled."""
    return metaframe.compile(metaframe.meta_value_and_grad(task_cost))
