"""Code of others, differentiated where it takes the root of zero.

`optax.adam` divides by the root of a second moment. Where that is zero the derivative of the root
is infinite, and infinity times the zero that it meets is NaN. So the code is traced, and those
operations of it that have no derivative somewhere get one of zero there: for the root that is what
`ops.safe_sqrt` does. Values stay what they are, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun

from metaframe.backend.types import Array, Arrays, ArraysFn

SINGULAR = frozenset({"sqrt", "rsqrt", "cbrt", "pow", "integer_pow", "div", "log", "log1p"})
"""Elementwise operations whose derivative is not finite at the border of their domain."""
RULES_OF_THEIR_OWN = frozenset({"custom_jvp_call", "custom_vjp_call"})


def with_finite_roots(fn: ArraysFn) -> ArraysFn:
    """`fn` with a derivative of zero where one of its operations has none."""

    def call(xs: Arrays) -> Arrays:
        traced = jax.make_jaxpr(fn)(xs)
        return tuple(_run(traced.jaxpr, traced.consts, xs))

    return call


def _run(jaxpr: Jaxpr, consts: Sequence[Any], xs: Sequence[Any]) -> list[Any]:
    """`jax.core.eval_jaxpr`, with rules of ours for some operations."""
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    values.update(zip(jaxpr.invars, xs, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if _is_literal(atom) else values[atom]

    for equation in jaxpr.eqns:
        found = _apply(jaxpr, equation, [read(atom) for atom in equation.invars])
        values.update(zip(equation.outvars, found, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _is_literal(atom: Any) -> bool:
    return isinstance(atom, Literal)


def _apply(jaxpr: Jaxpr, equation: Any, xs: list[Any]) -> list[Any]:
    name, params = equation.primitive.name, equation.params
    if name in SINGULAR and jnp.issubdtype(jnp.result_type(*xs), jnp.inexact):
        return [_finite(equation.primitive, params, xs)]
    if name not in RULES_OF_THEIR_OWN:
        params = {key: _inside(value) for key, value in params.items()}
    variables = [(v, x) for v, x in zip(equation.invars, xs, strict=True) if not _is_literal(v)]
    alone = jaxpr.replace(
        constvars=(),
        invars=[v for v, _ in variables],
        outvars=[*equation.outvars],
        eqns=[equation.replace(params=params)],
    )
    found: list[Any] = jaxpr_as_fun(ClosedJaxpr(alone, ()))(*(x for _, x in variables))
    return found


def _inside(param: Any) -> Any:
    """A parameter of a loop, a branch or a jitted function, with the same done to what is in it."""
    if isinstance(param, tuple):
        return tuple(map(_inside, param))
    if isinstance(param, Jaxpr):
        traced = _inside(ClosedJaxpr(param, ()))
        return traced.jaxpr
    if not isinstance(param, ClosedJaxpr):
        return param
    like = [
        jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype, weak_type=v.aval.weak_type)
        for v in param.jaxpr.invars
    ]
    return jax.make_jaxpr(lambda *xs: _run(param.jaxpr, param.consts, xs))(*like)


def _finite(primitive: Any, params: Any, xs: list[Any]) -> Array:
    """The operation, with a derivative of zero where a partial derivative is not finite."""
    places = [i for i, x in enumerate(xs) if jnp.issubdtype(jnp.result_type(x), jnp.inexact)]

    def of_floats(*floats: Array) -> Array:
        operands = list(xs)
        for i, x in zip(places, floats, strict=True):
            operands[i] = x
        return primitive.bind(*operands, **params)

    rule = jax.custom_jvp(of_floats)

    @rule.defjvp
    def differentiated(at: Arrays, tangents: Arrays) -> tuple[Array, Array]:
        regular = _is_regular(of_floats, at)
        elsewhere = tuple(jnp.where(regular, x, jnp.ones_like(x)) for x in at)
        moved = tuple(jnp.where(regular, t, jnp.zeros_like(t)) for t in tangents)
        return rule(*at), jax.jvp(of_floats, elsewhere, moved)[1]

    return rule(*(xs[i] for i in places))


def _is_regular(fn: Any, at: Arrays) -> Array:
    at = tuple(map(jax.lax.stop_gradient, at))
    zeros = tuple(map(jnp.zeros_like, at))
    regular: Array = jnp.array(True)
    for i, x in enumerate(at):
        along = (*zeros[:i], jnp.ones_like(x), *zeros[i + 1 :])
        regular &= jnp.isfinite(jax.jvp(fn, at, along)[1])
    return regular
