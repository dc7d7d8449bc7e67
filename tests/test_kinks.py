"""Derivatives at kinks, ties and bounds: one rule on every backend, whatever is made of the parts.

That each function keeps the table of docs/reference/derivatives.md is for the conformance suite to
check. Here are compositions, meta-gradients, and what the page says of the table.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import jets
from documents import ROOT
from frameworks import BACKENDS, require, slow
from meta_problems import quick
from metaframe import compile as compile_whole
from metaframe import maml_step, nn, ops, use_backend
from metaframe.backend import Backend
from metaframe.core.inner_loop import MODES
from metaframe.testing.conformance.clause import Bench, close
from metaframe.testing.conformance.kinks import TABLE, Kink, compare, derivatives, table

Call = Callable[..., Any]
Values = np.ndarray[Any, Any]


def test_the_page_shows_the_table() -> None:
    page = (ROOT / "docs/reference/derivatives.md").read_text()
    assert table() in page
    assert page.count("\n| `") == len(TABLE)


def test_every_function_with_a_kink_is_in_the_table() -> None:
    smooth = {"cos", "exp", "expm1", "mean", "sin", "square", "sum"}
    moving = {"astype", "broadcast_to", "concat", "einsum", "expand_dims", "matmul", "pad"}
    moving |= {"reshape", "squeeze", "stack", "stop_gradient", "take", "transpose"}
    made = {"arange", "argmax", "asarray", "one_hot", "ones_like", "zeros", "zeros_like"}
    named = {kink.name for kink in TABLE}
    assert set(ops.__all__) - smooth - moving - made - {"to_numpy"} <= named
    linear = {"attention", "conv2d", "dense", "dropout", "embedding", "mean_pool"}
    others = {"accuracy", "conv4", "dropout_mask", "glorot_uniform", "he_normal", "mlp", "ones"}
    others |= {"AttentionKernel", "Initializer", "Model", "truncated_normal", "zeros"}
    others |= {"use_attention_kernel"}
    others |= {"linear_cross_entropy"}  # smooth, as cross_entropy is
    assert set(nn.__all__) - linear - others <= named


# -- compositions --------------------------------------------------------------------------------

DIRECTION = (1.0, -0.5, 0.75)
POINTS = np.random.default_rng(1).choice([-1.0, 0.0, 0.5, 1.0, 2.0], size=(3, 16))


@functools.cache
def compositions(count: int) -> list[jets.Composition]:
    """So seeded that every function meets its kinks."""
    rng = np.random.default_rng(18)
    return [jets.composition(rng) for _ in range(count)]


def evaluated(backend: Backend, count: int) -> Call:
    """`xs -> ((value, gradients, Hessians times DIRECTION) of every composition)`."""

    def of(expression: jets.Composition, xs: Any) -> Any:
        def value(xs: Any) -> Any:
            found = expression.portable(xs)
            return ops.sum(found), (found,)

        def along(xs: Any) -> Any:
            _, (found,), grads = backend.value_and_grad(value)(xs)
            return sum(d * ops.sum(g) for d, g in zip(DIRECTION, grads, strict=True)), (
                found,
                *grads,
            )

        _, (found, *grads), products = backend.value_and_grad(along)(xs)
        return found, ops.stack(grads), ops.stack(products)

    return lambda *xs: [of(expression, xs) for expression in compositions(count)]


@functools.cache
def eager_results(name: str, count: int) -> Any:
    with use_backend(name, dtype="float64") as backend:
        found = evaluated(backend, count)(*map(backend.asarray, POINTS))
        return [tuple(map(backend.to_numpy, row)) for row in found]


COUNT = 40


def check_compositions(results: Any, count: int) -> None:
    for expression, (value, grads, products) in zip(compositions(count), results, strict=True):
        jet = expression.jet(POINTS, DIRECTION)
        for found, expected in (
            (value, jet.value),
            (np.tensordot(DIRECTION, grads, 1), jet.first),
            (np.tensordot(DIRECTION, products, 1), jet.second),
        ):
            close(np.where(jet.clear, found, 0.0), np.where(jet.clear, expected, 0.0), 1e-12)


def test_compositions_follow_the_rules(backend_name: str) -> None:
    """Random expressions at points that are full of ties, against the rules in NumPy."""
    check_compositions(eager_results(backend_name, COUNT), COUNT)


@pytest.mark.parametrize("backend_name", ["jax", slow("tensorflow"), slow("torch")], indirect=True)
def test_compiled_compositions_follow_the_rules(backend: Backend) -> None:
    found = compile_whole(evaluated(backend, 4))(*map(backend.asarray, POINTS))
    check_compositions([tuple(map(backend.to_numpy, row)) for row in found], 4)


@pytest.mark.parametrize("other", BACKENDS[1:])
def test_backends_agree_on_compositions(other: str) -> None:
    """In all of the gradient and of the Hessian's product, and not only along a direction."""
    require(BACKENDS[0])
    require(other)
    pairs = zip(eager_results(BACKENDS[0], COUNT), eager_results(other, COUNT), strict=True)
    for expression, (one, two) in zip(compositions(COUNT), pairs, strict=True):
        clear = expression.jet(POINTS, DIRECTION).clear
        for x, y in zip(one, two, strict=True):
            close(np.where(clear, x, 0.0), np.where(clear, y, 0.0), 1e-12)


