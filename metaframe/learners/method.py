"""Method: where an algorithm departs from MAML, as functions.

A learner that adapts step by step and the pure meta-objective call the same ones, so an algorithm
says once what it does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from metaframe.backend.contract import Backend
from metaframe.backend.types import Array
from metaframe.core.task_program import Objective
from metaframe.learners.functions import Params


class Support(NamedTuple):
    """The support set of a task, and what a model makes of it.

    `Method.begin` and `Method.finish` receive one:

    >>> from metaframe import ops
    >>> def clamped(support, start, params):
    ...     return {n: ops.clip(x, -1, 1) if n in support.names else x for n, x in params.items()}
    """

    x: Any
    """The inputs of the support set."""
    y: Any
    """Its targets."""
    predict: Callable[[Params, Any], Any]
    """`(parameters, x) -> prediction`."""
    loss: Callable[[Any, Params], Array]
    """`((x, y), parameters) -> support loss`; `(x, y, learned)` for other outer variables."""
    names: tuple[str, ...]
    """The parameters that adapt."""
    backend: Backend
    """The backend of the arrays."""
    learned: Any = None
    """The outer variables beyond the model's; None for a learner without."""


@dataclass(frozen=True)
class Method:
    """The functions where an algorithm departs from MAML; None for what MAML does.

    `MAML(model, ..., method=Method(...))` is the learner. All are pure functions of arrays, so that
    they run vectorised over tasks, compiled, and on every backend.

    Attributes:
        objective: one task's contribution to the meta-objective; MAML's is the query loss of the
            adapted parameters.
        begin: `(support, meta-parameters) -> parameters` to adapt from; MAML's are the same.
        penalty: `(parameters, where they began) -> scalar`, added to the support loss.
        finish: `(support, where it began, adapted) -> parameters`, after the last step.

    Parameters are mappings by name; those of `penalty` are the ones that adapt.

    >>> import torch
    >>> from metaframe import MAML, ops
    >>> def pull(params, start):
    ...     return 0.5 * sum(ops.sum(ops.square(params[n] - start[n])) for n in params)
    >>> maml = MAML(torch.nn.Linear(1, 1), inner_steps=3, method=Method(penalty=pull))
    """

    objective: Objective | None = None
    begin: Callable[[Support, Params], Params] | None = None
    penalty: Callable[[Params, Params], Array] | None = None
    finish: Callable[[Support, Params, Params], Params] | None = None

    @property
    def needs_support(self) -> bool:
        """True if a learner can adapt only where it is handed the support set itself."""
        return self.begin is not None or self.finish is not None


PLAIN = Method()
"""MAML itself."""
