"""Models as people write them in Flax and Equinox, each with how its own library calls it.

All take four examples of three numbers and return two numbers for each, in float64. The tests
import this module after JAX, Flax and Equinox are known to be there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

DOUBLE: dict[str, Any] = {"param_dtype": jnp.float64}


@dataclass(frozen=True)
class Entry:
    """A model and its own library's call of it."""

    build: Callable[[], Any]
    own: Callable[[Any, str | None, Any], Any]
    """`(model, norm, x) -> output`, without metaframe."""


# -- flax.nnx -----------------------------------------------------------------------------------


def nnx_own(model: Any, norm: str | None, x: Any) -> Any:
    copy = nnx.clone(model)
    if norm is not None:
        frozen = norm == "frozen"
        copy.set_attributes(nnx.BatchNorm, use_running_average=frozen, raise_if_not_found=False)
    return copy(x)


def settings(seed: int = 0) -> dict[str, Any]:
    return {"rngs": nnx.Rngs(seed), **DOUBLE}


def nnx_norm(size: int) -> Any:
    layer = nnx.BatchNorm(size, **settings())
    layer.mean = nnx.BatchStat(jnp.linspace(-0.1, 0.2, size, dtype=jnp.float64))
    layer.var = nnx.BatchStat(jnp.linspace(0.5, 1.5, size, dtype=jnp.float64))
    return layer


class TwoPaths(nnx.Module):
    """The encoder is an attribute, and part of the whole that is called."""

    def __init__(self) -> None:
        self.encoder = nnx.Linear(3, 4, **settings())
        self.net = nnx.Sequential(self.encoder, jnp.tanh, nnx.Linear(4, 2, **settings(1)))

    def __call__(self, x: Any) -> Any:
        return self.net(x) + self.encoder(x)[:, :2]


class Twice(nnx.Module):
    def __init__(self) -> None:
        self.layer, self.head = nnx.Linear(3, 3, **settings()), nnx.Linear(3, 2, **settings(1))

    def __call__(self, x: Any) -> Any:
        return self.head(jnp.tanh(self.layer(jnp.tanh(self.layer(x)))))


class Tied(nnx.Module):
    """One Variable in two layers."""

    def __init__(self) -> None:
        self.a, self.b = nnx.Linear(3, 3, **settings()), nnx.Linear(3, 3, **settings(1))
        self.b.kernel = self.a.kernel
        self.head = nnx.Linear(3, 2, **settings(2))

    def __call__(self, x: Any) -> Any:
        return self.head(self.b(jnp.tanh(self.a(x))))


class SharedEmbedding(nnx.Module):
    def __init__(self) -> None:
        self.embed = nnx.Embed(3, 4, **settings())
        self.scale = nnx.Param(jnp.ones(3))

    def __call__(self, x: Any) -> Any:
        hidden = jnp.tanh(self.embed(jnp.argsort(x)).sum(1))
        return (self.embed.attend(hidden) * self.scale[...])[:, :2]


class Normalised(nnx.Module):
    """Nested, with one normalisation used at two depths."""

    def __init__(self) -> None:
        self.norm = nnx_norm(4)
        self.body = nnx.Sequential(nnx.Linear(3, 4, **settings()), self.norm, jnp.tanh)
        self.blocks = nnx.List([nnx.Dict(lin=nnx.Linear(4, 4, **settings(i))) for i in (1, 2)])
        self.head = nnx.Linear(4, 2, **settings(3))

    def __call__(self, x: Any) -> Any:
        x = self.body(x)
        for block in self.blocks:
            x = jnp.tanh(self.norm(block["lin"](x)))
        return self.head(x)


class Dropping(nnx.Module):
    def __init__(self) -> None:
        self.layer = nnx.Linear(3, 8, **settings())
        self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(7))
        self.again = nnx.Dropout(0.3, rngs=nnx.Rngs(dropout=8))
        self.head = nnx.Linear(8, 2, **settings(1))

    def __call__(self, x: Any) -> Any:
        return self.head(self.again(jnp.tanh(self.drop(self.layer(x)))))


