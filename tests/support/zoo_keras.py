"""Keras models as people write them, all in float64, each with inputs of the shape it takes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

ROWS, EXAMPLES = (3,), 4
SEQUENCE, TOKENS, IMAGE = (4, 3), (4,), (6, 6, 2)

Build = Callable[[], Any]
MODELS: dict[str, tuple[Build, Any]] = {}
"""Name to a function that builds the model, and what its inputs are: a shape, or several."""


def model(inputs: Any = ROWS) -> Callable[[Build], Build]:
    def add(build: Build) -> Build:
        MODELS[build.__name__] = build, inputs
        return build

    return add


@contextmanager
def double() -> Iterator[Any]:
    """Keras in float64, on JAX and torch too, where it rounds most results of operations."""
    import keras
    from keras.src.backend.common import dtypes

    policy, floatx = keras.config.dtype_policy(), keras.config.floatx()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    narrow = dict(dtypes.BIT64_TO_BIT32_DTYPE)
    dtypes.BIT64_TO_BIT32_DTYPE.clear()
    try:
        yield keras
    finally:
        dtypes.BIT64_TO_BIT32_DTYPE.update(narrow)
        keras.config.set_floatx(floatx)
        keras.config.set_dtype_policy(policy)


def example(inputs: Any, seed: int = 0) -> Any:
    """Inputs of the model, in NumPy."""
    rng = np.random.default_rng(seed)
    if isinstance(inputs, dict):
        return {name: example(shape, seed + i) for i, (name, shape) in enumerate(inputs.items())}
    if isinstance(inputs, list):
        return [example(shape, seed + i) for i, shape in enumerate(inputs)]
    if inputs == TOKENS:
        return rng.integers(0, 5, (EXAMPLES, *inputs)) * (np.arange(inputs[0]) < 3)
    return rng.normal(size=(EXAMPLES, *inputs))


def build(name: str) -> tuple[Any, Any]:
    """A model, and what its inputs are. It has been called once, and is not at its start."""
    make, inputs = MODELS[name]
    with double() as keras:
        made = make()
        x = keras.tree.map_structure(keras.ops.convert_to_tensor, example(inputs))
        made(x, training=False)
        rng = np.random.default_rng(2)
        for variable in made.variables:
            if "float" in variable.dtype:
                value = rng.normal(size=variable.shape) / 2
                variable.assign(np.abs(value) + 0.5 if "variance" in variable.path else value)
    return made, inputs


@functools.cache
def classes() -> Any:
    """Layers and models of one's own."""
    import keras

    layers, ops = keras.layers, keras.ops

    class Plain(keras.Model):
        """Says nothing of training."""

        def __init__(self, *parts: Any) -> None:
            super().__init__()
            self.parts = list(parts)

        def call(self, x: Any) -> Any:
            for part in self.parts:
                x = part(x)
            return x

    class Implicit(Plain):
        """Takes training, and relies on Keras to hand it on."""

        def call(self, x: Any, training: bool | None = None) -> Any:
            del training
            return super().call(x)

    class Explicit(Plain):
        """Hands training on, and has to be told."""

        def call(self, x: Any, *, training: bool) -> Any:
            for part in self.parts:
                x = part(x, training=training)
            return x

    class Block(layers.Layer):
        """A layer around others, without a `build` of its own."""

        def __init__(self, width: int) -> None:
            super().__init__()
            self.parts = {"dense": layers.Dense(width), "norm": layers.BatchNormalization()}
            self.drop = (layers.Dropout(0.4, seed=5),)

        def call(self, x: Any) -> Any:
            return self.drop[0](self.parts["norm"](ops.tanh(self.parts["dense"](x))))

    class Weights(layers.Layer):
        """Weights of its own, made in `build`; one of them counts, one is an integer."""

        def build(self, shape: Any) -> None:
            self.w = self.add_weight(shape=(shape[-1], 4), name="w")
            self.b = keras.Variable(np.zeros(4), name="b")
            self.calls = self.add_weight(shape=(), trainable=False, dtype="int32", name="calls")

        def call(self, x: Any) -> Any:
            self.calls.assign_add(1)
            return ops.tanh(x @ self.w + self.b) * ops.cast(self.calls, x.dtype)

    class Tied(keras.Model):
        """One table reads tokens and scores them; a layer is used twice."""

        def __init__(self) -> None:
            super().__init__()
            self.embed = layers.Embedding(5, 4)
            self.mix = layers.Dense(4, activation="tanh")
            self.bias = self.add_weight(shape=(5,), name="bias")

        def call(self, tokens: Any) -> Any:
            x = ops.mean(self.mix(self.mix(self.embed(tokens))), axis=1)
            return (x @ ops.transpose(self.embed.embeddings) + self.bias)[:, :2]

    class Noisy(layers.Layer):
        """Draws numbers in training alone."""

        def __init__(self) -> None:
            super().__init__()
            self.seeds = keras.random.SeedGenerator(3)

        def call(self, x: Any, training: bool = False) -> Any:
            return x + keras.random.normal(x.shape, seed=self.seeds, dtype=x.dtype) * training

    class Cell(layers.Layer):
        """A recurrent cell."""

        def __init__(self) -> None:
            super().__init__()
            self.state_size, self.dense = 4, layers.Dense(4, activation="tanh")

        def build(self, shape: Any) -> None:
            self.dense.build((None, shape[-1] + 4))

        def call(self, x: Any, states: Any, training: bool | None = None) -> Any:
            del training
            h = self.dense(ops.concatenate([x, states[0]], axis=-1))
            return h, [h]

    class Two(keras.Model):
        """Inputs and outputs in dictionaries."""

        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.norm = (
                layers.Dense(2),
                layers.Dense(2),
                layers.BatchNormalization(),
            )

        def call(self, inputs: Any, training: bool | None = None) -> Any:
            left, right = self.left(inputs["a"]), self.right(inputs["b"])
            return {"sum": self.norm(left + right), "parts": (left, right)}

    class Losses(keras.Model):
        """Adds losses, keeps a metric, and returns the losses there are."""

        def __init__(self) -> None:
            super().__init__()
            self.dense = layers.Dense(2, kernel_regularizer="l2", activity_regularizer="l2")
            self.seen = keras.metrics.Mean(name="seen")

        def call(self, x: Any) -> Any:
            y = self.dense(x)
            self.add_loss(ops.mean(ops.square(y)))
            self.seen.update_state(ops.mean(y))
            return y + sum(self.losses)

    return locals()


