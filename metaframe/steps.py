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

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from metaframe import checks, ops, tree
from metaframe.backend import Array, Arrays, Backend
from metaframe.errors import InputError
from metaframe.inner import Cost, InnerLoop, InnerSettings, Mode, StepView
from metaframe.meta import MetaResult, TaskMap, arrays_of, map_tasks, meta_value_and_grad
from metaframe.optim import Rate, gradient_descent_update, is_rate_tree

Batched = bool | Literal["vmap", "scan"]
ReturnInner = bool | Literal["first", "all"]
BatchFn = Callable[[tree.Tree], tree.Tree]


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
) -> tuple[Array, tree.Tree, Any]:
    """One step of MAML, with exact second-order gradients (Finn et al. 2017, arXiv 1703.03400).

        theta_i = inner loop from theta on task i,   cost = mean_i outer_cost(batch_i, theta_i),
        grads = d cost / d theta

    Args:
        batch: all tasks' data; every leaf has a leading task axis.
        inner_cost_fn: `cost(batch, v) -> scalar`, minimised by the inner loop; pure.
        outer_cost_fn: the cost at the adapted variables; `None` for the inner one.
        variables: structure of floating arrays; with `batched=True` each with a leading task axis.
        inner_grad_steps: inner steps K, 0 or more.
        inner_learning_rate: a number, an array, or one rate a variable in their structure; `None`
            if the update rule brings its own.
        inner_optimization_step: an `optim.Optimizer`, on JAX also an optax transformation, or a
            function `(v, grads, lr, stop_gradients=...) -> new v`.
        inner_batch_fn: applied to a task's data before `inner_cost_fn`, such as taking the
            support set.
        outer_batch_fn: the same for `outer_cost_fn`.
        average_across_steps: the outer cost is the mean over the K+1 points visited.
        batched: how tasks are laid out and run, see the module; default: all in one call.
        inner_v: which variables the inner loop adapts: `None` for all, a key chain "a/b", a
            sequence of key chains, or a nested mapping of booleans. With `batched=False` a list
            of such choices gives one a task.
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
    layout = _Layout.of(batch, variables, num_tasks, batched, stop_gradients)
    task = _AdaptedCost(
        inner_cost_fn,
        outer_cost_fn,
        inner_grad_steps,
        InnerSettings(
            inner_learning_rate, inner_optimization_step, order=2, mode=mode, scale=layout.scale
        ),
        inner_batch_fn,
        outer_batch_fn,
        average_across_steps,
        return_inner_v,
    )
    choices = _Choices(inner_v, keep_inner_v, outer_v, keep_outer_v)
    cost, grads, adapted = _meta_step(layout, task, choices, chunk_size, check_finite)
    return layout.cost(cost), grads, layout.inner(adapted, return_inner_v)


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
) -> tuple[Any, ...]:
    """One step of first-order MAML (Finn et al. 2017, section 5.2).

        grads = mean_i (d outer_cost / d v)(batch_i, v = theta_i)

    the gradient of the outer cost at the adapted point; with `average_across_steps`, the mean of
    that gradient over the K+1 points visited. Arguments as for `maml_step`.

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
    layout = _Layout.of(batch, variables, num_tasks, batched, stop_gradients)
    task = _AdaptedCost(
        inner_cost_fn,
        outer_cost_fn,
        inner_grad_steps,
        InnerSettings(
            inner_learning_rate,
            inner_optimization_step,
            order=1,
            scale=layout.scale,
            stop_gradients=stop_gradients,
        ),
        inner_batch_fn,
        outer_batch_fn,
        average_across_steps,
        return_inner_v,
    )
    choices = _Choices(inner_v, keep_inner_v, outer_v, keep_outer_v)
    cost, grads, adapted = _meta_step(layout, task, choices, chunk_size, check_finite)
    if not return_inner_v:
        return layout.cost(cost), grads
    return layout.cost(cost), grads, layout.inner(adapted, return_inner_v)


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
    checks.steps(inner_grad_steps, "inner_grad_steps", at_least=1)
    checks.chunk_size(chunk_size)
    checks.choice(return_inner_v, "return_inner_v", _RETURN_INNER)
    divisor = _divisor(inner_learning_rate, inner_optimization_step)
    layout = _Layout.of(batch, variables, num_tasks, batched, stop_gradients)
    settings = InnerSettings(
        inner_learning_rate,
        inner_optimization_step,
        order=1,
        scale=layout.scale,
        stop_gradients=stop_gradients,
    )
    task = _ReptileTask(layout, cost_fn, inner_grad_steps, settings, direction, return_inner_v)
    leaves, spec = tree.flatten(layout.batch)
    mean, (costs, *adapted) = map_tasks(
        layout.backend,
        lambda xs: task(tree.unflatten(spec, xs)),
        leaves,
        tree.leaves(layout.variables),
        layout.task_map,
        chunk_size,
    )
    if check_finite:
        checks.finite(costs, layout.backend)
    grads = tree.unflatten(
        tree.structure(layout.variables), [layout.without_task_axis(x, "mean") for x in mean]
    )
    grads = _divided(grads, divisor)
    cost = layout.cost(layout.backend.ops.mean(costs))
    if not return_inner_v:
        return cost, grads
    inner = tree.unflatten(tree.structure(layout.variables), adapted)
    return cost, grads, layout.inner(inner, return_inner_v)


