"""The three meta-steps, with the signatures of ivy's functional API.

Each is a few lines over the composable core: an inner loop (`inner_loop.py`), a cost at the
point or points that it visits (`task_program.py`), and the mean and gradient of that over tasks
(`task_map.py`). How tasks are laid out is the argument `batched`:

- `True`: one call of the cost function sees all tasks at once. The caller has tiled every variable
  along a leading task axis, and the cost function returns the mean over tasks.
- `False`: the tasks one after the other; the cost function sees a sub-batch with a leading axis of
  size 1, and variables without a task axis.
- `"vmap"`, `"scan"`, `"loop"`, `"auto"`: the cost function sees one task without a task axis, and
  the tasks run as `task_map` of `meta_value_and_grad` says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from metaframe import arguments, tree
from metaframe.backend.contract import Backend
from metaframe.backend.types import Array, Arrays, TaskCost
from metaframe.core import checks, rates
from metaframe.core.batching import RETURN_INNER, Batched, Layout, ReturnInner
from metaframe.core.entrance import entrance
from metaframe.core.inner_loop import (
    Cost,
    InnerLoop,
    InnerSettings,
    Mode,
    Rows,
    flat_cost,
    in_order,
)
from metaframe.core.optim import Rate, gradient_descent_update
from metaframe.core.per_step import (
    Stepwise,
    contains_marks,
    number_of_steps,
    step_axis_first,
    unmarked,
)
from metaframe.core.task_map import averaged, gradient_of, weighed
from metaframe.core.task_program import (
    Direction,
    Objective,
    TaskRun,
    adapted_cost,
    average_cost,
    reptile,
)
from metaframe.distributed.agreement import agree
from metaframe.errors import InputError

LR = "inner_learning_rate"
"""The name of the argument, for errors."""
BatchFn = Callable[[tree.Tree], tree.Tree]


@entrance
def maml_step(
    batch: tree.Tree,
    inner_cost_fn: Cost,
    outer_cost_fn: Cost | None,
    variables: tree.Tree,
    inner_grad_steps: int,
    inner_learning_rate: Rate,
    /,
    *,
    inner_optimization_step: Any = gradient_descent_update,
    inner_batch_fn: BatchFn | None = None,
    outer_batch_fn: BatchFn | None = None,
    average_across_steps: bool = False,
    batched: Batched = True,
    inner_v: Any = None,
    keep_inner_v: bool = True,
    outer_v: Any = None,
    keep_outer_v: bool = True,
    return_inner_v: ReturnInner = False,
    num_tasks: int | None = None,
    stop_gradients: bool = True,
    chunk_size: int | None = None,
    mode: Mode = "reverse",
    check_finite: bool = False,
    distributed: bool = False,
) -> tuple[Array, tree.Tree, Any]:
    """One step of MAML, with exact second-order gradients (Finn et al. 2017, arXiv 1703.03400).

        theta_i = inner loop from theta on task i
        cost = mean_i outer_cost(batch_i, theta_i)
        grads = d cost / d theta

    Args:
        batch: all tasks' data; every leaf has a leading task axis.
        inner_cost_fn: `cost(batch, v) -> scalar`, minimised by the inner loop; pure.
        outer_cost_fn: the cost at the adapted variables; `None` for the inner one.
        variables: structure of floating arrays; with `batched=True` each with a leading task axis.
        inner_grad_steps: inner steps K, 0 or more.
        inner_learning_rate: a number, an array, or a structure that names the variables that adapt
            or parts of them, with a rate for each; `None` if the update rule brings its own.
        inner_optimization_step: an `optim.Optimizer`, on JAX also an optax transformation, or a
            function `(v, grads, lr, stop_gradients=...) -> new v`.
        inner_batch_fn: applied to a task's data before `inner_cost_fn`, such as taking the
            support set.
        outer_batch_fn: the same for `outer_cost_fn`.
        average_across_steps: the outer cost is the mean over the K+1 points visited.
        batched: how tasks are laid out and run, see the module; default: all in one call.
        inner_v: which variables the inner loop adapts: `None` for all, a key chain "a/b", a
            sequence of key chains, or a nested mapping of booleans. With `batched=False` also a
            list of one choice a task, each a list of key chains, a mapping or `None`: a list of
            key chains alone, such as ["a", "b"], is one choice for all tasks.
        keep_inner_v: False inverts `inner_v`.
        outer_v: which variables to differentiate; forms as for `inner_v`.
        keep_outer_v: False inverts `outer_v`.
        return_inner_v: "all" (or True) returns every task's adapted variables, "first" those of
            the first task, stacked along a leading task axis.
        num_tasks: use the first so many tasks of the batch; default: all.
        stop_gradients: return the cost as a constant. False leaves it differentiable with respect
            to `variables` where the framework can.
        chunk_size: with `batched="vmap"`, how many tasks at once.
        mode: how the inner loop is differentiated: "reverse", "remat", "mixed" or "replay".
        check_finite: raise on a cost or gradient that is not finite, naming the task.
        distributed: divide the tasks among the active workers, see `meta_value_and_grad`; not
            with `batched=True`.

    Returns:
        `(cost, grads, inner_v)`: a scalar; gradients in the structure and shapes of one task's
        `variables` (of the `outer_v` part); adapted variables, `()` if not asked for.

    Raises:
        InputError, InputTypeError, UnknownKeyError: bad arguments, before any work.

    The example of ivy's documentation, whose own step gets it right on one backend of three:

    >>> import torch
    >>> from metaframe import Container, maml_step
    >>> def cost_fn(sub_batch, v):
    ...     return sub_batch.mean().x / v.mean().latent
    >>> batch = Container(x=torch.arange(1, 3, dtype=torch.float32))
    >>> variables = Container(latent=torch.ones(2, 1))
    >>> cost, grads, _ = maml_step(batch, cost_fn, cost_fn, variables, 5, 0.01)
    >>> round(float(cost), 5), round(float(grads.latent), 5)
    (1.4007, -1.13723)
    """
    task = _TaskOfStep(
        inner_cost_fn,
        outer_cost_fn,
        inner_grad_steps,
        InnerSettings(inner_learning_rate, inner_optimization_step, order=2, mode=mode, lr_name=LR),
        inner_batch_fn,
        outer_batch_fn,
        average_cost if average_across_steps else adapted_cost,
        return_inner_v,
    )
    layout = Layout.of(
        batch,
        variables,
        batched,
        num_tasks=num_tasks,
        stop_gradients=stop_gradients,
        chunk_size=chunk_size,
        distributed=distributed,
    )
    parts = layout.parts(inner_v, keep_inner_v, outer_v, keep_outer_v)
    return _step(layout, task, parts, "sum", check_finite)


@entrance
def fomaml_step(
    batch: tree.Tree,
    inner_cost_fn: Cost,
    outer_cost_fn: Cost | None,
    variables: tree.Tree,
    inner_grad_steps: int,
    inner_learning_rate: Rate,
    /,
    *,
    inner_optimization_step: Any = gradient_descent_update,
    inner_batch_fn: BatchFn | None = None,
    outer_batch_fn: BatchFn | None = None,
    average_across_steps: bool = False,
    batched: Batched = True,
    inner_v: Any = None,
    keep_inner_v: bool = True,
    outer_v: Any = None,
    keep_outer_v: bool = True,
    return_inner_v: ReturnInner = False,
    num_tasks: int | None = None,
    stop_gradients: bool = True,
    chunk_size: int | None = None,
    check_finite: bool = False,
    distributed: bool = False,
) -> tuple[Any, ...]:
    """One step of first-order MAML (Finn et al. 2017, section 5.2).

        grads = mean_i (d outer_cost / d v)(batch_i, v = theta_i)

    the gradient of the outer cost at the adapted point; with `average_across_steps`, the mean of
    that gradient over the K+1 points visited.

    Args:
        batch: all tasks' data; every leaf has a leading task axis.
        inner_cost_fn: `cost(batch, v) -> scalar`, minimised by the inner loop; pure.
        outer_cost_fn: the cost at the adapted variables; `None` for the inner one.
        variables: structure of floating arrays; with `batched=True` each with a leading task axis.
        inner_grad_steps: inner steps K, 0 or more.
        inner_learning_rate: as for `maml_step`.
        inner_optimization_step: as for `maml_step`.
        inner_batch_fn: applied to a task's data before `inner_cost_fn`.
        outer_batch_fn: the same for `outer_cost_fn`.
        average_across_steps: the outer cost is the mean over the K+1 points visited.
        batched: how tasks are laid out and run, as for `maml_step`.
        inner_v: which variables the inner loop adapts, as for `maml_step`; default: all.
        keep_inner_v: False inverts `inner_v`.
        outer_v: which variables to differentiate; forms as for `inner_v`; default: all.
        keep_outer_v: False inverts `outer_v`.
        return_inner_v: "all" (or True) or "first", as for `maml_step`.
        num_tasks: use the first so many tasks of the batch; default: all.
        stop_gradients: return the cost as a constant. With False this gradient, in all variables,
            is the derivative of the cost.
        chunk_size: with `batched="vmap"`, how many tasks at once.
        check_finite: raise on a cost or gradient that is not finite, naming the task.
        distributed: divide the tasks among the active workers, as for `maml_step`.

    Returns:
        `(cost, grads)`, and with `return_inner_v` `(cost, grads, inner_v)`.

    Raises:
        InputError, InputTypeError, UnknownKeyError: bad arguments, before any work.

    >>> import torch
    >>> from metaframe import fomaml_step
    >>> def cost_fn(task, v):
    ...     return (v["w"] - task["target"]) ** 2
    >>> batch = {"target": torch.tensor([2.0, 4.0])}
    >>> fomaml_step(batch, cost_fn, None, {"w": torch.tensor(1.0)}, 1, 0.25, batched="vmap")
    (tensor(1.2500), {'w': tensor(-2.)})
    """
    task = _TaskOfStep(
        inner_cost_fn,
        outer_cost_fn,
        inner_grad_steps,
        InnerSettings(
            inner_learning_rate,
            inner_optimization_step,
            1,
            stop_gradients=stop_gradients,
            lr_name=LR,
        ),
        inner_batch_fn,
        outer_batch_fn,
        average_cost if average_across_steps else adapted_cost,
        return_inner_v,
    )
    layout = Layout.of(
        batch,
        variables,
        batched,
        num_tasks=num_tasks,
        stop_gradients=stop_gradients,
        chunk_size=chunk_size,
        distributed=distributed,
    )
    parts = layout.parts(inner_v, keep_inner_v, outer_v, keep_outer_v)
    cost, grads, inner = _step(layout, task, parts, "sum", check_finite)
    return (cost, grads, inner) if return_inner_v else (cost, grads)


@entrance
def reptile_step(
    batch: tree.Tree,
    cost_fn: Cost,
    variables: tree.Tree,
    inner_grad_steps: int,
    inner_learning_rate: Rate,
    /,
    *,
    inner_optimization_step: Any = gradient_descent_update,
    batched: Batched = True,
    return_inner_v: ReturnInner = False,
    num_tasks: int | None = None,
    stop_gradients: bool = True,
    direction: Direction = "gradients",
    chunk_size: int | None = None,
    check_finite: bool = False,
    distributed: bool = False,
) -> tuple[Any, ...]:
    """One step of Reptile (Nichol et al. 2018, arXiv 1803.02999).

    Two directions, which differ in more than scale:

    - "gradients" (default): what ivy's documentation prints, the mean of the K+1 inner gradients,
      the K that were used and one more at the adapted point, divided by the learning rate. **It
      is not the paper's direction**: it is about 1 / (inner_learning_rate * K) times as long.
    - "displacement": the paper's, `(theta - mean_i theta_i) / inner_learning_rate`, added up from
      the updates, because the difference of two nearby float32 vectors loses most of its digits.

    Args:
        batch: all tasks' data; every leaf has a leading task axis.
        cost_fn: `cost(batch, v) -> scalar`, minimised by the inner loop; pure.
        variables: structure of floating arrays; with `batched=True` each with a leading task axis.
        inner_grad_steps: 1 or more: without a step there is no direction.
        inner_learning_rate: positive. With `None` the rate of the `optim.Optimizer` divides; for
            an optax transformation, whose rate is not known, nothing does.
        inner_optimization_step: as for `maml_step`.
        batched: how tasks are laid out and run, as for `maml_step`.
        return_inner_v: "all" (or True) or "first", as for `maml_step`.
        num_tasks: use the first so many tasks of the batch; default: all.
        stop_gradients: return the cost as a constant. False leaves it differentiable, with the
            adaptation taken for a constant shift, as in FOMAML.
        direction: "gradients" or "displacement", see above.
        chunk_size: with `batched="vmap"`, how many tasks at once.
        check_finite: raise on a cost or gradient that is not finite, naming the task.
        distributed: divide the tasks among the active workers, as for `maml_step`.

    Returns:
        `(cost, grads)`, and with `return_inner_v` `(cost, grads, inner_v)`; the cost is the mean
        over the K+1 points visited.

    Raises:
        InputError, InputTypeError, UnknownKeyError: bad arguments, before any work.

    >>> import torch
    >>> from metaframe import Container, reptile_step
    >>> def cost_fn(batch, v):
    ...     return batch.mean().x / v.mean().latent
    >>> batch = Container(x=torch.arange(1, 4, dtype=torch.float32))
    >>> variables = Container(latent=torch.tensor([1.0, 2.0]))
    >>> cost, grads, first = reptile_step(
    ...     batch, cost_fn, variables, 4, 0.025, batched=False, num_tasks=2, return_inner_v="first")
    >>> round(float(cost), 5), [round(float(g), 4) for g in grads.latent]
    (0.98805, [-13.0177, -13.0177])
    """
    arguments.choice(direction, "direction", ("gradients", "displacement"))
    arguments.integer(inner_grad_steps, "inner_grad_steps", at_least=1)
    layout = Layout.of(
        batch,
        variables,
        batched,
        num_tasks=num_tasks,
        stop_gradients=stop_gradients,
        chunk_size=chunk_size,
        distributed=distributed,
    )
    task = _TaskOfStep(
        cost_fn,
        None,
        inner_grad_steps,
        InnerSettings(
            inner_learning_rate,
            inner_optimization_step,
            1,
            stop_gradients=stop_gradients,
            lr_name=LR,
        ),
        None,
        None,
        partial(reptile, direction=direction, scale=layout.scale, stop_gradients=stop_gradients),
        return_inner_v,
        reported=True,
    )
    divisor = _divisor(task.settings, layout)
    cost, grads, inner = _step(layout, task, layout.parts(), "mean", check_finite)
    grads = rates.divided(grads, divisor)
    return (cost, grads, inner) if return_inner_v else (cost, grads)


@dataclass(frozen=True)
class _TaskOfStep:
    """The program of one task of a step. Checked when it is made."""

    inner_cost: Cost
    outer_cost: Cost | None
    steps: int
    settings: InnerSettings
    inner_batch_fn: BatchFn | None
    outer_batch_fn: BatchFn | None
    objective: Objective
    return_inner: ReturnInner
    reported: bool = False
    """True if the cost to return is not the one that is differentiated, but the one reported."""

    def __post_init__(self) -> None:
        arguments.function(self.inner_cost, "inner_cost_fn")
        optional = {"outer_cost_fn": self.outer_cost, "inner_batch_fn": self.inner_batch_fn}
        for name, fn in {**optional, "outer_batch_fn": self.outer_batch_fn}.items():
            if fn is not None:
                arguments.function(fn, name)
        arguments.integer(self.steps, "inner_grad_steps", at_least=0)
        arguments.choice(self.return_inner, "return_inner_v", RETURN_INNER)

    def bound(
        self, layout: Layout, inner: tree.Part, outer: tree.Part, differentiated: tree.Part
    ) -> TaskCost:
        """The objective of a task map; it reports the cost to return and the adapted variables.

        Args:
            inner: the variables that adapt.
            outer: those that are differentiated in this task.
            differentiated: those that are differentiated in any task.
        """
        backend, spec = layout.backend, layout.batch.spec
        adapting = inner.structure(layout.variables.arrays)
        size = len(layout.batch.arrays)
        pairs = zip(outer.flags, differentiated.flags, strict=True)
        of_others = [anywhere and not here for here, anywhere in pairs]

        def objective(xs: Arrays, held: Arrays, task: Arrays) -> tuple[Array, Arrays]:
            leaves, weight = task[:size], task[size:]
            variables = differentiated.merge(xs, held)
            variables = tuple(
                backend.stop_gradient(x) if other else x
                for x, other in zip(variables, of_others, strict=True)
            )
            params, others = inner.divide(variables)
            support = self._support(layout, leaves)
            query = _applied(self.outer_batch_fn, spec, leaves, backend)
            if contains_marks(query.spec):
                query = tree.Packed(unmarked(query.unpack(query.arrays))[0], backend.owns)
            inner_cost = flat_cost(
                self.inner_cost,
                "inner_cost_fn",
                backend,
                inner,
                support.data.template(),
                layout.scale,
            )
            outer_cost = flat_cost(
                self.outer_cost or self.inner_cost, "outer_cost_fn", backend, inner, query
            )
            context = (*others, *query.arrays)
            found = self.objective(
                TaskRun.of(
                    InnerLoop(
                        backend, in_order(inner_cost, len(others), support), adapting, self.settings
                    ),
                    params,
                    (*others, *support.fixed),
                    self.steps,
                    lambda at, index: (outer_cost(at, context)[0], ()),
                    None if support.steps is None else Rows(support.rows),
                )
            )
            adapted = inner.merge(found.params, others) if self.return_inner else ()
            return weighed(backend, found.cost, weight), (*found.report, *adapted)

        return objective

    def _support(self, layout: Layout, leaves: Arrays) -> Stepwise:
        """The batch of a task's inner cost, with its rows for each step."""
        support = _applied(self.inner_batch_fn, layout.batch.spec, leaves, layout.backend)
        if not contains_marks(support.spec):
            return Stepwise.plain(support)
        if self.reported:
            raise InputError(
                "reptile_step looks at the inner cost after the last step too, for which per_step "
                "has no row. Leave out per_step, or use unroll."
            )
        batch = support.unpack(support.arrays)
        if layout.with_task_axis:
            batch = step_axis_first(batch, layout.backend)
        found = Stepwise.of(batch, layout.backend.owns, "batch")
        number_of_steps(self.steps, {"batch": found.steps}, "inner_grad_steps")
        return found


