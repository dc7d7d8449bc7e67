"""The transforms of JAX."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import export, lax
from jax.sharding import Mesh, PartitionSpec

import metaframe
from transform_tables import Fn, Row


def ones(x: Any) -> Any:
    return jnp.ones_like(x)


def two(w: Any) -> Any:
    return jnp.stack([w, 2 * w])


def summed(f: Fn) -> Fn:
    return lambda w: f(w).sum()


def sharded(f: Fn) -> Fn:
    """Each device gets an array of its own."""
    mesh, spec = Mesh(np.array(jax.devices()[:1]), ("devices",)), PartitionSpec("devices")
    mapped: Fn = jax.shard_map(lambda w: f(w[0])[None], mesh=mesh, in_specs=spec, out_specs=spec)
    return lambda w: mapped(w[None])


def custom_vjp(f: Fn, w: Any) -> Any:
    @jax.custom_vjp
    def g(w: Any) -> Any:
        return f(w)

    g.defvjp(lambda w: (f(w), w), lambda w, c: (c * jax.grad(f)(w),))
    return jax.grad(g)(w)


def custom_jvp(f: Fn, w: Any) -> Any:
    @jax.custom_jvp
    def g(w: Any) -> Any:
        return f(w)

    g.defjvp(lambda w, dw: jax.jvp(f, w, dw))
    return jax.grad(g)(w)


def repeated(f: Fn, w: Any) -> Any:
    return lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] + f(c[1] * w)), (0, 0.1))[1]


def scanned(f: Fn, w: Any) -> Any:
    return lax.scan(lambda c, x: (c + f(c * x), None), 0.1, two(w))[0]


def chosen(f: Fn, w: Any) -> Any:
    return lax.cond(w[0] > 0, f, lambda w: w[0], w)


def exported(f: Fn, w: Any) -> Any:
    return export.export(jax.jit(f))(w).call(w)


def within(scope: AbstractContextManager[Any], f: Fn, w: Any) -> Any:
    with scope:
        return f(w)


ROWS = {
    "jax.grad": Row(lambda f, w: jax.grad(f)(w)),
    "jax.grad of grad": Row(lambda f, w: jax.grad(summed(jax.grad(f)))(w)),
    "jax.vjp": Row(lambda f, w: jax.vjp(f, w)[1](1.0)[0]),
    "jax.jvp": Row(lambda f, w: jax.jvp(f, (w,), (ones(w),))[1]),
    "jax.linearize": Row(lambda f, w: jax.linearize(f, w)[1](ones(w))),
    "jax.jacrev": Row(lambda f, w: jax.jacrev(f)(w)),
    "jax.jacfwd": Row(lambda f, w: jax.jacfwd(f)(w)),
    "jax.hessian": Row(lambda f, w: jax.hessian(f)(w)),
    "jax.vmap": Row(lambda f, w: jax.vmap(f)(two(w))),
    "jax.vmap, axis_name": Row(lambda f, w: jax.vmap(f, axis_name="i")(two(w))),
    "jax.vmap of grad": Row(lambda f, w: jax.vmap(jax.grad(f))(two(w))),
    "jax.grad of vmap": Row(lambda f, w: jax.grad(summed(lambda w: jax.vmap(f)(two(w))))(w)),
    "jax.jit": Row(lambda f, w: jax.jit(f)(w)),
    "jax.jit of grad": Row(lambda f, w: jax.jit(jax.grad(f))(w)),
    "jax.grad of jit": Row(lambda f, w: jax.grad(jax.jit(f))(w)),
    "jax.pmap": Row(lambda f, w: jax.pmap(f)(w[None])),
    "jax.shard_map": Row(lambda f, w: sharded(f)(w)),
    "jax.shard_map of grad": Row(lambda f, w: sharded(jax.grad(f))(w)),
    "jax.grad of shard_map": Row(lambda f, w: jax.grad(summed(sharded(f)))(w)),
    "lax.scan": Row(scanned),
    "jax.grad of scan": Row(lambda f, w: jax.grad(lambda w: scanned(f, w))(w)),
    "lax.map": Row(lambda f, w: lax.map(f, two(w))),
    "lax.cond": Row(chosen),
    "jax.grad of cond": Row(lambda f, w: jax.grad(lambda w: chosen(f, w))(w)),
    "lax.switch": Row(lambda f, w: lax.switch(1, [lambda w: w[0], f], w)),
    "lax.while_loop": Row(repeated),
    "jax.checkpoint": Row(lambda f, w: jax.grad(jax.checkpoint(f))(w)),
    "jax.jit of checkpoint": Row(lambda f, w: jax.jit(jax.grad(jax.checkpoint(f)))(w)),
    "in a jax.custom_vjp": Row(custom_vjp),
    "in a jax.custom_jvp": Row(custom_jvp),
    "jax.export": Row(exported),
    "metaframe.compile": Row(lambda f, w: metaframe.compile(lambda w: f(w))(w)),
    "metaframe.compile of grad": Row(lambda f, w: metaframe.compile(jax.grad(f))(w)),
    "jax.grad of metaframe.compile": Row(
        lambda f, w: jax.grad(metaframe.compile(lambda w: f(w)))(w)
    ),
    "equinox.filter_jit": Row(lambda f, w: eqx.filter_jit(f)(w)),
    "equinox.filter_grad": Row(lambda f, w: eqx.filter_grad(f)(w)),
    "nnx.jit": Row(lambda f, w: nnx.jit(f)(w)),
    "jax.disable_jit": Row(lambda f, w: within(jax.disable_jit(), f, w)),
    "jax.default_matmul_precision": Row(
        lambda f, w: within(jax.default_matmul_precision("float32"), f, w)
    ),
    "jax.default_device": Row(lambda f, w: within(jax.default_device(jax.devices()[0]), f, w)),
    "jax.debug_nans": Row(lambda f, w: within(jax.debug_nans(True), f, w)),
    "jax.checking_leaks": Row(
        lambda f, w: within(jax.checking_leaks(), lambda w: jax.grad(f)(w), w)
    ),
}
