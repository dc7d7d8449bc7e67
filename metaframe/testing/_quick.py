"""One compiled gradient for a cost that takes long when it runs operation by operation.

A framework that compiles each operation by itself spends minutes on the second-order gradient of a
deep network, and seconds on the whole of it in one program. The forward pass still runs as it is:
what a cost keeps, changes or draws shows there, and the program has to give the same numbers.
"""

from __future__ import annotations

import copy
import time

import numpy as np

from metaframe import tree
from metaframe.core.compile import compile as compile_whole
from metaframe.core.meta_gradient import map_tasks, meta_value_and_grad
from metaframe.core.task_map import Strategy, strategy
from metaframe.testing.subject import Adaptation, Gradient, Step, Subject

SLOW = 3.0
"""Seconds of processor time for the forward pass of a task, from which a gradient is compiled."""
FEWEST = 2
"""The number of tasks of the compiled gradient; other ways of running are compared on as many."""
SAME = 1e-12
"""Relative: how far two ways of computing one cost in float64 may differ."""


def way(subject: Subject) -> Strategy:
    """The task map of a compiled gradient."""
    return strategy("auto", tree.leaves(subject.variables))


def forward(subject: Subject) -> Subject:
    """The inner and the outer cost of the variables as they are, without adaptation."""
    given = subject.adaptation

    def both(task: tree.Tree, v: tree.Tree) -> object:
        inner = given.inner_batch_fn(task) if given.inner_batch_fn else task
        outer = given.outer_batch_fn(task) if given.outer_batch_fn else task
        return subject.cost(inner, v) + (given.outer_cost or subject.cost)(outer, v)

    return subject.with_adaptation(Adaptation(steps=0, outer_cost=both))


def compiled(subject: Subject) -> Subject | None:
    """The subject with a compiled gradient as its step; None where it need or can not be."""
    if subject.step is not None or not subject.backend.compiles_quickly:
        return None
    plain, few = forward(subject).of_tasks(1), copy.copy(subject.of_tasks(FEWEST))
    start, begins = subject.numbers(subject.variables), time.process_time()
    try:
        cost = plain.cost_at(start)
        if time.process_time() - begins < SLOW or plain.cost_at(start) != cost:
            return None
        whole = compile_whole(lambda v, batch: map_tasks(lambda t: plain.task_cost(v, t))(batch))
        other = float(plain.backend.to_numpy(whole(plain.variables, plain.batch))[0])
        if not abs(other - cost) <= SAME * abs(cost):
            return None
        step: Step = meta_value_and_grad(subject.task_cost, task_map=way(subject))
        few.step = compile_whole(step)
        few.gradient()
    except Exception:  # noqa: BLE001  what cannot run like this runs as it is, and raises there
        return None
    return few


def of_all(few: Subject, whole: Subject) -> Gradient:
    """The gradient of all tasks by a step for a few of them; some come twice in the last few."""
    assert few.step is not None
    found = [
        few.of_step(few.step, whole.rows([j % whole.tasks for j in range(i, i + few.tasks)]))
        for i in range(0, whole.tasks, few.tasks)
    ]
    arrays = zip(*(g.arrays for g in found), strict=True)
    cost = float(np.mean([g.cost for g in found]))
    return Gradient(cost, tuple(sum(rows) / len(found) for rows in arrays))
