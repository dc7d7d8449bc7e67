"""Every layer of torch, as far as one can be adapted, and what it is called on.

A layer takes examples of a shape without the batch axis; words have the shape `TOKENS`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

from zoo_torch import BATCH, Apply, Build, mlp

TOKENS, WORDS = (-1,), 6


class Entry(NamedTuple):
    """A layer, and the shape of one example."""

    build: Build
    shape: tuple[int, ...]


def first(layer: nn.Module) -> nn.Module:
    """The first of a layer's results."""
    return Apply(lambda layer, x: layer(x)[0], layer)


def of_each_dimension(name: str, *args: Any, **kwargs: Any) -> dict[str, Entry]:
    """A layer for sequences, one for images and one for volumes."""
    shapes = {1: (2, 6), 2: (2, 4, 4), 3: (2, 4, 4, 4)}
    return {
        f"{name}{d}d": Entry(lambda d=d: getattr(nn, f"{name}{d}d")(*args, **kwargs), shape)
        for d, shape in shapes.items()
    }


def pooled_and_back(d: int) -> nn.Module:
    pool = getattr(nn, f"MaxPool{d}d")(2, return_indices=True)
    return Apply(lambda pool, unpool, x: unpool(*pool(x)), pool, getattr(nn, f"MaxUnpool{d}d")(2))


def samples(*shape: int) -> Tensor:
    return torch.full(shape, 0.3)


def elementwise(*names: str, **kwargs: Any) -> dict[str, Entry]:
    return {name: Entry(lambda name=name: getattr(nn, name)(**kwargs), (4,)) for name in names}


def interpolated(shape: tuple[int, ...], **how: Any) -> Entry:
    return Entry(lambda: Apply(lambda x: F.interpolate(x, **how)), shape)


def unbatched(layer: nn.Module) -> nn.Module:
    return Apply(lambda layer, x: torch.stack([layer(one)[0] for one in x]), layer)


class Packed(nn.Module):
    """A recurrent layer over sequences of different lengths."""

    def __init__(self, kind: str, batch_first: bool, in_order: bool, **how: Any) -> None:
        super().__init__()
        self.layer = getattr(nn, kind)(3, 2, batch_first=batch_first, **how)
        self.lengths = [5, 3, 3, 1] if in_order else [3, 5, 1, 3]
        self.how: dict[str, Any] = {"batch_first": batch_first}
        self.in_order = in_order

    def forward(self, x: Tensor) -> Tensor:
        first = self.how["batch_first"]
        packed = nn.utils.rnn.pack_padded_sequence(
            x if first else x.transpose(0, 1),
            self.lengths,
            enforce_sorted=self.in_order,
            **self.how,
        )
        output, state = self.layer(packed)
        y, lengths = nn.utils.rnn.pad_packed_sequence(output, total_length=6, **self.how)
        assert lengths.tolist() == self.lengths
        last = state[0] if isinstance(state, tuple) else state
        y = y if first else y.transpose(0, 1)
        return torch.cat([y.flatten(1), last.transpose(0, 1).flatten(1)], 1)


RECURRENT: dict[str, Entry] = {
    **{
        f"{kind}, {how}": Entry(
            lambda kind=kind, k=kwargs: first(getattr(nn, kind)(3, 2, **k)), (4, 3)
        )
        for kind in ("RNN", "GRU", "LSTM")
        for how, kwargs in {
            "plain": {},
            "deep, both ways": {"num_layers": 2, "bidirectional": True, "batch_first": True},
            "without bias": {"bias": False},
        }.items()
    },
    "LSTM, projected": Entry(lambda: first(nn.LSTM(3, 4, 2, proj_size=2)), (4, 3)),
    "GRU, dropout off": Entry(lambda: first(nn.GRU(3, 2, 2, dropout=0.5)).eval(), (4, 3)),
    "LSTM, unbatched": Entry(lambda: unbatched(nn.LSTM(3, 2)), (4, 3)),
    "RNNCell": Entry(lambda: nn.RNNCell(3, 2), (3,)),
    "RNNCell, relu": Entry(lambda: nn.RNNCell(3, 2, nonlinearity="relu"), (3,)),
    "GRUCell": Entry(lambda: nn.GRUCell(3, 2, bias=False), (3,)),
    "LSTMCell": Entry(lambda: first(nn.LSTMCell(3, 2)), (3,)),
    **{
        f"packed {kind}, {'batch first, ' * batch_first}{'in order' * in_order}": Entry(
            lambda args=(kind, batch_first, in_order): Packed(*args),
            (5, 3),
        )
        for kind, batch_first, in_order in (
            *(("GRU", True, True), ("GRU", False, False)),
            *(("LSTM", True, False), ("RNN", False, True)),
        )
    },
    "packed LSTM, deep, both ways": Entry(
        lambda: Packed("LSTM", True, False, num_layers=2, bidirectional=True, proj_size=1), (5, 3)
    ),
}

