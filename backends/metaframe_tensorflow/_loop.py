"""A loop in a graph whose size does not depend on the number of steps, with its gradient.

The gradient of `tf.while_loop` keeps what every step computed in lists of type variant, which
`tf.vectorized_map` cannot convert. Here the loop stores the carry before each step in plain
tensors, and its gradient is a second loop that runs each step again and transposes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from metaframe.backend.types import Array, Arrays, RowFn
from metaframe_tensorflow._moments import exact_moments
from metaframe_tensorflow._rule import (
    is_differentiable,
    is_eager,
    summed,
    traced,
    watched_outside,
)


def rolled(fn: RowFn, carry: Arrays, times: int, rows: Arrays) -> tuple[Arrays, Arrays] | None:
    """`times` applications of `fn`, at least one; None where it cannot be.

    TensorFlow has no way from the gradient of a loop to a tensor outside of its graph, and the
    plain tensors need shapes that are known.
    """
    graph = _graph_of(fn, carry, tuple(x[0] for x in rows))
    tensors = [x for x in graph.captured_inputs if x.dtype != tf.resource]
    closed = tuple(x for x in tensors if is_differentiable(x))
    like = tuple(graph.structured_outputs[len(carry) :])
    known = all(x.shape.is_fully_defined() for x in (*carry, *like))
    if not known or graph.variables or any(map(is_eager, closed)):
        return None
    counts = (len(carry), len(rows))

    @tf.custom_gradient  # type: ignore[untyped-decorator]
    def rule(*given: Any) -> tuple[list[Any], Any]:
        start, rows, _ = split(given, counts)
        final, ys, before = _forward(fn, start, times, rows, like)

        def pull_back(*cotangents: Any) -> list[Any]:
            return _backward(fn, before, rows, closed, cotangents, times)

        return [*final, *ys], pull_back

    found = rule(*carry, *rows, *closed)
    return tuple(found[: len(carry)]), tuple(found[len(carry) :])


def _graph_of(fn: RowFn, carry: Arrays, row: Arrays) -> Any:
    count = len(carry)

    def flat(xs: Arrays) -> Arrays:
        after, y = fn(xs[:count], xs[count:])
        return (*after, *y)

    return traced(flat, (*carry, *row))


def split(xs: Sequence[Any], counts: Sequence[int]) -> list[Arrays]:
    """`xs` cut into groups of the given sizes, and one more with what is left."""
    groups, start = [], 0
    for count in counts:
        groups.append(tuple(xs[start : start + count]))
        start += count
    return [*groups, tuple(xs[start:])]


def _forward(
    fn: RowFn, carry: Arrays, times: int, rows: Arrays, like: Sequence[Any]
) -> tuple[Arrays, Arrays, Arrays]:
    """The last carry, the ys, and the carry before each step, both with a leading step axis."""

    def body(i: Array, carry: Arrays, ys: Arrays, before: Arrays) -> Any:
        after, y = fn(carry, _rows_at(rows, i))
        return i + 1, tuple(after), _written(ys, i, y), _written(before, i, carry)

    start = (tf.constant(0), carry, _stores(like, times), _stores(carry, times))
    _, carry, ys, before = tf.while_loop(
        lambda i, *_: i < times, body, start, parallel_iterations=1, maximum_iterations=times
    )
    return carry, ys, before


def _backward(
    fn: RowFn, before: Arrays, rows: Arrays, closed: Arrays, cotangents: Sequence[Any], times: int
) -> list[Any]:
    """Cotangents of the start, of the rows and of what `fn` closes over."""
    of_end, of_ys = tuple(cotangents[: len(before)]), tuple(cotangents[len(before) :])

    def body(i: Array, of_carry: Arrays, of_rows: Arrays, of_closed: Arrays) -> Any:
        i = i - 1
        with exact_moments(), tf.GradientTape(watch_accessed_variables=False) as tape:
            outside = watched_outside(tape, closed)
            given = (*_rows_at(before, i), *_rows_at(rows, i))
            watched = [x for x in given if is_differentiable(x)]
            tape.watch(watched)
            after, ys = fn(given[: len(before)], given[len(before) :])
        results = zip((*after, *ys), (*of_carry, *_rows_at(of_ys, i)), strict=True)
        ends = [(y, cotangent) for y, cotangent in results if is_differentiable(y)]
        found = tape.gradient(
            [y for y, _ in ends],
            [*watched, *outside],
            output_gradients=[cotangent for _, cotangent in ends],
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )
        of_given = iter(found[: len(watched)])
        slopes = [next(of_given) if is_differentiable(x) else tf.zeros_like(x) for x in given]
        pairs = zip(of_closed, summed(found[len(watched) :], len(closed)), strict=True)
        return (
            i,
            tuple(slopes[: len(before)]),
            _written(of_rows, i, slopes[len(before) :]),
            tuple(a + b for a, b in pairs),
        )

    start = (
        tf.constant(times),
        of_end,
        tuple(map(tf.zeros_like, rows)),
        tuple(map(tf.zeros_like, closed)),
    )
    _, of_start, of_rows, of_closed = tf.while_loop(
        lambda i, *_: i > 0, body, start, parallel_iterations=1, maximum_iterations=times
    )
    return [*of_start, *of_rows, *of_closed]


def _rows_at(xs: Sequence[Any], i: Array) -> Arrays:
    return tuple(tf.gather(x, i) for x in xs)


def _stores(like: Sequence[Any], times: int) -> Arrays:
    return tuple(tf.zeros((times, *x.shape), x.dtype) for x in like)


def _written(stores: Sequence[Any], i: Array, xs: Sequence[Any]) -> Arrays:
    pairs = zip(stores, xs, strict=True)
    return tuple(tf.tensor_scatter_nd_update(store, [[i]], x[None]) for store, x in pairs)
