"""Costs, and the accuracy, as means over everything they are given."""

from __future__ import annotations

import math

from metaframe.backend.contract import Backend
from metaframe.backend.types import Array, Arrays
from metaframe.errors import InputError, InputTypeError
from metaframe.nn.blocks import block_length, by_blocks
from metaframe.nn.layers import dense
from metaframe.ops._dispatch import native, need_floating
from metaframe.ops._elementwise import log1p_exp_of_minus_abs

BLOCK = 256


def mse(prediction: Array, target: Array) -> Array:
    """The mean squared difference of two arrays.

    Args:
        prediction: a floating array of any shape.
        target: an array of the same shape.

    Returns:
        A number, as an array without axes.

    Raises:
        InputError: the shapes differ.

    >>> float(nn.mse(ops.asarray([1.0, 2.0]), ops.asarray([1.0, 4.0])))
    2.0
    """
    backend, (prediction, target) = native(prediction, target)
    _check_same_shape("mse", prediction=prediction, target=target)
    return backend.ops.mean(backend.ops.square(prediction - target))


def cross_entropy(logits: Array, labels: Array) -> Array:
    """The mean of `-log softmax(logits)[label]`.

    Args:
        logits: (..., classes).
        labels: (...) integers in `[0, classes)`. Any other makes the cost NaN.

    Returns:
        A number, as an array without axes.

    Raises:
        InputError: shapes that do not fit.
        InputTypeError: labels that are not integers.

    >>> logits = ops.asarray([[0.0, 0.0], [0.0, 1000.0]])
    >>> round(float(nn.cross_entropy(logits, ops.asarray([0, 1]))), 4)
    0.3466
    """
    backend, (logits, labels) = _classification("cross_entropy", logits, labels)
    return backend.ops.mean(_costs(backend, logits, labels))


def _costs(backend: Backend, logits: Array, labels: Array) -> Array:
    """`-log softmax(logits)[label]`, one for each label."""
    table = backend.ops
    # Selecting with `where` and not by a product keeps a logit of -inf from making NaN.
    hit = table.one_hot(labels, logits.shape[-1], "bool")
    chosen = table.where(hit, backend.nn.log_softmax(logits, -1), 0.0)
    # The count is 1, or 0 for a label out of range.
    count = table.sum(table.astype(hit, backend.dtype_name(logits)), -1)
    return -(table.sum(chosen, -1) / count)


def linear_cross_entropy(
    x: Array, w: Array, labels: Array, b: Array | None = None, *, block_size: int | None = None
) -> Array:
    """`cross_entropy(dense(x, w, b), labels)`, without holding all logits at once.

    By blocks of rows the logits of one block are held at a time, by its gradients of every order
    too.

    Args:
        x: (..., inputs), such as the last hidden states of a language model.
        w: (inputs, classes).
        labels: (...) integers in `[0, classes)`. Any other makes the cost NaN.
        b: (classes,), or None for no bias.
        block_size: how many rows of `x` to take at a time; as many as there are, or more, for the
            plain form. Default: 256 where rows times classes are at least 2**22, and the plain
            form otherwise. Blocks have no forward mode on torch and TensorFlow.

    Returns:
        A number, as an array without axes.

    Raises:
        InputError: shapes that do not fit, or a `block_size` below 1.
        InputTypeError: labels that are not integers.

    >>> x, w = ops.asarray([[1.0, 0.0], [0.0, 1.0]]), ops.asarray([[1.0, 0.0], [0.0, 1.0]])
    >>> round(float(nn.linear_cross_entropy(x, w, ops.asarray([0, 1]), block_size=1)), 4)
    0.3133
    """
    backend, (x, labels) = _classification("linear_cross_entropy", x, labels, "x")
    w = native(x, w)[1][1]
    rows = math.prod(x.shape[:-1]) if None not in tuple(x.shape) else None
    size = block_length(block_size, rows, w.shape[-1], BLOCK)
    if not size or rows is None:
        return cross_entropy(dense(x, w, b), labels)
    held = (w,) if b is None else (w, native(w, b)[1][1])

    def block(some: Arrays, all_: Arrays) -> Array:
        return _costs(backend, dense(some[0], *all_), some[1])

    reshape = backend.ops.reshape
    flat = (reshape(x, (rows, x.shape[-1])), reshape(labels, (rows,)))
    return backend.ops.mean(by_blocks(backend, block, flat, held, size))


