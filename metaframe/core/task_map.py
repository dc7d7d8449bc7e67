"""Tasks side by side or one after the other: the one place where the policy of speed lives.

Tasks are independent, so the gradient of their mean is the mean of their gradients. They are
computed all at once by the backend's `mapped_value_and_grad`, or one after the other in a compiled
scan or a Python loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from typing import Literal, get_args

from metaframe import arguments
from metaframe.backend.contract import Backend
from metaframe.backend.selection import backend_of
from metaframe.backend.types import Array, Arrays, TaskCost
from metaframe.backend.workers import Share
from metaframe.distributed.sharding import sharded

Strategy = Literal["vmap", "scan", "loop"]
TaskMap = Literal["auto", Strategy]
TASK_MAPS: tuple[TaskMap, ...] = get_args(TaskMap)

Found = tuple[Array, Arrays, Arrays]
"""A value and further arrays, stacked over tasks, and arrays summed over tasks."""
TaskFn = Callable[[Arrays], Found]
"""The arrays of one task, or of several with a leading axis -> what was found.

A task divided among workers comes with its weight, as the last array; see `weighed`.
"""


@dataclass(frozen=True)
class Execution:
    """The way the tasks of a batch run; the attributes are arguments of `meta_value_and_grad`."""

    task_map: TaskMap = "vmap"
    chunk_size: int | None = None
    distributed: bool | Share = False

    def __post_init__(self) -> None:
        arguments.choice(self.task_map, "task_map", TASK_MAPS)
        arguments.chunk_size(self.chunk_size)
        if self.share is None:
            arguments.choice(self.distributed, "distributed", (False, True))
        else:
            arguments.integer(self.share.num_tasks, "Share(num_tasks)", at_least=1)

    @property
    def share(self) -> Share | None:
        """The share that this process was given, where it was given no more than its own tasks."""
        return self.distributed if isinstance(self.distributed, Share) else None

    def settled(self, variables: Arrays) -> Execution:
        """The same with what "auto" means for these variables."""
        return replace(self, task_map=strategy(self.task_map, variables))


def strategy(task_map: TaskMap, variables: Arrays) -> Strategy:
    """The meaning of "auto": "scan" for convolutions on a CPU, "vmap" for everything else.

    Weights that differ from task to task turn a vectorised convolution into a grouped one, which
    CPUs are slow at. A variable of four axes or more is taken for the kernel of a convolution.
    """
    if task_map != "auto":
        return task_map
    convolutional = any(len(x.shape) >= 4 for x in variables)
    return "scan" if convolutional and backend_of(*variables).on_cpu(variables[0]) else "vmap"


def gradient_of(
    backend: Backend,
    objectives: Sequence[TaskCost],
    wanted: Arrays,
    held: Arrays,
    how: Execution,
) -> TaskFn:
    """`tasks -> (costs, aux, gradients in wanted)`, of what `averaged` hands it.

    Args:
        objectives: the cost of a task; where tasks run one by one in Python, also one for each.
        wanted: the variables to differentiate.
        held: the others.
        how: how the tasks run, without "auto".
    """
    if how.task_map == "vmap":
        (objective,) = objectives
        return partial(backend.mapped_value_and_grad(objective), wanted, held)
    each = cycle(objectives)

    def run(task: Arrays) -> Found:
        return backend.value_and_grad(partial(next(each), held=held, task=task))(wanted)

    return run


def averaged(backend: Backend, run: TaskFn, tasks: Arrays, like: Arrays, how: Execution) -> Found:
    """The outcome of `run` over all tasks, with means in the place of sums.

    Args:
        run: for several tasks at once with "vmap", for one otherwise.
        tasks: every task's arrays, with a leading task axis.
        like: the shapes and dtypes of what is averaged.
    """
    summed = _SUMS[how.task_map]
    if how.task_map == "vmap" and how.chunk_size is None:
        how = replace(how, chunk_size=_fitting(backend, tasks, like))
    if how.distributed and (workers := backend.workers()).count > 1:

        def sum_over(tasks: Arrays) -> tuple[Arrays, Arrays]:
            value, aux, sums = summed(backend, run, tasks, like, how.chunk_size)
            return sums, (value, *aux)

        means, rows = sharded(workers, backend, sum_over, tasks, how.share)
        return rows[0], rows[1:], means
    count = tasks[0].shape[0]
    if how.task_map == "vmap" and (how.chunk_size or count) >= count:
        value, aux, sums = run(tasks)
    else:
        value, aux, sums = summed(backend, run, tasks, like, how.chunk_size)
    return value, aux, tuple(x / count for x in sums) if count > 1 else sums


def weighed(backend: Backend, x: Array, weight: Arrays) -> Array:
    """`x` of a task, times the task's weight if it has one; 1 changes no bit."""
    return x * backend.ops.astype(weight[0], backend.dtype_name(x)) if weight else x


