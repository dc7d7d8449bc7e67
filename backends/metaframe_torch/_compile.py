"""Whole-function compilation for torch: trace the transforms away, compile what is left.

`make_fx` runs the function once, with its `vmap` and `grad` inside, and records the plain array
operations it performs. That graph has no transform left in it, so inductor compiles it in a
fraction of the time `torch.compile` needs to see through the transforms, and nothing that
inductor does can drop a derivative.
"""

from __future__ import annotations

from typing import Any

import torch
import torch._inductor.config
from torch._inductor import compile as inductor_compile
from torch.fx.experimental.proxy_tensor import make_fx

from metaframe.backend import Array, Arrays, ArraysFn


def compile_traced(fn: ArraysFn, examples: Arrays) -> ArraysFn:
    """`fn` as one compiled graph for tensors like `examples`."""

    def flat(*xs: Array) -> list[Array]:
        return list(fn(xs))

    # Compiled code relies on the strides of its inputs, and callers do not think of them.
    plain = [x.detach().contiguous() for x in examples]
    graph = make_fx(flat)(*plain)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    with torch.no_grad(), torch._inductor.config.patch(unroll_reductions_threshold=1):
        # Reductions over a few elements stay reductions: unrolled, the steps of an inner loop on
        # small tensors become one expression that grows exponentially with their number.
        compiled: Any = inductor_compile(graph, plain)

    return lambda xs: tuple(compiled(*(x if x.is_contiguous() else x.contiguous() for x in xs)))