LATER = torch.ones(3, 3, dtype=torch.bool).triu(1)
PADDED = torch.tensor([[False, False, True]]).expand(BATCH, 3)
LAST_PADDED = PADDED.clone()
MASKS: dict[str, dict[str, Any]] = {
    "no mask": {},
    "no mask, no weights": {"need_weights": False},
    "floating mask": {"attn_mask": torch.linspace(-1, 1, 9).reshape(3, 3).double()},
    "boolean mask": {"attn_mask": LATER},
    "boolean mask, no weights": {"attn_mask": LATER, "need_weights": False},
    "padding": {"key_padding_mask": PADDED},
    "padding, no weights": {"key_padding_mask": PADDED, "need_weights": False},
    "both": {"attn_mask": LATER, "key_padding_mask": PADDED},
    "causal": {"attn_mask": LATER, "is_causal": True, "need_weights": False},
    "a mask for each head": {"attn_mask": torch.zeros(2 * BATCH, 3, 3).double()},
}


def attention(mask: str, **how: Any) -> nn.Module:
    layer = nn.MultiheadAttention(4, 2, batch_first=True, **how)
    return Apply(lambda layer, x: layer(x, x, x, **MASKS[mask])[0], layer)


def transformer(name: str, *args: Any, **call: Any) -> nn.Module:
    how = {"dropout": 0.0, "batch_first": True, "activation": "gelu"}
    layer = getattr(nn, f"Transformer{name}Layer")(4, 2, 4, **how)
    if args:
        layer = getattr(nn, f"Transformer{name}")(layer, *args)
    return Apply(lambda m, x: m(x, x, **call) if name == "Decoder" else m(x, **call), layer)


ATTENTION: dict[str, Entry] = {
    **{
        f"attention, {mask}{', eval' * off}": Entry(
            lambda mask=mask, off=off: attention(mask).train(not off),
            (3, 4),
        )
        for mask in MASKS
        for off in (False, True)
    },
    "attention, biases": Entry(
        lambda: attention("no mask", add_bias_kv=True, add_zero_attn=True), (3, 4)
    ),
    "attention, own sizes": Entry(lambda: attention("no mask", kdim=4, vdim=4, bias=False), (3, 4)),
    **{
        f"{what}{', eval' * off}": Entry(lambda b=build, off=off: b().train(not off), (3, 4))
        for what, build in {
            "encoder layer": lambda: transformer("Encoder"),
            "encoder layer, padding": lambda: transformer("Encoder", src_key_padding_mask=PADDED),
            "encoder, padding": lambda: transformer("Encoder", 2, src_key_padding_mask=PADDED),
            "encoder, causal": lambda: transformer("Encoder", 1, mask=LATER, is_causal=True),
            "decoder": lambda: transformer("Decoder", 1),
        }.items()
        for off in (False, True)
    },
    "transformer": Entry(
        lambda: Apply(
            lambda m, x: m(x, torch.sin(x)),
            nn.Transformer(4, 2, 1, 1, 4, 0.0, "gelu", batch_first=True),
        ),
        (3, 4),
    ),
    **{
        f"scaled_dot_product_attention, {how}": Entry(
            lambda how=kwargs: Apply(
                lambda x: F.scaled_dot_product_attention(x, x.sin(), x.cos(), **how)
            ),
            (2, 3, 4),
        )
        for how, kwargs in {"plain": {}, "causal": {"is_causal": True}}.items()
    },
}


