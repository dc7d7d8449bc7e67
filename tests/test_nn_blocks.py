"""Attention and cross-entropy by blocks: equal to the plain form, with its derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from frameworks import compiles_on_torch, slow
from metaframe import compile as compile_whole
from metaframe import meta_value_and_grad, nn, ops, tree, unroll, use_backend, value_and_grad
from metaframe.errors import BackendError, InputError, InputTypeError

Call = Callable[..., Any]
RNG = np.random.default_rng(5)
LENGTH, WIDTH, BLOCK = 40, 4, 16
"""Two whole blocks and a rest."""
V = {name: RNG.normal(size=(WIDTH, WIDTH)) for name in ("query", "key", "value")}
X = RNG.normal(size=(LENGTH, WIDTH))
HIDDEN = RNG.uniform(size=LENGTH) < 0.5
FULL = RNG.uniform(size=(LENGTH, LENGTH)) < 0.5
np.fill_diagonal(FULL, True)
HIDDEN[0] = True
MASKS: dict[str, dict[str, Any]] = {
    "no mask": {},
    "causal": {"causal": True},
    "keys": {"mask": HIDDEN},
    "pairs": {"mask": FULL},
    "pairs and causal": {"mask": FULL, "causal": True},
}


def cost(x: Any, v: Any, how: dict[str, Any]) -> Any:
    out = nn.attention(x @ v["query"], x @ v["key"], x @ v["value"], **how)
    return ops.mean(ops.square(out - ops.tanh(x)))


def outer(v: Any, x: Any, how: dict[str, Any], mode: Any = "reverse") -> Any:
    """The cost after a step: its gradient has the second derivative of attention."""
    found = unroll(lambda x, v: cost(x, v, how), v, x, steps=1, lr=0.5, mode=mode)
    return cost(x, found.variables, how)


def both(found: Any, expected: Any, to_np: Call) -> None:
    assert to_np(found.cost) == pytest.approx(to_np(expected.cost), rel=1e-12)
    for a, b in zip(tree.leaves(found.grads), tree.leaves(expected.grads), strict=True):
        np.testing.assert_allclose(to_np(a), to_np(b), atol=1e-12 * np.abs(to_np(b)).max())


@pytest.mark.parametrize("masked", MASKS)
def test_attention_by_blocks(masked: str, arr: Call, to_np: Call) -> None:
    how = {k: arr(x) if k == "mask" else x for k, x in MASKS[masked].items()}
    v, x = arr(V), arr(X)
    plain = value_and_grad(lambda v: outer(v, x, {**how, "block_size": LENGTH}))(v)
    both(value_and_grad(lambda v: outer(v, x, {**how, "block_size": BLOCK}))(v), plain, to_np)


@pytest.mark.parametrize("mode", ["remat", "replay"])
def test_within_steps_that_are_recomputed(mode: Any, arr: Call, to_np: Call) -> None:
    v, x = arr(V), arr(X)
    plain = value_and_grad(lambda v: outer(v, x, {"block_size": LENGTH}))(v)
    both(value_and_grad(lambda v: outer(v, x, {"block_size": BLOCK}, mode))(v), plain, to_np)


def test_forward_over_reverse(backend: Any, arr: Call, to_np: Call) -> None:
    """mode="mixed" needs a forward mode of blocks, which JAX alone has; elsewhere it says so."""
    v, x = arr(V), arr(X)
    step = value_and_grad(lambda v: outer(v, x, {"block_size": BLOCK}, "mixed"))
    if backend.name == "jax":
        both(step(v), value_and_grad(lambda v: outer(v, x, {"block_size": LENGTH}))(v), to_np)
    else:
        with pytest.raises(BackendError, match=r"forward mode|ForwardAccumulator"):
            step(v)


@compiles_on_torch
def test_compiled_over_tasks(arr: Call, to_np: Call) -> None:
    """Over heads and tasks, by vmap, in one program; keys of another number than queries."""
    v, tasks = arr(V), arr(RNG.normal(size=(2, 3, 2, 20, WIDTH)))

    def step(size: int, task_map: Any) -> Any:
        def task_cost(v: Any, x: Any) -> Any:
            def inner(x: Any, v: Any) -> Any:
                q, k = x @ v["query"], x[..., :15, :]
                out = nn.attention(q, k @ v["key"], k @ v["value"], block_size=size)
                return ops.mean(ops.square(out - x))

            found = unroll(inner, v, x, steps=1, lr=0.5)
            return inner(x, found.variables)

        return meta_value_and_grad(task_cost, task_map=task_map)

    plain = step(20, "loop")(v, tasks)
    both(compile_whole(step(8, "vmap"))(v, tasks), plain, to_np)


@pytest.mark.parametrize(
    ("dtype", "length", "width", "close"),
    [("float64", 512, 16, 1e-12), slow("float32", 4096, 64, 1e-5)],
)
def test_length(
    backend: Any, to_np: Call, dtype: str, length: int, width: int, close: float
) -> None:
    """The second-order gradient by blocks is that of the plain form, by the norm of each part."""
    rng = np.random.default_rng(0)
    with use_backend(backend.name, dtype=dtype):
        x = ops.asarray(rng.normal(size=(length, width)))
        scale = 1 / np.sqrt(width)
        v = {n: ops.asarray(scale * rng.normal(size=(width, width))) for n in sorted(V)}
        plain, blocks = (
            to_np(value_and_grad(lambda v, size=size: outer(v, x, {"block_size": size}))(v))
            for size in (length, 128)
        )
    assert blocks.cost == pytest.approx(plain.cost, rel=close)
    for name, g in plain.grads.items():
        assert np.linalg.norm(blocks.grads[name] - g) <= close * np.linalg.norm(g)


def test_long_attention_is_by_blocks_of_itself(
    backend: Any, arr: Call, to_np: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    recompute = type(backend).recompute

    def counted(self: Any, fn: Any) -> Any:
        def call(xs: Any) -> Any:
            sizes.append(xs[0].shape[0])
            return recompute(self, fn)(xs)

        return call

    monkeypatch.setattr(type(backend), "recompute", counted)
    monkeypatch.setattr("metaframe.nn.blocks.LONG", 300 * 300)
    x = arr(RNG.normal(size=(300, 2)))
    nn.attention(x[:299], x, x)
    assert sizes == []
    found = nn.attention(x, x, x)
    assert sizes == [128, 128, 44]
    np.testing.assert_allclose(
        to_np(found), to_np(nn.attention(x, x, x, block_size=300)), rtol=1e-12
    )


def logits_cost(v: Any, x: Any, labels: Any, size: int) -> Any:
    def inner(x: Any, v: Any) -> Any:
        return nn.linear_cross_entropy(x @ v["m"], v["w"], labels, v["b"], block_size=size)

    found = unroll(inner, v, x, steps=1, lr=0.5)
    return inner(x, found.variables)


def test_cross_entropy_by_blocks(arr: Call, to_np: Call) -> None:
    shapes = {"m": (WIDTH, WIDTH), "w": (WIDTH, 9), "b": (9,)}
    v = arr({name: RNG.normal(size=shape) for name, shape in shapes.items()})
    x, labels = arr(X.reshape(2, LENGTH // 2, WIDTH)), arr(RNG.integers(0, 9, (2, LENGTH // 2)))

    def by_hand(x: Any, v: Any) -> Any:
        return nn.cross_entropy(nn.dense(x @ v["m"], v["w"], v["b"]), labels)

    plain = value_and_grad(lambda v: by_hand(x, unroll(by_hand, v, x, steps=1, lr=0.5).variables))(
        v
    )
    both(value_and_grad(lambda v: logits_cost(v, x, labels, BLOCK))(v), plain, to_np)


def test_another_kernel(arr: Call, to_np: Call) -> None:
    x = arr(X)

    def kernel(query: Any, key: Any, value: Any, *, mask: Any, causal: bool) -> Any:
        assert mask is None
        return 2 * nn.attention(query, key, value, causal=causal)

    found = nn.attention(x, x, x, causal=True, kernel=kernel)
    np.testing.assert_allclose(to_np(found), 2 * to_np(nn.attention(x, x, x, causal=True)))
    with pytest.raises(InputError, match=r"kernel returned shape \(2, 4\); .* in \(40, 4\)"):
        nn.attention(x, x, x, kernel=lambda query, key, value, mask, causal: value[:2])


def test_a_chosen_kernel(arr: Call, to_np: Call) -> None:
    """Compiled functions are told apart by it, and one of a call's own counts first."""
    x = arr(X)

    def doubled(query: Any, key: Any, value: Any, *, mask: Any, causal: bool) -> Any:
        return 2 * nn.attention(query, key, value, kernel=plain)

    def plain(query: Any, key: Any, value: Any, *, mask: Any, causal: bool) -> Any:
        return nn.softmax(query @ ops.transpose(key, [1, 0]) / np.sqrt(WIDTH)) @ value

    compiled = compile_whole(lambda x: nn.attention(x, x, x))
    expected = to_np(compiled(x))
    with nn.use_attention_kernel(doubled):
        np.testing.assert_allclose(to_np(compiled(x)), 2 * expected, rtol=1e-12)
        np.testing.assert_allclose(to_np(nn.attention(x, x, x)), 2 * expected, rtol=1e-12)
    np.testing.assert_allclose(to_np(compiled(x)), expected, rtol=1e-12)
    assert compiled.traces == 2
    refused = pytest.raises(InputTypeError, match="kernel must be a function, received int")
    with refused, nn.use_attention_kernel(3):  # type: ignore[arg-type]
        pass


