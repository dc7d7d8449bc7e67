"""Attention, whole or by blocks of queries.

The scores of a block of queries with all keys are computed, used and dropped, and computed again
when a gradient needs them, as in Rabe & Staats 2021 (arXiv 2112.05682). The softmax of a query is
over all keys at once, so that blocks change no number and derivatives of every order are those of
the plain form; keys are not cut into blocks as well, since a block of queries is linear in them.
"""

from __future__ import annotations

import math
from typing import Any

from metaframe import arguments
from metaframe.backend.attention import AttentionKernel, chosen_kernel
from metaframe.backend.contract import Backend
from metaframe.backend.types import Array, Arrays
from metaframe.errors import InputError
from metaframe.nn.blocks import block_length, by_blocks
from metaframe.ops._dispatch import native

BLOCK = 128


def attention(
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None = None,
    *,
    causal: bool = False,
    block_size: int | None = None,
    kernel: AttentionKernel | None = None,
) -> Array:
    """Scaled dot-product attention, `softmax(query @ key.T / sqrt(width)) @ value`.

    By blocks of queries the scores of one block are held at a time, by its gradients of every order
    too, which compute them again in the backward pass. A second-order gradient at length 4,096 took
    0.19 of the plain form's memory on torch and 0.21 on JAX (`python -m benchmarks.attention`).

    Args:
        query: (..., queries, width).
        key: (..., keys, width).
        value: (..., keys, width out).
        mask: booleans that broadcast to (..., queries, keys), true where a query sees a key. Each
            query needs at least one key. Default: every query sees every key.
        causal: query i sees the keys up to i and no others. Unlike a mask it takes no array of
            queries times keys.
        block_size: how many queries to attend at a time; as many as there are, or more, for the
            plain form. Default: 128 where queries times keys are at least 2**22, and the plain
            form otherwise. Blocks have no forward mode on torch and TensorFlow.
        kernel: what computes the result instead, `kernel(query, key, value, mask=..., causal=...)`,
            such as a fused kernel of the framework. Its derivatives are its own. Default: that of
            the `use_attention_kernel` around the call.

    Returns:
        An array of shape (..., queries, width out).

    Raises:
        InputError: arrays whose shapes do not fit, or a `block_size` below 1.

    >>> q, k = ops.asarray([[0.0]]), ops.asarray([[1.0], [2.0]])
    >>> ops.to_numpy(nn.attention(q, k, ops.asarray([[4.0], [8.0]]))).tolist()
    [[6.0]]
    """
    backend, (query, key, value) = native(query, key, value)
    arguments.choice(causal, "causal", (False, True))
    _check_shapes(query, key, value)
    if mask is not None:
        mask = native(query, mask)[1][1]
    queries, keys = query.shape[-2], key.shape[-2]
    size = block_length(block_size, queries, keys, BLOCK)
    if (kernel := kernel or chosen_kernel()) is not None:
        found = kernel(query, key, value, mask=mask, causal=causal)
        _check_result(found, queries, value)
        return found
    if not size:
        places = _places(backend, query) if causal else None
        return _attend(backend, query, key, value, mask, places)
    return _by_blocks(backend, (query, key, value), mask, causal, size)


def _check_shapes(query: Array, key: Array, value: Array) -> None:
    shapes = [tuple(x.shape) for x in (query, key, value)]
    if (
        min(map(len, shapes)) < 2
        or shapes[0][-1] != shapes[1][-1]
        or shapes[1][-2] != shapes[2][-2]
    ):
        raise InputError(
            "attention needs query (..., queries, width), key (..., keys, width) and value (..., "
            f"keys, width out), received shapes {shapes[0]}, {shapes[1]} and {shapes[2]}."
        )


def _check_result(found: Any, queries: int, value: Array) -> None:
    shape = tuple(getattr(found, "shape", ()))
    expected = (queries, value.shape[-1])
    if shape[-2:] != expected:
        raise InputError(
            f"kernel returned shape {shape}; attention ends in {expected}, (queries, width out)."
        )


def _places(backend: Backend, query: Array) -> Array:
    return backend.ops.arange(query.shape[-2], "int32", query)


def _attend(
    backend: Backend,
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None,
    places: Array | None,
) -> Array:
    """Attention of these queries, which stand at `places` where that matters."""
    table = backend.ops
    axes = list(range(len(key.shape)))
    transposed = table.transpose(key, [*axes[:-2], axes[-1], axes[-2]])
    scores = table.matmul(query / math.sqrt(query.shape[-1]), transposed)
    if mask is not None:
        scores = table.where(mask, scores, -math.inf)
    if places is not None:
        scores = table.where(_places(backend, key) <= places[:, None], scores, -math.inf)
    return table.matmul(backend.nn.softmax(scores, -1), value)


def _by_blocks(
    backend: Backend, arrays: Arrays, mask: Array | None, causal: bool, size: int
) -> Array:
    query, key, value = arrays
    row_of_mask = mask is not None and len(mask.shape) > 1 and mask.shape[-2] != 1
    rows = [_queries_first(backend, query)]
    held = [key, value]
    if mask is not None:
        (rows if row_of_mask else held).append(
            _queries_first(backend, mask) if row_of_mask else mask
        )
    if causal:
        rows.append(_places(backend, query))

    def block(some: Arrays, all_: Arrays) -> Array:
        allowed = all_[2] if len(all_) > 2 else None
        if row_of_mask:
            allowed = _queries_last(backend, some[1])
        places = some[-1] if causal else None
        query = _queries_last(backend, some[0])
        key, value = all_[0], all_[1]
        return _queries_first(backend, _attend(backend, query, key, value, allowed, places))

    return _queries_last(backend, by_blocks(backend, block, tuple(rows), tuple(held), size))


def _queries_first(backend: Backend, x: Array) -> Array:
    last = len(x.shape) - 1
    return backend.ops.transpose(x, [last - 1, *range(last - 1), last])


def _queries_last(backend: Backend, x: Array) -> Array:
    last = len(x.shape) - 1
    return backend.ops.transpose(x, [*range(1, last), 0, last])
