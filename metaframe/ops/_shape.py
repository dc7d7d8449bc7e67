"""Functions that move elements about, and products of arrays."""

from __future__ import annotations

from collections.abc import Sequence

from metaframe.backend.types import Array
from metaframe.errors import InputError
from metaframe.ops._dispatch import native


def reshape(x: Array, shape: Sequence[int]) -> Array:
    """The elements of `x`, last axis fastest, in another shape.

    Args:
        x: an array of any shape.
        shape: the new sizes, with the same product; one of them may be -1, and is then computed.

    Returns:
        An array of that shape.

    >>> ops.to_numpy(ops.reshape(ops.asarray([[1, 2], [3, 4]]), (-1,))).tolist()
    [1, 2, 3, 4]
    """
    backend, (x,) = native(x)
    return backend.ops.reshape(x, shape)


def transpose(x: Array, axes: Sequence[int]) -> Array:
    """`x` with its axes in another order.

    Args:
        x: an array of any shape.
        axes: the axes of `x`, each once, counted from 0.

    Returns:
        An array whose axis `i` is axis `axes[i]` of `x`.

    >>> ops.to_numpy(ops.transpose(ops.asarray([[1, 2], [3, 4]]), (1, 0))).tolist()
    [[1, 3], [2, 4]]
    """
    backend, (x,) = native(x)
    return backend.ops.transpose(x, axes)


def broadcast_to(x: Array, shape: Sequence[int]) -> Array:
    """`x` repeated along new axes in front and along axes of size 1.

    Args:
        x: an array of any shape.
        shape: the shape of the result, to which the shape of `x` broadcasts.

    Returns:
        An array of that shape.

    >>> ops.to_numpy(ops.broadcast_to(ops.asarray([1, 2]), (2, 2))).tolist()
    [[1, 2], [1, 2]]
    """
    backend, (x,) = native(x)
    return backend.ops.broadcast_to(x, shape)


def expand_dims(x: Array, axis: int) -> Array:
    """`x` with a new axis of size 1.

    Args:
        x: an array of any shape.
        axis: the position of the new axis in the result, from the end if negative.

    Returns:
        An array with one axis more.

    >>> ops.to_numpy(ops.expand_dims(ops.asarray([1, 2]), -1)).tolist()
    [[1], [2]]
    """
    backend, (x,) = native(x)
    return backend.ops.expand_dims(x, axis)


def squeeze(x: Array, axis: int) -> Array:
    """`x` without an axis of size 1.

    Args:
        x: an array with at least one axis.
        axis: the axis to remove, from the end if negative.

    Returns:
        An array with one axis less.

    Raises:
        InputError: the axis has another size than 1.

    >>> ops.to_numpy(ops.squeeze(ops.asarray([[1], [2]]), 1)).tolist()
    [1, 2]
    """
    backend, (x,) = native(x)
    if x.shape[axis] not in (1, None):
        # torch would return the array as it is.
        raise InputError(
            f"squeeze needs an axis of size 1, received axis={axis} of shape {tuple(x.shape)}."
        )
    return backend.ops.squeeze(x, axis)


def concat(xs: Sequence[Array], axis: int = 0) -> Array:
    """Arrays joined along an axis they have.

    Args:
        xs: at least one array; all have the same shape, except along `axis`.
        axis: the axis to join along, from the end if negative. Default: the first one.

    Returns:
        An array whose size along `axis` is the sum of theirs.

    Raises:
        InputError: `xs` is empty.

    >>> ops.to_numpy(ops.concat([ops.asarray([1, 2]), ops.asarray([3])])).tolist()
    [1, 2, 3]
    """
    backend, arrays = native(*_at_least_one("concat", xs))
    return backend.ops.concat(arrays, axis)


def stack(xs: Sequence[Array], axis: int = 0) -> Array:
    """Arrays of one shape joined along a new axis.

    Args:
        xs: at least one array; all have the same shape.
        axis: the position of the new axis in the result, from the end if negative. Default: in
            front.

    Returns:
        An array with one axis more, of size `len(xs)`.

    Raises:
        InputError: `xs` is empty.

    >>> ops.to_numpy(ops.stack([ops.asarray([1, 2]), ops.asarray([3, 4])], axis=1)).tolist()
    [[1, 3], [2, 4]]
    """
    backend, arrays = native(*_at_least_one("stack", xs))
    return backend.ops.stack(arrays, axis)


def _at_least_one(name: str, xs: Sequence[Array]) -> Sequence[Array]:
    if len(xs) == 0:
        raise InputError(f"{name} needs at least one array, received none.")
    return xs


def take(x: Array, indices: Array, axis: int = 0) -> Array:
    """The slices of `x` at integer indices.

    Args:
        x: an array with at least one axis.
        indices: integers of any shape, in `[0, size)`, where `size` is that of `x` along `axis`.
        axis: the axis to take from. Default: the first one.

    Returns:
        An array in which the axes of `indices` stand in the place of `axis`.

    >>> ops.to_numpy(ops.take(ops.asarray([1, 2, 3]), ops.asarray([[2, 0]]))).tolist()
    [[3, 1]]
    """
    backend, (x, indices) = native(x, indices)
    return backend.ops.take(x, indices, axis)


def pad(x: Array, widths: Sequence[tuple[int, int]]) -> Array:
    """`x` with zeros added around it.

    Args:
        x: an array of any shape.
        widths: for each axis how many zeros go `(before, after)` it.

    Returns:
        An array with these sizes added to those of `x`.

    >>> ops.to_numpy(ops.pad(ops.asarray([1, 2]), [(1, 2)])).tolist()
    [0, 1, 2, 0, 0]
    """
    backend, (x,) = native(x)
    return backend.ops.pad(x, widths)


def matmul(x: Array, y: Array) -> Array:
    """The matrix product, as in NumPy.

    Args:
        x: (..., n, k), or a vector (k,).
        y: (..., k, m), or a vector (k,). Leading axes broadcast.

    Returns:
        An array of shape (..., n, m), without `n` or `m` where that argument is a vector.

    >>> ops.to_numpy(ops.matmul(ops.asarray([[1.0, 2.0]]), ops.asarray([3.0, 4.0]))).tolist()
    [11.0]
    """
    backend, (x, y) = native(x, y)
    return backend.ops.matmul(x, y)


def einsum(equation: str, *xs: Array) -> Array:
    """The sum of products that an equation spells out.

    Args:
        equation: the axes of every array and of the result, such as "ij,jk->ik". The result's axes
            must be written.
        xs: as many arrays as the equation names.

    Returns:
        An array with the axes after "->".

    >>> x = ops.asarray([[1.0, 2.0], [3.0, 4.0]])
    >>> ops.to_numpy(ops.einsum("ij,ij->i", x, x)).tolist()
    [5.0, 25.0]
    """
    backend, arrays = native(*xs)
    return backend.ops.einsum(equation, *arrays)
