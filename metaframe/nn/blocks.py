"""Functions of rows, computed block by block and again in the backward pass.

The memory is that of one block and of the rows themselves, for derivatives of every order.
"""

from __future__ import annotations

from collections.abc import Callable

from metaframe import arguments
from metaframe.backend.contract import Backend
from metaframe.backend.types import Array, Arrays

LONG = 2**22
"""The number of pairs of a row and of what it is held against that makes blocks the default."""


def block_length(given: int | None, rows: int | None, others: int | None, default: int) -> int:
    """The number of rows in a block; 0 for no blocks.

    Args:
        given: the argument `block_size`.
        rows: how many rows there are; None if it is not known while a framework traces.
        others: how many numbers there are for each row.
        default: the length of blocks where `given` is None and there are more than `LONG` numbers.

    Raises:
        InputError: `given` is below 1.
    """
    if given is not None:
        given = arguments.integer(given, "block_size", at_least=1)
    if rows is None or others is None:
        return 0
    size = given if given is not None else default if rows * others >= LONG else rows
    return size if size < rows else 0


def by_blocks(
    backend: Backend,
    fn: Callable[[Arrays, Arrays], Array],
    rows: Arrays,
    held: Arrays,
    size: int,
) -> Array:
    """`fn(rows, held)`, whose result has one row for each row, by blocks of `size` rows.

    Args:
        backend: the backend of the arrays.
        fn: a function of a few rows and of what is held, which closes over no arrays.
        rows: arrays with the same leading axis.
        held: arrays that every block sees whole.
        size: how many rows a block has, below the number of rows.
    """
    count, rest = divmod(rows[0].shape[0], size)
    split = count * size
    run = backend.recompute(lambda xs: (fn(xs[: len(rows)], xs[len(rows) :]),))
    reshape = backend.ops.reshape
    folded = tuple(reshape(x[:split], (count, size, *x.shape[1:])) for x in rows)
    _, (found,) = backend.repeat(
        lambda carry, row: (carry, run((*row, *held))), (), count, rows=folded, rolled=True
    )
    found = reshape(found, (split, *found.shape[2:]))
    if not rest:
        return found
    (last,) = run((*(x[split:] for x in rows), *held))
    return backend.ops.concat([found, last])