class Adapted(nnx.Module):
    def __init__(self) -> None:
        self.body = nnx.LoRA(3, 2, 4, base_module=nnx.Linear(3, 4, **settings()), **settings(1))
        self.body.lora_b[...] = jnp.full((2, 4), 0.3)
        self.head = nnx.LoRALinear(4, 2, lora_rank=1, lora_param_dtype=jnp.float64, **settings(2))

    def __call__(self, x: Any) -> Any:
        return self.head(jnp.tanh(self.body(x)))


class Recurrent(nnx.Module):
    def __init__(self) -> None:
        self.cells = nnx.RNN(nnx.GRUCell(1, 4, **settings()))
        self.back = nnx.RNN(nnx.OptimizedLSTMCell(4, 4, **settings(1)), reverse=True)
        self.head = nnx.Linear(4, 2, **settings(2))

    def __call__(self, x: Any) -> Any:
        return self.head(self.back(self.cells(x[..., None]))[:, 0])


def attend(query: Any, key: Any, value: Any, mask: Any = None, **_: Any) -> Any:
    """As Flax's own, which has its softmax in float32, always."""
    weights = nnx.nn.attention.dot_product_attention_weights(query, key, mask=mask)
    return jnp.einsum("...hqk,...khd->...qhd", weights, value)


class Attending(nnx.Module):
    def __init__(self) -> None:
        self.embed = nnx.Linear(1, 4, **settings())
        self.attend = nnx.MultiHeadAttention(2, 4, decode=False, attention_fn=attend, **settings(1))
        self.head = nnx.Linear(4, 2, **settings(2))

    def __call__(self, x: Any) -> Any:
        x = self.embed(x[..., None])
        weights = nnx.make_causal_mask(x[..., 0])
        return self.head(self.attend(x, mask=weights).mean(1))


class Stateful(nnx.Module):
    """A count that multiplies, a raw array, a Variable of the user's own, settings in a list."""

    class Frozen(nnx.Variable):
        pass

    def __init__(self) -> None:
        self.layer = nnx.Linear(3, 2, **settings())
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))
        self.offset = self.Frozen(jnp.full(2, 0.5))
        self.raw = nnx.data(jnp.linspace(0.0, 1.0, 2))
        self.table = nnx.Param(jnp.ones(2), note="kept")

    def __call__(self, x: Any) -> Any:
        self.calls[...] += 1
        return self.calls[...] * jnp.tanh(self.layer(x)) * self.table[...] + self.offset + self.raw


class Stacked(nnx.Module):
    """Layers made by `nnx.vmap`, run by `nnx.scan` under `nnx.remat`, normalisation included."""

    def __init__(self) -> None:
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(key: Any) -> Any:
            return Block(nnx.Rngs(key))

        self.blocks = make(jax.random.split(jax.random.key(0), 2))
        self.head = nnx.Linear(3, 2, **settings())

    def __call__(self, x: Any) -> Any:
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x: Any, block: Any) -> Any:
            return nnx.remat(lambda block, x: block(x))(block, x)

        return self.head(run(x, self.blocks))


class Block(nnx.Module):
    def __init__(self, rngs: Any) -> None:
        self.layer = nnx.Linear(3, 3, rngs=rngs, **DOUBLE)
        self.norm = nnx.BatchNorm(3, rngs=rngs, **DOUBLE)
        self.norm.mean = nnx.BatchStat(jnp.full(3, 0.1))
        self.norm.var = nnx.BatchStat(jnp.full(3, 0.7))

    def __call__(self, x: Any) -> Any:
        return jnp.tanh(self.norm(self.layer(x)))


class Jitted(nnx.Module):
    """Subclassed, with a call under `nnx.jit` and a Variable made by the first call."""

    def __init__(self) -> None:
        self.net = Twice()

    @nnx.jit
    def __call__(self, x: Any) -> Any:
        return self.net(x)


class Overriding(Twice):
    def __call__(self, x: Any, *, scale: float = 0.5) -> Any:
        return scale * super().__call__(x)


class Variables(nnx.Module):
    """Variables in plain structures, and one that holds a structure."""

    def __init__(self) -> None:
        self.w = nnx.Dict({"0": nnx.Param(jnp.ones((3, 2)) / 3), "b": nnx.Param(jnp.zeros(2))})
        self.many = nnx.List([nnx.Param(jnp.full(2, 0.1 * i)) for i in range(11)])

    def __call__(self, x: Any) -> Any:
        return jnp.tanh(x @ self.w["0"] + self.w["b"]) * sum(p[...] for p in self.many)