def made(kind: str, *args: Any) -> Any:
    return classes()[kind](*args)


def layer(kind: str, *args: Any, **kwargs: Any) -> Any:
    import keras

    return getattr(keras.layers, kind)(*args, **kwargs)


def sequential(*parts: Any) -> Any:
    import keras

    return keras.Sequential(list(parts))


# -- how a model is put together ---------------------------------------------------------------


@model()
def plain() -> Any:
    return made("Plain", layer("BatchNormalization"), layer("Dense", 2))


@model()
def implicit() -> Any:
    norm, drop = layer("BatchNormalization"), layer("Dropout", 0.5, seed=1)
    return made("Implicit", layer("Dense", 4), norm, drop, layer("Dense", 2))


@model()
def explicit() -> Any:
    return made("Explicit", made("Implicit", layer("BatchNormalization"), layer("Dense", 2)))


@model()
def nested_three_deep() -> Any:
    inner = made("Plain", made("Block", 4), layer("Dense", 4))
    return made("Plain", made("Implicit", inner, made("Block", 3)), layer("Dense", 2))


@model()
def sequential_in_subclass() -> Any:
    inner = sequential(layer("Dense", 4, "tanh"), layer("BatchNormalization"))
    return made("Plain", inner, sequential(sequential(layer("Dense", 2))))


@model()
def functional() -> Any:
    import keras

    x = keras.Input(ROWS)
    shared = layer("Dense", 3, "tanh")
    left, right = shared(x), shared(shared(x))
    both = layer("Add")([layer("BatchNormalization")(left), right])
    return keras.Model(x, layer("Dense", 2)(layer("Dropout", 0.3, seed=2)(both)))


@model()
def functional_that_shares_layers() -> Any:
    import keras

    x = keras.Input(ROWS)
    hidden = layer("BatchNormalization")(layer("Dense", 4, "tanh")(x))
    keras.Model(x, layer("Dense", 7)(hidden))
    return keras.Model(x, layer("Dense", 2)(hidden))


@model()
def layer_alone() -> Any:
    return layer("Dense", 2)


@model()
def own_weights() -> Any:
    return made("Plain", made("Weights"), layer("Dense", 2))


@model(TOKENS)
def tied() -> Any:
    return made("Tied")


@model()
def layer_used_twice() -> Any:
    block, norm = layer("Dense", 3, "tanh"), layer("BatchNormalization")
    return made("Plain", block, norm, block, norm, layer("Dense", 2))


@model()
def two_ways_to_a_layer() -> Any:
    encoder = made("Block", 4)
    whole = made("Implicit", encoder, layer("Dense", 2))
    whole.encoder = encoder
    return whole


@model({"a": ROWS, "b": ROWS})
def dictionaries() -> Any:
    return made("Two")


@model([ROWS, ROWS])
def several_inputs() -> Any:
    import keras

    a, b = keras.Input(ROWS), keras.Input(ROWS)
    return keras.Model([a, b], layer("Dense", 2)(layer("Concatenate")([a, b])))


@model()
def compiled() -> Any:
    whole = implicit()
    whole.compile("adam", "mse", metrics=["mae"])
    return whole


