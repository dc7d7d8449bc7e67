"""torch functions in a form that can be differentiated twice and mapped over tasks.

Each computes what the function of its name does. torch's own lacks a second derivative, has a wrong
one, or has no batching rule; its first derivative at kinks and ties is kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from metaframe.backend.attention import chosen_kernel
from metaframe_torch import _private, _tape
from metaframe_torch._attention import attention, by_the_plain_kernel
from metaframe_torch._losses import ctc_loss, multi_margin_loss, multilabel_margin_loss
from metaframe_torch._recurrent import (
    gru_cell,
    lstm_cell,
    of_a_cell,
    of_a_layer,
    pack,
    pad,
    rnn_cell,
)

Function = Callable[..., Any]
Forms = Mapping[Function, Function]
"""torch's functions, and what is called in their place."""


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """`F.hardsigmoid`."""
    result = F.hardtanh(input + 3, 0.0, 6.0) / 6
    return input.copy_(result) if inplace else result


def rrelu(
    input: Tensor,
    lower: float = 1 / 8,
    upper: float = 1 / 3,
    training: bool = False,
    inplace: bool = False,
) -> Tensor:
    """`F.rrelu`."""
    slope: Any = (lower + upper) / 2
    if training:
        slope = lower + (upper - lower) * torch.rand_like(input)
    result = torch.where(input >= 0, input, input * slope)
    return input.copy_(result) if inplace else result


def one_hot(input: Tensor, num_classes: int = -1) -> Tensor:
    """`F.one_hot`, which looks at values if there is no `vmap`."""
    if num_classes < 0 or not _tape.transforming():
        return F.one_hot(input, num_classes)
    return (input.unsqueeze(-1) == torch.arange(num_classes, device=input.device)).long()


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """`v` in the length `g`."""
    return v * (g / _private.norm_except_dim(v, dim))


# -- distances ------------------------------------------------------------------------------------


def cdist(
    x1: Tensor,
    x2: Tensor,
    p: float = 2.0,
    compute_mode: str = "use_mm_for_euclid_dist_if_necessary",
) -> Tensor:
    """`torch.cdist`."""
    del compute_mode
    return _length(x1.unsqueeze(-2) - x2.unsqueeze(-3), p)


def pdist(input: Tensor, p: float = 2.0) -> Tensor:
    """`F.pdist`."""
    first, second = torch.triu_indices(*[input.shape[0]] * 2, 1, device=input.device)  # type: ignore[arg-type, call-arg]
    return _length(input[first] - input[second], p)


def _length(x: Tensor, p: float) -> Tensor:
    """The `p`-norm over the last axis, whose derivatives at zero are zero."""
    zero = (x == 0).all(-1, keepdim=True)
    norm = torch.linalg.vector_norm(torch.where(zero, 1.0, x), p, dim=-1)
    return torch.where(zero.squeeze(-1), 0.0, norm)


# -- embeddings -----------------------------------------------------------------------------------


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """`F.embedding`, whose gradient is dense and which writes to no row."""
    del sparse
    rows = _rows(input, weight, max_norm, norm_type, scale_grad_by_freq)
    return F.embedding(input, rows, padding_idx)


def dense_embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    **options: Any,
) -> Tensor:
    """`F.embedding_bag`, whose gradient is dense and which writes to no row."""
    del sparse
    rows = _rows(input, weight, max_norm, norm_type, scale_grad_by_freq)
    return F.embedding_bag(input, rows, offsets, mode=mode, **options)


def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """`F.embedding_bag`, by `F.embedding` and a sum, mean or maximum over each bag."""
    if mode == "max" and (sparse or scale_grad_by_freq):
        raise ValueError("max mode supports neither sparse weights nor scale_grad_by_freq.")
    if per_sample_weights is not None and (
        mode != "sum" or per_sample_weights.shape != input.shape
    ):
        raise ValueError("per_sample_weights goes with mode='sum' and has the shape of input.")
    if input.dim() not in (1, 2) or (offsets is None) != (input.dim() == 2):
        raise ValueError("input is 2D without offsets, or 1D with offsets.")
    rows = embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.unsqueeze(-1)
    kept = torch.ones_like(input, dtype=torch.bool)
    if padding_idx is not None:
        kept = input != padding_idx % weight.shape[0]
    if offsets is None:
        return _bags_of_one_length(rows, kept, mode)
    return _bags(rows, kept, mode, offsets[:-1] if include_last_offset else offsets)


def _bags_of_one_length(rows: Tensor, kept: Tensor, mode: str) -> Tensor:
    chosen = kept.unsqueeze(-1)
    if mode == "max":
        if rows.shape[1] == 0:
            return rows.sum(1)
        highest = torch.where(chosen, rows, -torch.inf).max(1).values
        return torch.where(kept.any(1, keepdim=True), highest, 0.0)
    total = torch.where(chosen, rows, 0.0).sum(1)
    return total if mode == "sum" else total / kept.sum(1, keepdim=True).clamp(min=1)