NNX = {
    "shared submodule": TwoPaths,
    "layer twice": Twice,
    "tied": Tied,
    "shared embedding": SharedEmbedding,
    "batch norm": Normalised,
    "dropout": Dropping,
    "lora": Adapted,
    "rnn": Recurrent,
    "attention": Attending,
    "state": Stateful,
    "scan and remat": Stacked,
    "jit": Jitted,
    "subclass": Overriding,
    "containers": Variables,
}


# -- flax.linen ---------------------------------------------------------------------------------


def linen_own(model: Any, norm: str | None, x: Any) -> Any:
    module, variables = model
    kwargs = {}
    if norm is not None and hasattr(module, "takes_train"):
        kwargs = {"train": norm != "frozen"}
    if norm == "frozen" and hasattr(module, "norm"):
        module = module.copy(norm=module.norm.copy(use_running_average=True))
    mutable = [name for name in variables if name != "params"]
    return module.apply(variables, x, mutable=mutable, **kwargs)[0]


def initialised(module: Any) -> Any:
    variables = module.init(jax.random.key(0), jnp.ones((4, 3)))
    rng = iter(jax.random.split(jax.random.key(1), 99))

    def start(path: Any, x: Any) -> Any:
        if "batch_stats" not in jax.tree_util.keystr(path):
            return x
        return jnp.abs(jax.random.normal(next(rng), x.shape, jnp.float64)) + 0.5

    return module, jax.tree_util.tree_map_with_path(start, variables)


class LinenSetup(linen.Module):
    """Submodules made in `setup`, one of them used twice; another method besides the call."""

    def setup(self) -> None:
        self.layer = linen.Dense(3, **DOUBLE)
        self.head = linen.Dense(2, **DOUBLE)

    def features(self, x: Any) -> Any:
        return jnp.tanh(self.layer(jnp.tanh(self.layer(x))))

    def __call__(self, x: Any) -> Any:
        return self.head(self.features(x))


class LinenShared(linen.Module):
    """Two modules in one scope, and an embedding that is used at both ends."""

    @linen.compact
    def __call__(self, x: Any) -> Any:
        embed = linen.Embed(3, 4, **DOUBLE)
        hidden = jnp.tanh(embed(jnp.argsort(x)).sum(1))
        return Scoped(linen.Dense(3, **DOUBLE))(embed.attend(hidden))


class Scoped(linen.Module):
    inner: Any

    def setup(self) -> None:
        linen.share_scope(self, self.inner)

    @linen.compact
    def __call__(self, x: Any) -> Any:
        scale = self.param("scale", linen.initializers.ones, (3,), jnp.float64)
        return (self.inner(x) * scale)[:, :2]


class LinenBlock(linen.Module):
    @linen.compact
    def __call__(self, x: Any, train: bool) -> Any:
        x = linen.Dense(3, **DOUBLE)(x)
        return jnp.tanh(linen.BatchNorm(use_running_average=not train, **DOUBLE)(x))


class LinenNorm(linen.Module):
    """Normalisations three modules deep."""

    takes_train = True

    @linen.compact
    def __call__(self, x: Any, train: bool = True) -> Any:
        x = linen.BatchNorm(use_running_average=not train, **DOUBLE)(x)
        return linen.Dense(2, **DOUBLE)(LinenNest()(x, train))


class LinenNest(linen.Module):
    @linen.compact
    def __call__(self, x: Any, train: bool) -> Any:
        return LinenBlock()(LinenBlock()(x, train), train)


class LinenLifted(linen.Module):
    """Layers lifted through `nn.remat`, `nn.scan` and `nn.vmap`."""

    takes_train = True

    @linen.compact
    def __call__(self, x: Any, train: bool = True) -> Any:
        def step(block: Any, x: Any) -> Any:
            return block(x, train), None

        block = linen.remat(LinenBlock, static_argnums=2)()
        scanned = linen.scan(
            step,
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            length=2,
        )
        x, _ = scanned(block, x)
        heads = linen.vmap(
            linen.Dense,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=None,
            out_axes=-1,
            axis_size=2,
        )
        return heads(1, **DOUBLE)(x)[:, 0]


