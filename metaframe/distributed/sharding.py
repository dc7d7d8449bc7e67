"""The sum over a meta-batch, divided among workers.

Every worker runs the same number of tasks, the smallest that suffices. Where the tasks do not
divide evenly the last ones are copies of a real task with weight 0: anything made up in its place
could give NaN, and 0 * NaN is NaN. What the workers exchange are sums of the tasks' contributions
and of their weights, never means, and each task's own results in a place of their own. All of it is
one flat buffer, which one all-reduce adds up, after every derivative was taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from metaframe.boundary import Array, Arrays, Backend
from metaframe.workers import AllSum, Workers

SumOver = Callable[[Arrays], tuple[Arrays, Arrays]]
"""Tasks and, last, their weights -> (weighted sums over them, stacked results)."""


def sharded(
    workers: Workers, backend: Backend, sum_over: SumOver, tasks: Arrays
) -> tuple[Arrays, Arrays]:
    """The sums of `sum_over` over all tasks by their number, and the stacked results.

    Every worker gets the same bits.
    """
    count = tasks[0].shape[0]
    length = -(-count // workers.count) * workers.count
    weights = backend.ops.astype(backend.ops.arange(length, "int32", tasks[0]) < count, "float32")
    how_many: list[int] = []

    def part(mine: Arrays, index: Array, all_sum: AllSum) -> Arrays:
        sums, rows = sum_over(mine)
        how_many.append(len(sums))
        placed = tuple(_in_its_place(backend, x, index, workers.count) for x in rows)
        return all_summed(backend, (*sums, backend.ops.sum(mine[-1]), *placed), all_sum)

    out = workers.each(part, (*(_padded(backend, x, length) for x in tasks), weights))
    sums, total, rows = out[: how_many[0]], out[how_many[0]], out[how_many[0] + 1 :]
    means = tuple(x / backend.ops.astype(total, backend.dtype_name(x)) for x in sums)
    return means, tuple(x[:count] for x in rows)


def all_summed(backend: Backend, arrays: Arrays, all_sum: AllSum) -> Arrays:
    """Each array summed over all workers, as one buffer.

    Floats travel in the widest type among them and at least in float32; whole numbers, if there
    are any, in a second buffer.
    """
    ops, names = backend.ops, [backend.dtype_name(x) for x in arrays]
    out: list[Array] = list(arrays)
    for dtype, places in _buffers([backend.is_floating(x) for x in arrays], names):
        flat = [ops.reshape(ops.astype(arrays[i], dtype), (-1,)) for i in places]
        buffer = all_sum(ops.concat(flat))
        start = 0
        for i in places:
            shape = tuple(arrays[i].shape)
            end = start + math.prod(shape)
            out[i] = ops.astype(ops.reshape(buffer[start:end], shape), names[i])
            start = end
    return tuple(out)


def _buffers(floating: Sequence[bool], names: Sequence[str]) -> list[tuple[str, list[int]]]:
    """For each buffer its dtype, and which arrays travel in it."""
    floats = [i for i, flag in enumerate(floating) if flag]
    others = [i for i, flag in enumerate(floating) if not flag]
    wide = "float64" if any(names[i] == "float64" for i in floats) else "float32"
    whole = "int64" if any(names[i] == "int64" for i in others) else "int32"
    return [(dtype, places) for dtype, places in ((wide, floats), (whole, others)) if places]


def _padded(backend: Backend, x: Array, length: int) -> Array:
    missing = length - x.shape[0]
    return backend.ops.concat([x, *[x[:1]] * missing]) if missing else x


def _in_its_place(backend: Backend, rows: Array, index: Array, count: int) -> Array:
    """Rows of this worker among zeros for those of the others."""
    ops, shape = backend.ops, tuple(rows.shape)
    mine = ops.arange(count, "int32", rows) == index
    # A choice and not a product: what is not finite stays in its own row.
    there = ops.reshape(mine, (count, *[1] * len(shape)))
    return ops.reshape(
        ops.where(there, rows[None], ops.zeros_like(rows)[None]), (count * shape[0], *shape[1:])
    )