def binary_cross_entropy(logits: Array, targets: Array) -> Array:
    """The mean of `log(1 + exp(z)) - z * y` over logits `z` and targets `y`.

    It is `-y log(p) - (1 - y) log(1 - p)` with `p = sigmoid(z)`, without overflow, and with exact
    derivatives of every order by both arguments.

    Args:
        logits: a floating array of any shape.
        targets: the same shape: probabilities, or 0 and 1 of any dtype.

    Returns:
        A number, as an array without axes.

    Raises:
        InputError: the shapes differ.
        InputTypeError: logits that are not floating.

    >>> logits = ops.asarray([0.0, 1000.0, -1000.0])
    >>> round(float(nn.binary_cross_entropy(logits, ops.asarray([1.0, 1.0, 1.0]))), 4)
    333.5644
    """
    backend, (logits, targets) = native(logits, targets)
    need_floating("binary_cross_entropy", backend, logits)
    _check_same_shape("binary_cross_entropy", logits=logits, targets=targets)
    table = backend.ops
    dtype, positive = backend.dtype_name(logits), logits > 0
    # The linear parts are joined before they are multiplied, so that nothing cancels.
    slope = table.astype(positive, dtype) - table.astype(targets, dtype)
    certain = (slope == 0.0) & (logits - logits != 0.0)  # infinity times 0 would be NaN
    linear = table.where(certain, 0.0, logits) * slope
    return table.mean(linear + log1p_exp_of_minus_abs(backend, logits, positive))


def accuracy(logits: Array, labels: Array) -> Array:
    """The share of examples whose label has the largest logit.

    Args:
        logits: (..., classes).
        labels: (...) integers in `[0, classes)`.

    Returns:
        A number in [0, 1], as an array without axes of the dtype of `logits`.

    Raises:
        InputError: shapes that do not fit.
        InputTypeError: labels that are not integers.

    >>> float(nn.accuracy(ops.asarray([[1.0, 2.0], [3.0, 0.0]]), ops.asarray([1, 1])))
    0.5
    """
    backend, (logits, labels) = _classification("accuracy", logits, labels)
    table = backend.ops
    hit = table.astype(table.argmax(logits, -1), "int32") == table.astype(labels, "int32")
    return table.mean(table.astype(hit, backend.dtype_name(logits)))


def _check_same_shape(name: str, **arrays: Array) -> None:
    # (N, 1) and (N,) would broadcast to (N, N) and give a plausible number.
    one, other = (tuple(x.shape) for x in arrays.values())
    if one != other:
        received = " and ".join(f"{key} {tuple(x.shape)}" for key, x in arrays.items())
        raise InputError(
            f"{name} needs two arrays of the same shape, received {received}. Reshape one of them."
        )


def _classification(
    name: str, logits: Array, labels: Array, what: str = "logits"
) -> tuple[Backend, Arrays]:
    backend, arrays = native(logits, labels)
    logits, labels = arrays
    if backend.is_floating(labels):
        raise InputTypeError(
            f"{name} needs integer labels, received {backend.dtype_name(labels)}. Convert them: "
            'ops.astype(labels, "int32"), or ops.argmax(labels) if they are one-hot.'
        )
    if tuple(labels.shape) != tuple(logits.shape[:-1]):
        raise InputError(
            f"{name} needs labels of shape {tuple(logits.shape[:-1])} for {what} of shape "
            f"{tuple(logits.shape)}, received {tuple(labels.shape)}."
        )
    return backend, arrays
