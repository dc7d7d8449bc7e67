"""The private names of JAX that this backend uses, and what it does where one is missing.

Importing this module looks none of them up.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
from jax import Array

from metaframe.backend.private import PrivateName
from metaframe.backend.types import Arrays, ScalarFn

SEEN = ("0.8.1", "0.10.2")

TRACER = PrivateName("jax.core:Tracer", "the quick test for tracers", SEEN, "slower")
TRACE = PrivateName(
    "jax.core:Tracer._trace",
    "telling without another trace whether a loss depends on what it is differentiated by",
    SEEN,
    "slower",
)
SETTINGS = PrivateName(
    "jax._src.config:trace_context", "the quick look at JAX's settings", SEEN, "slower"
)
CAPTURED = PrivateName(
    "jax.stages:Traced._consts",
    "keeping a program that was traced under an outer transform",
    SEEN,
    "slower",
)
# Several devices.
CURRENT_TRACE = PrivateName(
    "jax._src.core:trace_ctx", "a compiled step on several devices", SEEN, "error"
)
JIT_TRACE = PrivateName(
    "jax._src.interpreters.partial_eval:DynamicJaxprTrace",
    "a compiled step on several devices",
    SEEN,
    "error",
)
# Several processes.
PROCESSES = PrivateName(
    "jax._src.distributed:global_state",
    "a step of several processes",
    SEEN,
    "error",
)


def is_tracer(x: Array) -> bool:
    """True if `x` is a tracer, whose value is not known."""
    if TRACER.found is not None:
        return isinstance(x, TRACER.found)
    try:
        x.devices()
    except jax.errors.ConcretizationTypeError:
        return True
    return False


def staged() -> bool:
    """True if a program is being recorded, as under jit. Every new array is then a tracer."""
    return is_tracer(jnp.zeros(()))


def transforming() -> bool:
    """True if any transform is active."""
    try:
        jax.sharding.get_mesh()
    except ValueError:  # it is for the outside of transforms only
        return True
    return False


_KNOWN_SETTINGS = (
    "jax_enable_x64",
    "jax_default_device",
    "jax_default_matmul_precision",
    "jax_numpy_dtype_promotion",
    "jax_numpy_rank_promotion",
    "jax_default_prng_impl",
    "jax_random_seed_offset",
    "jax_threefry_partitionable",
)


def settings() -> Hashable:
    """The settings that a program is traced under, those of context managers included."""
    if SETTINGS.found is not None:
        # JAX itself keeps a trace when this one changes.
        prng: object = getattr(jax.config, "jax_default_prng_impl", None)
        return (*SETTINGS.found(), prng)
    return tuple(getattr(jax.config, name, None) for name in _KNOWN_SETTINGS)


def captures_tracers(traced: Any) -> bool:
    """True if a `jax.stages.Traced` closes over arrays of an outer transform."""
    if CAPTURED.found is None:
        return transforming()  # the safe answer: it is not kept
    return any(map(is_tracer, CAPTURED.found.__get__(traced)))


def recorded_by_jit() -> bool:
    """True if the innermost transform is jit."""
    return isinstance(CURRENT_TRACE.required.trace, JIT_TRACE.required)


def client() -> Any:
    """The connection to the other processes; None where there are none."""
    if jax.process_count() == 1 and PROCESSES.found is None:
        return None
    return PROCESSES.required.client


def depends(value: Array, xs: Arrays) -> bool:
    """True if `value` depends differentiably on `xs`, inside a gradient transform.

    A value without a tangent leaves the transform as a plain array or as a tracer of an outer
    one, so it is enough to compare which trace the tracers belong to. Without the name true, and
    `connected` tells.
    """
    if TRACE.found is None:
        return True
    here = getattr(xs[0], "_trace", None) if xs else None
    return here is not None and getattr(value, "_trace", None) is here


def connected(fn: ScalarFn, xs: Arrays) -> bool:
    """The answer of `depends` by another trace of the derivative. True if `depends` tells."""
    if TRACE.found is not None:
        return True

    def derivative(xs: Arrays, tangents: Arrays) -> Array:
        return jax.jvp(lambda *ys: fn(ys)[0], xs, tangents)[1]  # type: ignore[no-any-return]

    program = jax.make_jaxpr(derivative)(xs, xs).jaxpr
    reached: set[Any] = set(program.invars[len(xs) :])
    for equation in program.eqns:
        if any(_is_among(x, reached) for x in equation.invars):
            reached.update(equation.outvars)
    return _is_among(program.outvars[0], reached)


def _is_among(x: Any, variables: set[Any]) -> bool:
    return not isinstance(x, jax.extend.core.Literal) and x in variables