def test_compositions_meet_every_kink() -> None:
    met: Counter[str] = Counter()
    for expression in compositions(COUNT):
        for name, arguments in expression.visited(POINTS, DIRECTION):
            values = np.array([x.value for x in arguments])
            tie = np.isin(values, (-1.0, 0.0, 1.0)).any(0) | (values[1:] == values[0]).any(0)
            met[name] += int(np.sum(tie & arguments[0].clear))
    assert min(met[name] for name in jets.STEPS) >= 5


# -- meta-gradients ------------------------------------------------------------------------------

SINGLE = {name: step for name, step in jets.STEPS.items() if step.arguments == 1}
START = np.array([-1.0, -0.5, 0.0, 0.5, 1.0])
SHIFTS = np.array([0.0, 0.5, -1.0])
RATE = 0.5


def shifted_cost(task: Any, v: Any) -> Any:
    return sum(ops.sum(SINGLE[name].portable(x + task["shift"])) for name, x in v.items())


def meta_gradient_by_the_rules(name: str) -> Values:
    """Of `f(u - rate f'(u))`, `u` the start and the shift: `f'(...) (1 - rate f''(u))`."""
    found = []
    for shift in SHIFTS:
        before = SINGLE[name].rule(jets.variable(START + shift, 1.0))
        after = SINGLE[name].rule(jets.variable(START + shift - RATE * before.first, 1.0))
        found.append(after.first * (1 - RATE * before.second))
    return np.asarray(np.mean(found, 0))


@pytest.mark.parametrize(
    ("batched", "mode"),
    [
        ("vmap", "reverse"),
        *(slow("vmap", mode) for mode in MODES if mode != "reverse"),
        *(slow(batched, mode) for batched in ("scan", False) for mode in MODES),
    ],
)
def test_meta_gradients_through_kinks(
    backend: Backend, arr: Call, to_np: Call, batched: Any, mode: Any
) -> None:
    """The inner loop starts on kinks and ends on kinks."""

    def step(batch: Any, v: Any) -> Any:
        args = (batch, shifted_cost, None, v, 1, RATE)
        return maml_step(*args, batched=batched, mode=mode)[1]

    v = dict.fromkeys(SINGLE, START)
    grads = to_np(quick(backend, step)(arr({"shift": SHIFTS}), arr(v)))
    for name in SINGLE:
        close(grads[name], meta_gradient_by_the_rules(name), 1e-12)


# -- borders of single functions -------------------------------------------------------------------

AT_ZERO = [k for k in TABLE if list(k.at.values()) == [0.0] and np.isfinite(k.expected).all()]