class LinenGiven(linen.Module):
    """Submodules that come as attributes, one of them at two places."""

    layer: Any
    norm: Any

    @linen.compact
    def __call__(self, x: Any) -> Any:
        x = jnp.tanh(self.norm(self.layer(jnp.tanh(self.layer(x)))))
        return linen.Dense(2, **DOUBLE)(x)


class LinenCell(linen.Module):
    @linen.compact
    def __call__(self, x: Any) -> Any:
        cells = linen.RNN(linen.OptimizedLSTMCell(4, **DOUBLE))(x[..., None])
        attend = linen.MultiHeadDotProductAttention(num_heads=2, **DOUBLE)
        return linen.Dense(2, **DOUBLE)(attend(cells).mean(1))


class LinenBoxed(linen.Module):
    """A parameter with partitioning, sown intermediates, and a counter of its own."""

    @linen.compact
    def __call__(self, x: Any) -> Any:
        boxed = linen.with_partitioning(linen.initializers.lecun_normal(), (None, None))
        x = linen.Dense(4, kernel_init=boxed, **DOUBLE)(x)
        self.sow("intermediates", "hidden", x)
        calls = self.variable("counts", "calls", lambda: jnp.zeros((), jnp.int32))
        calls.value += 1
        return calls.value * linen.Dense(2, **DOUBLE)(jnp.tanh(x))


def linen_given() -> Any:
    norm = linen.BatchNorm(use_running_average=False, **DOUBLE)
    return initialised(LinenGiven(linen.Dense(3, **DOUBLE), norm))


LINEN: dict[str, Callable[[], Any]] = {
    "setup": lambda: initialised(LinenSetup()),
    "shared scope": lambda: initialised(LinenShared()),
    "nested batch norm": lambda: initialised(LinenNorm()),
    "lifted": lambda: initialised(LinenLifted()),
    "given submodules": linen_given,
    "rnn and attention": lambda: initialised(LinenCell()),
    "boxes and counts": lambda: initialised(LinenBoxed()),
    "sequential": lambda: initialised(
        linen.Sequential([linen.Dense(4, **DOUBLE), jnp.tanh, linen.Dense(2, **DOUBLE)])
    ),
}


# -- equinox ------------------------------------------------------------------------------------


def equinox_own(model: Any, norm: str | None, x: Any) -> Any:
    if not isinstance(model, tuple):
        return model(x) if "Vmap" in type(model).__name__ else jax.vmap(model)(x)
    first, second = model
    if not isinstance(second, eqx.nn.State):
        return first(second, x)
    if norm in ("batch", "record"):  # mode "ema" takes those of the first batch as they are
        _, second = eqx.nn.make_with_state(type(first))(first.norm.mode)
    state = jax.tree.map(lambda x: x, second)  # a state is used up by a call
    return mapped(eqx.nn.inference_mode(first, norm == "frozen"), x, state)[0]


KEYS = jax.random.split(jax.random.key(0), 4)


class EqxShared(eqx.Module):
    shared: eqx.nn.Shared

    def __init__(self) -> None:
        pair = eqx.nn.Embedding(3, 4, key=KEYS[0]), eqx.nn.Linear(4, 3, key=KEYS[1])
        self.shared = eqx.nn.Shared(pair, lambda p: p[1].weight, lambda p: p[0].weight)

    def __call__(self, x: Any) -> Any:
        embed, linear = self.shared()
        return linear(jnp.tanh(jax.vmap(embed)(jnp.argsort(x)).sum(0)))[:2]


class EqxMixed(eqx.Module):
    """Static fields, functions, numbers, integers, NumPy arrays and None beside parameters."""

    layer: eqx.nn.Linear
    table: Any
    offset: Any
    frozen: Any
    activation: Callable[..., Any]
    rate: float
    absent: Any = None
    size: int = eqx.field(static=True, default=2)

    def __init__(self) -> None:
        self.layer = eqx.nn.Linear(3, 2, key=KEYS[0])
        self.table, self.offset = jnp.arange(2), {"a": [jnp.ones(2), jnp.zeros(2)]}
        self.frozen, self.activation, self.rate = np.full(2, 0.4), jnp.tanh, 0.7

    def __call__(self, x: Any) -> Any:
        y = self.activation(self.layer(x)) * self.rate + self.table + self.offset["a"][1]
        return (y * self.frozen + self.offset["a"][0])[: self.size]


