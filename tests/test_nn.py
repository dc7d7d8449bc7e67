"""The portable layers, costs, initialisers and models against NumPy, on every backend."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cases import (
    Case,
    check_compiled,
    check_derivatives,
    check_value,
    check_vmap,
    close,
    run_examples,
    slope,
    weights,
)
from frameworks import compiles_on_torch, require
from metaframe import nn, ops, tree
from metaframe.backend import Backend, load_backend, use_backend
from metaframe.errors import BackendError, InputError, InputTypeError
from metaframe.nn.init import stream

_rng = np.random.default_rng(0)
X = _rng.normal(size=(2, 5))
IMAGES = _rng.normal(size=(2, 5, 4, 2))
KERNEL = _rng.normal(size=(3, 3, 2, 3))
ROW = _rng.normal(size=5)
LABELS = np.array([3, 0])
QUERY, KEY, VALUE = (_rng.normal(size=shape) for shape in ((2, 3, 4), (2, 5, 4), (2, 5, 2)))
MASK = np.array([[1, 0, 1, 1, 0], [0, 1, 0, 0, 0], [1, 1, 1, 1, 1]], bool)


def _softmax(x: Any, axis: int = -1) -> Any:
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def _gelu(x: Any) -> Any:
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def _conv2d(x: Any, kernel: Any, stride: tuple[int, int], pads: Any) -> Any:
    x = np.pad(x, ((0, 0), *pads, (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[:2], (1, 2))
    return np.einsum("nyxcij,ijcd->nyxd", windows[:, :: stride[0], :: stride[1]], kernel)


def _max_pool(x: Any, window: tuple[int, int]) -> Any:
    windows = np.lib.stride_tricks.sliding_window_view(x, window, (1, 2))
    return windows[:, :: window[0], :: window[1]].max((-2, -1))


def _normalised(x: Any, axes: Any, scale: Any = 1.0, shift: Any = 0.0, eps: float = 1e-5) -> Any:
    centred = x - x.mean(axes, keepdims=True)
    return scale * centred / np.sqrt(x.var(axes, keepdims=True) + eps) + shift


def _attention(query: Any, key: Any, value: Any, mask: Any = True) -> Any:
    scores = np.einsum("bqd,bkd->bqk", query, key) / math.sqrt(query.shape[-1])
    return _softmax(np.where(mask, scores, -np.inf)) @ value


def _cross_entropy(logits: Any, labels: Any) -> Any:
    return -np.log(_softmax(logits))[np.arange(len(labels)), labels].mean()


def _case(name: str, formula: Callable[..., Any], *inputs: Any, **options: Any) -> Case:
    label = "-".join([name, *(f"{k}={v}" for k, v in options.items()), str(len(inputs))])
    function = getattr(nn, name)
    return Case(label, lambda *xs: function(*xs, **options), formula, inputs)


def _conv_case(pads: Any, window: tuple[int, int] = (3, 3), **options: Any) -> Case:
    """`pads` is what the options have to mean."""
    stride = options.get("stride", 1)
    strides = (stride, stride) if isinstance(stride, int) else stride
    kernel = _rng.normal(size=(*window, 2, 3))
    case = _case("conv2d", lambda x, k: _conv2d(x, k, strides, pads), IMAGES, kernel, **options)
    return Case(f"{case.id}-{window}", case.function, case.formula, case.inputs)


CONVOLUTIONS = [
    _conv_case(((1, 1), (1, 1))),
    _conv_case(((1, 1), (0, 1)), stride=2, padding="same"),
    _conv_case(((0, 1), (0, 0)), (2, 1), padding="same"),
    _conv_case(((0, 0), (0, 0)), (1, 1)),
    _conv_case(((0, 0), (0, 0)), padding="valid"),
    _conv_case(((0, 0), (0, 0)), stride=(2, 1), padding="valid"),
    _conv_case(((2, 2), (2, 2)), stride=3, padding=2),
    _conv_case(((0, 2), (1, 0)), padding=((0, 2), (1, 0))),
]

CASES = [
    *CONVOLUTIONS,
    _case(
        "conv2d", lambda x, k, b: _conv2d(x, k, (1, 1), ((1, 1),) * 2) + b, IMAGES, KERNEL, ROW[:3]
    ),
    _case("dense", lambda x, w: x @ w, X, _rng.normal(size=(5, 3))),
    _case("dense", lambda x, w, b: x @ w + b, IMAGES, _rng.normal(size=(2, 3)), ROW[:3]),
    _case("max_pool2d", lambda x: _max_pool(x, (2, 2)), IMAGES),
    _case("max_pool2d", lambda x: _max_pool(x, (3, 1)), IMAGES, window=(3, 1)),
    _case("mean_pool", lambda x: x.mean((1, 2)), IMAGES),
    _case("batch_norm", lambda x: _normalised(x, (0, 1, 2)), IMAGES),
    _case(
        "batch_norm",
        lambda x, a, b: _normalised(x, (0, 1, 2), a, b, 0.1),
        IMAGES,
        ROW[:2],
        ROW[2:4],
        eps=0.1,
    ),
    _case("layer_norm", lambda x: _normalised(x, -1), 3 * X),
    _case("layer_norm", lambda x, a, b: _normalised(x, -1, a, b), 3 * X, ROW, 2 * ROW),
    _case("relu", lambda x: np.maximum(x, 0), X),
    _case("gelu", _gelu, X),
    _case("softmax", _softmax, X),
    _case("softmax", lambda x: _softmax(x, 0), X, axis=0),
    _case("log_softmax", lambda x: np.log(_softmax(x)), X),
    _case("log_softmax", lambda x: np.log(_softmax(x, 0)), X, axis=0),
    _case("embedding", lambda table, ids: table[ids], X, np.array([[1, 0, 1]])),
    _case("attention", _attention, QUERY, KEY, VALUE),
    _case("attention", _attention, QUERY, KEY, VALUE, MASK),
    _case("dropout", lambda x, keep: x * keep / 0.7, X, X > 0, rate=0.3),
    _case("mse", lambda p, t: np.mean((p - t) ** 2), X, 2 * X + ROW),
    _case("cross_entropy", _cross_entropy, X, LABELS),
]

SCORES = [_case("accuracy", lambda p, t: np.mean(p.argmax(-1) == t), X, X.argmax(-1) * [1, 0])]

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", [*CASES, *SCORES], ids=lambda case: case.id)
def test_values(case: Case, backend: Backend, dtype: str) -> None:
    check_value(case, backend, dtype)


@every_case
def test_both_derivatives(case: Case, backend: Backend) -> None:
    check_derivatives(case, backend)


@every_case
def test_vmap(case: Case, backend: Backend) -> None:
    check_vmap(case, backend)


@pytest.mark.slow
def test_compiled(backend: Backend) -> None:
    check_compiled(CASES, backend)


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=lambda case: case.id)
def test_jax_convolves_alike_on_an_accelerator(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    require("jax")
    backend = load_backend("jax")
    monkeypatch.setattr("metaframe_jax._nn.on_cpu", lambda x: False)
    check_value(case, backend, "float64")
    with use_backend("jax", dtype="float64"):
        check_derivatives(case, backend)


def test_examples_print_the_same_everywhere(backend: Backend) -> None:
    run_examples(nn)


def test_every_function_is_tested_and_documented() -> None:
    special = {"Initializer", "Model", "conv4", "dropout_mask", "mlp"}
    initializers = {"glorot_uniform", "he_normal", "ones", "truncated_normal", "zeros"}
    tested = {case.id.partition("-")[0] for case in [*CASES, *SCORES]}
    assert tested | special | initializers == set(nn.__all__)
    named = set(nn.__all__) - {"Initializer"}
    assert all(">>>" in (inspect.getdoc(getattr(nn, name)) or "") for name in named)


def _gradient(backend: Backend, fn: Callable[[Any], Any], x: Any) -> Any:
    _, _, (gradient,) = backend.value_and_grad(lambda v: (backend.ops.sum(fn(v[0])), ()))((x,))
    return gradient


@pytest.mark.parametrize("channels", [1, 16])
def test_max_pool_gives_the_gradient_to_the_first_largest_pixel(
    backend: Backend, channels: int
) -> None:
    pixels = np.array([[[2.0, 2.0], [2.0, 2.0]], [[1.0, 2.0], [2.0, 0.0]]])
    images = np.repeat(pixels[..., None], channels, -1)
    found = backend.to_numpy(_gradient(backend, nn.max_pool2d, backend.asarray(images)))
    first = np.array([[[1.0, 0.0], [0.0, 0.0]], [[0.0, 1.0], [0.0, 0.0]]])
    np.testing.assert_array_equal(found, np.repeat(first[..., None], channels, -1))


def test_max_pool_passes_nan_on(backend: Backend) -> None:
    for place in range(4):
        image = np.ones((1, 2, 2, 1))
        image.reshape(-1)[place] = np.nan
        assert np.isnan(backend.to_numpy(nn.max_pool2d(image))).all()


ROWS, COLUMNS, PICTURES = (_rng.normal(size=shape) for shape in ((1000, 64), (2, 64), (5, 8, 8, 1)))
LARGEST: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "max": (COLUMNS, lambda w: ops.max(nn.batch_norm(ops.asarray(ROWS) * w[0] + w[1]), 1)),
    "max_pool2d": (
        0.2 * _rng.normal(size=(3, 3, 1, 32)),
        lambda kernel: nn.max_pool2d(nn.batch_norm(nn.conv2d(ops.asarray(PICTURES), kernel))),
    ),
}


@compiles_on_torch
@pytest.mark.parametrize("name", LARGEST)
def test_fused_code_loses_no_winner(backend: Backend, name: str) -> None:
    """Compared with a maximum that was computed elsewhere, an element may differ in the last bit.

    With a plain reduction, meta-gradients under jax.jit are wrong here by 5e-3 to 30 of the norm.
    """
    start, output = LARGEST[name]

    def cost(xs: Any) -> Any:
        return ops.mean(ops.sin(output(xs[0]))), ()

    def outer(xs: Any) -> Any:
        _, _, (gradient,) = backend.value_and_grad(cost)(xs)
        return cost((xs[0] - 0.5 * gradient,))

    def meta_gradient(xs: Any) -> Any:
        return backend.value_and_grad(outer)(xs)[2]

    xs = (backend.asarray(start),)
    (found,), (expected,) = backend.compile(meta_gradient, xs)(xs), meta_gradient(xs)
    error = np.linalg.norm(backend.to_numpy(found) - backend.to_numpy(expected))
    assert error < 1e-10 * np.linalg.norm(backend.to_numpy(expected))


def test_relu_is_flat_at_zero(backend: Backend) -> None:
    gradient = _gradient(backend, nn.relu, backend.asarray([-1.0, 0.0, 2.0]))
    assert backend.to_numpy(gradient).tolist() == [0.0, 0.0, 1.0]


def test_cross_entropy_of_an_excluded_class_is_finite(backend: Backend) -> None:
    logits = ops.asarray([[0.0, 0.0, -math.inf]])
    cost = functools.partial(nn.cross_entropy, labels=ops.asarray(np.array([0])))
    assert float(cost(logits)) == pytest.approx(math.log(2), abs=1e-15)
    assert backend.to_numpy(_gradient(backend, cost, logits)).tolist() == [[-0.5, 0.5, 0.0]]


@pytest.mark.parametrize("label", [-1, 2])
def test_cross_entropy_with_a_label_out_of_range_is_nan(backend: Backend, label: int) -> None:
    assert math.isnan(float(nn.cross_entropy(np.zeros((2, 2)), np.array([0, label]))))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: nn.mse(np.ones((3, 1)), np.ones(3)), InputError, r"\(3, 1\) and target \(3,\)"),
        (
            lambda: nn.cross_entropy(np.ones((3, 2)), np.ones(3)),
            InputTypeError,
            "integer labels, received float64",
        ),
        (
            lambda: nn.accuracy(np.ones((3, 2)), np.ones((3, 1), int)),
            InputError,
            r"labels of shape \(3,\)",
        ),
        (lambda: nn.dense(np.ones((3, 2)), np.ones((3, 2))), InputError, "inputs of size 3"),
        (lambda: nn.conv2d(np.ones((1, 4, 4, 2)), KERNEL[:, :, :1]), InputError, "C in"),
        (lambda: nn.conv2d(IMAGES, KERNEL, padding="full"), InputError, "received 'full'"),
        (lambda: nn.dropout(X, X > 0, 1.0), InputError, "received 1.0"),
        (lambda: nn.mlp([3]), InputError, r"received \[3\]"),
        (lambda: nn.conv4(5, image_size=15), InputError, "at least 16x16"),
        (lambda: nn.conv4(5, pooling="mean"), InputError, "pooling='mean'"),
        (lambda: nn.glorot_uniform(-1, "w", (1, 1)), InputError, "received -1"),
        (lambda: nn.he_normal(0, "w", (3,)), InputError, "at least two axes"),
    ],
)
def test_unusable_arguments_are_named(
    backend: Backend, call: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call()


def test_initial_values_never_change() -> None:
    """Stored runs depend on these numbers."""
    assert stream(7, "head/w").random(2).tolist() == [0.11480033189452843, 0.7130847295213936]
    expected = [[-0.2516364585048754, -1.7518646501360553]]
    np.testing.assert_allclose(nn.he_normal(7, "head/w", (1, 2)), expected, rtol=1e-15)


def test_a_name_is_a_stream_of_its_own() -> None:
    first = nn.glorot_uniform(0, "a/w", (50, 50))
    assert np.array_equal(first, nn.glorot_uniform(0, "a/w", (50, 50)))
    for other in (nn.glorot_uniform(0, "b/w", (50, 50)), nn.glorot_uniform(1, "a/w", (50, 50))):
        assert abs(np.corrcoef(first.ravel(), other.ravel())[0, 1]) < 0.1


@pytest.mark.parametrize(
    ("initializer", "deviation", "largest"),
    [
        (nn.glorot_uniform, math.sqrt(2 / (9 * 40 + 9 * 80)), math.sqrt(6 / (9 * 40 + 9 * 80))),
        (nn.he_normal, math.sqrt(2 / (9 * 40)), math.inf),
        # Cutting a normal at two deviations leaves 0.8796 of its deviation.
        (functools.partial(nn.truncated_normal, stddev=0.5), 0.5 * 0.8796, 1.0),
    ],
    ids=["glorot_uniform", "he_normal", "truncated_normal"],
)
def test_distributions(initializer: Any, deviation: float, largest: float) -> None:
    values = initializer(0, "kernel", (3, 3, 40, 80))
    assert values.mean() == pytest.approx(0.0, abs=0.02 * deviation)
    assert values.std() == pytest.approx(deviation, rel=0.02)
    assert np.abs(values).max() <= largest


def test_dropout_mask_drops_its_share(backend: Backend) -> None:
    mask = nn.dropout_mask(0, "layer1", (100, 100), rate=0.3)
    assert backend.dtype_name(mask) == "bool"
    assert backend.to_numpy(mask).mean() == pytest.approx(0.7, abs=0.02)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_models_start_from_the_same_bits(backend: Backend, dtype: str) -> None:
    params = nn.conv4(ways=5, channels=4).init(3, dtype)
    for chain, leaf in params.to_iterator():
        if chain.endswith(("/w", "/kernel")):
            expected = nn.glorot_uniform(3, chain, tuple(leaf.shape)).astype(dtype)
            np.testing.assert_array_equal(backend.to_numpy(leaf), expected)
            assert backend.dtype_name(leaf) == dtype


def test_a_model_needs_a_selected_backend_to_start() -> None:
    with pytest.raises(BackendError, match="no backend is selected"):
        nn.mlp([1, 1]).init(0)


def _mlp_formula(params: Any, x: Any) -> Any:
    hidden = np.tanh(x @ params["layer1/w"] + params["layer1/b"])
    return hidden @ params["head/w"] + params["head/b"]


def _conv4_formula(pooling: str, params: Any, x: Any) -> Any:
    for i in range(1, 5):
        kernel, scale, shift = (params[f"block{i}/{k}"] for k in ("kernel", "scale", "shift"))
        stride = (1, 1) if pooling == "max" else (2, 2)
        low = 1 if pooling == "max" or x.shape[1] % 2 else 0
        x = _conv2d(x, kernel, stride, ((low, 1), (low, 1)))
        x = np.maximum(_normalised(x, (0, 1, 2), scale, shift), 0)
        x = _max_pool(x, (2, 2)) if pooling == "max" else x
    x = x.reshape(len(x), -1) if pooling == "max" else x.mean((1, 2))
    return x @ params["head/w"] + params["head/b"]


MODELS = {
    "mlp": (nn.mlp([5, 8, 3], activation=ops.tanh), _mlp_formula, (4, 5)),
    "conv4-max": (
        nn.conv4(ways=3, channels=4, in_channels=2, image_size=33),
        functools.partial(_conv4_formula, "max"),
        (4, 33, 33, 2),
    ),
    "conv4-stride": (
        nn.conv4(ways=3, channels=4, image_size=28, pooling="stride"),
        functools.partial(_conv4_formula, "stride"),
        (4, 28, 28, 1),
    ),
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", MODELS)
def test_models_compute_their_formula(backend: Backend, name: str, dtype: str) -> None:
    model, formula, shape = MODELS[name]
    x, params = weights(np.zeros(shape)), model.init(0, "float64")
    params = params.map(lambda leaf: leaf + 0.1)  # no bias, scale or shift that does nothing
    found = model.apply(params.map(lambda v: ops.astype(v, dtype)), backend.asarray(x, dtype))
    expected = formula(params.map(backend.to_numpy), x)
    close(backend.to_numpy(found), expected, 5e-13 if dtype == "float64" else 2e-6)


@pytest.mark.parametrize(
    "name",
    [
        "mlp",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("conv4-max", "conv4-stride")),
    ],
)
def test_models_have_second_derivatives(backend: Backend, name: str) -> None:
    model, _, shape = MODELS[name]
    leaves, spec = tree.flatten(model.init(0).map(lambda leaf: backend.to_numpy(leaf) + 0.1))
    x = backend.asarray(weights(np.zeros(shape)))
    labels = backend.asarray(np.arange(shape[0]) % 3)
    directions = [weights(leaf, 2) / math.sqrt(leaf.size) for leaf in leaves]

    def cost(xs: Any) -> Any:
        return nn.cross_entropy(model.apply(tree.unflatten(spec, xs), x), labels), ()

    def along(xs: Any) -> Any:
        _, _, gradients = backend.value_and_grad(cost)(xs)
        pairs = zip(directions, gradients, strict=True)
        return sum(ops.sum(backend.asarray(d) * g) for d, g in pairs), gradients

    def at(t: float) -> Any:
        xs = tuple(
            backend.asarray(leaf + t * d) for leaf, d in zip(leaves, directions, strict=True)
        )
        value, _, products = backend.value_and_grad(along)(xs)
        return float(value), [backend.to_numpy(p) for p in products]

    moved = functools.cache(at)
    value, products = moved(0.0)

    # A short step, so that no relu and no maximum switches within the stencil.
    def cost_along(t: float) -> float:
        pairs = zip(leaves, directions, strict=True)
        return float(cost(tuple(backend.asarray(leaf + t * d) for leaf, d in pairs))[0])

    assert value == pytest.approx(slope(cost_along, 1e-5), abs=1e-9)
    squared = sum(float(np.sum(p * d)) for p, d in zip(products, directions, strict=True))
    assert squared == pytest.approx(slope(lambda t: moved(t)[0], 1e-5), rel=1e-8)
