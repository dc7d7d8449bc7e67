"""From a cost for one task to its mean and gradient over a batch of tasks.

Tasks are independent, so the gradient of the mean is the mean of the tasks' gradients. They are
computed one after the other, in a sequential scan or a Python loop, or all at once by the backend's
`mapped_value_and_grad`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

from metaframe import checks, tree
from metaframe.backend import Array, Arrays, Backend, backend_of, convert_neutral
from metaframe.distributed.agreement import agree
from metaframe.distributed.sharding import sharded
from metaframe.entrance import entrance
from metaframe.errors import InputError
from metaframe.inputs import arrays_of
from metaframe.workers import Share

Strategy = Literal["vmap", "scan", "loop"]
TaskMap = Literal["auto", Strategy]
TASK_MAPS: tuple[TaskMap, ...] = get_args(TaskMap)

TaskFn = Callable[[Arrays], tuple[Arrays, Arrays]]
"""The arrays of one task, or of several -> (arrays to add up, arrays to stack).

A task divided among workers comes with its weight, as the last array; see `weighed`.
"""


@dataclass(frozen=True)
class Execution:
    """How the tasks of a batch run; the attributes are arguments of `meta_value_and_grad`."""

    task_map: TaskMap = "vmap"
    chunk_size: int | None = None
    distributed: bool | Share = False

    def __post_init__(self) -> None:
        checks.choice(self.task_map, "task_map", TASK_MAPS)
        checks.chunk_size(self.chunk_size)
        if self.share is None:
            checks.choice(self.distributed, "distributed", (False, True))
        else:
            checks.integer(self.share.num_tasks, "Share(num_tasks)", at_least=1)

    @property
    def share(self) -> Share | None:
        """Of what a process's tasks are a part, if it was given no more than them."""
        return self.distributed if isinstance(self.distributed, Share) else None


class MetaResult(NamedTuple):
    """The outcome of a meta-gradient.

    >>> import torch
    >>> step = meta_value_and_grad(lambda v, task: (v * task, {"seen": task}), has_aux=True)
    >>> result = step(torch.tensor(3.0), torch.tensor([1.0, 2.0]))
    >>> result.cost, result.grads, result.aux
    (tensor(4.5000), tensor(1.5000), {'seen': tensor([1., 2.])})
    """

    cost: Array
    """Mean over tasks, a scalar."""
    grads: tree.Tree
    """Gradient of the mean, in the structure of the variables (or of the chosen part)."""
    aux: tree.Tree
    """What the task cost returned besides, with a leading task axis; `()` without `has_aux`."""


