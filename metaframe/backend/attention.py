"""The kernel that computes attention, where another than ours is chosen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

from metaframe.backend.types import Array
from metaframe.errors import InputTypeError


class AttentionKernel(Protocol):
    """Another implementation of `nn.attention`, of arrays of one framework.

    >>> import torch
    >>> from metaframe import nn
    >>> def first_value(query, key, value, *, mask, causal):
    ...     return value[..., :1, :]
    >>> x = torch.tensor([[3.0]])
    >>> nn.attention(x, x, x, kernel=first_value)
    tensor([[3.]])
    """

    def __call__(
        self, query: Array, key: Array, value: Array, *, mask: Array | None, causal: bool
    ) -> Array:
        """Compute the attention.

        Args:
            query: (..., queries, width).
            key: (..., keys, width).
            value: (..., keys, width out).
            mask: booleans that broadcast to (..., queries, keys), or None.
            causal: query i sees the keys up to i and no others.

        Returns:
            An array of shape (..., queries, width out).
        """


_chosen: ContextVar[AttentionKernel | None] = ContextVar("attention_kernel", default=None)


def chosen_kernel() -> AttentionKernel | None:
    """The kernel of the `use_attention_kernel` around this call; None outside of one."""
    return _chosen.get()


@contextmanager
def use_attention_kernel(kernel: AttentionKernel) -> Iterator[None]:
    """A block of code in which `kernel` computes attention, in this thread or async task.

    `nn.attention` without a `kernel` of its own takes it, and so does
    `torch.nn.functional.scaled_dot_product_attention` in a torch module that metaframe calls, but
    not `torch.nn.MultiheadAttention`, which calls it where nothing can stand in for it. A kernel
    has to compute what `nn.attention` does, and derivatives as often as they are taken: a step that
    runs again in the backward pass may take another one.

    Args:
        kernel: `kernel(query, key, value, mask=..., causal=...)`, as for `nn.attention`.

    Raises:
        InputTypeError: it is no function.

    >>> import torch
    >>> from metaframe import nn
    >>> def first_value(query, key, value, *, mask, causal):
    ...     return value[..., :1, :]
    >>> x = torch.tensor([[3.0], [5.0]])
    >>> with nn.use_attention_kernel(first_value):
    ...     nn.attention(x[:1], x, x)
    tensor([[3.]])
    """
    if not callable(kernel):
        raise InputTypeError(f"kernel must be a function, received {type(kernel).__name__}.")
    token = _chosen.set(kernel)
    try:
        yield
    finally:
        _chosen.reset(token)
