"""The three meta-steps, with the signatures of ivy's functional API.

Each is a few lines over the composable core: an inner loop (`inner.py`), a cost at the point or
points it visits, and the mean and gradient of that over tasks (`meta.py`). How tasks are laid out
is the argument `batched`:

- `True`: one call of the cost function sees all tasks at once. The caller has tiled every variable
  along a leading task axis, and the cost function returns the mean over tasks.
- `False`: the tasks one after the other; the cost function sees a sub-batch with a leading axis of
  size 1, and variables without a task axis.
- `"vmap"`, `"scan"`: the cost function sees one task without a task axis; the tasks are vectorised,
  or run one after the other in compiled form in the memory of one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from metaframe import checks, rates, tree
from metaframe.backend import Array, Arrays, Backend
from metaframe.distributed.agreement import agree
from metaframe.entrance import entrance
from metaframe.errors import InputError
from metaframe.inner import Cost, InnerSettings, Mode
from metaframe.layout import RETURN_INNER, Batched, Choices, Layout, ReturnInner, execution
from metaframe.meta import Execution, MetaResult, accumulate, meta_value_and_grad, weighed
from metaframe.objectives import AdaptedCost, BatchFn, ReptileTask
from metaframe.optim import Rate, gradient_descent_update

LR = "inner_learning_rate"
"""The name of the argument, for errors."""


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
        mode: how the inner loop is differentiated: "reverse", "remat" or "mixed".
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
    how = execution(batched, chunk_size, distributed, stop_gradients)
    layout = Layout.of(batch, variables, num_tasks, batched, stop_gradients)
    task = AdaptedCost(
        inner_cost_fn,
        outer_cost_fn,
        inner_grad_steps,
        InnerSettings(
            inner_learning_rate,
            inner_optimization_step,
            order=2,
            mode=mode,
            scale=layout.scale,
            lr_name=LR,
        ),
        inner_batch_fn,
        outer_batch_fn,
        average_across_steps,
        return_inner_v,
    )
    choices = Choices(inner_v, keep_inner_v, outer_v, keep_outer_v)
    cost, grads, adapted = _meta_step(layout, task, choices, how, check_finite)
    return layout.cost(cost), grads, layout.inner(adapted, return_inner_v)


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
    that gradient over the K+1 points visited. Arguments as for `maml_step`; with
    `stop_gradients=False` this gradient, in all variables, is the derivative of the cost.

    Returns:
        `(cost, grads)`, and with `return_inner_v` `(cost, grads, inner_v)`.

    >>> import torch
    >>> from metaframe import fomaml_step
    >>> def cost_fn(task, v):
    ...     return (v["w"] - task["target"]) ** 2
    >>> batch = {"target": torch.tensor([2.0, 4.0])}
    >>> fomaml_step(batch, cost_fn, None, {"w": torch.tensor(1.0)}, 1, 0.25, batched="vmap")
    (tensor(1.2500), {'w': tensor(-2.)})
    """
    how = execution(batched, chunk_size, distributed, stop_gradients)
    layout = Layout.of(batch, variables, num_tasks, batched, stop_gradients)
    task = AdaptedCost(
        inner_cost_fn,
        outer_cost_fn,
        inner_grad_steps,
        InnerSettings(
            inner_learning_rate,
            inner_optimization_step,
            order=1,
            scale=layout.scale,
            stop_gradients=stop_gradients,
            lr_name=LR,
        ),
        inner_batch_fn,
        outer_batch_fn,
        average_across_steps,
        return_inner_v,
    )
    choices = Choices(inner_v, keep_inner_v, outer_v, keep_outer_v)
    cost, grads, adapted = _meta_step(layout, task, choices, how, check_finite)
    if not return_inner_v:
        return layout.cost(cost), grads
    return layout.cost(cost), grads, layout.inner(adapted, return_inner_v)


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
    direction: Literal["gradients", "displacement"] = "gradients",
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
        cost_fn: `cost(batch, v) -> scalar`.
        inner_grad_steps: 1 or more: without a step there is no direction.
        inner_learning_rate: positive. With `None` the rate of the `optim.Optimizer` divides; for
            an optax transformation, whose rate is not known, nothing does.
        stop_gradients: return the cost as a constant. False leaves it differentiable, with the
            adaptation taken for a constant shift, as in FOMAML.
        direction: see above.

    The other arguments as for `maml_step`.

    Returns:
        `(cost, grads)`, and with `return_inner_v` `(cost, grads, inner_v)`; the cost is the mean
        over the K+1 points visited.

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
    checks.choice(direction, "direction", ("gradients", "displacement"))
    checks.integer(inner_grad_steps, "inner_grad_steps", at_least=1)
    checks.choice(return_inner_v, "return_inner_v", RETURN_INNER)
    how = execution(batched, chunk_size, distributed, stop_gradients)
    layout = Layout.of(batch, variables, num_tasks, batched, stop_gradients)
    settings = InnerSettings(
        inner_learning_rate,
        inner_optimization_step,
        order=1,
        scale=layout.scale,
        stop_gradients=stop_gradients,
        lr_name=LR,
    )
    divisor = _divisor(settings, layout)
    task = ReptileTask(layout, cost_fn, inner_grad_steps, settings, direction, return_inner_v)
    leaves, spec = tree.flatten(layout.batch)

    def of_task(xs: Arrays) -> tuple[Arrays, Arrays]:
        direction, rows = task(tree.unflatten(spec, xs[: len(leaves)]))
        weight = xs[len(leaves) :]
        return tuple(weighed(layout.backend, x, weight) for x in direction), rows

    def of_chunk(xs: Arrays) -> tuple[Arrays, Arrays]:
        out = layout.backend.vmap(lambda row: (*(parts := of_task(row))[0], *parts[1]))(xs)
        directions, stacked = out[: len(like)], out[len(like) :]
        return tuple(layout.backend.ops.sum(x, axis=0) for x in directions), stacked

    like = tree.leaves(layout.variables)
    if distributed:
        agree(layout.backend, reptile_step=(task, how), batch=layout.batch)
    mean, (costs, *adapted) = accumulate(layout.backend, of_task, of_chunk, leaves, like, how)
    v_spec = tree.structure(layout.variables)
    grads = tree.unflatten(v_spec, [layout.without_task_axis(x, "mean") for x in mean])
    grads = rates.divided(grads, divisor)
    if check_finite:
        checks.finite(costs, layout.backend, tiled=layout.tiled)
        checks.finite_leaves(grads, layout.backend)
    cost = layout.cost(tree.wrapped_as(v_spec, layout.backend.ops.mean(costs)))
    if not return_inner_v:
        return cost, grads
    inner = tree.unflatten(v_spec, adapted)
    return cost, grads, layout.inner(inner, return_inner_v)


