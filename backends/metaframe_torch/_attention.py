"""`F.scaled_dot_product_attention` in a model: by blocks if it is long, or by a chosen kernel."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from metaframe.backend.attention import chosen_kernel
from metaframe.errors import InputError
from metaframe_torch import _private


def by_the_plain_kernel(func: Callable[..., Any]) -> Callable[..., Any]:
    """An attention by torch's plain kernel, the one with a second derivative."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with sdpa_kernel(SDPBackend.MATH):
            return func(*args, **kwargs)

    return run


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`F.scaled_dot_product_attention`, with derivatives of every order."""
    from metaframe import nn
    from metaframe.nn.blocks import LONG

    usual = dropout_p == 0 and not enable_gqa and (attn_mask is None or _is_boolean(attn_mask))
    if (kernel := chosen_kernel()) is not None and not usual:
        raise InputError(
            "use_attention_kernel: a model calls scaled_dot_product_attention with dropout, with "
            "enable_gqa or with a mask of numbers, which a kernel does not take. Switch dropout "
            "off, repeat the keys, or use a boolean mask."
        )
    long = query.shape[-2] * key.shape[-2] >= LONG and not _private.forward_mode_active()
    if kernel is None and not (usual and long):
        options = (attn_mask, dropout_p, is_causal)
        plain = by_the_plain_kernel(F.scaled_dot_product_attention)
        found: Tensor = plain(query, key, value, *options, scale=scale, enable_gqa=enable_gqa)
        return found
    if scale is not None:
        query = query * (scale * math.sqrt(query.shape[-1]))
    return nn.attention(query, key, value, attn_mask, causal=is_causal, kernel=kernel)


def _is_boolean(mask: Tensor) -> bool:
    return mask.dtype is torch.bool
