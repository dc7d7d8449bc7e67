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

from metaframe.backend.contract import Backend
from metaframe.backend.types import Array, Arrays
from metaframe.backend.workers import AllSum, Share, Workers
from metaframe.errors import InputError

SumOver = Callable[[Arrays], tuple[Arrays, Arrays]]
"""Tasks and, last, their weights -> (weighted sums over them, stacked results)."""


def sharded(
    workers: Workers, backend: Backend, sum_over: SumOver, tasks: Arrays, share: Share | None
) -> tuple[Arrays, Arrays]:
    """The sums of `sum_over` over all tasks by their number, and the stacked results.

    Every worker gets the same bits. With `share`, `tasks` are those of this process.
    """
    ops = backend.ops
    count = tasks[0].shape[0] if share is None else share.num_tasks
    length = workers.padded(count)
    each = length // workers.count
    how_many: list[int] = []

    def part(mine: Arrays, index: Array, all_sum: AllSum) -> Arrays:
        number = ops.arange(each, "int32", mine[0]) + index * each
        weights = ops.astype(number < count, "float32")
        sums, rows = sum_over((*mine, weights))
        how_many.append(len(sums))
        placed = tuple(_in_its_place(backend, x, index, workers.count) for x in rows)
        return all_summed(backend, (*sums, ops.sum(weights), *placed), all_sum)

    if share is None:
        tasks = tuple(_padded(backend, x, length) for x in tasks)
    out = workers.each(part, tasks, shared=share is not None)
    sums, total, rows = out[: how_many[0]], out[how_many[0]], out[how_many[0] + 1 :]
    means = tuple(x / ops.astype(total, backend.dtype_name(x)) for x in sums)
    return means, tuple(x[:count] for x in rows)


def all_summed(backend: Backend, arrays: Arrays, all_sum: AllSum) -> Arrays:
    """Each array summed over all workers, as one buffer.

    Floats travel in the widest type among them and at least in float32; whole numbers, if there
    are any, in a second buffer.

    Raises:
        InputError: an array of anything else.
    """
    ops, names = backend.ops, [backend.dtype_name(x) for x in arrays]
    for x, name in zip(arrays, names, strict=True):
        if not (backend.is_floating(x) or name.startswith(("int", "uint", "bool"))):
            raise InputError(
                f"with distributed=True a task's results are sums over the workers, of real "
                f"numbers; received {name}. Return such an array in real parts, as real and "
                "imaginary part for instance, or not at all."
            )
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
    whole = "int64" if any(names[i] in ("int64", "uint64") for i in others) else "int32"
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
