"""Classes that JAX takes apart, as variables: structures like others, of the same class after."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest

import metaframe
from frameworks import require
from metaframe import MAML, inner_loop, maml_step, meta_value_and_grad, reptile_step, tree
from metaframe.errors import InputError, InputTypeError

require("jax")
for library in ("flax", "equinox", "optax"):
    pytest.importorskip(library)

import equinox as eqx  # noqa: E402
import flax  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402
from flax import nnx  # noqa: E402

RNG = np.random.default_rng(0)
W, B = jnp.asarray(RNG.normal(size=(3, 2))), jnp.asarray(RNG.normal(size=2))
BATCH = {"x": jnp.asarray(RNG.normal(size=(2, 4, 3))), "y": jnp.asarray(RNG.normal(size=(2, 4, 2)))}
TASK = {name: x[0] for name, x in BATCH.items()}


def loss(batch: Any, w: Any, b: Any) -> Any:
    return jnp.mean((jnp.tanh(batch["x"] @ w + b) - batch["y"]) ** 2)


class Linear(eqx.Module):
    w: Any
    b: Any
    activation: Any = None
    rate: float = eqx.field(static=True, default=0.5)


@jax.tree_util.register_pytree_node_class
class Pair:
    """Without names for its children."""

    def __init__(self, w: Any, b: Any) -> None:
        self.w, self.b = w, b

    def tree_flatten(self) -> Any:
        return (self.w, self.b), None

    @classmethod
    def tree_unflatten(cls, _: Any, children: Any) -> Any:
        return cls(*children)


@jax.tree_util.register_dataclass
@dataclass
class Fields:
    w: Any
    b: Any


@flax.struct.dataclass
class Struct:
    w: Any
    b: Any
    name: str = flax.struct.field(pytree_node=False, default="static")


class Case(NamedTuple):
    build: Callable[[], Any]
    parts: Callable[[Any], Any] = lambda v: (v.w, v.b)
    chain: str = "w"
    """Where the weight is."""


def by_key(v: Any) -> Any:
    return tuple(x[...] for x in (v["w"], v["b"]))


CASES = {
    "equinox": Case(lambda: Linear(W, B)),
    "frozen dict": Case(lambda: flax.core.freeze({"w": W, "b": B}), by_key),
    "nnx state": Case(
        lambda: nnx.state(nnx.Dict(w=nnx.Param(W), b=nnx.Param(B))), by_key, "w/value"
    ),
    "class": Case(lambda: Pair(W, B), chain="0"),
    "dataclass": Case(lambda: Fields(W, B)),
    "flax struct": Case(lambda: Struct(W, B)),
    "inside others": Case(
        lambda: metaframe.Container(m=[Linear(W, B)]), lambda v: (v.m[0].w, v.m[0].b), "m/0/w"
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_goes_in_comes_out(name: str, execution: Any) -> None:
    build, parts, chain = CASES[name]
    v = build()

    def cost(batch: Any, v: Any) -> Any:
        return loss(batch, *parts(v))

    def run(v: Any, batch: Any) -> Any:
        whole = maml_step(batch, cost, None, v, 1, 0.1, batched="vmap", return_inner_v="all")
        chosen = meta_value_and_grad(lambda v, task: cost(task, v), outer_v=chain)
        return whole[1:], reptile_step(batch, cost, v, 1, 0.1, batched="scan")[1], chosen(v, batch)

    (grads, inner), direction, chosen = execution(run)(v, BATCH)
    adapted = inner_loop(cost, v, TASK, steps=2, lr=None, update=optax.adam(0.1))
    for found in (grads, inner, direction, adapted):
        assert type(found) is type(v)
        assert tree.structure(found) == tree.structure(v)
    assert tree.key_chains(chosen.grads) == (chain,)
    plain = maml_step(
        BATCH, lambda b, v: loss(b, *v), None, (W, B), 1, 0.1, batched="vmap", return_inner_v="all"
    )
    for found, expected in zip((*parts(grads), *parts(inner)), (*plain[1], *plain[2]), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-14)


def test_an_optax_state_is_a_structure_too() -> None:
    """A part of it that cannot be learned is refused by name, and can be left out."""
    v = {"p": (W, B), "optimizer": optax.adam(0.1).init((W, B))}

    def step(**how: Any) -> Any:
        return maml_step(
            BATCH, lambda b, v: loss(b, *v["p"]), None, v, 1, 0.1, batched="vmap", **how
        )

    with pytest.raises(InputTypeError, match="variable 'optimizer/0/count' is int32"):
        step()
    _, grads, inner = step(inner_v="p", outer_v="p", return_inner_v="first")
    assert tree.key_chains(grads) == ("p/0", "p/1")
    assert type(inner["optimizer"][0]) is type(v["optimizer"][0])


def test_a_pair_with_a_structure_of_jax() -> None:
    maml = MAML((lambda v, x: jnp.tanh(x @ v.w + v.b), Linear(W, B)), 0.1)
    assert sorted(maml.meta_parameters()) == ["b", "w"]
    maml = MAML((lambda v, x: jnp.tanh(x @ v["w"] + v["b"]), flax.core.freeze({"w": W, "b": B})))
    assert sorted(maml.meta_parameters()) == ["b", "w"]


@pytest.mark.parametrize(
    ("v", "message"),
    [
        (lambda: Linear(W, B, jnp.tanh), "Keep functions out of the variables.*partition"),
        (lambda: nnx.Linear(3, 2, rngs=nnx.Rngs(0)), "it is a model.*named_params"),
    ],
)
def test_a_whole_model_is_refused_with_the_way_out(v: Any, message: str) -> None:
    """A module of nnx is a graph: a Variable that is reached on two ways would become two."""
    with pytest.raises(InputTypeError, match=message):
        maml_step(BATCH, lambda b, v: loss(b, v.w, v.b), None, v(), 1, 0.1, batched="vmap")


def test_choosing_from_a_mapping_that_cannot_be_changed() -> None:
    v = flax.core.freeze({"a": {"w": W, "b": B}, "c": B})
    assert tree.prune(v, (True, False, False)) == flax.core.freeze({"a": {"b": B}})
    assert tree.prune(v, (False, False, True)) == flax.core.freeze({"c": B})
    with pytest.raises(InputError, match=r"missing \['c'\]"):
        tree.same_structure(v.pop("c")[0], tree.structure(v), what="v")