def _applied(
    fn: BatchFn | None, spec: tree.TreeSpec, leaves: Arrays, backend: Backend
) -> tree.Packed:
    if fn is None:
        return tree.Packed.of(spec, leaves)
    return tree.Packed(backend.user_function(fn)(tree.unflatten(spec, leaves)), backend.owns)


def _step(
    layout: Layout,
    task: _TaskOfStep,
    parts: list[tuple[tree.Part, tree.Part]],
    reduce: Literal["sum", "mean"],
    check_finite: bool,
) -> tuple[Any, tree.Tree, tree.Tree]:
    """Cost, gradients and adapted variables, as the caller gets them.

    `parts` are the variables that adapt and those that are differentiated: for all tasks, or one
    pair for each.
    """
    backend, how = layout.backend, layout.how
    flags = [any(column) for column in zip(*(outer.flags for _, outer in parts), strict=True)]
    differentiated = tree.Part(layout.variables.spec, flags)
    objectives = [task.bound(layout, inner, outer, differentiated) for inner, outer in parts]
    wanted, held = differentiated.divide(layout.variables.arrays)
    if how.distributed:
        agree(
            backend,
            step=(task, how),
            num_tasks=layout.num_tasks,
            batch=layout.batch.build(layout.batch.arrays),
            v=layout.variables.build(layout.variables.arrays),
            chosen=parts,
        )
    run = gradient_of(backend, objectives, wanted, held, how)
    costs, rows, grads = averaged(backend, run, layout.batch.arrays, wanted, how)
    gradient = tree.Flat(
        layout.without_task_axis(grads, reduce), differentiated.structure(layout.variables.arrays)
    )
    if task.reported:
        costs, rows = rows[0], rows[1:]
    if check_finite:
        checks.finite(costs, backend, tiled=layout.tiled)
        checks.finite_leaves(gradient, backend)
    cost = layout.cost(backend.ops.mean(costs))
    return cost, gradient.build(gradient.arrays), layout.inner(rows, task.return_inner)


def _divisor(settings: InnerSettings, layout: Layout) -> Rate:
    """The rates that Reptile's direction is divided by, one for each variable; None for 1."""
    update, lr = settings.update, settings.lr
    rate = getattr(update, "learning_rate", None) if lr is None else lr
    name = "the optimizer's learning_rate" if lr is None else LR
    rates.refuse_zero(rate, name, "reptile_step")
    arrays = layout.variables.arrays
    of_a_task = [x[0] for x in arrays] if layout.tiled else arrays
    return rates.spread(rate, layout.variables.build(of_a_task), name=name)
