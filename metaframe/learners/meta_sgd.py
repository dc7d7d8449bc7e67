"""Meta-SGD: MAML that learns its inner learning rates (Li et al. 2017, arXiv 1707.09835)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from metaframe.backend.types import Array
from metaframe.learners.functions import LearningRate
from metaframe.learners.maml import MAML
from metaframe.learners.norms import Norm
from metaframe.learners.registry import Algorithm, register_algorithm


class MetaSGD(MAML):
    """MAML with a learned inner learning rate for every number in every adapted parameter.

        theta' = theta - alpha * grad L_support(theta),   alpha of the shape of theta and learned

    The rates are meta-parameters next to the model's: in `lrs`, a mapping from the names of the
    adapted parameters, which on torch is a part of the wrapper, so that `parameters()` and
    `state_dict()` have them; and in `meta_parameters()`, under "learned/".

    Args:
        module: the model, see `MAML`.
        inner_lr: where every rate starts, see `MAML`.
        inner_steps: see `MAML`.
        first_order: see `MAML`. With one inner step the rates get their
            exact gradient either way; with more the part that goes through later gradients is
            dropped for them too.
        adapt_names: names of the parameters to adapt, and to learn rates for.
        allow_unused: see `MAML`.
        norm: see `MAML`.

    >>> import torch
    >>> maml = MetaSGD(torch.nn.Linear(1, 1))
    >>> sorted(maml.meta_parameters())
    ['bias', 'learned/bias', 'learned/weight', 'weight']
    >>> maml.lrs["bias"]
    Parameter containing:
    tensor([0.0100], requires_grad=True)
    """

    def __init__(
        self,
        module: Any,
        inner_lr: LearningRate = 0.01,
        inner_steps: int = 1,
        first_order: bool = False,
        adapt_names: Iterable[str] | None = None,
        allow_unused: bool = True,
        *,
        norm: Norm = "batch",
    ) -> None:
        super().__init__(
            module, inner_lr, inner_steps, first_order, adapt_names, allow_unused, norm=norm
        )
        params = self._adapter.params()
        self.lrs: Mapping[str, Array] = self._learn(
            self.config.starting_rates({n: params[n] for n in self.config.names})
        )
        """The live rates, by the names of the parameters that they are for."""

    @property
    def rates(self) -> Mapping[str, Array]:
        """The same as `lrs`."""
        return self.lrs


register_algorithm(
    Algorithm(
        "metasgd",
        "learns the inner rates (arXiv 1707.09835)",
        lambda model, c: MetaSGD(model, c.inner_lr, c.inner_steps, norm=c.norm),
    )
)
