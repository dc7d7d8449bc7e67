"""The inner loop with everything that it sees: batches, rates, state, costs of each step."""

from __future__ import annotations

from typing import Any, NamedTuple

from metaframe import arguments, tree
from metaframe.backend.contract import Backend
from metaframe.backend.selection import backend_of, following, is_array
from metaframe.backend.types import Array, Arrays
from metaframe.core import checks, optim, rates
from metaframe.core.entrance import entrance
from metaframe.core.inner_loop import (
    Cost,
    FlatCost,
    InnerLoop,
    InnerResult,
    InnerSettings,
    Mode,
    Order,
    Rows,
    flat_cost,
    in_order,
)
from metaframe.core.per_step import Stepwise, contains_marks, number_of_steps, refuse_marks


class Unrolled(NamedTuple):
    """The outcome of an inner loop of K steps.

    >>> import torch
    >>> found = unroll(lambda batch, v: (v - batch) ** 2, torch.tensor(1.0), torch.tensor(3.0),
    ...                steps=2, lr=0.25)
    >>> found.variables, found.costs
    (tensor(2.5000), tensor([4., 1.]))
    """

    variables: tree.Tree
    """The adapted variables."""
    state: tree.Tree
    """The state of the update rule, for `unroll(..., state=...)` to go on from."""
    costs: Array
    """The inner cost before each step, shape (K,)."""
    aux: tree.Tree
    """The cost's further results, with a leading step axis; `()` without `has_aux` or steps."""


@entrance
def unroll(
    cost: Cost,
    v: tree.Tree,
    batch: tree.Tree,
    *,
    steps: int | None = None,
    lr: optim.Rate,
    update: Any = optim.gradient_descent_update,
    state: tree.Tree = None,
    order: Order = 2,
    mode: Mode = "reverse",
    inner_v: Any = None,
    keep_inner_v: bool = True,
    has_aux: bool = False,
    last: int | None = None,
) -> Unrolled:
    """Adapt `v` by K steps of an update rule, and return what the loop saw on the way.

        theta_{k+1} = update(theta_k, grad cost(batch_k, theta_k)),   k = 0 .. K-1

    All of the result is differentiable in `v`, `batch`, `lr` and `state`, in every mode. Two loops
    of which the second goes on from the variables and the state of the first are one loop.

    Args:
        cost: `cost(batch, v) -> scalar`, pure; `(scalar, aux)` with `has_aux`.
        v: variables, any structure of floating arrays.
        batch: the data, any structure of arrays, handed to `cost` as it is. Each step gets its own
            rows of what `per_step` marks: all of it, or parts, `(fixed, per_step(rows))`.
        steps: the number of steps K, 0 or more. Default: the length of what `per_step` marks.
        lr: as for `inner_loop`; what `per_step` marks has a rate for each step.
        update: as for `inner_loop`.
        state: where the update rule goes on from, as an earlier loop returned it. Default: the
            rule's first state.
        order: as for `inner_loop`. With 1, `costs` have the gradient of the cost where the loop
            was, as the result has.
        mode: as for `inner_loop`.
        inner_v: as for `inner_loop`.
        keep_inner_v: as for `inner_loop`.
        has_aux: `cost` returns something besides, a structure of arrays.
        last: truncation: gradients go through the last so many steps only, and everything before
            them is a constant. Default: through all.

    Returns:
        The adapted variables, the rule's state, the costs and the aux; see `Unrolled`.

    Raises:
        InputError, InputTypeError, UnknownKeyError: bad arguments, before any work.

    >>> import torch
    >>> from metaframe import optim, per_step
    >>> def cost(batch, v):
    ...     return ((v["w"] * batch["x"] - batch["y"]) ** 2).mean()
    >>> v, rule = {"w": torch.tensor(1.0)}, optim.momentum()
    >>> batch = {"x": per_step(torch.tensor([[1.0], [2.0]])), "y": torch.tensor([3.0])}
    >>> found = unroll(cost, v, batch, lr=0.1, update=rule)
    >>> found.costs
    tensor([4.0000, 0.0400])
    >>> unroll(cost, found.variables, batch, lr=0.1, update=rule, state=found.state).variables
    {'w': tensor(2.2588)}
    """
    problem = Problem.of(
        cost, v, batch, steps, lr, update, order, mode, inner_v, keep_inner_v, has_aux
    )
    found = problem.run(state, last, keeps=True)
    costs, *aux = found.seen or (problem.no_costs(),)
    return Unrolled(
        problem.build(found.params),
        found.state.build(found.state.arrays),
        costs,
        problem.aux.build(aux) if found.seen and has_aux else (),
    )