def meta_value_and_grad(
    task_cost: Callable[..., Any],
    *,
    task_map: TaskMap = "auto",
    chunk_size: int | None = None,
    has_aux: bool = False,
    outer_v: Any = None,
    keep_outer_v: bool = True,
    check_finite: bool = False,
    distributed: bool | Share = False,
) -> Callable[..., MetaResult]:
    """Turn the cost of one task into the mean cost of many, with its gradient.

    Args:
        task_cost: `task_cost(v, task) -> scalar`, or `(scalar, aux)` with `has_aux`; usually an
            `inner_loop` followed by a cost on the query set. It sees a task without a task axis.
        task_map: "vmap" for all tasks at once; "scan" one after the other in compiled form, in the
            memory of one task; "loop" the same in Python; "auto" see `strategy`. On torch,
            variables that require grad keep the record of every task for whoever differentiates
            the result: detach them, or work under `torch.no_grad()`, for the memory of one.
        chunk_size: with "vmap", how many tasks at once; bounds the memory. Default: all.
        has_aux: `task_cost` returns something besides, a structure of arrays.
        outer_v: which variables to differentiate, as for `maml_step`; all by default.
        keep_outer_v: False inverts `outer_v`.
        check_finite: raise when a cost or gradient is not finite, naming the task. Looks at the
            values, so it waits for an accelerator; not available inside `compile`.
        distributed: divide the tasks among the workers of the active torch process group, JAX mesh
            or tf.distribute strategy. Every process passes the same batch and gets the same result,
            bit for bit; see `metaframe.distributed`. Without an active engine it changes nothing.
            `Share(num_tasks)` instead of True: every process passes its own tasks alone.

    Returns:
        A function `(v, tasks, num_tasks=None) -> MetaResult`; every leaf of `tasks` has a leading
        task axis, of which the first `num_tasks` are used.

    Raises:
        InputError, InputTypeError, UnknownKeyError: bad arguments, before any work.
        NonFiniteError: with `check_finite`, a cost or gradient that is NaN or infinite.
        DistributedError: the processes do not agree on the variables, the batch or the settings.
        BackendError: WORLD_SIZE says that there are other processes, which were not joined.

    >>> import torch
    >>> def task_cost(v, task):
    ...     return (v["w"] - task["target"]) ** 2
    >>> step = meta_value_and_grad(task_cost)
    >>> cost, grads, _ = step({"w": torch.tensor(1.0)}, {"target": torch.tensor([2.0, 4.0])})
    >>> cost, grads
    (tensor(5.), {'w': tensor(-4.)})
    """
    checks.function(task_cost, "task_cost")
    how = Execution(task_map, chunk_size, distributed)

    @entrance
    def call(v: tree.Tree, tasks: tree.Tree, num_tasks: int | None = None) -> MetaResult:
        count = checks.tasks(tasks, num_tasks)
        v, tasks, backend = arrays_of(v, tasks)
        batch, batch_spec = tree.flatten(tasks)
        flags = tree.chosen(v, outer_v, keep_outer_v)
        checks.variables(v, flags, backend, "outer_v")
        leaves, spec = tree.flatten(v)
        wanted = tuple(x for x, flag in zip(leaves, flags, strict=True) if flag)
        held = tuple(x for x, flag in zip(leaves, flags, strict=True) if not flag)
        cost_of = _Checked(task_cost, has_aux, backend)
        settled = replace(how, task_map=strategy(how.task_map, leaves))

        def objective(xs: Arrays, held: Arrays, task: Arrays) -> tuple[Array, Arrays]:
            fresh, others = iter(xs), iter(held)
            full = [next(fresh if flag else others) for flag in flags]
            task, weight = task[: len(batch)], task[len(batch) :]
            cost, aux = cost_of(tree.unflatten(spec, full), tree.unflatten(batch_spec, task))
            return weighed(backend, cost, weight), aux

        def of_task(task: Arrays) -> tuple[Arrays, Arrays]:
            cost, aux, grads = backend.value_and_grad(lambda xs: objective(xs, held, task))(wanted)
            return grads, (cost, *aux)

        def of_chunk(tasks: Arrays) -> tuple[Arrays, Arrays]:
            costs, aux, grads = backend.mapped_value_and_grad(objective)(wanted, held, tasks)
            return grads, (costs, *aux)

        if distributed:
            agree(
                backend,
                task_cost=task_cost,
                how=how,
                v=v,
                chosen=flags,
                tasks=tasks,
                num_tasks=count,
            )
            check_share(backend, how, count)
        grads, (costs, *aux) = accumulate(
            backend, of_task, of_chunk, first_tasks(batch, count), wanted, settled
        )
        if check_finite:
            checks.finite(costs, backend)
        gradient = tree.unflatten(tree.structure(tree.prune(v, flags)), grads)
        if check_finite:
            checks.finite_leaves(gradient, backend)
        cost = tree.wrapped_as(spec, backend.ops.mean(costs))
        return MetaResult(cost, gradient, cost_of.unflatten_aux(aux))

    return call


def map_tasks(
    fn: Callable[..., Any], *, task_map: Strategy = "vmap", chunk_size: int | None = None
) -> Callable[..., Any]:
    """Turn a function of one task into one of many, such as an evaluation.

    Args:
        fn: a function of structures of arrays, without a task axis, that returns one.
        task_map, chunk_size: as for `meta_value_and_grad`, without "auto".

    Returns:
        `fn` for arguments with a leading task axis on every leaf; the results are stacked alike.

    >>> import torch
    >>> means = map_tasks(lambda task: {"mean": task["x"].mean()})
    >>> means({"x": torch.tensor([[1.0, 3.0], [5.0, 7.0]])})
    {'mean': tensor([2., 6.])}
    """
    checks.function(fn, "fn")
    checks.choice(task_map, "task_map", get_args(Strategy))
    how = Execution(task_map, chunk_size)

    @entrance
    def call(*tasks: tree.Tree) -> tree.Tree:
        checks.tasks(tasks, None)
        leaves, spec = tree.flatten(tasks)
        backend = backend_of(*leaves)
        results: list[tree.TreeSpec] = []

        def of_task(task: Arrays) -> tuple[Arrays, Arrays]:
            rows, row_spec = tree.flatten(fn(*tree.unflatten(spec, task)))
            results.append(row_spec)
            return (), rows

        def of_chunk(tasks: Arrays) -> tuple[Arrays, Arrays]:
            return (), backend.vmap(lambda task: of_task(task)[1])(tasks)

        _, stacked = accumulate(
            backend, of_task, of_chunk, convert_neutral(leaves, backend), (), how
        )
        return tree.unflatten(results[-1], stacked)

    return call


class _Checked:
    """`task_cost` on flat arrays: checks the cost, remembers the structure of aux."""

    def __init__(self, task_cost: Callable[..., Any], has_aux: bool, backend: Backend) -> None:
        self._task_cost = task_cost
        self._has_aux = has_aux
        self._backend = backend
        self._aux_leaves: Arrays = ()
        self._aux_spec = tree.structure(())

    def _split(self, v: tree.Tree, task: tree.Tree) -> Array:
        if not self._has_aux:
            return self._task_cost(v, task)
        cost, aux = self._task_cost(v, task)
        self._aux_leaves, self._aux_spec = tree.flatten(aux)
        return cost

    def __call__(self, v: tree.Tree, task: tree.Tree) -> tuple[Array, Arrays]:
        cost = checks.scalar(self._split(v, task), "task_cost", self._backend)
        return cost, self._aux_leaves

    def unflatten_aux(self, leaves: list[Array]) -> tree.Tree:
        return tree.unflatten(self._aux_spec, leaves)