def _bags(rows: Tensor, kept: Tensor, mode: str, offsets: Tensor) -> Tensor:
    """Bags of any length, each from its offset to the next."""
    count, places = len(rows), torch.arange(len(rows), device=rows.device)
    bag = torch.searchsorted(offsets.contiguous(), places.to(offsets.dtype), right=True) - 1
    shape = (offsets.shape[0], rows.shape[1])
    if mode == "max":
        # Where the highest is, and then that: the derivative of `scatter_reduce` halves at ties.
        index = bag.unsqueeze(-1).expand(count, shape[1])
        found = torch.where(kept.unsqueeze(-1), rows.detach(), -torch.inf)
        highest = found.new_full(shape, -torch.inf).scatter_reduce(0, index, found, "amax")
        candidates = (found == highest[bag]) & kept.unsqueeze(-1)
        place = torch.where(candidates, places.unsqueeze(-1), count)
        first = place.new_full(shape, count).scatter_reduce(0, index, place, "amin")
        return torch.where(first < count, rows.gather(0, first.clamp(max=count - 1)), 0.0)
    total = rows.new_zeros(shape).index_add(0, bag, torch.where(kept.unsqueeze(-1), rows, 0.0))
    if mode == "sum":
        return total
    size = rows.new_zeros(shape[0]).index_add(0, bag, kept.to(rows.dtype))
    return total / size.clamp(min=1).unsqueeze(-1)


def _rows(
    input: Tensor, weight: Tensor, longest: float | None, order: float, by_frequency: bool
) -> Tensor:
    """The rows of an embedding, those beyond `longest` shortened, which torch does in place.

    torch takes the shortened rows for constants; here they have a derivative.
    """
    if longest is not None:
        long = torch.linalg.vector_norm(weight.detach(), order, dim=-1, keepdim=True) > longest
        # A norm has no second derivative at zero, where a padding row is.
        safe = torch.where(long, weight, 1.0)
        norm = torch.linalg.vector_norm(safe, order, dim=-1, keepdim=True)
        weight = weight * torch.where(long, longest / (norm + 1e-7), 1.0)
    if by_frequency:  # the value is that of the rows; torch's second derivative forgets the scale
        ones = torch.ones_like(input, dtype=weight.dtype).flatten()
        counts = weight.new_zeros(weight.shape[0]).index_add(0, input.flatten(), ones)
        rest = weight - weight.detach()
        weight = weight.detach() + rest / counts.clamp(min=1).unsqueeze(-1)
    return weight


# -- which there are ---


def always() -> Forms:
    """The forms that compute what torch does at next to no cost."""
    forms = _forms(False, *(name.found for name in _NAMES))
    if chosen_kernel() is not None:
        return {**forms, F.scaled_dot_product_attention: attention}
    return forms


def exact() -> Forms:
    """The forms for where a second derivative may be taken, or a transform is active."""
    return _forms(True, *(name.found for name in _NAMES))


_NAMES = (
    _private.WEIGHT_NORM,
    _private.PACK_PADDED,
    _private.PAD_PACKED,
    _private.LEFT_ALIGNED,
)


@functools.cache
def _forms(exact: bool, *private: Function | None) -> Forms:
    # A transformer in eval mode takes kernels for inference if its mask has a certain form.
    own: tuple[Function, ...] = (weight_norm, pack, pad, lambda x, mask: False)
    forms: dict[Function, Function] = {
        **{f: form for f, form in zip(private, own, strict=True) if f is not None},
        F.hardsigmoid: hardsigmoid,  # torch has the factor 1 / 6 in single precision
        F.embedding: embedding,
        F.embedding_bag: dense_embedding_bag,
        F.one_hot: one_hot,
        **{f: of_a_layer(f) for f in (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)},
        torch.gru_cell: of_a_cell(torch.gru_cell, gru_cell),
        torch.lstm_cell: of_a_cell(torch.lstm_cell, lstm_cell),
        torch.rnn_tanh_cell: of_a_cell(torch.rnn_tanh_cell, rnn_cell(torch.tanh)),
        torch.rnn_relu_cell: of_a_cell(torch.rnn_relu_cell, rnn_cell(torch.relu)),
    }
    if exact:
        forms |= {  # type: ignore[misc]
            F.rrelu: rrelu,
            F.embedding_bag: embedding_bag,
            torch.cdist: cdist,
            F.pdist: pdist,
            F.multi_margin_loss: multi_margin_loss,
            F.multilabel_margin_loss: multilabel_margin_loss,
            F.ctc_loss: ctc_loss,
            F.scaled_dot_product_attention: attention,
            F.multi_head_attention_forward: by_the_plain_kernel(F.multi_head_attention_forward),
        }
    return forms