@model()
def losses_and_metrics() -> Any:
    return made("Losses")


@model()
def partly_frozen() -> Any:
    norm, dense = layer("BatchNormalization"), layer("Dense", 3, "tanh")
    norm.trainable = dense.trainable = False
    return made("Implicit", dense, norm, layer("BatchNormalization"), layer("Dense", 2))


# -- layers ------------------------------------------------------------------------------------


@model()
def noises() -> Any:
    parts = [layer(n, 0.3, seed=4) for n in ("GaussianNoise", "GaussianDropout", "AlphaDropout")]
    return made("Plain", layer("Dense", 4), *parts, made("Noisy"), layer("Dense", 2))


@model(IMAGE)
def convolutional() -> Any:
    norms = layer("BatchNormalization"), layer("GroupNormalization", 2)
    drop, pool = layer("SpatialDropout2D", 0.3, seed=3), layer("GlobalAveragePooling2D")
    conv, end = layer("Conv2D", 4, 3, activation="tanh"), layer("DepthwiseConv2D", 2)
    return made("Plain", conv, norms[0], drop, end, norms[1], pool, layer("Dense", 2))


@model()
def layer_norms() -> Any:
    norms = layer("LayerNormalization"), layer("UnitNormalization"), layer("RMSNormalization")
    return made("Plain", layer("Dense", 4, "tanh"), *norms, layer("Dense", 2))


@model(TOKENS)
def masked_lstm() -> Any:
    return made(
        "Implicit", layer("Embedding", 5, 3, mask_zero=True), layer("LSTM", 3), layer("Dense", 2)
    )


@model(SEQUENCE)
def recurrent() -> Any:
    gru = layer("GRU", 3, return_sequences=True, dropout=0.2, seed=6)
    cells = layer("RNN", made("Cell"), return_sequences=True)
    both = layer("Bidirectional", layer("SimpleRNN", 2))
    return made("Plain", gru, cells, both, layer("Dense", 2))


@model(SEQUENCE)
def unrolled() -> Any:
    return made("Plain", layer("LSTM", 3, unroll=True), layer("Dense", 2))


@model(SEQUENCE)
def attention() -> Any:
    import keras

    x = keras.Input(SEQUENCE)
    attended = layer("MultiHeadAttention", 2, 3, dropout=0.2, seed=7)(x, x, use_causal_mask=True)
    normed = layer("LayerNormalization")(layer("Add")([x, attended]))
    return keras.Model(x, layer("Dense", 2)(layer("GlobalAveragePooling1D")(normed)))


@model(SEQUENCE)
def time_distributed() -> Any:
    each = sequential(layer("Dense", 3, "tanh"), layer("BatchNormalization"))
    return made("Plain", layer("TimeDistributed", each), layer("Flatten"), layer("Dense", 2))


@model()
def functions_as_layers() -> Any:
    import keras

    scaled = layer("Lambda", lambda x: keras.ops.tanh(2 * x))
    return made(
        "Plain", layer("Dense", 4), scaled, layer("Activation", "softplus"), layer("Dense", 2)
    )


@model()
def preprocessed() -> Any:
    normal = layer("Normalization", mean=[0.1, 0.2, 0.3], variance=[1.0, 2.0, 3.0])
    normal.build((None, 3))  # within a model it would keep a tensor of the graph that builds that
    return made("Plain", normal, layer("Rescaling", 0.5, offset=0.1), layer("Dense", 2))


@model(IMAGE)
def augmented() -> Any:
    flip, move = layer("RandomFlip", seed=1), layer("RandomTranslation", 0.2, 0.2, seed=2)
    return made("Plain", flip, move, layer("Flatten"), layer("Dense", 2))


# -- what rounds or cuts gradients, and has no slope to compare with -----------------------------


@model()
def low_rank() -> Any:
    dense = layer("Dense", 4)
    dense.build((None, 3))
    dense.enable_lora(2)  # in float32, whatever the layer is in
    return made("Plain", dense, layer("Dense", 2))


@model()
def mixed_precision() -> Any:
    parts = [
        layer("Dense", 4, dtype="mixed_bfloat16"),
        layer("BatchNormalization", dtype="mixed_bfloat16"),
    ]
    return made("Implicit", *parts, layer("Dense", 2))


@model()
def quantized() -> Any:
    dense = layer("Dense", 4)
    dense.build((None, 3))
    dense.quantize("int8")
    return made("Implicit", dense, layer("Dense", 2))


@model()
def spectral_norm() -> Any:
    """A call in training assigns the kernel, and takes its singular vectors for constants."""
    return made("Implicit", layer("SpectralNormalization", layer("Dense", 4)), layer("Dense", 2))


ROUNDED = ("low_rank", "mixed_precision", "quantized", "spectral_norm")