class Weighted(nn.Module):
    """A bag whose words have weights that are learned."""

    def __init__(self, **how: Any) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(WORDS, 3, mode="sum", **how)
        self.weights = nn.Parameter(torch.randn(WORDS))

    def forward(self, words: Tensor) -> Tensor:
        return self.bag(words, per_sample_weights=self.weights[words])


def with_offsets(mode: str, **how: Any) -> nn.Module:
    """Bags of different lengths, one of them empty."""
    starts = [0, 2, 2, 7, BATCH * 3][: BATCH + how.get("include_last_offset", False)]
    bag = nn.EmbeddingBag(WORDS, 3, mode=mode, **how)
    return Apply(lambda bag, words: bag(words.flatten(), torch.tensor(starts)), bag)


HOWS = {"plain": {}, "padded": {"padding_idx": 1}, "sparse": {"sparse": True}}
EMBEDDINGS: dict[str, Entry] = {
    **{
        f"Embedding, {how}": Entry(lambda k=kwargs: nn.Embedding(WORDS, 3, **k), TOKENS)
        for how, kwargs in {
            **HOWS,
            "short": {"max_norm": 1.0, "norm_type": 3.0},
            "short, sparse, padded": {"max_norm": 1.0, "sparse": True, "padding_idx": 0},
        }.items()
    },
    **{
        f"EmbeddingBag, {mode}, {how}": Entry(
            lambda m=mode, k=kwargs: nn.EmbeddingBag(WORDS, 3, mode=m, **k),
            TOKENS,
        )
        for mode in ("sum", "mean", "max")
        for how, kwargs in {**HOWS, "short": {"max_norm": 1.0}}.items()
        if (mode, how) != ("max", "sparse")
    },
    **{
        f"EmbeddingBag, {mode}, offsets{how}": Entry(
            lambda m=mode, k=kwargs: with_offsets(m, **k),
            TOKENS,
        )
        for mode in ("sum", "mean", "max")
        for how, kwargs in {
            "": {},
            ", the last too": {"include_last_offset": True},
            ", padded": {"padding_idx": 2},
        }.items()
    },
    "EmbeddingBag, weights": Entry(Weighted, TOKENS),
    "EmbeddingBag, weights, sparse, padded": Entry(
        lambda: Weighted(sparse=True, padding_idx=3), TOKENS
    ),
}


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).mT


def symmetric() -> nn.Module:
    layer = nn.Linear(4, 4)
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return layer


PARAMETRIZED: dict[str, Entry] = {
    "weight_norm": Entry(lambda: parametrizations.weight_norm(nn.Linear(4, 3)), (4,)),
    "weight_norm, whole": Entry(
        lambda: parametrizations.weight_norm(nn.Conv1d(2, 3, 2), dim=None), (2, 4)
    ),
    "weight_norm, old": Entry(lambda: nn.utils.weight_norm(nn.Linear(4, 3), dim=1), (4,)),
    "spectral_norm": Entry(lambda: parametrizations.spectral_norm(nn.Linear(4, 3)), (4,)),
    "spectral_norm, of a convolution": Entry(
        lambda: parametrizations.spectral_norm(nn.Conv1d(2, 3, 2), n_power_iterations=2), (2, 4)
    ),
    "spectral_norm, eval": Entry(
        lambda: parametrizations.spectral_norm(nn.Linear(4, 3)).eval(), (4,)
    ),
    "spectral_norm, old": Entry(lambda: nn.utils.spectral_norm(nn.Linear(4, 3)), (4,)),
    "spectral_norm, old, eval": Entry(lambda: nn.utils.spectral_norm(nn.Linear(4, 3)).eval(), (4,)),
    **{
        f"orthogonal, {how}": Entry(
            lambda how=how: parametrizations.orthogonal(nn.Linear(4, 3), orthogonal_map=how),
            (4,),
        )
        for how in ("matrix_exp", "cayley", "householder")
    },
    "orthogonal, as it is": Entry(
        lambda: parametrizations.orthogonal(nn.Linear(4, 4), use_trivialization=False), (4,)
    ),
    "symmetric": Entry(symmetric, (4,)),
    "pruned": Entry(lambda: prune.l1_unstructured(nn.Linear(4, 3), "weight", 0.4), (4,)),
    "pruned by rows": Entry(
        lambda: prune.random_structured(nn.Linear(4, 3), "weight", 0.4, dim=0), (4,)
    ),
}

