"""Mapping and looping."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from metaframe import ops
from metaframe.core.meta_gradient import meta_value_and_grad
from metaframe.testing.conformance.clause import Bench, Chapter, close, same

ROWS = np.arange(12.0).reshape(4, 3) / 7 + 0.5

VMAP, LOOPS = Chapter("vmap"), Chapter("loops")


@VMAP.clause("values")
def _values(b: Bench) -> None:
    """The leading axis of every input and output, integers and booleans among them."""
    table = np.array([10.0, 20.0, 30.0])

    def fn(xs: Any) -> Any:
        row, index = xs
        return b.backend.ops.sum(row * 2.0), row[1:], b.arr(table)[index], index + 1, row > 1.0

    indices = np.array([2, 0, 1, 2], "int32")
    found = b.to_np(b.backend.vmap(fn)((b.arr(ROWS), b.arr(indices))))
    expected = (2 * ROWS.sum(1), ROWS[:, 1:], table[indices], indices + 1, ROWS > 1.0)
    for a, wanted in zip(found, expected, strict=True):
        close(a, wanted, b.exact)


@VMAP.clause("nested")
def _nested(b: Bench) -> None:
    """A map of maps, and one of gradients of maps."""
    cube = ROWS.reshape(2, 2, 3)
    xs = (b.arr(cube),)

    def inner(xs: Any) -> Any:
        return b.backend.vmap(lambda ys: (b.backend.ops.sum(ys[0] ** 2),))(xs)

    close(b.to_np(b.backend.vmap(inner)(xs)[0]), (cube**2).sum(2), b.exact)

    def gradient(xs: Any) -> Any:
        return tuple(b.gradient(lambda x: inner((x,))[0], *xs))

    close(b.to_np(b.backend.vmap(gradient)(xs)[0]), 2 * cube, b.exact)


@VMAP.clause("constants")
def _constants(b: Bench) -> None:
    """An output that depends on no input is repeated."""
    seven = b.arr([7.0, 8.0])
    found = b.to_np(b.backend.vmap(lambda xs: (seven, xs[0]))((b.arr(ROWS),)))
    same(found[0], [[7.0, 8.0]] * 4)


@VMAP.clause("one-row")
def _one_row(b: Bench) -> None:
    """A leading axis of size 1 is mapped like any other."""
    found = b.to_np(b.backend.vmap(lambda xs: (ops.sum(xs[0]),))((b.arr(ROWS[:1]),)))
    close(found[0], ROWS[:1].sum(1), b.exact)


@VMAP.clause("mapped_value_and_grad")
def _mapped_gradients(b: Bench) -> None:
    """Values and aux of every task, stacked; gradients summed over tasks; what is held, whole."""
    w = np.array([1.0, -2.0, 0.5])

    def fn(xs: Any, held: Any, task: Any) -> Any:
        return b.backend.ops.sum(xs[0] ** 2 * task[0]) * xs[1] * held[0], (xs[0] + task[0],)

    run = b.backend.mapped_value_and_grad(fn)
    values, aux, grads = b.to_np(run((b.arr(w), b.arr(3.0)), (b.arr(0.5),), (b.arr(ROWS),)))
    close(values, 1.5 * (w**2 * ROWS).sum(1), b.exact)
    close(aux[0], w + ROWS, b.exact)
    close(grads[0], 3 * w * ROWS.sum(0), b.exact)
    close(grads[1], 0.5 * (w**2 * ROWS).sum(), b.exact)


def _chunks(b: Bench, task_map: Any, size: int | None) -> None:
    """The mean over five tasks of (w - t)^2 a, and what it returns besides."""
    targets, scale = np.arange(5.0), np.array([1.0, 2.0, 0.5, 3.0, 1.5])

    def task_cost(v: Any, task: Any) -> Any:
        return (v["w"] - task["t"]) ** 2 * task["a"], task["t"] + v["w"]

    step = meta_value_and_grad(task_cost, task_map=task_map, chunk_size=size, has_aux=True)
    cost, grads, aux = b.to_np(step(b.arr({"w": 1.5}), b.arr({"t": targets, "a": scale})))
    close(cost, np.mean((1.5 - targets) ** 2 * scale), b.exact)
    close(grads["w"], np.mean(2 * (1.5 - targets) * scale), b.exact)
    close(aux, targets + 1.5, b.exact)


for _task_map, _size in (("loop", None), ("scan", None), *(("vmap", k) for k in (None, 1, 2, 5))):
    VMAP.add(
        f"tasks/{_task_map}" + (f"-{_size}" if _size else ""),
        "Meta-gradients over tasks, at once, in chunks or one after the other, are the same.",
        functools.partial(_chunks, task_map=_task_map, size=_size),
    )


# -- loops ---------------------------------------------------------------------------------------


def _running(b: Bench, start: Any, rows: Any) -> Any:
    """Carry' = carry x + x, with the square of the carry on the way; an integer counts along."""

    def body(carry: Any, xs: Any) -> Any:
        value, count = carry
        return (value * xs[0] + xs[0], count + 1), (value * value, count)

    return b.backend.scan(body, (start, b.backend.asarray(0, "int32")), (rows,))


def _ran(start: np.ndarray[Any, Any]) -> tuple[Any, Any, Any]:
    """The same in NumPy: the end, d end / d start, and the squares."""
    value, slope, squares = start, np.ones_like(start), []
    for row in ROWS:
        squares.append(value**2)
        value, slope = value * row + row, slope * row
    return value, slope, np.stack(squares)


