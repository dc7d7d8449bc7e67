"""One small policy, written in every library: a body, a head, a method, a property and a flag.

forward(x) = tanh(x @ w1 + b1) @ w2 + b2,   energy(x) = mean(scale * forward(x)^2),
scale = exp(temperature)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

import zoo

WIDTH = 4


class Policy(NamedTuple):
    """How a library builds the policy, and what it calls the parts that are asked for."""

    id: str
    backend: str
    build: Callable[[], Any]
    body: str
    """The name of the weight of the body, as a parameter."""
    weight: str
    """And as an attribute of the body."""
    transposed: bool = False
    one_by_one: bool = False
    """Whether a layer takes one example."""
    switchable: bool = True
    listed: bool = True
    """Whether it holds its layers in a list too."""


def _torch() -> Any:
    import torch

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.head = torch.nn.Linear(3, WIDTH), torch.nn.Linear(WIDTH, 2)
            self.temperature = torch.nn.Parameter(torch.zeros(2))
            self.drop = torch.nn.Dropout(0.5)
            self.layers = torch.nn.ModuleList([self.encoder, self.head])
            self.flag = WIDTH

        def forward(self, x: Any) -> Any:
            return self.head(self.drop(torch.tanh(self.encoder(x))))

        @property
        def scale(self) -> Any:
            return torch.exp(self.temperature)

        def energy(self, x: Any) -> Any:
            return (self.scale * self.head(torch.tanh(self.encoder(x))) ** 2).mean()

        def weights(self) -> Any:
            for layer in self.layers:
                yield layer.weight

    return Net().double()


def _nnx() -> Any:
    import jax.numpy as jnp

    nnx = pytest.importorskip("flax.nnx")

    class Net(nnx.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            rngs = nnx.Rngs(0)
            settings = {"rngs": rngs, "param_dtype": jnp.float64}
            self.encoder, self.head = (
                nnx.Linear(3, WIDTH, **settings),
                nnx.Linear(WIDTH, 2, **settings),
            )
            self.temperature = nnx.Param(jnp.zeros(2))
            self.drop = nnx.Dropout(0.5, rngs=rngs)
            self.layers = nnx.List([self.encoder, self.head])
            self.flag = WIDTH

        def __call__(self, x: Any) -> Any:
            return self.head(self.drop(jnp.tanh(self.encoder(x))))

        @property
        def scale(self) -> Any:
            return jnp.exp(self.temperature[...])

        def energy(self, x: Any) -> Any:
            return (self.scale * self.head(jnp.tanh(self.encoder(x))) ** 2).mean()

        def weights(self) -> Any:
            for layer in self.layers:
                yield layer.kernel

    return Net()


def _linen() -> Any:
    import jax
    import jax.numpy as jnp

    linen = pytest.importorskip("flax.linen")

    class Net(linen.Module):  # type: ignore[misc, name-defined]
        flag: int = WIDTH

        def setup(self) -> None:
            self.encoder = linen.Dense(WIDTH, param_dtype=jnp.float64)
            self.head = linen.Dense(2, param_dtype=jnp.float64)
            self.temperature = self.param("temperature", lambda key: jnp.zeros(2))

        def __call__(self, x: Any) -> Any:
            return self.head(jnp.tanh(self.encoder(x)))

        @property
        def scale(self) -> Any:
            return jnp.exp(self.temperature)

        def energy(self, x: Any) -> Any:
            return (self.scale * self(x) ** 2).mean()

    module = Net()
    return module, module.init(jax.random.key(0), jnp.ones((1, 3)))


def _equinox() -> Any:
    import jax
    import jax.numpy as jnp

    equinox = pytest.importorskip("equinox")

    class Net(equinox.Module):  # type: ignore[misc, name-defined]
        encoder: Any
        head: Any
        temperature: Any
        drop: Any
        layers: tuple[Any, ...]
        flag: int = equinox.field(static=True, default=WIDTH)

        def __init__(self) -> None:
            first, last = jax.random.split(jax.random.key(0))
            self.encoder = equinox.nn.Linear(3, WIDTH, key=first)
            self.head = equinox.nn.Linear(WIDTH, 2, key=last)
            self.temperature = jnp.zeros(2)
            self.drop = equinox.nn.Dropout(0.5)
            self.layers = (jnp.tanh, self.drop)

        def __call__(self, x: Any) -> Any:
            return self.head(self.drop(jnp.tanh(self.encoder(x)), key=jax.random.key(1)))

        @property
        def scale(self) -> Any:
            return jnp.exp(self.temperature)

        def energy(self, x: Any) -> Any:
            return (
                self.scale * jax.vmap(lambda x: self.head(jnp.tanh(self.encoder(x))))(x) ** 2
            ).mean()

    return jax.tree.map(lambda x: x.astype("float64") if equinox.is_array(x) else x, Net())


def _keras() -> Any:
    keras = pytest.importorskip("keras")
    ops = keras.ops

    class Net(keras.Model):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(name="net", dtype="float64")
            self.encoder = keras.layers.Dense(WIDTH, name="encoder", dtype="float64")
            self.head = keras.layers.Dense(2, name="head", dtype="float64")
            self.drop = keras.layers.Dropout(0.5, dtype="float64")
            self.temperature = self.add_weight(shape=(2,), initializer="zeros", dtype="float64")
            self.flag = WIDTH

        def call(self, x: Any, training: Any = None) -> Any:
            return self.head(self.drop(ops.tanh(self.encoder(x)), training=training))

        @property
        def scale(self) -> Any:
            return ops.exp(self.temperature)

        def energy(self, x: Any) -> Any:
            return ops.mean(self.scale * self.head(ops.tanh(self.encoder(x))) ** 2)

        def kernels(self) -> Any:
            for layer in (self.encoder, self.head):
                yield layer.kernel

    model = Net()
    model(np.ones((1, 3)))
    return model


def _tf_module() -> Any:
    import tensorflow as tf

    class Dense(tf.Module):  # type: ignore[misc]
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()
            start = np.random.default_rng(inputs).normal(size=(inputs, outputs))
            self.w, self.b = tf.Variable(start), tf.Variable(np.zeros(outputs))

        def __call__(self, x: Any) -> Any:
            return x @ self.w + self.b

    class Net(tf.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.head = Dense(3, WIDTH), Dense(WIDTH, 2)
            self.layers = [self.encoder, self.head]
            self.temperature = tf.Variable(np.zeros(2))
            self.flag = WIDTH

        def __call__(self, x: Any) -> Any:
            return self.head(tf.tanh(self.encoder(x)))

        @property
        def scale(self) -> Any:
            return tf.exp(self.temperature)

        def energy(self, x: Any) -> Any:
            return tf.reduce_mean(self.scale * self(x) ** 2)

        def weights(self) -> Any:
            for layer in self.layers:
                yield layer.w

    return Net()


POLICIES = (
    Policy("torch", "torch", _torch, "encoder.weight", "weight", transposed=True),
    Policy("nnx", "jax", _nnx, "encoder/kernel", "kernel"),
    Policy("linen", "jax", _linen, "encoder/kernel", "kernel", switchable=False, listed=False),
    Policy("equinox", "jax", _equinox, "encoder/weight", "weight", True, True, listed=False),
    Policy("keras", "tensorflow", _keras, "net/encoder/kernel", "kernel"),
    Policy("tf_module", "tensorflow", _tf_module, "encoder/w", "w", switchable=False),
)


def built(policy: Policy) -> Any:
    """The policy; skips where its library is not installed."""
    zoo.require(policy.backend)
    return policy.build()
