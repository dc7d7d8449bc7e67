"""The portable layers, costs, initialisers and models against NumPy, on every backend."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from frameworks import checked_functions, require
from metaframe import nn, ops, tree
from metaframe.backend import Backend, load_backend
from metaframe.errors import BackendError, InputError, InputTypeError
from metaframe.nn.init import stream
from metaframe.testing.conformance.cases import Case, check_derivatives, check_value, slope, weights
from metaframe.testing.conformance.clause import close, on_the_bench
from metaframe.testing.conformance.nn_clauses import CONVOLUTIONS, conv2d, max_pool, normalised

_rng = np.random.default_rng(0)
X = _rng.normal(size=(2, 5))
IMAGES = _rng.normal(size=(2, 5, 4, 2))
KERNEL = _rng.normal(size=(3, 3, 2, 3))


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=lambda case: case.id)
def test_jax_convolves_alike_on_an_accelerator(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    require("jax")
    monkeypatch.setattr("metaframe_jax._nn.on_cpu", lambda x: False)
    with on_the_bench(load_backend("jax")) as bench:
        check_value(case, bench)
        check_derivatives(case, bench)


def test_every_function_is_tested_and_documented() -> None:
    special = {"Initializer", "Model", "conv4", "dropout_mask", "mlp", "softplus"}
    special |= {
        "AttentionKernel",
        "linear_cross_entropy",
        "use_attention_kernel",
    }  # with the blocks
    assert nn.softplus is ops.softplus
    initializers = {"glorot_uniform", "he_normal", "ones", "truncated_normal", "zeros"}
    assert checked_functions("nn") | special | initializers == set(nn.__all__)
    named = set(nn.__all__) - {"AttentionKernel", "Initializer"}
    assert all(">>>" in (inspect.getdoc(getattr(nn, name)) or "") for name in named)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: nn.mse(np.ones((3, 1)), np.ones(3)), InputError, r"\(3, 1\) and target \(3,\)"),
        (
            lambda: nn.binary_cross_entropy(np.ones((3, 1)), np.ones(3)),
            InputError,
            r"logits \(3, 1\) and targets \(3,\)",
        ),
        (
            lambda: nn.binary_cross_entropy(np.ones(3, int), np.ones(3)),
            InputTypeError,
            "binary_cross_entropy needs a floating array, received int",
        ),
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
        (
            lambda: nn.conv2d(IMAGES[:, :, :2], KERNEL, padding="valid"),
            InputError,
            r"a kernel of 3 x 3 pixels does not fit into x of shape \(2, 5, 2, 2\)",
        ),
        (lambda: nn.conv2d(IMAGES[:, :1], KERNEL, padding=((1, 0), (1, 1))), InputError, "3 x 3"),
        (lambda: nn.max_pool2d(IMAGES[:, :1]), InputError, "a window of 2 x 2 pixels does not fit"),
        (lambda: nn.max_pool2d(IMAGES, (2, 5)), InputError, "a window of 2 x 5 pixels"),
        (lambda: nn.max_pool2d(IMAGES[0]), InputError, r"\(N, H, W, C\), received \(5, 4, 2\)"),
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
        x = conv2d(x, kernel, stride, ((low, 1), (low, 1)))
        x = np.maximum(normalised(x, (0, 1, 2), scale, shift), 0)
        x = max_pool(x, (2, 2)) if pooling == "max" else x
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


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "float64"])
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


def _composed(x: Any, scale: Any, shift: Any, eps: float) -> Any:
    axes = tuple(range(len(x.shape) - 1))
    centred = x - ops.mean(x, axes, keepdims=True)
    variance = ops.mean(ops.square(centred), axes, keepdims=True)
    return centred / ops.sqrt(variance + eps) * scale + shift


@pytest.mark.parametrize(
    ("shape", "mapped"),
    [
        pytest.param((5, 3), False, id="vectors"),
        pytest.param((2, 3, 2, 3), False, id="images", marks=pytest.mark.slow),
        pytest.param((2, 3, 2, 3), True, id="images of tasks", marks=pytest.mark.slow),
    ],
)
def test_batch_norm_has_derivatives_of_every_order(
    backend: Backend, shape: tuple[int, ...], mapped: bool, execution: Any
) -> None:
    """Torch's own third derivative takes the statistics for constants, and is off by its size."""
    values = _rng.normal(size=shape), _rng.normal(size=3), _rng.normal(size=3)
    xs = tuple(backend.asarray(v) for v in values)
    weight = backend.asarray(_rng.normal(size=shape))

    def derivatives(norm: Callable[..., Any]) -> Any:
        def cost(xs: Any) -> tuple[Any, tuple[Any, ...]]:
            return ops.sum(ops.sin(weight * norm(*xs, eps=1e-2))), ()

        def next_order(fn: Any) -> Any:
            def sum_of_squares(xs: Any) -> tuple[Any, tuple[Any, ...]]:
                value, aux, grads = backend.value_and_grad(fn)(xs)
                total = sum(ops.sum(g * g) for g in grads)
                return total, (value, *aux, *grads)

            return sum_of_squares

        def all_orders(*xs: Any) -> Any:
            value, aux, grads = backend.value_and_grad(next_order(next_order(cost)))(xs)
            return (value, *aux, *grads)

        if not mapped:
            return execution(all_orders)(*xs)
        rows = tuple(ops.stack([x, 2 * x]) for x in xs)
        return execution(lambda *rows: backend.vmap(lambda xs: all_orders(*xs))(rows))(*rows)

    found, expected = derivatives(nn.batch_norm), derivatives(_composed)
    assert len(found) == len(expected) == 1 + 2 + 3 * 3
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(
            backend.to_numpy(x), backend.to_numpy(y), rtol=0, atol=1e-12 * _size(backend, y)
        )


def _size(backend: Backend, x: Any) -> float:
    return float(np.abs(backend.to_numpy(x)).max()) + 1.0
