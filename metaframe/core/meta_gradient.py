"""From a cost for one task to its mean and gradient over a batch of tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, get_args

from metaframe import arguments, tree
from metaframe.backend.contract import Backend
from metaframe.backend.selection import backend_of, following
from metaframe.backend.types import Array, Arrays
from metaframe.backend.workers import Share
from metaframe.core import checks
from metaframe.core.entrance import entrance
from metaframe.core.task_map import (
    Execution,
    Found,
    Strategy,
    TaskMap,
    averaged,
    gradient_of,
    weighed,
)
from metaframe.distributed.agreement import agree
from metaframe.errors import InputError


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
    """The task cost's further results, with a leading task axis; `()` without `has_aux`."""


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
        chunk_size: with "vmap", how many tasks at once; bounds the memory. Default: all, and on a
            CPU no more than pays.
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
    arguments.function(task_cost, "task_cost")
    how = Execution(task_map, chunk_size, distributed)

    @entrance
    def call(v: tree.Tree, tasks: tree.Tree, num_tasks: int | None = None) -> MetaResult:
        variables, batch, count, backend = taken_apart(v, tasks, num_tasks)
        part = tree.Part(
            variables.spec, tree.flags(variables.spec, outer_v, keep_outer_v, name="outer_v")
        )
        checks.variables(variables.arrays, part, backend, "outer_v")
        wanted, held = part.divide(variables.arrays)
        aux_of = tree.Returned()

        def objective(xs: Arrays, held: Arrays, task: Arrays) -> tuple[Array, Arrays]:
            weight = task[len(batch.arrays) :]
            found = backend.user_function(task_cost)(
                variables.build(part.merge(xs, held)), batch.build(task[: len(batch.arrays)])
            )
            cost, aux = found if has_aux else (found, ())
            cost = checks.scalar(cost, "task_cost", backend)
            return weighed(backend, cost, weight), aux_of.flatten(aux) if has_aux else ()

        if distributed:
            agree(
                backend,
                task_cost=task_cost,
                how=how,
                v=v,
                chosen=part.flags,
                tasks=tasks,
                num_tasks=count,
            )
            _check_share(backend, how, count)
        settled = how.settled(variables.arrays)
        run = gradient_of(backend, [objective], wanted, held, settled)
        tasks_ = first_tasks(batch.arrays, count)
        costs, aux, grads = averaged(backend, run, tasks_, wanted, settled)
        gradient = tree.Flat(grads, part.structure(variables.arrays))
        if check_finite:
            checks.finite(costs, backend)
            checks.finite_leaves(gradient, backend)
        cost = tree.wrapped_as(variables.spec, backend.ops.mean(costs))
        return MetaResult(cost, gradient.build(grads), aux_of.build(aux))

    return call


def map_tasks(
    fn: Callable[..., Any], *, task_map: Strategy = "vmap", chunk_size: int | None = None
) -> Callable[..., Any]:
    """Turn a function of one task into one of many, such as an evaluation.

    Args:
        fn: a function of structures of arrays, without a task axis, that returns one.
        task_map: as for `meta_value_and_grad`, without "auto".
        chunk_size: as for `meta_value_and_grad`.

    Returns:
        `fn` for arguments with a leading task axis on every leaf; the results are stacked alike.

    >>> import torch
    >>> means = map_tasks(lambda task: {"mean": task["x"].mean()})
    >>> means({"x": torch.tensor([[1.0, 3.0], [5.0, 7.0]])})
    {'mean': tensor([2., 6.])}
    """
    arguments.function(fn, "fn")
    arguments.choice(task_map, "task_map", get_args(Strategy))
    how = Execution(task_map, chunk_size)

    @entrance
    def call(*tasks: tree.Tree) -> tree.Tree:
        _, batch, _, backend = taken_apart((), tasks, None)
        rows_of = tree.Returned()

        def rows(task: Arrays) -> Arrays:
            return rows_of.flatten(backend.user_function(fn)(*batch.build(task)))

        of = backend.vmap(rows) if task_map == "vmap" else rows

        def run(xs: Arrays) -> Found:
            first, *rest = of(xs) or _no_results()
            return first, tuple(rest), ()

        first, rest, _ = averaged(backend, run, batch.arrays, (), how)
        return rows_of.build((first, *rest))

    return call


def _no_results() -> Arrays:
    raise InputError("fn returned no arrays. Return a structure with at least one.")


def taken_apart(
    v: tree.Tree, tasks: tree.Tree, num_tasks: int | None
) -> tuple[tree.Flat, tree.Flat, int, Backend]:
    """The variables and the tasks, how many tasks to use, and the backend of all arrays."""
    variables, batch = tree.Flat.of(v, "variables"), tree.Flat.of(tasks, "batch")
    count = checks.tasks(batch, num_tasks)
    with following(tree.node_types(variables.spec, batch.spec)):
        backend = backend_of(*variables.arrays, *batch.arrays)
        variables = checks.converted(variables, backend, "variables")
        batch = checks.converted(batch, backend, "batch")
    return variables, batch, count, backend


def first_tasks(batch: Arrays, count: int) -> Arrays:
    """The first `count` rows of every array; the arrays themselves when that is all of them."""
    return tuple(x if x.shape[0] == count else x[:count] for x in batch)


def _check_share(backend: Backend, how: Execution, count: int) -> None:
    """A batch that is a process's share has as many tasks as that."""
    if how.share is None:
        return
    expected = len(backend.workers().share(how.share.num_tasks))
    if count != expected:
        raise InputError(
            f"this process's share of {how.share.num_tasks} tasks is {expected}, the batch has "
            f"{count}. Pass those that workers.share({how.share.num_tasks}) names."
        )