def strategy(task_map: TaskMap, variables: Arrays) -> Strategy:
    """What "auto" means: "scan" for convolutions on a CPU, "vmap" for everything else.

    Weights that differ from task to task turn a vectorised convolution into a grouped one, which
    CPUs are slow at. A variable of four axes or more is taken for the kernel of a convolution.
    """
    if task_map != "auto":
        return task_map
    convolutional = any(len(x.shape) >= 4 for x in variables)
    return "scan" if convolutional and backend_of(*variables).on_cpu(variables[0]) else "vmap"


def first_tasks(batch: Arrays, count: int) -> Arrays:
    """The first `count` rows of every array; the arrays themselves when that is all of them."""
    return tuple(x if x.shape[0] == count else x[:count] for x in batch)


def accumulate(
    backend: Backend,
    of_task: TaskFn,
    of_chunk: TaskFn,
    tasks: Arrays,
    like: Arrays,
    how: Execution,
) -> tuple[Arrays, Arrays]:
    """Every task's contribution: (means over tasks, stacked over tasks).

    Args:
        of_task: one task's arrays -> (arrays to average, arrays to stack).
        of_chunk: the same for several tasks at once -> (sums over them, stacked).
        tasks: every task's arrays, with a leading task axis.
        like: the shapes and dtypes of what is averaged.
        how: how they run, without "auto".
    """

    def summed(tasks: Arrays) -> tuple[Arrays, Arrays]:
        count = tasks[0].shape[0]
        if how.task_map == "vmap":
            return _in_chunks(backend, of_chunk, tasks, like, min(how.chunk_size or count, count))
        if how.task_map == "scan":
            return backend.scan(_adding(of_task), _zeros(backend, like), tasks)
        return _in_python(backend, of_task, tasks)

    if how.distributed and (workers := backend.workers()).count > 1:
        return sharded(workers, backend, summed, tasks, how.share)
    count = tasks[0].shape[0]
    sums, stacked = summed(tasks)
    return tuple(x / count for x in sums) if count > 1 else sums, stacked


def check_share(backend: Backend, how: Execution, count: int) -> None:
    """A batch that is a process's share has as many tasks as that."""
    if how.share is None:
        return
    expected = len(backend.workers().share(how.share.num_tasks))
    if count != expected:
        raise InputError(
            f"this process's share of {how.share.num_tasks} tasks is {expected}, the batch has "
            f"{count}. Pass those that workers.share({how.share.num_tasks}) names."
        )


def weighed(backend: Backend, x: Array, weight: Arrays) -> Array:
    """`x` of a task, times the task's weight if it has one; 1 changes no bit."""
    return x * backend.ops.astype(weight[0], backend.dtype_name(x)) if weight else x


def _in_python(backend: Backend, fn: TaskFn, tasks: Arrays) -> tuple[Arrays, Arrays]:
    sums: Arrays = ()
    rows: list[Arrays] = []
    for i in range(tasks[0].shape[0]):
        terms, row = fn(tuple(x[i] for x in tasks))
        sums = _added(sums, terms) if rows else terms
        rows.append(row)
    return sums, tuple(backend.ops.stack(column) for column in zip(*rows, strict=True))


def _in_chunks(
    backend: Backend, chunk: TaskFn, tasks: Arrays, like: Arrays, size: int
) -> tuple[Arrays, Arrays]:
    """Vectorised within chunks of `size` tasks, sequential over chunks."""
    count = tasks[0].shape[0]
    whole = count // size
    if whole == 1:
        sums, stacked = chunk(tuple(x[:size] for x in tasks) if count > size else tasks)
    else:
        folded = tuple(
            backend.ops.reshape(x[: whole * size], (whole, size, *x.shape[1:])) for x in tasks
        )
        sums, rows = backend.scan(_adding(chunk), _zeros(backend, like), folded)
        stacked = tuple(backend.ops.reshape(x, (whole * size, *x.shape[2:])) for x in rows)
    if whole * size == count:
        return sums, stacked
    rest, tail = chunk(tuple(x[whole * size :] for x in tasks))
    joined = tuple(backend.ops.concat(pair) for pair in zip(stacked, tail, strict=True))
    return _added(sums, rest), joined


def _adding(fn: TaskFn) -> Callable[[Arrays, Arrays], tuple[Arrays, Arrays]]:
    def body(sums: Arrays, task: Arrays) -> tuple[Arrays, Arrays]:
        terms, rows = fn(task)
        return _added(sums, terms), rows

    return body


def _added(xs: Arrays, ys: Arrays) -> Arrays:
    return tuple(x + y for x, y in zip(xs, ys, strict=True))


def _zeros(backend: Backend, like: Arrays) -> Arrays:
    return tuple(backend.ops.zeros_like(x) for x in like)
