"""Whole-function compilation for TensorFlow: one graph, through XLA where that pays.

XLA fuses the many small operations of a dense network and its derivatives, which makes a step up
to a fifth faster. Its convolutions on a CPU are nine times slower than TensorFlow's own, and it
cannot compile the loops that `vectorized_map` falls back to, so a graph with either is left alone.
"""

from __future__ import annotations

import logging
from typing import Any

import tensorflow as tf

from metaframe.backend.types import Arrays, ArraysFn
from metaframe_tensorflow import _private

logger = logging.getLogger("metaframe.compile")

_BETTER_WITHOUT_XLA = ("Conv", "DepthwiseConv", "While", "StatelessWhile")
_IMPOSSIBLE_WITH_XLA = ("Collective", "Nccl")


def compile_graph(fn: ArraysFn, examples: Arrays) -> ArraysFn:
    """`fn` as one graph function for tensors like `examples`."""
    specs = [tf.TensorSpec(x.shape, x.dtype) for x in examples]
    graph = tf.function(lambda *xs: list(fn(xs)), autograph=False).get_concrete_function(*specs)
    found = operations(graph)
    # The replicas of a strategy lie on several devices, XLA's program on one.
    divided = tf.distribute.has_strategy() or _any(found, _IMPOSSIBLE_WITH_XLA)
    on_cpu = not tf.config.list_physical_devices("GPU")
    if divided or (on_cpu and _any(found, _BETTER_WITHOUT_XLA)):
        return _caller(graph)
    fused = tf.function(graph, jit_compile=True, autograph=False).get_concrete_function(*specs)
    try:
        fused(*examples)
    except (tf.errors.InvalidArgumentError, tf.errors.UnimplementedError) as error:
        # The same program, unfused: an operation that XLA has no kernel for.
        logger.debug("not compiled with XLA: %s", error)
        return _caller(graph)
    return _caller(fused)


def _caller(concrete: Any) -> ArraysFn:
    """`concrete` by its quick call, where nothing records it."""
    quick = _private.quick_call(concrete)
    if quick is None or concrete.captured_inputs:
        return lambda xs: tuple(concrete(*xs))
    with tf.init_scope():
        plain = frozenset({type(tf.constant(0))})

    def run(xs: Arrays) -> Arrays:
        recorded = _private.may_record() or not tf.executing_eagerly()
        if recorded or not plain.issuperset(map(type, xs)):
            return tuple(concrete(*xs))
        return quick(xs)

    return run


def operations(graph: Any) -> set[str]:
    """The kinds of operations in a concrete function, those of the functions it calls included."""
    definition = graph.graph.as_graph_def()
    nodes = [*definition.node]
    for function in definition.library.function:
        nodes += function.node_def
    return {node.op for node in nodes}


def _any(names: set[str], prefixes: tuple[str, ...]) -> bool:
    return any(name.startswith(prefixes) for name in names)
