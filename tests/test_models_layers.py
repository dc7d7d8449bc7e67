"""Layers of Flax, Equinox and Keras under MAML: exact second derivatives, and whose mask it is.

Finite differences of the query loss along a line, in float64. torch's layers are in
`test_learners_torch.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import zoo
from frameworks import require, slow
from metaframe import MAML, nn
from metaframe.backend import load_backend
from metaframe.tasks import Task
from test_models_norm import MODELS as NORMALISED

IMAGE, TOKENS, SEQUENCE, ROW = (6, 6, 2), (5,), (3, 3), (3,)


def nnx_settings() -> dict[str, Any]:
    import jax.numpy as jnp
    from flax import nnx

    return {"rngs": nnx.Rngs(0), "param_dtype": jnp.float64}


def nnx_convolutional(norm: str, *args: int) -> Any:
    from flax import nnx

    settings = nnx_settings()

    class Net(nnx.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self.conv = nnx.Conv(2, 4, (3, 3), padding="VALID", **settings)
            self.norm = getattr(nnx, norm)(4, *args, **settings)
            self.head = nnx.Linear(16, 2, **settings)

        def __call__(self, x: Any) -> Any:
            x = nnx.avg_pool(nnx.softplus(self.norm(self.conv(x))), (2, 2), (2, 2))
            return self.head(x.reshape(len(x), -1))

    return Net()


def nnx_attention() -> Any:
    import jax.numpy as jnp
    from flax import nnx

    settings = nnx_settings()

    def attend(query: Any, key: Any, value: Any, **_: Any) -> Any:
        # Flax's default, jax.nn.dot_product_attention, has its softmax in float32, always.
        weights = nnx.nn.attention.dot_product_attention_weights(query, key)
        return jnp.einsum("...hqk,...khd->...qhd", weights, value)

    class Net(nnx.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self.embed = nnx.Embed(5, 4, **settings)
            self.attend = nnx.MultiHeadAttention(
                2, 4, decode=False, attention_fn=attend, **settings
            )
            self.norm = nnx.LayerNorm(4, **settings)
            self.head = nnx.Linear(4, 2, **settings)

        def __call__(self, tokens: Any) -> Any:
            x = self.embed(tokens)
            return self.head(self.norm(x + self.attend(x)).mean(1))

    return Net()


def nnx_recurrent(cell: str) -> Any:
    from flax import nnx

    settings = nnx_settings()

    class Net(nnx.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self.cells = nnx.RNN(getattr(nnx, cell)(3, 4, **settings))
            self.head = nnx.Linear(4, 2, **settings)

        def __call__(self, x: Any) -> Any:
            return self.head(self.cells(x)[:, -1])

    return Net()


def nnx_dropout() -> Any:
    from flax import nnx

    settings = nnx_settings()
    return nnx.Sequential(
        nnx.Linear(3, 8, **settings), nnx.Dropout(0.5, rngs=nnx.Rngs(3)), nnx.Linear(8, 2, **settings)
    )


def equinox_attention() -> Any:
    import equinox as eqx
    import jax

    keys = jax.random.split(jax.random.key(0), 3)

    class Net(eqx.Module):
        embed: Any = eqx.nn.Embedding(5, 4, key=keys[0])
        attend: Any = eqx.nn.MultiheadAttention(2, 4, key=keys[1])
        norm: Any = eqx.nn.LayerNorm(4)
        head: Any = eqx.nn.Linear(4, 2, key=keys[2])

        def __call__(self, tokens: Any) -> Any:
            x = jax.vmap(self.embed)(tokens)
            return self.head(jax.vmap(self.norm)(x + self.attend(x, x, x)).mean(0))

    return Net()


def equinox_dropout() -> Any:
    import equinox as eqx
    import jax

    layers = [eqx.nn.Linear(3, 8, key=jax.random.key(0)), eqx.nn.Dropout(0.5)]
    return eqx.nn.Sequential([*layers, eqx.nn.Linear(8, 2, key=jax.random.key(1))])


def linen_dropout() -> Any:
    import flax.linen as linen
    import jax
    import jax.numpy as jnp

    class Net(linen.Module):  # type: ignore[misc, name-defined]
        @linen.compact  # type: ignore[untyped-decorator]
        def __call__(self, x: Any) -> Any:
            x = linen.Dense(8)(x)
            return linen.Dense(2)(linen.Dropout(0.5, deterministic=False)(x))

    module, keys = Net(), jax.random.split(jax.random.key(0))
    return module, module.init({"params": keys[0], "dropout": keys[1]}, jnp.ones((1, 3)))


def keras_layers(shape: tuple[int, ...], *layers: tuple[Any, ...]) -> Any:
    """A model of layers, each `(name, *arguments)` of `keras.layers`, and a head."""
    import keras

    double = {"dtype": "float64"}
    made = [getattr(keras.layers, name)(*args, **double) for name, *args in layers]
    head = keras.layers.Dense(2, **double)
    return keras.Sequential([keras.layers.Input(shape, **double), *made, head])


def keras_convolutional(norm: str, *args: int) -> Any:
    return keras_layers(
        IMAGE,
        ("Conv2D", 4, 3),
        (norm, *args),
        ("Activation", "softplus"),
        ("AveragePooling2D", 2),
        ("Flatten",),
    )


def keras_attention() -> Any:
    import keras

    layers, double = keras.layers, {"dtype": "float64"}
    tokens = layers.Input(TOKENS, dtype="int64")
    x = layers.Embedding(5, 4, **double)(tokens)
    attended = layers.MultiHeadAttention(2, 2, **double)(x, x)
    x = layers.LayerNormalization(**double)(layers.Add(**double)([x, attended]))
    pooled = layers.GlobalAveragePooling1D(**double)(x)
    return keras.Model(tokens, layers.Dense(2, **double)(pooled))


def keras_recurrent(cells: str) -> Any:
    return keras_layers(SEQUENCE, (cells, 4))


def keras_dropout() -> Any:
    return keras_layers(ROW, ("Dense", 8), ("Dropout", 0.5))


FRAMEWORK = {"nnx": "jax", "linen": "jax", "equinox": "jax", "keras": "tensorflow"}
MODULE = {"nnx": "flax.nnx", "linen": "flax.linen"}

Model = tuple[Callable[[], Any], tuple[int, ...]]
MODELS: dict[str, Model] = {
    "nnx-batch_norm": (NORMALISED["nnx"][1], ROW),
    "nnx-conv_batch_norm": (lambda: nnx_convolutional("BatchNorm"), IMAGE),
    "nnx-group_norm": (lambda: nnx_convolutional("GroupNorm", 2), IMAGE),
    "nnx-attention": (nnx_attention, TOKENS),
    "nnx-gru": (lambda: nnx_recurrent("GRUCell"), SEQUENCE),
    "nnx-lstm": (lambda: nnx_recurrent("LSTMCell"), SEQUENCE),
    "nnx-dropout": (nnx_dropout, ROW),
    "linen-batch_norm": (NORMALISED["linen"][1], ROW),
    "equinox-attention": (equinox_attention, TOKENS),
    "keras-batch_norm": (NORMALISED["keras"][1], ROW),
    "keras-conv_batch_norm": (lambda: keras_convolutional("BatchNormalization"), IMAGE),
    "keras-group_norm": (lambda: keras_convolutional("GroupNormalization", 2), IMAGE),
    "keras-attention": (keras_attention, TOKENS),
    "keras-gru": (lambda: keras_recurrent("GRU"), SEQUENCE),
    "keras-lstm": (lambda: keras_recurrent("LSTM"), SEQUENCE),
    "keras-dropout": (keras_dropout, ROW),
}


def maml_around(name: str, build: Callable[[], Any]) -> MAML:
    """Two inner steps on the model, from parameters for which a stencil's error is small."""
    library = name.partition("-")[0]
    require(FRAMEWORK[library])
    pytest.importorskip(MODULE.get(library, library))
    backend, rng = load_backend(FRAMEWORK[library]), np.random.default_rng(2)
    maml = MAML(build(), inner_lr=0.1, inner_steps=2)
    shapes = {n: tuple(x.shape) for n, x in sorted(maml.meta_parameters().items())}
    maml.assign({n: backend.asarray(rng.normal(size=shape) / 2) for n, shape in shapes.items()})
    return maml


def tasks_of(shape: tuple[int, ...]) -> list[Task]:
    rng = np.random.default_rng(0)

    def inputs() -> Any:
        if shape == TOKENS:
            return rng.integers(0, 5, (4, *shape))
        return rng.normal(size=(4, *shape))

    def outputs() -> Any:
        return rng.normal(size=(4, 2))

    return [Task(inputs(), outputs(), inputs(), outputs()) for _ in range(2)]
