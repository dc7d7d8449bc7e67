"""The best TensorFlow we could write by hand for the two workloads, one function a strategy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from benchmarks.harness import Program
from benchmarks.workloads import Case

Params = list[Any]
Cost = Callable[[Params, Any, Any], Any]


def programs(case: Case, params: list[Any], tasks: tuple[Any, ...]) -> dict[str, Program]:
    """By name; "eager" ones are for the overhead of metaframe's own Python."""
    meta_gradient = _task_gradient(case, COSTS[case.workload.name])

    def vectorised(p: Params, tasks: tuple[Any, ...]) -> Any:
        rows = tf.vectorized_map(lambda task: meta_gradient(p, task), tasks)
        return [tf.reduce_mean(x, 0) for x in rows]

    def one_by_one(p: Params, tasks: tuple[Any, ...]) -> Any:
        count = tasks[0].shape[0]
        total = [tf.zeros((), p[0].dtype), *map(tf.zeros_like, p)]

        def body(i: Any, total: list[Any]) -> Any:
            found = meta_gradient(p, [x[i] for x in tasks])
            return i + 1, [a + b for a, b in zip(total, found, strict=True)]

        _, total = tf.while_loop(
            lambda i, _: i < count, body, (tf.constant(0), total), parallel_iterations=1
        )
        return [x / count for x in total]

    if case.workload.name == "W1":
        found = {
            "tf.function vectorized_map": tf.function(vectorised, autograph=False),
            "tf.function vectorized_map XLA": tf.function(
                vectorised, autograph=False, jit_compile=True
            ),
            "eager vectorized_map": vectorised,
        }
    else:
        found = {"tf.function while": tf.function(one_by_one, autograph=False)}
        if case.steps == 1:
            found["tf.function vectorized_map"] = tf.function(vectorised, autograph=False)
    return {name: lambda fn=fn: fn(params, tasks) for name, fn in found.items()}


def _task_gradient(case: Case, cost: Cost) -> Callable[[Params, Any], list[Any]]:
    """(cost, *gradients) of one task."""
    lr = case.workload.inner_lr

    def run(p: Params, task: Any) -> list[Any]:
        sx, sy, qx, qy = task
        p = [tf.identity(x) for x in p]
        with tf.GradientTape(watch_accessed_variables=False) as outer:
            outer.watch(p)
            q = p
            for _ in range(case.steps):
                with tf.GradientTape(watch_accessed_variables=False) as inner:
                    inner.watch(q)
                    value = cost(q, sx, sy)
                grads = inner.gradient(value, q)
                if case.order == 1:
                    grads = [tf.stop_gradient(g) for g in grads]
                q = [x - lr * g for x, g in zip(q, grads, strict=True)]
            value = cost(q, qx, qy)
        return [value, *outer.gradient(value, p)]

    return run


def _mlp_cost(p: Params, x: Any, y: Any) -> Any:
    b3, w3, b1, w1, b2, w2 = p
    h = tf.nn.relu(x @ w1 + b1)
    h = tf.nn.relu(h @ w2 + b2)
    return tf.reduce_mean(tf.square(h @ w3 + b3 - y))


def _conv4_cost(p: Params, x: Any, y: Any) -> Any:
    *blocks, b, w = p
    for i in range(0, 12, 3):
        kernel, scale, shift = blocks[i : i + 3]
        x = tf.nn.conv2d(x, kernel, 1, "SAME")
        mean = tf.reduce_mean(x, (0, 1, 2))
        var = tf.reduce_mean(tf.square(x - mean), (0, 1, 2))
        x = (x - mean) * (scale * tf.math.rsqrt(var + 1e-5)) + shift
        x = tf.nn.relu(_max_pool(x))
    logits = tf.reshape(x, (x.shape[0], -1)) @ w + b
    hit = tf.one_hot(y, logits.shape[-1], dtype=logits.dtype)
    return -tf.reduce_mean(tf.reduce_sum(tf.nn.log_softmax(logits) * hit, -1))


def _max_pool(x: Any) -> Any:
    """As a maximum of four shifts: faster than a reduction over a reshaped image."""
    height, width = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
    rows = tf.maximum(x[:, 0:height:2, :width], x[:, 1:height:2, :width])
    return tf.maximum(rows[:, :, 0::2], rows[:, :, 1::2])


COSTS: dict[str, Cost] = {"W1": _mlp_cost, "W2": _conv4_cost}