@LOOPS.clause("scan")
def _scan(b: Bench) -> None:
    """Scan hands the carry on and stacks what every row gives; a gradient goes through it."""
    start = np.array([0.5, -1.0, 2.0])
    end, slope, squares = _ran(start)
    (value, count), (stacked, counts) = b.to_np(_running(b, b.arr(start), b.arr(ROWS)))
    close(value, end, b.exact)
    close(stacked, squares, b.exact)
    same(count, 4)
    same(counts, [0, 1, 2, 3])
    found = b.gradient(lambda x: _running(b, x, b.arr(ROWS))[0][0], b.arr(start))
    close(b.to_np(found[0]), slope, b.exact)


@LOOPS.clause("scan-compiled", compiles=True)
def _compiled_scan(b: Bench) -> None:
    """Scan is the same inside a compiled program, and so is its gradient."""
    start = np.array([0.5, -1.0, 2.0])
    end, slope, squares = _ran(start)

    def fn(xs: Any) -> Any:
        (value, count), (stacked, _) = _running(b, *xs)
        return value, count, stacked, *b.gradient(lambda x: _running(b, x, xs[1])[0][0], xs[0])

    xs = (b.arr(start), b.arr(ROWS))
    value, count, stacked, gradient = b.to_np(tuple(b.backend.compile(fn, xs)(xs)))
    same(count, 4)
    for found, expected in ((value, end), (stacked, squares), (gradient, slope)):
        close(found, expected, b.exact)


def _some_rows(compiled: bool, b: Bench) -> None:
    def body(carry: Any, xs: Any) -> Any:
        value = carry[0] * xs[0] + xs[0]
        return (value,), (value * 2,)

    def fn(xs: Any) -> Any:
        start, rows, first, count = xs
        (end,), (values,) = b.backend.scan_rows(body, (start,), (rows,), first, count)
        return end, values

    start = np.array([0.5, -1.0, 2.0])
    run: Callable[[Any], Any] = fn
    for first, count in ((0, len(ROWS)), (1, 2), (2, 1)):
        numbers = tuple(b.backend.asarray(np.asarray(n, np.int32)) for n in (first, count))
        xs = (b.arr(start), b.arr(ROWS), *numbers)
        if compiled and run is fn:
            run = b.backend.compile(fn, xs)
        end, values = b.to_np(tuple(run(xs)))
        expected = start
        for i in range(first, first + count):
            expected = expected * ROWS[i] + ROWS[i]
            close(values[i], 2 * expected, b.exact)
        close(end, expected, b.exact)


LOOPS.add(
    "scan-rows",
    "A scan of some rows is a scan of these alone.",
    functools.partial(_some_rows, False),
)


@LOOPS.clause("scan-rows-compiled", compiles=True)
def _compiled_some_rows(b: Bench) -> None:
    """With `loops_in_programs`, one program scans whichever rows it is told to."""
    if b.backend.loops_in_programs:
        _some_rows(True, b)


def _repeat(rolled: bool, compiled: bool, b: Bench) -> None:
    def times(count: int) -> Callable[[Any], Any]:
        def body(carry: Any, row: Any) -> Any:
            after = carry[0] * 1.1 + row[0]
            return (after, carry[1] + 1), (after * carry[0],)

        def end(x: Any, rows: Any) -> Any:
            carry = (x, b.backend.asarray(0, "int32"))
            carry, ys = b.backend.repeat(body, carry, count, rows=(rows,), rolled=rolled)
            return (*carry, *(ys or (b.arr(np.zeros((0, 2))),)))

        def weighed(x: Any, rows: Any) -> Any:
            value, _, ys = end(x, rows)
            return ops.sum(value) + ops.sum(ys) if count else ops.sum(value)

        return lambda xs: (
            *end(*xs),
            *b.gradient(lambda x: weighed(x, xs[1]), xs[0]),
            *b.gradient(lambda rows: weighed(xs[0], rows), xs[1]),
        )

    for count in (0, 1, 3, 11):
        x, rows = np.array([0.5, 2.0]), np.linspace(-1, 1, 2 * count).reshape(count, 2)
        xs = (b.arr(x), b.arr(rows))
        points = [x]
        for row in rows:
            points.append(points[-1] * 1.1 + row)
        products = [after * before for before, after in itertools.pairwise(points)]
        # Of each point: through the next one, and through the products that it is in.
        slope, of_rows = np.ones(2), np.zeros((count, 2))
        for k in reversed(range(count)):
            of_rows[k] = slope + points[k]
            slope = 1.1 * of_rows[k] + points[k + 1]
        run = b.backend.compile(times(count), xs) if compiled else times(count)
        value, steps, found, by_x, by_rows = b.to_np(tuple(run(xs)))
        close(value, points[-1], b.exact)
        same(steps, count)
        close(found, np.reshape(products, (count, 2)), b.exact)
        close(by_x, slope, b.exact)
        close(by_rows, of_rows, b.exact)


for _rolled in (False, True):
    for _compiled in (False, True):
        LOOPS.add(
            "repeat" + "-rolled" * _rolled + "-compiled" * _compiled,
            "A function applied 0, 1, 3 and 11 times to rows, and the gradient through it.",
            functools.partial(_repeat, _rolled, _compiled),
            compiles=_compiled,
        )
