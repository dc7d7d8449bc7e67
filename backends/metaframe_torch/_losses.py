"""torch's losses that have no second derivative, in a form that has one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def multi_margin_loss(
    input: Tensor,
    target: Tensor,
    p: int = 1,
    margin: float = 1.0,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """`F.multi_margin_loss`."""
    x, chosen = input.reshape(-1, input.shape[-1]), target.reshape(-1, 1)
    terms = torch.relu(margin - x.gather(1, chosen) + x) ** p
    if weight is not None:
        terms = terms * weight[chosen]
    others = chosen != torch.arange(x.shape[1], device=x.device)
    losses = torch.where(others, terms, 0.0).mean(1)
    return _reduced(losses.reshape(target.shape), _reduction(reduction, size_average, reduce))


def multilabel_margin_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """`F.multilabel_margin_loss`; labels end at the first negative one."""
    x, labels = (y.reshape(-1, y.shape[-1]) for y in (input, target))
    valid = (labels >= 0).long().cumprod(1) > 0
    labels = torch.where(valid, labels, 0)
    classes = torch.arange(x.shape[1], device=x.device)
    hit = ((labels.unsqueeze(-1) == classes) & valid.unsqueeze(-1)).any(1)
    terms = torch.relu(1 - x.gather(1, labels).unsqueeze(-1) + x.unsqueeze(1))
    counted = valid.unsqueeze(-1) & ~hit.unsqueeze(1)
    losses = torch.where(counted, terms, 0.0).sum((1, 2)) / x.shape[1]
    losses = losses.reshape(input.shape[:-1])
    return _reduced(losses, _reduction(reduction, size_average, reduce))


def ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Any,
    target_lengths: Any,
    blank: int = 0,
    reduction: str = "mean",
    zero_infinity: bool = False,
) -> Tensor:
    """`F.ctc_loss`, by the forward recursion of Graves et al. (ICML 2006, section 4.1)."""
    batched = log_probs.dim() == 3
    log_probs = log_probs if batched else log_probs.unsqueeze(1)
    times, lengths = (
        torch.as_tensor(n, device=log_probs.device).reshape(-1)
        for n in (input_lengths, target_lengths)
    )
    labels = _padded(targets, lengths)
    path = torch.stack([torch.full_like(labels, blank), labels], -1).flatten(1)
    path = F.pad(path, (0, 1), value=blank)  # blank, label, blank, label, ..., blank
    skips = F.pad((path[:, 2:] != blank) & (path[:, 2:] != path[:, :-2]), (2, 0))
    scores = log_probs.gather(2, path.expand(len(log_probs), *path.shape))
    alpha = torch.where(torch.arange(path.shape[1], device=path.device) < 2, scores[0], _NEVER)
    for t in range(1, len(scores)):
        before = F.pad(alpha, (2, 0), value=_NEVER)
        ways = [alpha, before[:, 1:-1], torch.where(skips, before[:, :-2], _NEVER)]
        moved = torch.logsumexp(torch.stack(ways), 0) + scores[t]
        alpha = torch.where((t < times).unsqueeze(-1), moved, alpha)
    last = 2 * lengths.unsqueeze(-1)
    blank_last = alpha.gather(1, last)
    label_last = torch.where(last > 0, alpha.gather(1, (last - 1).clamp(min=0)), _NEVER)
    losses = -torch.logaddexp(blank_last, label_last).squeeze(-1)
    losses = torch.where(losses < -_NEVER / 2, losses, 0.0 if zero_infinity else torch.inf)
    if reduction == "mean":
        losses = losses / lengths.clamp(min=1)
    return _reduced(losses if batched else losses.squeeze(0), reduction)


_NEVER = -1e30
"""The logarithm of a probability of zero, with derivatives."""


def _padded(targets: Tensor, lengths: Tensor) -> Tensor:
    """Labels (sequences, longest), where they may come one sequence after the other."""
    if targets.dim() == 1 and len(lengths) == 1:
        targets = targets.unsqueeze(0)
    if targets.dim() == 1:
        starts = lengths.cumsum(0) - lengths
        places = starts.unsqueeze(-1) + torch.arange(len(targets), device=targets.device)
        targets = targets[places.clamp(max=len(targets) - 1)]
    return targets.long().clamp(min=0)


def _reduction(reduction: str, size_average: bool | None, reduce: bool | None) -> str:
    """`reduction`, or what was said in its place in older versions."""
    if size_average is None and reduce is None:
        return reduction
    return "none" if reduce is False else "sum" if size_average is False else "mean"


def _reduced(losses: Tensor, reduction: str) -> Tensor:
    result: Tensor = losses if reduction == "none" else getattr(losses, reduction)()
    return result
