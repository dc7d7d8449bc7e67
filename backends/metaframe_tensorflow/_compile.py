"""Whole-function compilation for TensorFlow: one graph, through XLA where that pays.

XLA fuses the many small operations of a dense network and its derivatives, which makes a step up
to a fifth faster. Its convolutions on a CPU are nine times slower than TensorFlow's own, and it
cannot compile the loops that `vectorized_map` falls back to, so a graph with either is left alone;
so is one whose assertions or random numbers XLA would change.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import hashlib
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import tensorflow as tf

from metaframe.backend.types import Arrays, ArraysFn
from metaframe.errors import CompileError
from metaframe_tensorflow import _private
from metaframe_tensorflow._graph import RANDOM, operations

logger = logging.getLogger("metaframe.compile")

_units: contextvars.ContextVar[list[Any] | None] = contextvars.ContextVar("units", default=None)

_BETTER_WITHOUT_XLA = ("Conv", "DepthwiseConv", "While", "StatelessWhile")
_IMPOSSIBLE_WITH_XLA = ("Collective", "Nccl")
_DROPPED_BY_XLA = ("Assert", "CheckNumerics")
_OTHER_NUMBERS_WITH_XLA = (
    "RandomIndexShuffle",
    "StatelessMultinomial",
    "StatelessParameterized",
    "StatelessRandom",
    "StatelessShuffle",
    "StatelessTruncated",
)
"""Random operations whose numbers follow from a seed, and from the compiler that XLA is."""


def compile_graph(fn: ArraysFn, examples: Arrays) -> ArraysFn:
    """`fn` as one graph function for tensors like `examples`."""
    specs = [tf.TensorSpec(x.shape, x.dtype) for x in examples]

    def flat(*xs: Any) -> list[Any]:
        with tf.variable_creator_scope(_created_outside):
            return list(fn(xs))

    fused_units: list[Any] = []
    with _fusing(fused_units):
        graph = _traced(flat, specs)
    plain = _caller(graph)
    if fused_units:
        unfused = functools.cache(lambda: _caller(_traced(flat, specs)))
        return _tried(plain, lambda xs: unfused()(xs))
    if not _suits_xla(operations(graph)):
        return plain
    return _tried(_caller(_fused(graph, specs)), plain)


def unit(fn: ArraysFn, examples: Arrays) -> Any:
    """`fn` as a function that a graph may call again and again, by XLA where that suits a step."""
    specs = [tf.TensorSpec(x.shape, x.dtype) for x in examples]
    graph = _traced(lambda *xs: list(fn(xs)), specs)
    noted = _units.get()
    if noted is None or not _suits_xla(operations(graph)):
        return graph
    noted.append(graph)
    return _fused(graph, specs)


def _fused(graph: Any, specs: list[Any]) -> Any:
    """`graph` for XLA: the same function for every graph that says the same.

    TensorFlow keeps what XLA makes of a function for as long as the process lives, a third of a
    megabyte for the smallest. A function that is made anew, as in a search or a cell of a notebook
    that is run again, finds what was made of it before.
    """
    text = None if graph.captured_inputs else _text(graph)
    known = None if text is None else _fused_graphs.pop(text, None)
    if known is None:
        known = tf.function(graph, jit_compile=True, autograph=False).get_concrete_function(*specs)
    if text is not None:
        _fused_graphs[text] = known
        for old in list(_fused_graphs)[:-GRAPHS_KEPT]:
            _fused_graphs.pop(old, None)
    return known


GRAPHS_KEPT = 64
_fused_graphs: dict[bytes, Any] = {}
"""Functions for XLA by a digest of their graphs, the one used last at the end."""


def _text(graph: Any) -> bytes | None:
    """A digest of all that `graph` computes; None if its text does not tell.

    That is, where it calls functions, whose names are new each time, or has gradients of its own.
    """
    definition = graph.graph.as_graph_def()
    if definition.library.function or any(_GRADIENT in node.attr for node in definition.node):
        return None
    ends = [x.name for x in (*graph.inputs, *graph.outputs)]
    state = tf.config.experimental.tensor_float_32_execution_enabled()
    whole = definition.SerializeToString(deterministic=True) + repr((ends, state)).encode()
    return hashlib.blake2b(whole).digest()


_GRADIENT = "_gradient_op_type"
"""The attribute by which an operation names a gradient that was registered for it."""


def _traced(fn: Callable[..., Any], specs: list[Any]) -> Any:
    return tf.function(fn, autograph=False).get_concrete_function(*specs)


@contextlib.contextmanager
def _fusing(units: list[Any]) -> Iterator[None]:
    """Within, `unit` may use XLA, and notes where it does."""
    token = _units.set(units)
    try:
        yield
    finally:
        _units.reset(token)


def _created_outside(create: Callable[..., Any], **settings: Any) -> Any:
    """A variable that a function makes when it is traced, made outside of the graph.

    `tf.function` would trace the function once more for it. In another thread no graph is built.
    """
    if tf.distribute.has_strategy():
        return create(**settings)  # a strategy belongs to a thread
    context = contextvars.copy_context()
    with ThreadPoolExecutor(1) as outside:
        made = outside.submit(context.run, lambda: tf.Variable(**settings))
    if isinstance(made.exception(), (TypeError, ValueError, NotImplementedError)):
        raise CompileError(
            "a compiled function makes a tf.Variable from a value that it computes. Make the "
            "variable outside, from a value that is known there."
        ) from made.exception()
    return made.result()


def _suits_xla(found: set[str]) -> bool:
    unlike = (*_IMPOSSIBLE_WITH_XLA, *_DROPPED_BY_XLA, *_OTHER_NUMBERS_WITH_XLA)
    if found & RANDOM or _any(found, unlike):
        return False
    if tf.distribute.has_strategy():
        return False  # its replicas lie on several devices, XLA's program on one
    on_cpu = not tf.config.list_physical_devices("GPU")
    return not (on_cpu and _any(found, _BETTER_WITHOUT_XLA))


def _tried(fused: ArraysFn, plain: ArraysFn) -> ArraysFn:
    """`fused`, unless its first call shows that XLA cannot compile it, which comes before it runs.

    Not tried before the first call, so that nothing that a program does is done twice.
    """
    chosen: list[ArraysFn] = []

    def run(xs: Arrays) -> Arrays:
        if chosen:
            return chosen[0](xs)
        try:
            results = fused(xs)
        except (tf.errors.InvalidArgumentError, tf.errors.UnimplementedError) as error:
            # The same program, unfused: an operation that XLA has no kernel for.
            logger.debug("not compiled with XLA: %s", error)
            results = plain(xs)
            chosen.append(plain)
        else:
            chosen.append(fused)
        return results

    return run


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


def _any(names: set[str], prefixes: tuple[str, ...]) -> bool:
    return any(name.startswith(prefixes) for name in names)
