"""Whole-function compilation for TensorFlow: one graph, through XLA where that pays.

XLA fuses the many small operations of a dense network and its derivatives, which makes a step up
to a fifth faster. Its convolutions on a CPU are nine times slower than TensorFlow's own, and it
cannot compile the loops that `vectorized_map` falls back to, so a graph with either is left alone.
So is one that draws numbers from a seed, which XLA would have others of: a mask of dropout is the
same in every way to run a step.
"""

from __future__ import annotations

import logging
from typing import Any

import tensorflow as tf
from tensorflow.python.eager import record

from metaframe.backend import Arrays, ArraysFn

logger = logging.getLogger("metaframe.compile")

_BETTER_WITHOUT_XLA = ("Conv", "DepthwiseConv", "While", "StatelessWhile")
_IMPOSSIBLE_WITH_XLA = ("Collective", "Nccl")
_OTHER_NUMBERS_WITH_XLA = (
    "RandomIndexShuffle",
    "StatelessMultinomial",
    "StatelessParameterized",
    "StatelessRandom",
    "StatelessShuffle",
    "StatelessTruncated",
)
"""Random operations whose numbers follow from a seed, and from the compiler that XLA is."""
_TENSORS = frozenset({tf.__internal__.EagerTensor})


def compile_graph(fn: ArraysFn, examples: Arrays) -> ArraysFn:
    """`fn` as one graph function for tensors like `examples`."""
    specs = [tf.TensorSpec(x.shape, x.dtype) for x in examples]
    graph = tf.function(lambda *xs: list(fn(xs)), autograph=False).get_concrete_function(*specs)
    found = operations(graph)
    # The replicas of a strategy lie on several devices, XLA's program on one.
    divided = tf.distribute.has_strategy() or _any(found, _IMPOSSIBLE_WITH_XLA)
    on_cpu = not tf.config.list_physical_devices("GPU")
    better = on_cpu and _any(found, _BETTER_WITHOUT_XLA)
    if divided or better or _any(found, _OTHER_NUMBERS_WITH_XLA):
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
    """`concrete` by the call it ends in, where nothing records it.

    What it does before, checking and sorting arguments that `metaframe.compile` has looked at
    already, takes longer than the program of a small model.
    """
    captures = concrete.captured_inputs

    def run(xs: Arrays) -> Arrays:
        recorded = record.could_possibly_record() or not tf.executing_eagerly()
        variables = not _TENSORS.issuperset(map(type, xs))
        if captures or recorded or variables:
            return tuple(concrete(*xs))
        results = concrete.inference_fn.call_flat(*xs)
        return tuple(results or ())  # None where there are none

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