def _meta_step(
    layout: Layout,
    task: AdaptedCost,
    choices: Choices,
    how: Execution,
    check_finite: bool,
) -> MetaResult:
    choices.check_count(layout)
    if choices.per_task:
        if how.distributed:
            raise InputError(
                "inner_v or outer_v gives one choice a task, which distributed=True does not take."
            )
        return _one_choice_a_task(layout, task, choices, check_finite)
    v = layout.variables
    inner = choices.inner(v)
    checks.variables(v, inner, layout.backend, "inner_v")
    cost, grads, adapted = meta_value_and_grad(
        task.bound(layout.backend, inner),
        task_map=how.task_map,
        chunk_size=how.chunk_size,
        distributed=how.distributed,
        has_aux=True,
        outer_v=choices.outer_v,
        keep_outer_v=choices.keep_outer_v,
        check_finite=check_finite and not layout.tiled,
    )(v, layout.batch)
    if check_finite and layout.tiled:
        checks.finite(tree.leaves(cost)[0], layout.backend, tiled=True)
        checks.finite_leaves(grads, layout.backend)
    return MetaResult(cost, tree.map(lambda g: layout.without_task_axis(g, "sum"), grads), adapted)


def _one_choice_a_task(
    layout: Layout, task: AdaptedCost, choices: Choices, check_finite: bool
) -> MetaResult:
    """As `_meta_step` with the tasks one by one; a variable not chosen in a task counts as zero."""
    v, backend = layout.variables, layout.backend
    outer = [choices.outer(v, i) for i in range(layout.num_tasks)]
    union = [
        chain
        for chain, flags in zip(tree.key_chains(v), zip(*outer, strict=True), strict=True)
        if any(flags)
    ]
    results = []
    for i, flags in enumerate(outer):
        inner = choices.inner(v, i)
        checks.variables(v, inner, backend, "inner_v")
        results.append(
            meta_value_and_grad(
                _frozen(task.bound(backend, inner), flags, backend),
                task_map="loop",
                has_aux=True,
                outer_v=union,
            )(v, tree.map(lambda x, i=i: x[i : i + 1], layout.batch))
        )
    costs, grads, adapted = zip(*results, strict=True)
    mean = tree.map(lambda *gs: sum(gs) / len(gs), *grads)
    if check_finite:
        checks.finite(backend.ops.stack([tree.leaves(c)[0] for c in costs]), backend)
        checks.finite_leaves(mean, backend)
    return MetaResult(
        tree.map(lambda *cs: sum(cs) / len(cs), *costs),
        mean,
        tree.map(lambda *xs: backend.ops.concat(xs), *adapted),
    )


def _frozen(
    task_cost: Callable[..., Any], differentiable: tuple[bool, ...], backend: Backend
) -> Callable[..., Any]:
    """`task_cost` with every variable that is not `differentiable` taken for a constant."""

    def call(v: tree.Tree, task: tree.Tree) -> Any:
        leaves, spec = tree.flatten(v)
        flagged = zip(leaves, differentiable, strict=True)
        return task_cost(
            tree.unflatten(spec, [x if flag else backend.stop_gradient(x) for x, flag in flagged]),
            task,
        )

    return call


def _divisor(settings: InnerSettings, layout: Layout) -> Rate:
    """What Reptile's direction is divided by, for one task's variables; `None` for nothing."""
    update, lr = settings.update, settings.lr
    rate = getattr(update, "learning_rate", None) if lr is None else lr
    name = "the optimizer's learning_rate" if lr is None else LR
    rates.refuse_zero(rate, name, "reptile_step")
    v = tree.map(lambda x: x[0], layout.variables) if layout.tiled else layout.variables
    return rates.spread(rate, v, name=name)