@entrance
def inner_loop(
    cost: Cost,
    v: tree.Tree,
    batch: tree.Tree,
    *,
    steps: int | None = None,
    lr: optim.Rate,
    update: Any = optim.gradient_descent_update,
    order: Order = 2,
    mode: Mode = "reverse",
    inner_v: Any = None,
    keep_inner_v: bool = True,
) -> tree.Tree:
    """Adapt `v` to one task.

    Args:
        cost: `cost(batch, v) -> scalar`, pure.
        v: variables, any structure of floating arrays.
        batch: the task's data, any structure of arrays, handed to `cost` as it is. Each step gets
            its own rows of what `per_step` marks.
        steps: number of steps K, 0 or more. Default: the length of what `per_step` marks.
        lr: a number or an array, for all variables, or a structure of them: one for each variable
            that adapts, or for each part of these such as a layer. Arrays are of NumPy or the
            variables' framework, scalars or of the variable's shape, and differentiable. `None` if
            `update` brings its own rate.
        update: an `optim.Optimizer`, on JAX also an optax `GradientTransformation`, or a function
            `update(v, grads, lr, stop_gradients=...)` that returns new variables.
        order: 2, or 1 for gradients that take the adaptation for a constant shift.
        mode: how the loop is differentiated: "reverse", "remat", "mixed" or "replay", see
            `metaframe.core.inner_loop`. With all but the first everything differentiable has to be
            in `v`, `batch` or `lr`.
        inner_v: which variables adapt, as for `maml_step`; all by default.
        keep_inner_v: False inverts `inner_v`.

    Returns:
        The adapted variables, in the structure of `v`: the first field of `unroll`.

    Raises:
        InputError, InputTypeError, UnknownKeyError: bad arguments, before any work.

    >>> import torch
    >>> def cost(batch, v):
    ...     return ((v["w"] * batch["x"] - batch["y"]) ** 2).mean()
    >>> v = {"w": torch.tensor(1.0)}
    >>> batch = {"x": torch.tensor([1.0, 2.0]), "y": torch.tensor([3.0, 6.0])}
    >>> inner_loop(cost, v, batch, steps=1, lr=0.1)
    {'w': tensor(2.)}
    """
    problem = Problem.of(cost, v, batch, steps, lr, update, order, mode, inner_v, keep_inner_v)
    return problem.build(problem.run().params)


