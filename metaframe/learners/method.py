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
from metaframe.learners.functional import Params


class Support(NamedTuple):
    """The support set of a task, and what a model makes of it."""

    x: Any
    y: Any
    predict: Callable[[Params, Any], Any]
    """`(parameters, x) -> prediction`."""
    loss: Callable[[Any, Params], Array]
    """`((x, y), parameters) -> support loss`."""
    names: tuple[str, ...]
    """The parameters that adapt."""
    backend: Backend


@dataclass(frozen=True)
class Method:
    """The functions; None for what MAML does.

    Attributes:
        objective: one task's contribution to the meta-objective; MAML's is the query loss of the
            adapted parameters.
        begin: `(support, meta-parameters) -> parameters` to adapt from; MAML's are the same.
        penalty: `(parameters, where they began) -> scalar`, added to the support loss.
        finish: `(support, where it began, adapted) -> parameters`, after the last step.
    """

    objective: Objective | None = None
    begin: Callable[[Support, Params], Params] | None = None
    penalty: Callable[[Params, Params], Array] | None = None
    finish: Callable[[Support, Params, Params], Params] | None = None

    @property
    def needs_support(self) -> bool:
        """Can a learner adapt only where it is handed the support set itself?"""
        return self.begin is not None or self.finish is not None
