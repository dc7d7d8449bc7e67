"""Normalisation policies: the statistics that batch normalisation takes on each set of a task.

`models/per_step.py` keeps the running statistics of "per-step". Adapters of models carry out what
`Forward` says.
"""

from __future__ import annotations

from typing import Literal, get_args

from metaframe.backend.model import Forward

Norm = Literal["batch", "frozen", "support", "per-step"]
NORMS: tuple[Norm, ...] = get_args(Norm)
Phase = Literal["support", "query"]


def forward_under(norm: Norm, phase: Phase, *, twice: bool) -> Forward:
    """The form of the model's call on the examples of a phase.

    Args:
        norm: the policy, see `MAML`.
        phase: the support set, which the model adapts on, or what it predicts for then.
        twice: True if the loss will be differentiated twice.
    """
    if norm == "support":
        return Forward("record" if phase == "support" else "frozen", twice)
    return Forward("frozen" if norm == "per-step" else norm, twice)