_RETURN_INNER = (False, True, "first", "all")


@dataclass(frozen=True)
class _Layout:
    """The tasks and variables of one call, checked, as arrays, laid out for `map_tasks`."""

    backend: Backend
    batch: tree.Tree
    variables: tree.Tree
    num_tasks: int
    tiled: bool
    task_map: TaskMap
    stop_gradients: bool

    @staticmethod
    def of(
        batch: tree.Tree,
        variables: tree.Tree,
        num_tasks: int | None,
        batched: Batched,
        stop_gradients: bool,
    ) -> _Layout:
        checks.choice(batched, "batched", (True, False, "vmap", "scan"))
        variables, batch, backend = arrays_of(variables, batch)
        count = checks.tasks(batch, num_tasks)
        tiled = batched is True
        if tiled:
            checks.tiled(variables, count)

        def lay_out(x: Array) -> Array:
            x = x if x.shape[0] == count else x[:count]
            # All tasks as a single one, or each with a leading axis of size 1.
            return x[None] if tiled else backend.ops.expand_dims(x, 1) if batched is False else x

        prepare = backend.stop_gradient if stop_gradients else backend.asarray
        return _Layout(
            backend,
            tree.map(lay_out, batch),
            tree.map(prepare, variables),
            count,
            tiled,
            "loop" if isinstance(batched, bool) else batched,
            stop_gradients,
        )

    @property
    def scale(self) -> int:
        """What turns the gradient of a mean over tiled tasks into every task's own."""
        return self.num_tasks if self.tiled else 1

    def without_task_axis(self, x: Array, how: Literal["sum", "mean"]) -> Array:
        if not self.tiled:
            return x
        reduce = self.backend.ops.sum if how == "sum" else self.backend.ops.mean
        return reduce(x, axis=0)

    def cost(self, cost: Array) -> Array:
        return self.backend.stop_gradient(cost) if self.stop_gradients else cost

    def inner(self, adapted: tree.Tree, which: ReturnInner) -> tree.Tree:
        """Adapted variables as the caller asked for them, from those of all tasks."""
        if not which:
            return ()
        if self.tiled:
            adapted = tree.map(lambda x: x[0], adapted)
        if which == "first":
            adapted = tree.map(lambda x: x[:1], adapted)
        return tree.map(self.backend.stop_gradient, adapted) if self.stop_gradients else adapted


@dataclass(frozen=True)
class _AdaptedCost:
    """The outer cost after adaptation, for one task."""

    inner_cost: Cost
    outer_cost: Cost | None
    steps: int
    settings: InnerSettings
    inner_batch_fn: BatchFn | None
    outer_batch_fn: BatchFn | None
    average_across_steps: bool
    return_inner_v: ReturnInner

    def __post_init__(self) -> None:
        checks.function(self.inner_cost, "inner_cost_fn")
        if self.outer_cost is not None:
            checks.function(self.outer_cost, "outer_cost_fn")
        for name in ("inner_batch_fn", "outer_batch_fn"):
            if getattr(self, name) is not None:
                checks.function(getattr(self, name), name)
        checks.steps(self.steps, "inner_grad_steps", at_least=0)
        checks.choice(self.return_inner_v, "return_inner_v", _RETURN_INNER)

    def bound(
        self, backend: Backend, chosen: tuple[bool, ...]
    ) -> Callable[[tree.Tree, tree.Tree], tuple[Array, tree.Tree]]:
        """`(v, task) -> (outer cost, adapted variables)`, adapting the `chosen` variables."""
        outer = checks.scalar_cost(self.outer_cost or self.inner_cost, "outer_cost_fn", backend)

        def task_cost(v: tree.Tree, task: tree.Tree) -> tuple[Array, tree.Tree]:
            inner_batch = self.inner_batch_fn(task) if self.inner_batch_fn else task
            outer_batch = self.outer_batch_fn(task) if self.outer_batch_fn else task

            def observe(at: tree.Tree, _: StepView | None) -> Arrays:
                return (outer(outer_batch, at),)

            loop = InnerLoop(self.inner_cost, v, inner_batch, chosen, self.settings)
            result = loop.run(self.steps, observe if self.average_across_steps else None)
            cost = outer(outer_batch, result.variables)
            for total in result.total:
                cost = (total + cost) / (self.steps + 1)
            return cost, result.variables if self.return_inner_v else ()

        return task_cost


