"""Modules of TensorFlow as people write them, in float64; each maps (N, 3) to (N, 2)."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

Build = Callable[[], Any]
MODULES: dict[str, Build] = {}
Pair = collections.namedtuple("Pair", ["encoder", "head"])


def module(build: Build) -> Build:
    MODULES[build.__name__] = build
    return build


def variable(*shape: int, **how: Any) -> Any:
    import tensorflow as tf

    return tf.Variable(np.random.default_rng(sum(shape)).normal(size=shape) / 2, **how)


@functools.cache
def dense() -> Any:
    import tensorflow as tf

    class Dense(tf.Module):  # type: ignore[misc]
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()
            self.w, self.b = variable(inputs, outputs), variable(outputs)

        def __call__(self, x: Any) -> Any:
            return x @ self.w + self.b

    return Dense


@module
def two_ways_to_a_module() -> Any:
    import tensorflow as tf

    class Net(tf.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.encoder = dense()(3, 4)
            self.steps = [self.encoder, tf.tanh, dense()(4, 2)]

        def __call__(self, x: Any) -> Any:
            for step in self.steps:
                x = step(x)
            return x + tf.reduce_sum(self.encoder.w)

    return Net()


@module
def used_twice_and_tied() -> Any:
    import tensorflow as tf

    class Net(tf.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = dense()(3, 3), dense()(3, 3), (dense()(3, 2),)
            self.second.w = self.first.w

        def __call__(self, x: Any) -> Any:
            x = self.second(tf.tanh(self.first(tf.tanh(self.first(x)))))
            return self.head[0](tf.tanh(x))

    return Net()


@module
def containers() -> Any:
    import tensorflow as tf

    class Names(dict):  # type: ignore[type-arg]
        def __getattr__(self, name: str) -> Any:
            return self.get(name)

    class Parts(list):  # type: ignore[type-arg]
        @property
        def last(self) -> Any:
            return self[-1]

    class Net(tf.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.pair = Pair(dense()(3, 4), dense()(4, 3))
            self.named = {"z": dense()(3, 3), "a": variable(3), "list": [{"deep": variable(3)}]}
            self.ordered = collections.OrderedDict(z=variable(3), a=dense()(3, 2))
            self.default = collections.defaultdict(list, {"k": [variable(2)]})
            self.mine, self.parts = Names(shift=variable(2)), Parts([variable(2)])
            self.keys: dict[Any, Any] = {1: variable(2)}
            self.seen: list[int] = []

        def __call__(self, x: Any) -> Any:
            self.seen.append(1)  # of the copy
            self.last = x
            assert list(self.ordered) == ["z", "a"]
            assert self.default["missing"] == []
            x = self.pair.head(tf.tanh(self.pair.encoder(x)))
            x = self.named["z"](tf.tanh(x)) * self.named["a"] + self.named["list"][0]["deep"]
            x = self.ordered["a"](x + self.ordered["z"])
            return x * self.default["k"][0] + self.mine.shift + self.parts.last * self.keys[1]

    return Net()


@module
def graph_functions() -> Any:
    import tensorflow as tf

    class Net(tf.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = dense()(3, 4), dense()(4, 2)
            self.run = tf.function(self.all)
            self.twice = functools.partial(self.scaled, 2.0)

        @tf.function  # type: ignore[untyped-decorator]
        def __call__(self, x: Any) -> Any:
            return self.run(x)

        def all(self, x: Any) -> Any:
            return self.twice(self.head(tf.tanh(self.hidden(x))))

        @tf.function(autograph=False)  # type: ignore[untyped-decorator]
        def hidden(self, x: Any) -> Any:
            return self.body(x)

        def scaled(self, by: float, x: Any) -> Any:
            return by * x * tf.reduce_sum(self.head.b)

    return Net()


@module
def slots_and_properties() -> Any:
    import tensorflow as tf

    class Net(tf.Module):  # type: ignore[misc]
        __slots__ = ("__b", "scale", "unset", "w")

        def __init__(self) -> None:
            super().__init__()
            self.w, self.__b, self.scale = variable(3, 2), variable(2), 2.0

        @property
        def scaled(self) -> Any:
            return self.w * self.scale

        @functools.cached_property
        def doubled(self) -> Any:
            return 2 * self.w

        def __call__(self, x: Any) -> Any:
            return x @ (self.scaled + self.doubled) + self.__b

    return Net()


@module
def moving_statistics() -> Any:
    """Variables that a call assigns: of floats, of an integer, and one that is a flag."""
    import tensorflow as tf

    class Net(tf.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.dense = dense()(3, 2)
            self.mean = tf.Variable(np.zeros(2), trainable=False)
            self.calls = tf.Variable(1, trainable=False)
            self.counts = tf.Variable([1, 2])  # said to be trainable, which an integer is not
            self.table = tf.Variable(np.arange(6.0).reshape(3, 2), trainable=False)

        def __call__(self, x: Any) -> Any:
            y = self.dense(x)
            self.calls.assign_add(1)
            self.mean.assign(0.9 * self.mean + 0.1 * tf.reduce_mean(y, axis=0))
            y = (y - self.mean) * tf.cast(self.calls, y.dtype) + tf.gather(self.mean, [1, 0])
            return y + self.table[1] + self.mean.read_value() * tf.cast(self.counts, y.dtype)

    return Net()


@module
def child_and_parent() -> Any:
    import tensorflow as tf

    class Child(tf.Module):  # type: ignore[misc]
        def __init__(self, parent: Any) -> None:
            super().__init__()
            self.parent, self.b = parent, variable(2)

        def __call__(self, x: Any) -> Any:
            return x @ self.parent.w + self.b

    class Parent(tf.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.child, self.w = Child(self), variable(3, 2)

        @tf.Module.with_name_scope  # type: ignore[untyped-decorator]
        def __call__(self, x: Any) -> Any:
            return self.child(x)

    return Parent()


@module
def with_attributes_of_its_own() -> Any:
    import tensorflow as tf

    class Net(tf.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.store = {"kernel": variable(3, 2)}
            self.constant = tf.constant(np.ones(2))

        def __getattr__(self, name: str) -> Any:
            if name != "kernel":
                raise AttributeError(name)
            return self.store["kernel"]

        def __setattr__(self, name: str, value: Any) -> None:
            if name == "constant" and hasattr(self, "constant"):
                raise ValueError("set once")
            super().__setattr__(name, value)

        def __call__(self, x: Any) -> Any:
            return x @ self.kernel + self.constant

    return Net()


@module
def made_when_called() -> Any:
    import tensorflow as tf

    class Net(tf.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.layers: list[Any] = []

        def __call__(self, x: Any) -> Any:
            if not self.layers:
                self.layers = [dense()(x.shape[-1], 4), dense()(4, 2)]
            return self.layers[1](tf.tanh(self.layers[0](x)))

    return Net()


@module
def keras_layers() -> Any:
    import keras
    import tensorflow as tf

    double = {"dtype": "float64"}
    layers = keras.layers

    class Net(tf.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            norm, drop = layers.BatchNormalization(**double), layers.Dropout(0.5, seed=1, **double)
            self.body = [layers.Dense(4, **double), norm, drop]
            self.fixed = layers.Dense(4, trainable=False, **double)
            self.head, self.scale = dense()(4, 2), keras.Variable(np.ones(2))

        def __call__(self, x: Any) -> Any:
            for layer in self.body:
                x = layer(x, training=True)
            return self.head(self.fixed(x)) * self.scale

    return Net()


def build(name: str) -> Any:
    """A module that has been called once."""
    import tensorflow as tf

    made = MODULES[name]()
    made(tf.constant(np.ones((2, 3))))
    return made
