"""Implicit MAML: meta-gradients without a path (Rajeswaran et al. 2019, arXiv 1909.04630)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

from metaframe import arguments, ops, optim, tree
from metaframe.backend.types import Array, Arrays
from metaframe.core.implicit import attached, conjugate_gradient
from metaframe.errors import InputError
from metaframe.learners.functions import LearningRate, Params
from metaframe.learners.maml import MAML
from metaframe.learners.method import Method, Support
from metaframe.learners.norms import Norm
from metaframe.learners.registry import Algorithm, register_algorithm


class ImplicitMAML(MAML):
    """MAML with a proximal inner problem, differentiated at its solution (iMAML).

        phi* = argmin_phi L_support(phi) + lambda / 2 |phi - theta|^2
        meta-gradient (I + H / lambda)^{-1} grad L_query(phi*),   H = grad^2 L_support(phi*)

    The inner problem is solved by `inner_steps` steps from theta, and the linear system by
    `cg_steps` steps of conjugate gradient, which needs products with H and never H itself. Memory
    does not grow with the number of inner steps. The formula holds at the solution: too few steps
    make it approximate, and so do too few of conjugate gradient; where I + H / lambda is not
    positive definite, neither is sure to converge. Parameters that do not adapt get their part of
    the implicit gradient too.

    A learner needs `adapt_on`, which ends with the solution; `backward()` through it on torch, and
    the framework's own derivatives elsewhere, give the implicit gradient.

    Args:
        module: see `MAML`.
        inner_lr: step size of the inner solver.
        inner_steps: its steps.
        proximal: lambda, a positive number. The authors take 2 on Omniglot and 0.5 on
            miniImageNet.
        cg_steps: steps of conjugate gradient, at least 1; the authors take 5.
        adapt_names: see `MAML`.
        allow_unused: see `MAML`.
        norm: see `MAML`.
        update: the inner solver's update rule, see `MAML`.
        learned: outer variables beyond the model's, see `MAML`. Those that the support loss depends
            on get their part of the implicit gradient; the path to the solution, and so a rate,
            has none.

    >>> import torch
    >>> from metaframe.tasks import Task
    >>> maml = ImplicitMAML(torch.nn.Linear(1, 1), inner_lr=0.1, inner_steps=16, proximal=1.0)
    >>> x = torch.linspace(-1, 1, 8)[:, None]
    >>> cost, grads, _ = maml.meta_value_and_grad(torch.nn.functional.mse_loss,
    ...                                           [Task(x, 2 * x, x, 2 * x)])
    >>> sorted(grads)
    ['bias', 'weight']
    """

    def __init__(
        self,
        module: Any,
        inner_lr: LearningRate | None = 0.01,
        inner_steps: int = 16,
        proximal: float = 2.0,
        cg_steps: int = 5,
        adapt_names: Iterable[str] | None = None,
        allow_unused: bool = True,
        *,
        norm: Norm = "batch",
        update: Any = optim.gradient_descent_update,
        learned: Mapping[str, Any] | None = None,
    ) -> None:
        arguments.integer(cg_steps, "cg_steps", at_least=1)
        if not (isinstance(proximal, (int, float)) and 0 < proximal < float("inf")):
            raise InputError(f"proximal must be a positive number, received {proximal!r}.")
        method = Method(
            penalty=functools.partial(squared_distance, strength=proximal),
            finish=functools.partial(implicit, strength=proximal, cg_steps=cg_steps),
        )
        super().__init__(
            module,
            inner_lr,
            inner_steps,
            True,
            adapt_names,
            allow_unused,
            norm=norm,
            update=update,
            method=method,
            learned=learned,
        )
        # The gradient is differentiated again, in the products with H.
        self.config = dataclasses.replace(self.config, twice=True)


def squared_distance(params: Params, start: Params, *, strength: float) -> Array:
    """`strength / 2 |params - start|^2`."""
    distances = (ops.sum(ops.square(params[name] - start[name])) for name in params)
    return 0.5 * strength * sum(distances)


def implicit(
    support: Support, start: Params, params: Params, *, strength: float, cg_steps: int
) -> Params:
    """`params` with the derivatives of the solution of the proximal problem."""
    backend, names = support.backend, sorted(support.names)
    packed = tree.Packed((start, (support.x, support.y, support.learned)), backend.owns)

    def cost(params: Arrays, context: Arrays) -> tuple[Array, Arrays]:
        begun, batch = packed.unpack(context)
        adapted = dict(zip(names, params, strict=True))
        at = {**begun, **adapted}
        distance = squared_distance(adapted, begun, strength=strength)
        return support.loss(batch, {name: at[name] for name in start}) + distance, ()

    solution = tuple(backend.stop_gradient(params[name]) for name in names)
    solve = functools.partial(conjugate_gradient, steps=cg_steps)
    found = attached(backend, cost, solution, packed.arrays, solve)
    return {**params, **dict(zip(names, found, strict=True))}


register_algorithm(
    Algorithm(
        "imaml",
        "gradients at the solution of a proximal inner problem (arXiv 1909.04630)",
        lambda model, c: ImplicitMAML(
            model, c.inner_lr, c.inner_steps, c.proximal, c.cg_steps, norm=c.norm
        ),
        ("proximal", "cg_steps"),
        {"inner_steps": 16},
        ignores=("mode",),
        exact=False,
    )
)