@dataclass(frozen=True)
class _Choices:
    """Which variables adapt and which are differentiated, possibly another choice each task."""

    inner_v: Any
    keep_inner_v: bool
    outer_v: Any
    keep_outer_v: bool

    @property
    def per_task(self) -> bool:
        return _is_per_task(self.inner_v) or _is_per_task(self.outer_v)

    def inner(self, variables: tree.Tree, task: int | None = None) -> tuple[bool, ...]:
        return tree.chosen(variables, _at(self.inner_v, task), self.keep_inner_v)

    def outer(self, variables: tree.Tree, task: int | None = None) -> tuple[bool, ...]:
        return tree.chosen(variables, _at(self.outer_v, task), self.keep_outer_v)

    def check_count(self, layout: _Layout) -> None:
        for name, choice in (("inner_v", self.inner_v), ("outer_v", self.outer_v)):
            if not _is_per_task(choice):
                continue
            if layout.tiled or layout.task_map != "loop":
                raise InputError(f"{name} gives one choice a task, which needs batched=False.")
            if len(choice) != layout.num_tasks:
                raise InputError(
                    f"{name} gives {len(choice)} choices for {layout.num_tasks} tasks."
                )


def _is_per_task(choice: Any) -> bool:
    return (
        isinstance(choice, (list, tuple))
        and len(choice) > 0
        and isinstance(choice[0], (list, tuple, Mapping, type(None)))
    )


def _at(choice: Any, task: int | None) -> Any:
    return choice[task] if _is_per_task(choice) else choice


def _meta_step(
    layout: _Layout,
    task: _AdaptedCost,
    choices: _Choices,
    chunk_size: int | None,
    check_finite: bool,
) -> MetaResult:
    choices.check_count(layout)
    if choices.per_task:
        return _one_choice_a_task(layout, task, choices, check_finite)
    v = layout.variables
    inner = choices.inner(v)
    checks.variables(v, inner, layout.backend, "inner_v")
    cost, grads, adapted = meta_value_and_grad(
        task.bound(layout.backend, inner),
        task_map=layout.task_map,
        chunk_size=chunk_size,
        has_aux=True,
        outer_v=choices.outer_v,
        keep_outer_v=choices.keep_outer_v,
        check_finite=check_finite,
    )(v, layout.batch)
    return MetaResult(
        cost, tree.map(lambda g: layout.without_task_axis(g, "sum"), grads), adapted
    )


def _one_choice_a_task(
    layout: _Layout, task: _AdaptedCost, choices: _Choices, check_finite: bool
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
                check_finite=check_finite,
            )(v, tree.map(lambda x, i=i: x[i : i + 1], layout.batch))
        )
    costs, grads, adapted = zip(*results, strict=True)
    return MetaResult(
        sum(costs) / len(costs),
        tree.map(lambda *gs: sum(gs) / len(gs), *grads),
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


@dataclass(frozen=True)
class _ReptileTask:
    """One task of Reptile: `task -> (direction, (cost, *adapted))`."""

    layout: _Layout
    cost_fn: Cost
    steps: int
    settings: InnerSettings
    direction: Literal["gradients", "displacement"]
    return_inner_v: ReturnInner

    def __call__(self, task: tree.Tree) -> tuple[Arrays, Arrays]:
        v = self.layout.variables
        loop = InnerLoop(self.cost_fn, v, task, tree.chosen(v, None), self.settings)
        result = loop.run(self.steps, self._observe)
        total_cost, *total = result.total
        last_cost, last_grads = loop.cost_and_gradient(result.variables)
        if self.direction == "gradients":
            pairs = zip(total, last_grads, strict=True)
            step = tuple((a + b) / (self.steps + 1) for a, b in pairs)
        else:
            step = tuple(-x for x in total)
        cost = (total_cost + last_cost) / (self.steps + 1)
        return step, (cost, *(tree.leaves(result.variables) if self.return_inner_v else ()))

    def _observe(self, at: tree.Tree, view: StepView | None) -> Arrays:
        del at
        if view is None:
            raise InputError("Reptile needs the gradients of the inner steps: mode='reverse'.")
        return (view.cost, *(view.grads if self.direction == "gradients" else view.updates))


def _divisor(lr: Rate, update: Any) -> Rate:
    """What Reptile's direction is divided by, `None` for nothing."""
    rate = getattr(update, "learning_rate", None) if lr is None else lr
    for leaf in tree.leaves(rate):
        if isinstance(leaf, (int, float)) and leaf == 0:
            raise InputError("reptile_step divides by the inner learning rate, received 0.")
    return rate


def _divided(grads: tree.Tree, divisor: Rate) -> tree.Tree:
    if divisor is None:
        return grads
    if is_rate_tree(divisor):
        return tree.map(lambda g, r: g / r, grads, divisor)
    return tree.map(lambda g: g / divisor, grads)