class EqxCells(eqx.Module):
    lstm: Any = eqx.nn.LSTMCell(1, 4, key=KEYS[0])
    gru: Any = eqx.nn.GRUCell(4, 4, key=KEYS[1])
    attend: Any = eqx.nn.MultiheadAttention(2, 4, key=KEYS[2])
    head: Any = eqx.nn.Linear(4, 2, key=KEYS[3])

    def __call__(self, x: Any) -> Any:
        def step(carry: Any, x: Any) -> Any:
            cell, hidden = carry
            cell = self.lstm(x[None], cell)
            hidden = self.gru(cell[0], hidden)
            return (cell, hidden), hidden

        zeros = jnp.zeros(4)
        _, states = jax.lax.scan(step, ((zeros, zeros), zeros), x)
        return self.head(self.attend(states, states, states).mean(0))


class EqxConv(eqx.Module):
    conv: Any = eqx.nn.Conv1d(1, 2, 2, key=KEYS[0])
    norm: Any = eqx.nn.GroupNorm(1, 2)
    mlp: Any = eqx.nn.MLP(4, 2, 3, 1, activation=jnp.tanh, key=KEYS[1])

    def __call__(self, x: Any) -> Any:
        return self.mlp(self.norm(self.conv(x[None])).reshape(-1))


def eqx_mlp() -> Any:
    return eqx.nn.MLP(3, 2, 4, 1, activation=jnp.tanh, key=KEYS[0])


class EqxStateful(eqx.Module):
    """Batch normalisation with its running statistics in an `eqx.nn.State`."""

    layer: Any
    norm: Any
    head: Any

    def __init__(self, mode: Any) -> None:
        self.layer = eqx.nn.Linear(3, 4, key=KEYS[0])
        self.norm = eqx.nn.BatchNorm(4, "examples", mode=mode)
        self.head = eqx.nn.Linear(4, 2, key=KEYS[1])

    def __call__(self, x: Any, state: Any) -> Any:
        x, state = self.norm(self.layer(x), state)
        return self.head(jnp.tanh(x)), state


def mapped(module: Any, x: Any, state: Any) -> Any:
    return jax.vmap(module, axis_name="examples", in_axes=(0, None), out_axes=(0, None))(x, state)


def stateful(mode: str) -> Any:
    module, state = eqx.nn.make_with_state(EqxStateful)(mode)
    _, state = mapped(module, jnp.linspace(-1.0, 2.0, 12).reshape(4, 3), state)
    return module, state


class EqxBatch(eqx.Module):
    """Takes a batch: the examples know each other."""

    mlp: Any

    def __call__(self, x: Any) -> Any:
        return jax.vmap(self.mlp)(x - x.mean(0))


def eqx_partitioned() -> Any:
    trained, frozen = eqx.partition(
        eqx_mlp(), lambda x: eqx.is_inexact_array(x) and x.shape != (4, 3)
    )
    return lambda module, x: jax.vmap(eqx.combine(module, frozen))(x), trained


EQUINOX: dict[str, Callable[[], Any]] = {
    "mlp": eqx_mlp,
    "shared": EqxShared,
    "mixed leaves": EqxMixed,
    "cells and attention": EqxCells,
    "convolution": EqxConv,
    "jitted": lambda: eqx.filter_jit(eqx_mlp()),
    "vectorised": lambda: eqx.filter_vmap(eqx_mlp()),
    "batch norm": lambda: stateful("batch"),
    "batch norm by averages": lambda: stateful("ema"),
    "takes a batch": lambda: (lambda module, x: module(x), EqxBatch(eqx_mlp())),
    "partitioned": eqx_partitioned,
}


def zoo() -> dict[str, Entry]:
    found = {f"nnx {n}": Entry(build, nnx_own) for n, build in NNX.items()}
    found |= {f"linen {n}": Entry(build, linen_own) for n, build in LINEN.items()}
    return found | {f"equinox {n}": Entry(build, equinox_own) for n, build in EQUINOX.items()}