def _in_python(
    backend: Backend, run: TaskFn, tasks: Arrays, like: Arrays, chunk_size: int | None
) -> Found:
    del like, chunk_size
    total: Arrays = ()
    rows: list[Arrays] = []
    for i in range(tasks[0].shape[0]):
        value, aux, terms = run(tuple(x[i] for x in tasks))
        total = _added(total, terms) if rows else terms
        rows.append((value, *aux))
    stacked = tuple(backend.ops.stack(column) for column in zip(*rows, strict=True))
    return stacked[0], stacked[1:], total


def _in_a_scan(
    backend: Backend, run: TaskFn, tasks: Arrays, like: Arrays, chunk_size: int | None
) -> Found:
    del chunk_size

    def body(sums: Arrays, task: Arrays) -> tuple[Arrays, Arrays]:
        value, aux, terms = run(task)
        return _added(sums, terms), (value, *aux)

    sums, rows = backend.scan(body, tuple(map(backend.ops.zeros_like, like)), tasks)
    return rows[0], rows[1:], sums


FEWEST_AT_ONCE = 128
"""Tasks that are enough to vectorise over, whatever the size of the model."""
UNROLLED_AT_MOST = 4
"""Chunks of a framework whose compiled programs have no loops: each is compiled again."""


def _fitting(backend: Backend, tasks: Arrays, like: Arrays) -> int | None:
    """The number of tasks to take at once where all would outgrow the caches of a CPU."""
    if backend.chunk_elements is None or not backend.on_cpu(tasks[0]):
        return None
    count: int = tasks[0].shape[0]
    each = sum(math.prod(x.shape) for x in like) + sum(math.prod(x.shape[1:]) for x in tasks)
    fitting: int = backend.chunk_elements // max(each, 1)
    if count <= max(FEWEST_AT_ONCE, fitting):
        return None
    chunks = -(-count // max(FEWEST_AT_ONCE, fitting // 2))
    if not backend.loops_in_programs:
        chunks = min(chunks, UNROLLED_AT_MOST)
    return -(-count // chunks)


def _in_chunks(
    backend: Backend, run: TaskFn, tasks: Arrays, like: Arrays, chunk_size: int | None
) -> Found:
    """Vectorised within chunks of tasks, sequential over chunks."""
    count = tasks[0].shape[0]
    size = min(chunk_size or count, count)
    whole = count // size
    if whole == 1:
        value, aux, sums = run(tuple(x[:size] for x in tasks))
    else:
        folded = tuple(
            backend.ops.reshape(x[: whole * size], (whole, size, *x.shape[1:])) for x in tasks
        )
        value, aux, sums = _in_a_scan(backend, run, folded, like, None)
        rows = tuple(backend.ops.reshape(x, (whole * size, *x.shape[2:])) for x in (value, *aux))
        value, aux = rows[0], rows[1:]
    if whole * size == count:
        return value, aux, sums
    last, tail, rest = run(tuple(x[whole * size :] for x in tasks))
    joined = tuple(map(backend.ops.concat, zip((value, *aux), (last, *tail), strict=True)))
    return joined[0], joined[1:], _added(sums, rest)


_SUMS = {"vmap": _in_chunks, "scan": _in_a_scan, "loop": _in_python}


def _added(xs: Arrays, ys: Arrays) -> Arrays:
    return tuple(x + y for x, y in zip(xs, ys, strict=True))