class Problem(NamedTuple):
    """An inner loop, taken apart: the arrays and what runs on them."""

    backend: Backend
    cost: FlatCost
    loop: InnerLoop
    part: tree.Part
    params: Arrays
    others: Arrays
    fixed: Arrays
    rows: Rows | None
    steps: int
    aux: tree.Returned

    @staticmethod
    def of(
        cost: Cost,
        v: tree.Tree,
        batch: tree.Tree,
        steps: int | None,
        lr: optim.Rate,
        update: Any,
        order: Order,
        mode: Mode,
        inner_v: Any,
        keep_inner_v: bool,
        has_aux: bool = False,
    ) -> Problem:
        """The arguments of `unroll`, checked and converted."""
        rate = Stepwise.of(lr, is_array, "lr")
        checks.learning_rate(rate.data.unpack(rate.data.arrays))
        leaves, spec = variables = tree.Flat.of(v, "v")
        if contains_marks(spec):
            refuse_marks(v, "v", "Variables are where a loop begins; mark the batch or lr.")
        given = tree.Flat.of(batch, "batch")
        with following(tree.node_types(spec, given.spec)):
            backend = backend_of(*leaves, *given.arrays)
            leaves = checks.converted(variables, backend, "v").arrays
            # Python numbers in the batch stay what they are.
            given = checks.converted(given, backend, "batch", is_array)
        data = Stepwise.of(given.build(given.arrays), backend.owns, "batch")
        if steps is not None:
            arguments.integer(steps, "steps", at_least=0)
        count = number_of_steps(steps, {"batch": data.steps, "lr": rate.steps})
        part = tree.Part(spec, tree.flags(spec, inner_v, keep_inner_v, name="inner_v"))
        checks.variables(leaves, part, backend, "inner_v")
        params, others = part.divide(leaves)
        rows, first = _rows(rate, data, params[0], backend)
        settings = InnerSettings(
            lr if rate.steps is None else first,
            update,
            order,
            mode,
            lr_known=tree.chains(spec) if rates.is_structure(first) else (),
        )
        aux = tree.Returned()
        flat = flat_cost(
            cost, "cost", backend, part, data.data.template(), aux=aux if has_aux else None
        )
        flat = in_order(flat, len(others), data)
        loop = InnerLoop(backend, flat, part.structure(leaves), settings)
        return Problem(backend, flat, loop, part, params, others, data.fixed, rows, count, aux)

    def run(
        self, state: tree.Tree = None, last: int | None = None, *, keeps: bool = False
    ) -> InnerResult:
        """The loop, from its first step or from `state`."""
        context = (*self.others, *self.fixed)
        if state is not None:
            state = self.loop.checked_state(state, self.params)
        if last is not None:
            arguments.integer(last, "last", at_least=0)
        before = 0 if last is None else max(self.steps - last, 0)
        params, seen = self.params, ()
        if before:
            first = self.loop.run(
                params, context, before, state=state, rows=self._slice(0, before), keeps=keeps
            )
            stop = self.backend.stop_gradient
            params, seen = tuple(map(stop, first.params)), tuple(map(stop, first.seen))
            state = first.state.build(map(self._constant, first.state.arrays))
        found = self.loop.run(
            params,
            context,
            self.steps - before,
            state=state,
            rows=self._slice(before, self.steps),
            keeps=keeps,
        )
        if seen and found.seen:
            seen = tuple(map(self.backend.ops.concat, zip(seen, found.seen, strict=True)))
        return found._replace(seen=seen if not found.seen else seen or found.seen)

    def _slice(self, start: int, stop: int) -> Rows | None:
        if self.rows is None or (start, stop) == (0, self.steps):
            return self.rows
        return self.rows._replace(arrays=tuple(x[start:stop] for x in self.rows.arrays))

    def _constant(self, x: Any) -> Any:
        return self.backend.stop_gradient(x) if self.backend.owns(x) else x

    def build(self, params: Arrays) -> tree.Tree:
        """The variables, with `params` in the places of those that adapt."""
        return tree.unflatten(self.part.spec, self.part.merge(params, self.others))

    def no_costs(self) -> Array:
        """The costs of no steps."""
        like = self.params[0]
        return self.backend.ops.zeros((0,), self.backend.dtype_name(like), like)


def _rows(
    rate: Stepwise, data: Stepwise, like: Array, backend: Backend
) -> tuple[Rows | None, optim.Rate]:
    """The rows of both, and the learning rate of the first step."""
    if rate.steps is None:
        return (None if data.steps is None else Rows(data.rows)), rate.data.unpack(rate.data.arrays)
    dtype = backend.dtype_name(like)
    rows = tuple(x if backend.owns(x) else backend.asarray(x, dtype) for x in rate.rows)

    def at(row: Arrays) -> optim.Rate:
        return rate.data.unpack(rate.at(row, rate.fixed))

    # The sum of no rows is a zero of their shape.
    first = tuple(x[0] if rate.steps else backend.ops.sum(x, axis=0) for x in rows)
    return Rows((*rows, *data.rows), len(rows), at), at(first)