LAYERS: dict[str, Entry] = {
    **elementwise(
        *("CELU", "ELU", "GELU", "GLU", "Hardshrink", "Hardsigmoid", "Hardswish", "Hardtanh"),
        *("Identity", "LeakyReLU", "LogSigmoid", "Mish", "PReLU", "ReLU", "ReLU6", "SELU", "SiLU"),
        *("Sigmoid", "Softplus", "Softshrink", "Softsign", "Tanh", "Tanhshrink"),
    ),
    **elementwise("LogSoftmax", "Softmax", "Softmin", dim=-1),
    "Threshold": Entry(lambda: nn.Threshold(0.1, 0.2), (4,)),
    "RReLU, eval": Entry(lambda: nn.RReLU().eval(), (4,)),
    "Hardsigmoid, in place": Entry(
        lambda: nn.Sequential(nn.Linear(4, 4), nn.Hardsigmoid(inplace=True)), (4,)
    ),
    "Softmax2d": Entry(nn.Softmax2d, (2, 2, 2)),
    "Linear": Entry(lambda: nn.Linear(4, 3), (4,)),
    "Bilinear": Entry(lambda: Apply(lambda f, x: f(x, x.sin()), nn.Bilinear(4, 4, 3)), (4,)),
    **of_each_dimension("AdaptiveAvgPool", 3),
    **of_each_dimension("AdaptiveMaxPool", 3),
    **of_each_dimension("AvgPool", 2),
    **of_each_dimension("MaxPool", 2),
    **of_each_dimension("LPPool", 2.0, 2),
    **of_each_dimension("Conv", 2, 2, 3, padding=1, groups=2),
    **of_each_dimension("ConvTranspose", 2, 2, 2, stride=2),
    **of_each_dimension("BatchNorm", 2),
    **of_each_dimension("InstanceNorm", 2, affine=True, track_running_stats=True),
    **of_each_dimension("CircularPad", 1),
    **of_each_dimension("ConstantPad", 1, 0.5),
    **of_each_dimension("ReflectionPad", 1),
    **of_each_dimension("ReplicationPad", 1),
    **of_each_dimension("ZeroPad", 1),
    **of_each_dimension("Dropout", 0.0),
    **{
        f"MaxUnpool{d}d": Entry(lambda d=d: pooled_and_back(d), (2, 4, 4, 4)[: d + 1])
        for d in (1, 2, 3)
    },
    "Conv2d, circular": Entry(
        lambda: nn.Conv2d(2, 2, 3, padding="same", padding_mode="circular"), (2, 4, 4)
    ),
    "Dropout": Entry(lambda: nn.Dropout().eval(), (4,)),
    "AlphaDropout": Entry(lambda: nn.AlphaDropout().eval(), (4,)),
    "FeatureAlphaDropout": Entry(lambda: nn.FeatureAlphaDropout().eval(), (2, 4)),
    "FractionalMaxPool2d": Entry(
        lambda: nn.FractionalMaxPool2d(2, 2, _random_samples=samples(BATCH, 2, 2)), (2, 4, 4)
    ),
    "FractionalMaxPool3d": Entry(
        lambda: nn.FractionalMaxPool3d(2, 2, _random_samples=samples(BATCH, 2, 3)), (2, 4, 4, 4)
    ),
    "ChannelShuffle": Entry(lambda: nn.ChannelShuffle(2), (4, 2, 2)),
    "PixelShuffle": Entry(lambda: nn.PixelShuffle(2), (4, 2, 2)),
    "PixelUnshuffle": Entry(lambda: nn.PixelUnshuffle(2), (1, 4, 4)),
    "LocalResponseNorm": Entry(lambda: nn.LocalResponseNorm(2), (4, 2, 2)),
    "GroupNorm": Entry(lambda: nn.GroupNorm(2, 4), (4, 2, 2)),
    "LayerNorm": Entry(lambda: nn.LayerNorm(4), (3, 4)),
    "RMSNorm": Entry(lambda: nn.RMSNorm(4), (3, 4)),
    "Fold": Entry(lambda: nn.Fold((4, 4), 2, stride=2), (8, 4)),
    "Unfold": Entry(lambda: nn.Unfold(2), (2, 3, 3)),
    "Flatten": Entry(nn.Flatten, (2, 3)),
    "Unflatten": Entry(lambda: nn.Unflatten(1, (2, 2)), (4,)),
    "Upsample": Entry(lambda: nn.Upsample(scale_factor=2, mode="linear"), (2, 3)),
    "UpsamplingBilinear2d": Entry(lambda: nn.UpsamplingBilinear2d(scale_factor=2), (1, 3, 3)),
    "UpsamplingNearest2d": Entry(lambda: nn.UpsamplingNearest2d(scale_factor=2), (1, 3, 3)),
    "bicubic": interpolated((1, 4, 4), scale_factor=1.5, mode="bicubic"),
    "bicubic, smoothed": interpolated((1, 4, 4), size=3, mode="bicubic", antialias=True),
    "trilinear": interpolated((1, 3, 3, 3), scale_factor=2, mode="trilinear"),
    **{
        f"grid_sample, {mode}, {padding}": Entry(
            lambda how={"mode": mode, "padding_mode": padding}: Apply(
                lambda x: F.grid_sample(
                    x[:, :1], x[:, 1:].movedim(1, -1), align_corners=False, **how
                )
            ),
            (3, 3, 3),
        )
        for mode, padding in (
            *(("bilinear", "zeros"), ("bilinear", "reflection")),
            *(("nearest", "border"), ("bicubic", "border")),
        )
    },
    "affine_grid": Entry(
        lambda: Apply(lambda x: F.affine_grid(x, [BATCH, 1, 2, 2], align_corners=False)), (2, 3)
    ),
    "CosineSimilarity": Entry(
        lambda: Apply(lambda f, x: f(x, x.sin() + 1).unsqueeze(1), nn.CosineSimilarity()), (4,)
    ),
    "PairwiseDistance": Entry(
        lambda: Apply(lambda f, x: f(x, x.sin() + 1), nn.PairwiseDistance(keepdim=True)), (4,)
    ),
    **{
        f"cdist, {p}": Entry(lambda p=p: Apply(lambda x: torch.cdist(x, x.sin(), p)), (3, 4))
        for p in (1.0, 2.0, 3.0, float("inf"))
    },
    "cdist, of equals": Entry(lambda: Apply(lambda x: torch.cdist(x, x)), (3, 4)),
    "pdist": Entry(lambda: Apply(lambda x: x * F.pdist(x).sum()), (4,)),
    "one_hot": Entry(lambda: Apply(lambda x: x * F.one_hot(x.argmax(-1), 4)), (4,)),
    **RECURRENT,
    **ATTENTION,
    **EMBEDDINGS,
    **PARAMETRIZED,
}

REFUSED: dict[str, tuple[Build, str]] = {
    "CrossMapLRN2d": (lambda: nn.CrossMapLRN2d(2), "LocalResponseNorm"),
    "lazy": (lambda: nn.LazyLinear(2), "has no weights yet"),
    "TorchScript": (lambda: torch.jit.script(mlp()), "TorchScript has its own values"),
}
"""Modules that cannot be adapted, and what the error says."""
ONLY_IN_A_LOOP = {"AdaptiveLogSoftmaxWithLoss"}
"""Layers whose operations depend on values, and so differ from task to task."""