def test_a_negative_zero_is_a_zero(backend: Backend) -> None:
    bench = Bench(backend)
    functions = [derivatives(kink, bench) for kink in AT_ZERO]

    def everything(x: Any) -> Any:
        return [fn((x,)) for fn in functions]

    found = quick(backend, everything)(backend.asarray(-0.0, "float64"))
    for kink, arrays in zip(AT_ZERO, found, strict=True):
        compare(kink, arrays, bench)
    assert len(AT_ZERO) > 15


FAR = np.array([0.0, 1e-3, 1.0, 10.0, 30.0, 50.0, 80.0, 1e4])
LOGITS = np.concatenate([-FAR, FAR])


def sigmoid(z: Values) -> Values:
    small = np.exp(-np.abs(z))
    return np.where(z < 0, small, 1.0) / (1.0 + small)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("label", [None, 0, 1])
def test_soft_functions_keep_all_their_digits(
    backend: Backend, to_np: Call, dtype: str, label: int | None
) -> None:
    """Of values and of three derivatives, where they are tiny too: the tolerance is relative."""
    sign = 1.0 if label is None else 1.0 - 2.0 * label
    p, q = sigmoid(sign * LOGITS), sigmoid(-sign * LOGITS)
    value = np.maximum(sign * LOGITS, 0) + np.log1p(np.exp(-np.abs(LOGITS)))
    # The third derivative is a difference, which cancels where p is near q.
    expected = ((value, value), (sign * p, p), (p * q, p * q), (sign * p * q * (q - p), p * q))

    def cost(z: Any) -> Any:
        if label is None:
            return ops.sum(ops.softplus(z))
        targets = ops.asarray(np.full(LOGITS.shape, label))
        return len(LOGITS) * nn.binary_cross_entropy(z, targets)

    def slopes(fn: Call) -> Call:
        return lambda z: backend.value_and_grad(lambda xs: (ops.sum(fn(xs[0])), ()))((z,))[2][0]

    def orders(z: Any) -> Any:
        first = slopes(cost)
        return ops.softplus(sign * z), first(z), slopes(first)(z), slopes(slopes(first))(z)

    tolerance = 2e-6 if dtype == "float32" else 1e-13
    found = to_np(quick(backend, orders)(backend.asarray(LOGITS, dtype)))
    for x, (y, scale) in zip(found, expected, strict=True):
        assert (np.abs(x - y) <= tolerance * scale).all()


def test_targets_can_be_learned(backend: Backend, to_np: Call) -> None:
    """The derivative by a target is the negative logit, also where it is 0 or 1 already."""
    z, y = np.array([-2.0, 0.5, 3.0]), np.array([0.0, 0.3, 1.0])

    def cost(xs: Any) -> Any:
        return 3 * nn.binary_cross_entropy(*xs), ()

    _, _, grads = backend.value_and_grad(cost)((backend.asarray(z), backend.asarray(y)))
    close(to_np(grads[0]), sigmoid(z) - y, 1e-12)
    close(to_np(grads[1]), -z, 1e-12)


def test_equal_numbers_have_no_deviation(backend: Backend, to_np: Call) -> None:
    """Also ones that are not sums of powers of two, whose mean is rounded."""
    x = backend.asarray(np.full(7, 0.1), "float64")

    def slope(xs: Any) -> Any:
        _, _, (found,) = backend.value_and_grad(lambda xs: (ops.std(xs[0]), ()))(xs)
        return ops.sum(found * backend.asarray(np.arange(7.0), "float64")), (found,)

    _, (first,), (second,) = backend.value_and_grad(slope)((x,))
    assert not to_np(first).any()
    assert not to_np(second).any()


def test_a_kink_names_what_it_is_about() -> None:
    kink = Kink("f(x, y)", lambda x, y: x + y, {"x": [0.0, 1.0], "y": 2.0}, [1.0] * 3)
    assert kink.row() == "| `f(x, y)` | x = (0, 1), y = 2 | (1, 1, 1) | 0 |"
