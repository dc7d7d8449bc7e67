"""Solutions of inner problems, differentiated as such and not through the steps to them.

Where grad cost(theta) = 0, the implicit function theorem gives the derivative of theta in
everything else that the cost depends on. For a cotangent b of theta, with the Hessian H of the cost
there, the cotangent of c is

    -(d/dc grad cost)^T u,   (H + damping I) u = b.

The system needs products with H alone. Memory does not grow with the number of steps.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

from metaframe import arguments, ops, tree
from metaframe.backend.contract import Backend
from metaframe.backend.types import Array, Arrays
from metaframe.core import checks, optim, rates, recompute
from metaframe.core.entrance import entrance
from metaframe.core.inner_loop import Cost, FlatCost
from metaframe.core.unroll import Problem
from metaframe.errors import InputError

Solver = Literal["cg", "neumann"]
Solve = Callable[[Backend, Callable[[Arrays], Arrays], Arrays], Arrays]
"""`(backend, u -> H u, b) -> u`."""


@entrance
def implicit_loop(
    cost: Cost,
    v: tree.Tree,
    batch: tree.Tree,
    *,
    steps: int,
    lr: optim.Rate,
    update: Any = optim.gradient_descent_update,
    solver: Solver = "cg",
    solver_steps: int = 20,
    damping: float = 0.0,
    inner_v: Any = None,
    keep_inner_v: bool = True,
) -> tree.Tree:
    """Adapt `v` like `inner_loop`, and differentiate the result as the solution of grad cost = 0.

    The derivative is that of the minimum to which the steps lead, so it is as good as they are
    long: where the gradient is not zero yet, it is an approximation. The starting values get no
    gradient, since the minimum does not depend on them, and neither does the rate. It may be
    differentiated again; the solver's steps then are too.

    Args:
        cost: `cost(batch, v) -> scalar`, pure, with a positive definite Hessian at its minimum.
        v: as for `inner_loop`.
        batch: as for `inner_loop`. The gradient goes into everything that `cost` sees: the batch
            and the variables that do not adapt; on JAX also what it closes over, which is refused
            on torch and TensorFlow.
        steps: as for `inner_loop`.
        lr: as for `inner_loop`.
        update: as for `inner_loop`.
        solver: "cg", conjugate gradient (Hestenes & Stiefel 1952; Rajeswaran et al. 2019, arXiv
            1909.04630), or "neumann", the series lr * sum_j (I - lr H)^j (Lorraine et al. 2020,
            arXiv 1911.02590), for which `lr` has to be one number or scalar.
        solver_steps: steps of the solver, 1 or more.
        damping: added to the diagonal of the Hessian, for one that is nearly singular.
        inner_v: as for `inner_loop`.
        keep_inner_v: as for `inner_loop`.

    Returns:
        The adapted variables, in the structure of `v`.

    Raises:
        InputError, InputTypeError, UnknownKeyError: bad arguments, before any work.

    >>> import torch
    >>> from metaframe import value_and_grad
    >>> def cost(decay, w):
    ...     return (w - 3.0) ** 2 + decay * w**2
    >>> def validation(decay):
    ...     return implicit_loop(cost, torch.tensor(0.0), decay, steps=200, lr=0.1)
    >>> value_and_grad(validation)(torch.tensor(0.5))[:2]  # w = 3 / (1 + decay)
    (tensor(2.0000), tensor(-1.3333))
    """
    arguments.choice(solver, "solver", get_args(Solver))
    arguments.integer(solver_steps, "solver_steps", at_least=1)
    checks.setting("damping", damping)
    problem = Problem.of(cost, v, batch, steps, lr, update, 2, "reverse", inner_v, keep_inner_v)
    if problem.rows is not None:
        raise InputError(
            "implicit_loop differentiates the minimum of one cost, so neither batch nor lr changes "
            "from step to step. Leave out per_step, or use unroll."
        )
    if solver == "neumann" and not _is_one_number(lr):
        raise InputError(
            'solver="neumann" takes lr for the rate of its series, and needs one number or scalar, '
            f"received {lr!r}."
        )
    backend, context = problem.backend, (*problem.others, *problem.fixed)
    stop = backend.stop_gradient
    constant = problem._replace(
        params=tuple(map(stop, problem.params)),
        others=tuple(map(stop, problem.others)),
        fixed=tuple(map(stop, problem.fixed)),
    )
    solution = tuple(map(stop, constant.run().params))
    solve = (
        partial(conjugate_gradient, steps=solver_steps)
        if solver == "cg"
        else partial(neumann_series, steps=solver_steps, rate=tree.unwrapped(lr))
    )
    found = attached(backend, problem.cost, solution, context, solve, damping)
    return problem.build(found)


def _is_one_number(lr: optim.Rate) -> bool:
    return lr is not None and not rates.is_structure(lr) and getattr(lr, "shape", ()) in ((), (1,))


def attached(
    backend: Backend,
    cost: FlatCost,
    solution: Arrays,
    context: Arrays,
    solve: Solve,
    damping: float = 0.0,
) -> Arrays:
    """`solution`, a constant, with the derivatives of a minimum of `cost` in the context.

    Raises:
        InputError: the cost depends on something else, whose gradient would be lost.
    """
    count = len(solution)
    inputs = (solution, context)
    recompute.check_repeatable(
        backend,
        lambda params, context: (cost(params, context)[:1],),
        inputs,
        "implicit_loop differentiates the inner cost in the backward pass",
    )
    lifted, closed = backend.lift(
        lambda xs: (cost(xs[:count], xs[count:])[0],), (*solution, *context)
    )

    def gradient(at: Arrays, given: Arrays) -> Arrays:
        def objective(at: Arrays) -> tuple[Array, Arrays]:
            return lifted((*at, *given))[0], ()

        return backend.value_and_grad(objective, checks.cost_ignores_variables)(at)[2]

    if not closed and (found := backend.loses_closures(lifted, (*solution, *context))):
        raise InputError(
            f"implicit_loop cannot differentiate {found} that the inner cost closes over. Make it "
            "an argument, in the variables or the batch."
        )

    def backward(xs: Arrays, cotangents: Arrays) -> Arrays:
        # The solution by the rule again, so that a derivative of this one moves it too.
        at, given = rule(xs), xs[count:]

        def system(u: Arrays) -> Arrays:
            product = backend.transpose(lambda at: gradient(at, given), at, u)
            return along(product, damping, u) if damping else product

        u = solve(backend, system, cotangents)
        rest = backend.transpose(lambda given: gradient(at, given), given, u)
        zeros = tuple(map(ops.zeros_like, at))
        return (*zeros, *(None if x is None else -x for x in rest))

    rule = backend.custom_vjp(lambda xs: tuple(1 * x for x in xs[:count]), backward)
    return rule((*solution, *context, *closed))


def conjugate_gradient(
    backend: Backend, system: Callable[[Arrays], Arrays], right: Arrays, *, steps: int
) -> Arrays:
    """The solution of a symmetric positive definite system, after `steps` steps from zero.

    Hestenes & Stiefel 1952. Once the residual is exactly zero nothing changes any more.
    """
    count = len(right)

    def body(carry: Arrays, row: Arrays) -> tuple[Arrays, Arrays]:
        x, residual, direction, _ = recompute.split(carry, (count, count, count))
        product = system(direction)
        size = _dot(residual, residual)
        rate = size / _or_one(_dot(direction, product))
        x = along(x, rate, direction)
        residual = along(residual, -rate, product)
        ratio = _dot(residual, residual) / _or_one(size)
        return (*x, *residual, *along(residual, ratio, direction)), row

    start = (*map(ops.zeros_like, right), *right, *right)
    return backend.repeat(body, start, steps)[0][:count]


def neumann_series(
    backend: Backend, system: Callable[[Arrays], Arrays], right: Arrays, *, steps: int, rate: Any
) -> Arrays:
    """`rate * sum_{j=0..steps} (I - rate * H)^j right`, which tends to the solution of H u = right.

    Lorraine et al. 2020, algorithm 3. It converges where `rate` is below 2 by the largest
    eigenvalue.
    """
    count = len(right)

    def body(carry: Arrays, row: Arrays) -> tuple[Arrays, Arrays]:
        total, term = carry[:count], carry[count:]
        term = along(term, -rate, system(term))
        return (*along(total, 1, term), *term), row

    total = backend.repeat(body, (*right, *right), steps)[0][:count]
    return tuple(rate * x for x in total)


def _dot(xs: Arrays, ys: Arrays) -> Array:
    return sum(ops.sum(x * y) for x, y in zip(xs, ys, strict=True))


def along(xs: Arrays, rate: Any, direction: Arrays) -> Arrays:
    """`xs + rate * direction`."""
    return tuple(x + rate * d for x, d in zip(xs, direction, strict=True))


def _or_one(x: Array) -> Array:
    return ops.where(ops.abs(x) > 0, x, 1.0)
