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
from metaframe import MAML, nn, ops
from metaframe.backend import load_backend, use_backend
from metaframe.errors import BackendError
from metaframe.models.precision import mixed_precision
from metaframe.tasks import Task
from test_models_norm import MODELS as NORMALISED

IMAGE, TOKENS, SEQUENCE, ROW = (6, 6, 2), (5,), (3, 3), (3,)


def nnx_settings() -> dict[str, Any]:
    import jax.numpy as jnp
    from flax import nnx

    return {"rngs": nnx.Rngs(0), "param_dtype": jnp.float64}


def nnx_convolutional(norm: str, *args: int) -> Any:
    import jax.numpy as jnp
    from flax import nnx

    settings = nnx_settings()

    class Net(nnx.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self.conv = nnx.Conv(2, 4, (3, 3), padding="VALID", **settings)
            self.norm = getattr(nnx, norm)(4, *args, **settings)
            if norm == "BatchNorm":  # Flax keeps statistics in float32 whatever the parameters are
                self.norm.mean = nnx.BatchStat(jnp.zeros(4, jnp.float64))
                self.norm.var = nnx.BatchStat(jnp.ones(4, jnp.float64))
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
        nnx.Linear(3, 8, **settings),
        nnx.Dropout(0.5, rngs=nnx.Rngs(3)),
        nnx.Linear(8, 2, **settings),
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


def ways(name: str) -> list[dict[str, Any]]:
    """How a model's meta-gradient is computed: at once and one by one where it can be both."""
    if name == "keras-batch_norm":  # the modes differentiate through other calls of the backend
        modes = ("reverse", "remat", "mixed")
        eagerly = [{"compiled": False, "task_map": "loop", "mode": mode} for mode in modes]
        return [{"task_map": "vmap"}, *eagerly]
    if name in ("keras-gru", "keras-lstm"):
        return [{"task_map": "scan"}]
    return [{"task_map": "vmap"}, {"task_map": "scan"}]


EAGERLY = [{"compiled": False, "task_map": "loop", "steps": 1}]
"""TensorFlow takes the least for few runs of a model this way; JAX keeps what it compiled."""


@pytest.mark.parametrize(
    ("name", "hows"),
    [
        ("nnx-batch_norm", [{"steps": 1}]),
        ("nnx-gru", [{"steps": 1}]),
        ("keras-batch_norm", EAGERLY),
        ("keras-gru", EAGERLY),
        *(slow(name, ways(name), id=f"{name}-every way") for name in MODELS),
    ],
)
def test_layers_have_exact_second_derivatives(name: str, hows: list[dict[str, Any]]) -> None:
    build, shape = MODELS[name]
    zoo.check_along_a_line(maml_around(name, build), nn.mse, tasks_of(shape), hows)


@pytest.mark.slow
def test_recurrent_layers_of_keras_are_not_vectorised_and_say_so() -> None:
    maml = maml_around("keras-gru", MODELS["keras-gru"][0])
    with pytest.raises(BackendError, match=r"variant.*recurrent layer.*task_map=\"loop\""):
        maml.meta_value_and_grad(nn.mse, tasks_of(SEQUENCE))


# -- dropout ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nnx-dropout", slow("keras-dropout")])
def test_dropout_of_a_model_with_its_own_key_has_one_mask(name: str) -> None:
    """The key is state, which nothing writes to: the same mask for every task, step and call."""
    maml, task = maml_around(name, MODELS[name][0]), tasks_of(ROW)[0]
    results = [maml.meta_value_and_grad(nn.mse, [task] * 3, steps=0) for _ in range(2)]
    costs = np.stack([maml.backend.to_numpy(result.aux["costs"]) for result in results])
    np.testing.assert_allclose(costs, costs[0, 0], rtol=1e-13)
    if name == "nnx-dropout":
        maml.module.eval()
    undropped = (maml if name == "nnx-dropout" else MAML(maml.module, norm="frozen"))(
        maml.backend.asarray(task.query_x)
    )
    off = np.mean((maml.backend.to_numpy(undropped) - task.query_y) ** 2) - costs[0, 0]
    assert abs(off) > 1e-3


@pytest.mark.parametrize("name", ["nnx-dropout", slow("keras-dropout")])
def test_dropout_in_mixed_precision(name: str) -> None:
    """The key has no precision to be rounded to, so the mask is that of the model as it is."""
    maml, tasks = maml_around(name, MODELS[name][0]), tasks_of(ROW)
    rounded = MAML(mixed_precision(maml.module), 0.1, maml.config.inner_steps)
    costs = [
        float(m.backend.to_numpy(m.meta_value_and_grad(nn.mse, tasks, task_map="scan").cost))
        for m in (maml, rounded)
    ]
    assert costs[0] != costs[1]
    assert costs[1] == pytest.approx(costs[0], rel=0.02)


@pytest.mark.parametrize(
    ("name", "build", "message"),
    [("linen", linen_dropout, "dropout"), ("equinox", equinox_dropout, "requires a key")],
)
def test_dropout_of_a_model_that_is_handed_its_key_is_refused(
    name: str, build: Callable[[], Any], message: str
) -> None:
    maml = maml_around(name, build)
    with pytest.raises(Exception, match=message):
        maml.meta_value_and_grad(nn.mse, tasks_of(ROW), steps=0)


def test_masks_that_come_with_the_examples() -> None:
    """The way to a mask for every task: drawn before, with an explicit seed, and in the batch."""
    require("jax")
    nnx = pytest.importorskip("flax.nnx")
    settings = nnx_settings()

    class Net(nnx.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self.layer, self.head = nnx.Linear(3, 8, **settings), nnx.Linear(8, 2, **settings)

        def __call__(self, inputs: Any) -> Any:
            return self.head(nn.dropout(self.layer(inputs["x"]), inputs["keep"], 0.5))

    def mask(seed: int) -> Any:
        with use_backend("jax"):
            return ops.to_numpy(nn.dropout_mask(seed, "layer", (4, 8), 0.5))

    tasks = [
        Task(*({"x": task.query_x, "keep": mask(seed)}, task.query_y) * 2)
        for seed, task in enumerate(tasks_of(ROW))
    ]
    maml = maml_around("nnx-masks", Net)
    zoo.check_along_a_line(maml, nn.mse, tasks, [{"steps": 1}])
    v = {n: maml.backend.to_numpy(p) for n, p in maml.meta_parameters().items()}
    costs = maml.meta_value_and_grad(nn.mse, tasks, steps=0).aux["costs"]
    for task, found in zip(tasks, maml.backend.to_numpy(costs), strict=True):
        hidden = task.query_x["x"] @ v["layer/kernel"] + v["layer/bias"]
        dropped = np.where(task.query_x["keep"], 2 * hidden, 0.0)
        predicted = dropped @ v["head/kernel"] + v["head/bias"]
        np.testing.assert_allclose(found, np.mean((predicted - task.query_y) ** 2), rtol=1e-12)
