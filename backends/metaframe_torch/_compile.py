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
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.fx import GraphModule

from metaframe.backend import Array, Arrays, ArraysFn
from metaframe_torch import _private, _tape

logger = logging.getLogger("metaframe.compile")

_one_at_a_time = threading.RLock()  # inductor's state is the process's


def compile_traced(fn: ArraysFn, examples: Arrays) -> ArraysFn:
    """`fn` as one compiled graph for tensors like `examples`."""
    programs: dict[bool, Callable[..., Any]] = {}

    def program(xs: Arrays) -> Callable[..., Any]:
        # Two at most, since `fn` may do something else where gradients are enabled.
        recording = torch.is_grad_enabled()
        if recording not in programs:
            if programs:
                logger.debug("a program once more, for gradients %s", "on" if recording else "off")
            programs[recording] = _program(fn, xs)
        return programs[recording]

    def run(xs: Arrays) -> Arrays:
        return tuple(program(xs)(*[x if x.is_contiguous() else x.contiguous() for x in xs]))

    if not _tape.transforming():  # what a transform hands over are no tensors to compile for
        program(examples)
    differentiable = _tape.taped(run, fn)
    return lambda xs: fn(xs) if _tape.transforming() else differentiable(xs)


def _program(fn: ArraysFn, examples: Arrays) -> Callable[..., Any]:
    outputs: list[Array] = []

    def flat(*xs: Array) -> list[Array]:
        outputs[:] = fn(xs)
        return list(outputs)

    # Compiled code relies on the strides of its inputs, and callers do not think of them.
    plain = [x.detach().contiguous() for x in examples]
    _ = _private.PROXY_MODE.required  # our own functions ask whether they are recorded
    with _one_at_a_time, _collection_paused():
        graph = _private.MAKE_FX.required(flat)(*plain)
        if any(y.requires_grad for y in outputs):
            # By what `fn` closes over, whose gradient compiled code would lose.
            return lambda *xs: fn(xs)
        return _compiled(graph, plain)


def _compiled(graph: GraphModule, plain: list[Array]) -> Callable[..., Any]:
    graph.graph.eliminate_dead_code()
    for node in graph.graph.find_nodes(op="placeholder"):
        # make_fx gives each its own FakeTensorMode, and the C++ wrapper wants one for all.
        node.meta.pop("val", None)
    graph.recompile()
    settings = {
        # Kernels are called from C++: on small models Python takes longer than they do. With CUDA
        # that would need the toolkit's headers on the user's machine.
        "cpp_wrapper": all(x.device.type == "cpu" for x in plain),
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
    }
    return _private.inductor(graph, plain, settings)


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
