"""Models defined once for every backend: a pair of pure functions, as an optimizer is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from metaframe import ops
from metaframe.backend.types import Array
from metaframe.core.container import Container
from metaframe.errors import InputError
from metaframe.nn import init
from metaframe.nn.activations import relu
from metaframe.nn.layers import batch_norm, conv2d, dense, max_pool2d, mean_pool

POOLINGS = ("max", "stride")


class Model(NamedTuple):
    """A model as functions: of a seed, its parameters; of these and an input, its output.

    >>> model = nn.mlp([1, 40, 40, 1])
    >>> params = model.init(0)
    >>> model.apply(params, ops.zeros((10, 1))).shape == (10, 1)
    True
    """

    init: Callable[..., Container]
    """`init(seed, dtype=None)`: parameters on the selected backend, the same numbers on each."""
    apply: Callable[[Any, Array], Array]
    """`apply(params, x)`: the outputs. `params` may be any mapping with the keys of `init`."""
    norms: tuple[str, ...] = ()
    """Keys of what has a batch normalisation, in the order of their calls: its "scale" and "shift"
    are there, and a "mean" and a "var" there take the places of its inputs' own."""


def mlp(
    sizes: Sequence[int],
    activation: Callable[[Array], Array] = relu,
    initializer: init.Initializer = init.glorot_uniform,
    context: int = 0,
) -> Model:
    """Dense layers "layer1", "layer2", ..., "head", with an activation after all but the head.

    Args:
        sizes: inputs, hidden sizes, outputs: `[1, 40, 40, 1]` is the sinusoid model of MAML.
        activation: elementwise function.
        initializer: of the weights; biases start at zero.
        context: numbers in a parameter "context", zeros at first, that every example gets as
            further inputs (Zintgraf et al. 2019, arXiv 1810.03642, for `CAVIA`).

    Returns:
        A model of (..., inputs) arrays to (..., outputs).

    Raises:
        InputError: fewer than two sizes, one below 1, or a negative `context`.

    >>> sorted(nn.mlp([1, 40, 40, 1]).init(0))
    ['head', 'layer1', 'layer2']
    """
    if len(sizes) < 2 or min(sizes) < 1 or context < 0:
        raise InputError(
            "sizes needs inputs and outputs, each at least 1, and context is not negative; "
            f"received {list(sizes)}, {context=}."
        )
    hidden = [f"layer{i}" for i in range(1, len(sizes) - 1)]
    inputs = [sizes[0] + context, *sizes[1:-1]]
    pairs = list(zip([*hidden, "head"], inputs, sizes[1:], strict=True))

    def start(seed: int, dtype: str | None = None) -> Container:
        params = {name: _dense(seed, name, pair, initializer) for name, *pair in pairs}
        params |= _context(seed, context)
        return Container(params).map(lambda values: ops.asarray(values, dtype))

    def apply(params: Any, x: Array) -> Array:
        if context:
            shared = ops.broadcast_to(params["context"], (*x.shape[:-1], context))
            x = ops.concat([x, shared], axis=-1)
        for name in hidden:
            x = activation(dense(x, params[name]["w"], params[name]["b"]))
        return dense(x, params["head"]["w"], params["head"]["b"])

    return Model(start, apply)


def conv4(
    ways: int,
    channels: int = 64,
    in_channels: int = 1,
    image_size: int = 28,
    pooling: Literal["max", "stride"] = "max",
    initializer: init.Initializer = init.glorot_uniform,
    context: int = 0,
) -> Model:
    """The four-block convolutional network of MAML and its successors.

    Each block is a 3x3 convolution, batch normalisation, relu and 2x2 max pooling; the head is
    dense. The normalisation is by the batch's own statistics, unless a policy says otherwise
    (`norm=` of `MAML`). The convolutions have no bias, which it would cancel. Parameters are
    "block1" to "block4" ("kernel", "scale", "shift") and "head".

    Args:
        ways: classes.
        channels: filters in every block; 64 for Omniglot, 32 for miniImageNet.
        in_channels: of the images.
        image_size: height and width of the images, at least 16 with max pooling.
        pooling: "max", or "stride" for strided convolutions and a mean over the last pixels, as
            MAML's Omniglot network has it.
        initializer: of kernels and head weights.
        context: numbers in a parameter "context", zeros at first, of which a linear map "film"
            makes a factor `1 + gamma` and a shift for every channel of the third block (Zintgraf
            et al. 2019, arXiv 1810.03642, for `CAVIA`; Perez et al. 2018, arXiv 1709.07871).

    Finn, Abbeel and Levine, 2017, arXiv 1703.03400.

    Returns:
        A model of (N, image_size, image_size, in_channels) images to (N, ways) logits.

    Raises:
        InputError: a size below 1, an unknown `pooling`, or images too small for max pooling.

    >>> model = nn.conv4(ways=5, channels=8, image_size=16)
    >>> v = model.init(0)
    >>> v.block4.kernel.shape == (3, 3, 8, 8), v.head.w.shape == (8, 5)
    (True, True)
    """
    if min(ways, channels, in_channels, image_size, context + 1) < 1 or pooling not in POOLINGS:
        raise InputError(
            "conv4 needs positive sizes and pooling 'max' or 'stride', received "
            f"{ways=}, {channels=}, {in_channels=}, {image_size=}, {context=}, {pooling=}."
        )
    pixels = (image_size // 16) ** 2 if pooling == "max" else 1
    if pixels == 0:
        raise InputError(
            f"four max poolings need images of at least 16x16, received {image_size=}. Use "
            "pooling='stride'."
        )
    blocks = [f"block{i}" for i in range(1, 5)]

    def start(seed: int, dtype: str | None = None) -> Container:
        params: dict[str, Any] = _context(seed, context)
        params["head"] = _dense(seed, "head", (pixels * channels, ways), initializer)
        if context:
            params["film"] = {"w": initializer(seed, "film/w", (context, 2 * channels))}
        for name, inputs in zip(blocks, (in_channels, *[channels] * 3), strict=True):
            params[name] = {
                "kernel": initializer(seed, f"{name}/kernel", (3, 3, inputs, channels)),
                "scale": init.ones(seed, f"{name}/scale", (channels,)),
                "shift": init.zeros(seed, f"{name}/shift", (channels,)),
            }
        return Container(params).map(lambda values: ops.asarray(values, dtype))

    def apply(params: Any, x: Array) -> Array:
        for name in blocks:
            block = params[name]
            x = conv2d(x, block["kernel"], stride=1 if pooling == "max" else 2)
            given = (block["mean"], block["var"]) if "mean" in block else None
            x = batch_norm(x, block["scale"], block["shift"], statistics=given)
            if context and name == "block3":
                film = dense(params["context"], params["film"]["w"])
                x = x * (1 + film[:channels]) + film[channels:]
            # relu after the pooling is the same function for a quarter of the work.
            x = relu(max_pool2d(x) if pooling == "max" else x)
        x = mean_pool(x) if pooling == "stride" else ops.reshape(x, (-1, math.prod(x.shape[1:])))
        return dense(x, params["head"]["w"], params["head"]["b"])

    return Model(start, apply, tuple(blocks))


def _dense(
    seed: int, name: str, shape: Sequence[int], initializer: init.Initializer
) -> dict[str, init.Values]:
    return {
        "w": initializer(seed, f"{name}/w", shape),
        "b": init.zeros(seed, f"{name}/b", shape[1:]),
    }


def _context(seed: int, size: int) -> dict[str, Any]:
    return {"context": init.zeros(seed, "context", (size,))} if size else {}
