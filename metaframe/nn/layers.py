"""Layers as pure functions of arrays.

Images are (N, H, W, C), convolution kernels (height, width, channels in, channels out).
Normalisation is composed from means: fused kernels are where frameworks get second derivatives
wrong, and where they differ from one another.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

from metaframe.backend.tables import Pads
from metaframe.backend.types import Array
from metaframe.errors import InputError
from metaframe.ops._dispatch import native

Statistics = tuple[Array, Array]
"""Mean and variance, (channels,) each."""
Pair = int | tuple[int, int]
Padding = Literal["same", "valid"] | int | Pads


def dense(x: Array, w: Array, b: Array | None = None) -> Array:
    """A dense layer: `x @ w + b`.

    Args:
        x: (..., inputs).
        w: (inputs, outputs).
        b: (outputs,), or None for no bias.

    Returns:
        An array of shape (..., outputs).

    Raises:
        InputError: the last axis of `x` does not have the size of the first one of `w`.

    >>> x, w = ops.asarray([[1.0, 2.0]]), ops.asarray([[3.0], [4.0]])
    >>> ops.to_numpy(nn.dense(x, w, ops.asarray([0.5]))).tolist()
    [[11.5]]
    """
    backend, (x, w) = native(x, w)
    if x.shape[-1] != w.shape[0]:
        raise InputError(
            f"dense needs inputs of size {w.shape[0]} for w of shape {tuple(w.shape)}, "
            f"received x of shape {tuple(x.shape)}."
        )
    return _add(backend.ops.matmul(x, w), b)


def conv2d(
    x: Array,
    kernel: Array,
    bias: Array | None = None,
    *,
    stride: Pair = 1,
    padding: Padding = "same",
) -> Array:
    """Cross-correlate (N, H, W, C in) images with a (height, width, C in, C out) kernel.

    Args:
        x: (N, H, W, C in), the images.
        kernel: (height, width, C in, C out).
        bias: (C out,), added last, or None for no bias.
        stride: pixels between outputs, one number or (down, right).
        padding: "same" pads with zeros to ceil(size / stride) outputs, the odd pixel below and
            right; "valid" not at all; a number pads by it on every side; or the numbers
            `((above, below), (left, right))`.

    Returns:
        An array of shape (N, H out, W out, C out).

    Raises:
        InputError: shapes that do not fit, a kernel larger than the padded images, or an unknown
            `padding`.

    >>> image = ops.reshape(ops.asarray([1.0, 2.0, 3.0, 4.0]), (1, 2, 2, 1))
    >>> ones = ops.ones_like(image[0, :, :, :, None])
    >>> ops.to_numpy(nn.conv2d(image, ones))[0, :, :, 0].tolist()
    [[10.0, 6.0], [7.0, 4.0]]
    """
    backend, (x, kernel) = native(x, kernel)
    if len(x.shape) != 4 or len(kernel.shape) != 4 or x.shape[3] != kernel.shape[2]:
        raise InputError(
            "conv2d needs x of shape (N, H, W, C in) and a kernel of shape (height, width, C in, "
            f"C out), received {tuple(x.shape)} and {tuple(kernel.shape)}."
        )
    strides = _pair(stride)
    pads = _pads(x.shape[1:3], kernel.shape[:2], strides, padding)
    _check_fits("a kernel", kernel.shape[:2], x, pads)
    return _add(backend.nn.conv2d(x, kernel, strides, pads), bias)


def _add(x: Array, bias: Array | None) -> Array:
    return x if bias is None else x + native(x, bias)[1][1]


def _pair(value: Pair) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def _pads(
    size: tuple[int, int], window: tuple[int, int], stride: tuple[int, int], padding: Padding
) -> Pads:
    if padding == "same":
        height, width = map(_same, size, window, stride)
        return height, width
    if padding == "valid":
        return (0, 0), (0, 0)
    if isinstance(padding, int):
        return (padding, padding), (padding, padding)
    if isinstance(padding, str):
        raise InputError(
            f'padding is "same", "valid", a number or ((above, below), (left, right)), '
            f"received {padding!r}."
        )
    return padding


def _same(size: int, window: int, stride: int) -> tuple[int, int]:
    total = max((math.ceil(size / stride) - 1) * stride + window - size, 0)
    return total // 2, total - total // 2


def _check_fits(
    what: str, window: tuple[int, int], x: Array, pads: Pads = ((0, 0), (0, 0))
) -> None:
    # An error in one framework, and an image without pixels in another. TensorFlow may not know a
    # size while it traces.
    sizes = zip(x.shape[1:3], pads, window, strict=True)
    if any(size is not None and size + sum(pad) < n for size, pad, n in sizes):
        raise InputError(
            f"{what} of {' x '.join(map(str, window))} pixels does not fit into x of shape "
            f"{tuple(x.shape)}, padded by {pads}. Use larger images, or fewer layers that shrink "
            "them."
        )


def max_pool2d(x: Array, window: Pair = 2) -> Array:
    """The largest pixel of each window, without overlap.

    Of equal largest pixels the first one, row by row, gets the gradient.

    Args:
        x: (N, H, W, C), the images.
        window: height and width of a window in pixels, one number or (height, width). Rows and
            columns that fill no window are dropped.

    Returns:
        An array of shape (N, H // height, W // width, C).

    Raises:
        InputError: `x` is not of that shape, or a window is larger than the images.

    >>> image = ops.reshape(ops.asarray([1.0, 2.0, 3.0, 4.0]), (1, 2, 2, 1))
    >>> ops.to_numpy(nn.max_pool2d(image)).tolist()
    [[[[4.0]]]]
    """
    backend, (x,) = native(x)
    if len(x.shape) != 4:
        raise InputError(f"max_pool2d needs x of shape (N, H, W, C), received {tuple(x.shape)}.")
    _check_fits("a window", _pair(window), x)
    return backend.nn.max_pool2d(x, _pair(window))


def mean_pool(x: Array) -> Array:
    """The mean over all pixels of each channel.

    Args:
        x: (N, H, W, C), the images.

    Returns:
        An array of shape (N, C).

    >>> image = ops.reshape(ops.asarray([1.0, 2.0, 3.0, 4.0]), (1, 2, 2, 1))
    >>> ops.to_numpy(nn.mean_pool(image)).tolist()
    [[2.5]]
    """
    backend, (x,) = native(x)
    return backend.ops.mean(x, (1, 2))


_recorder: ContextVar[list[Statistics] | None] = ContextVar("_recorder", default=None)


@contextmanager
def recorded_statistics() -> Iterator[list[Statistics]]:
    """The mean and variance of every `batch_norm` inside that took its inputs' own, in order.

    >>> with recorded_statistics() as found:
    ...     _ = nn.batch_norm(ops.asarray([[1.0], [3.0]]))
    >>> [[ops.to_numpy(x).tolist() for x in pair] for pair in found]
    [[[2.0], [1.0]]]
    """
    found: list[Statistics] = []
    token = _recorder.set(found)
    try:
        yield found
    finally:
        _recorder.reset(token)


def batch_norm(
    x: Array,
    scale: Array | None = None,
    shift: Array | None = None,
    *,
    statistics: Statistics | None = None,
    eps: float = 1e-5,
) -> Array:
    """Normalise each channel (last axis) by mean and variance over all other axes.

    `(x - mean) / sqrt(var + eps) * scale + shift` (Ioffe and Szegedy, 2015, arXiv 1502.03167). The
    statistics are those of `x`, as MAML uses them, unless others are given: nothing is remembered
    between calls, so support and query are each normalised by their own.

    Args:
        x: (..., C).
        scale: (C,), a factor applied after the normalisation, or None for none.
        shift: (C,), added last, or None for none.
        statistics: mean and variance, (C,) each, to normalise by instead of those of `x`.
        eps: added to the variance.

    Returns:
        An array of the shape of `x`.

    >>> x = ops.asarray([[1.0], [3.0]])
    >>> ops.to_numpy(nn.batch_norm(x, shift=ops.asarray([2.0]), eps=0.0)).tolist()
    [[1.0], [3.0]]
    """
    backend, (x,) = native(x)
    table, axes, found = backend.ops, tuple(range(len(x.shape) - 1)), _recorder.get()
    if statistics is None and found is None:
        scale, shift = (None if y is None else native(x, y)[1][1] for y in (scale, shift))
        if (normalised := backend.nn.batch_norm(x, scale, shift, eps)) is not None:
            return normalised
    if statistics is None:
        mean = table.mean(x, axes, keepdims=True)
        centred = x - mean
        var = table.mean(table.square(centred), axes, keepdims=True)
        if found is not None:
            found.append((table.reshape(mean, (-1,)), table.reshape(var, (-1,))))
    else:
        mean, var = native(x, *statistics)[1][1:]
        centred = x - mean
    factor = 1.0 / table.sqrt(var + eps)
    if scale is not None:
        factor = factor * native(x, scale)[1][1]  # on (1, ..., C) numbers, not on every pixel
    return _add(centred * factor, shift)


def layer_norm(
    x: Array, scale: Array | None = None, shift: Array | None = None, *, eps: float = 1e-5
) -> Array:
    """Normalise each row (last axis) by its own mean and variance.

    `(x - mean) / sqrt(var + eps) * scale + shift` (Ba et al., 2016, arXiv 1607.06450).

    Args:
        x: (..., C).
        scale: (C,), a factor applied after the normalisation, or None for none.
        shift: (C,), added last, or None for none.
        eps: added to the variance.

    Returns:
        An array of the shape of `x`.

    >>> ops.to_numpy(nn.layer_norm(ops.asarray([[1.0, 3.0]]), eps=0.0)).tolist()
    [[-1.0, 1.0]]
    """
    backend, (x,) = native(x)
    table = backend.ops
    centred = x - table.mean(x, -1, keepdims=True)
    result = centred / table.sqrt(table.mean(table.square(centred), -1, keepdims=True) + eps)
    if scale is not None:
        result = result * native(x, scale)[1][1]
    return _add(result, shift)


def embedding(table: Array, ids: Array) -> Array:
    """Rows of a table, looked up by integer ids.

    Args:
        table: (rows, width).
        ids: (...) integers in `[0, rows)`.

    Returns:
        An array of shape (..., width).

    >>> table = ops.asarray([[1.0, 2.0], [3.0, 4.0]])
    >>> ops.to_numpy(nn.embedding(table, ops.asarray([1, 1]))).tolist()
    [[3.0, 4.0], [3.0, 4.0]]
    """
    backend, (table, ids) = native(table, ids)
    return backend.ops.take(table, ids, 0)


def dropout(x: Array, keep: Array, rate: float) -> Array:
    """`x / (1 - rate)` where `keep` is true and zero elsewhere.

    The mask is an argument, and so part of the batch, because a mask drawn inside is another
    one in every recomputation and on every backend. Draw it with `dropout_mask`.

    Args:
        x: a floating array of any shape.
        keep: booleans whose shape broadcasts with that of `x`.
        rate: the share that is dropped, in `[0, 1)`.

    Returns:
        An array of the broadcast shape.

    Raises:
        InputError: `rate` is out of range.

    >>> x, keep = ops.asarray([1.0, 2.0]), ops.asarray([True, False])
    >>> ops.to_numpy(nn.dropout(x, keep, rate=0.5)).tolist()
    [2.0, 0.0]
    """
    if not 0.0 <= rate < 1.0:
        raise InputError(f"rate is the share that is dropped, in [0, 1), received {rate}.")
    backend, (x, keep) = native(x, keep)
    return backend.ops.where(keep, x / (1.0 - rate), 0.0)