def test_causal_is_a_mask(arr: Call, to_np: Call) -> None:
    x, mask = arr(X), arr(np.tri(LENGTH, LENGTH - 9, dtype=bool))
    expected = nn.attention(x, x[:-9], x[:-9], mask)
    np.testing.assert_array_equal(
        to_np(nn.attention(x, x[:-9], x[:-9], causal=True)), to_np(expected)
    )


def test_bad_arguments(arr: Call) -> None:
    x, labels = arr(X), arr(np.zeros(LENGTH, int))
    with pytest.raises(InputError, match="block_size must be at least 1, received 0"):
        nn.attention(x, x, x, block_size=0)
    with pytest.raises(InputError, match=r"received shapes \(40, 4\), \(40, 3\) and \(40, 4\)"):
        nn.attention(x, x[:, :3], x)
    with pytest.raises(InputError, match=r"causal must be one of False, True"):
        nn.attention(x, x, x, causal=1)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"linear_cross_entropy needs labels .* for x of shape"):
        nn.linear_cross_entropy(x, arr(np.zeros((4, 9))), labels[:3], block_size=8)
    with pytest.raises(InputTypeError, match="linear_cross_entropy needs integer labels"):
        nn.linear_cross_entropy(x, arr(np.zeros((4, 9))), x[:, 0], block_size=8)
