"""Whole-function compilation for torch: trace the transforms away, compile what is left.

`make_fx` runs the function once, with its `vmap` and `grad` inside, and records the plain array
operations it performs. That graph has no transform left in it, so inductor compiles it in a
fraction of the time `torch.compile` needs to see through the transforms, and nothing that
inductor does can drop a derivative. The program itself has none: where autograd records, or a
transform goes over it, the function is run as it is.
"""

from __future__ import annotations

import contextlib
import gc
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from metaframe.backend.types import Array, Arrays, ArraysFn
from metaframe.errors import CompileError, MetaframeError
from metaframe_torch import _private, _tape
from metaframe_torch._ambient import Ambient, Streams, without_autocast
from metaframe_torch._release import leaving_nothing
from metaframe_torch._trace import Traced, traced

_one_at_a_time = threading.RLock()  # inductor's state is the process's


def compile_traced(fn: ArraysFn, examples: Arrays) -> ArraysFn:
    """`fn` as one compiled graph for tensors like `examples`."""
    if any(x.layout is not torch.strided or x.is_meta for x in examples):
        return fn  # inductor knows no other layouts, and without memory there is nothing to run
    streams = Streams.now()
    with _one_at_a_time, _collection_paused(), leaving_nothing():
        found = traced(fn, [_plain(x.detach()) for x in examples])
        drawn = Streams.now() != streams
        if found.recorded:
            return _uncompiled(fn)
        program = _compiled(found)
    # The casts are part of the program, which must not be cast once more.
    scope = without_autocast if any(Ambient.now().autocast) else contextlib.nullcontext

    def run(xs: Arrays) -> Arrays:
        with scope():
            return tuple(program(*map(_plain, xs)))

    # Numbers of Python and NumPy are part of the program; run again, the function gets them too.
    return _tape.recordable(run, streams.replayed(fn) if drawn else fn)


def _plain(x: Array) -> Array:
    """`x` as compiled code reads it: in order, without a sign that is still to be applied."""
    if x.is_neg() or x.is_conj():
        x = x.resolve_neg().resolve_conj()
    return x if x.is_contiguous() else x.contiguous()


def _uncompiled(fn: ArraysFn) -> ArraysFn:
    """`fn`, of whose results compiled code would lose a derivative."""

    def run(xs: Arrays) -> Arrays:
        warnings.warn(_tape.CLOSES_OVER, stacklevel=2)
        return fn(xs)

    return run


def _compiled(found: Traced) -> Callable[..., Any]:
    graph = found.graph
    graph.graph.eliminate_dead_code()
    graph.recompile()
    settings = {
        # Kernels are called from C++: on small models Python takes longer than they do. With CUDA
        # that would need the toolkit's headers on the user's machine.
        "cpp_wrapper": all(x.device.type == "cpu" for x in found.examples),
        # What calls them is compiled apart from them, with less optimisation and headers that are
        # prepared for either: a second less for each program.
        "cpp_wrapper_build_separate": True,
        # Reductions over a few elements stay reductions: unrolled, the steps of an inner loop on
        # small tensors become one expression that grows exponentially with their number.
        "unroll_reductions_threshold": 1,
        # The instructions that the processor has are not tried out first, which takes a second, and
        # seven on a machine where nothing was compiled yet: a compiler that knows C++20, as torch's
        # headers need, knows them all.
        "cpp.vec_isa_ok": True,
        # Random numbers are those of the function as it is, after the same seed.
        "fallback_random": True,
    }
    try:
        with without_autocast():
            return _private.inductor(graph, found.examples, settings)
    except Exception as error:
        if isinstance(error, MetaframeError):
            raise
        raise CompileError(
            "torch's compiler fails on an operation of a compiled function: "
            f"{str(error).strip().splitlines()[0]}. Write it in other operations, or call the "
            "function without compile."
        ) from error


@contextlib.contextmanager
def _collection_paused() -> Iterator[None]:
    """Compiling makes millions of objects, which the collector would go through again and again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
