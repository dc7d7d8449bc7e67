"""CAVIA: adaptation of context parameters alone (Zintgraf et al. 2019, arXiv 1810.03642)."""

from __future__ import annotations

from typing import Any

from metaframe.errors import InputError
from metaframe.learners.anil import part_names
from metaframe.learners.maml import MAML
from metaframe.learners.registry import Algorithm, register_algorithm
from metaframe.models.lookup import adapter_of
from metaframe.models.wrapped import WithContext


class CAVIA(MAML):
    """MAML whose inner loop adapts context parameters, which start at zero for every task.

        phi_0 = 0,   phi' = phi - alpha * grad_phi L_support(phi, theta)
        meta-gradient d L_query(phi', theta) / d theta

    The context is a parameter of the model, which decides where it enters: next to the inputs, as
    a bias, or to scale features. Whatever values the model holds there, a task starts from zeros;
    the context is no meta-parameter.

    Args:
        module: the model, see `MAML`.
        context: the part to adapt, in the forms that `head_names` takes: a submodule, the name of
            a part of the parameters, or that part itself.
        kwargs: passed to `MAML`; not `adapt_names`.

    Raises:
        InputError: the context shares no parameters with the model, or is all of it.

    >>> import torch
    >>> class Conditioned(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.context = torch.nn.Parameter(torch.zeros(4))
    ...         self.shared = torch.nn.Linear(1 + 4, 1)
    ...     def forward(self, x):
    ...         return self.shared(torch.cat([x, self.context.expand(len(x), 4)], dim=1))
    >>> maml = CAVIA(Conditioned(), "context", inner_lr=1.0)
    >>> sorted(maml.meta_parameters())
    ['shared.bias', 'shared.weight']
    """

    def __init__(self, module: Any, context: Any, **kwargs: Any) -> None:
        if "adapt_names" in kwargs:
            raise InputError("CAVIA adapts its context; adapt_names is not an argument of it.")
        adapter = WithContext(adapter_of(module), part_names(module, context, "context"))
        if not adapter.trainable():
            raise InputError("the context is the whole model, which leaves nothing to meta-learn.")
        super().__init__(adapter, **kwargs)


register_algorithm(
    Algorithm(
        "cavia",
        "adapts context parameters only (arXiv 1810.03642)",
        lambda model, c: CAVIA(
            model, "context", inner_lr=c.inner_lr, inner_steps=c.inner_steps, norm=c.norm
        ),
        ("context",),
        {"context": 5, "inner_lr": 1.0},
    )
)
