"""Schedules: their formulas, and the gradient of a loop in their parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from frameworks import compiles_on_torch
from metaframe import compile as compile_whole
from metaframe import ops, optim, per_step, tree, unroll, value_and_grad
from metaframe.core.inner_loop import MODES
from metaframe.errors import InputError, InputTypeError

Call = Callable[..., Any]
STEPS = 6
RNG = np.random.default_rng(11)
X, START, WEIGHTS = RNG.normal(size=(STEPS, 2)), RNG.normal(size=2), RNG.normal(size=2)
SCHEDULES: dict[str, tuple[Call, list[Any]]] = {
    "constant": (optim.constant, [0.1]),
    "linear": (lambda a, b: optim.linear(a, b, 4), [0.1, 0.02]),
    "cosine": (lambda a, b: optim.cosine(a, 4, b), [0.1, 0.02]),
    "exponential": (lambda a, b: optim.exponential(a, b, 2), [0.1, 0.7]),
    "table": (optim.table, [RNG.uniform(0.05, 0.2, size=4)]),
    "warmup": (lambda a, b: optim.warmup(optim.exponential(a, b), 3), [0.1, 0.7]),
    "of one's own": (
        lambda a, b: optim.Schedule(lambda count, a, b: a / (1 + b * count), (a, b)),
        [0.1, 0.5],
    ),
}


def rate_by_hand(name: str, k: int, given: list[Any]) -> Any:
    a, b = (*given, None)[:2]
    t = min(k / 4, 1.0)
    return {
        "constant": lambda: a,
        "linear": lambda: a * (1 - t) + b * t,
        "cosine": lambda: b + (a - b) * (1 + np.cos(np.pi * t)) / 2,
        "exponential": lambda: a * b ** (k / 2),
        "table": lambda: a[min(k, 3)],
        "warmup": lambda: a * b**k * min((k + 1) / 3, 1.0),
        "of one's own": lambda: a / (1 + b * k),
    }[name]()


def end_by_hand(name: str, given: list[Any]) -> Any:
    """The objective of momentum under the schedule in plain NumPy, for complex numbers too."""
    v, m = START + 0j, 0j
    for k in range(STEPS):
        x = X[k]
        slope = 2 * (v - x) * (1 + v**2) + (v - x) ** 2 * 2 * v
        m = 0.9 * m + slope
        v = v - rate_by_hand(name, k, given) * m
    return np.sum(v * WEIGHTS)


def cost(x: Any, v: Any) -> Any:
    return ops.sum(ops.square(v - x) * (1 + ops.square(v)))


def end(name: str, given: list[Any], mode: Any, arr: Call) -> Any:
    update = optim.momentum(SCHEDULES[name][0](*given))
    found = unroll(cost, arr(START), per_step(arr(X)), lr=None, update=update, mode=mode)
    return ops.sum(found.variables * arr(WEIGHTS))


def slopes_by_hand(name: str) -> list[Any]:
    """Complex steps, element by element."""
    given, found = SCHEDULES[name][1], []
    for i, x in enumerate(given):
        slope = np.zeros_like(np.asarray(x))
        for place in np.ndindex(slope.shape):
            moved = np.asarray(x, dtype=complex)
            moved[place] += 1e-30j
            slope[place] = end_by_hand(name, [*given[:i], moved, *given[i + 1 :]]).imag / 1e-30
        found.append(slope)
    return found


@pytest.mark.parametrize(
    ("name", "mode"), [*((name, "remat") for name in SCHEDULES), *(("cosine", m) for m in MODES)]
)
def test_the_gradient_in_the_parameters(name: str, mode: Any, arr: Call, to_np: Call) -> None:
    given = SCHEDULES[name][1]
    found = value_and_grad(lambda xs: end(name, list(xs), mode, arr))(list(map(arr, given)))
    assert to_np(found.cost) == pytest.approx(end_by_hand(name, given).real, rel=1e-12)
    for slope, expected in zip(to_np(found.grads), slopes_by_hand(name), strict=True):
        np.testing.assert_allclose(slope, expected, rtol=1e-10)


@compiles_on_torch
def test_compiled(arr: Call, to_np: Call) -> None:
    step = value_and_grad(lambda xs: end("cosine", list(xs), "remat", arr))
    found = compile_whole(step)(list(map(arr, SCHEDULES["cosine"][1])))
    for slope, expected in zip(to_np(found.grads), slopes_by_hand("cosine"), strict=True):
        np.testing.assert_allclose(slope, expected, rtol=1e-10)


@pytest.mark.parametrize("name", SCHEDULES)
def test_rates_of_python_numbers(name: str) -> None:
    make, given = SCHEDULES[name]
    for k in range(STEPS):
        rate = make(*given)(k)
        assert type(rate) is float
        assert rate == pytest.approx(rate_by_hand(name, k, given), rel=1e-14)


def test_two_loops_are_one(arr: Call, to_np: Call) -> None:
    """The count is in the state, and so are the parameters."""
    update = optim.adam(optim.cosine(arr(0.1), STEPS))
    whole = unroll(cost, arr(START), per_step(arr(X)), lr=None, update=update)
    first = unroll(cost, arr(START), per_step(arr(X[:2])), lr=None, update=update)
    second = unroll(
        cost, first.variables, per_step(arr(X[2:])), lr=None, update=update, state=first.state
    )
    assert np.array_equal(to_np(second.variables), to_np(whole.variables))
    assert to_np(second.state.count) == STEPS


def test_a_schedule_is_a_structure_of_its_parameters(arr: Call, to_np: Call) -> None:
    """So that it is a variable itself: its gradient is a schedule of gradients."""
    schedule = optim.warmup(optim.exponential(arr(0.1), arr(0.7)), 3)

    def objective(schedule: Any) -> Any:
        update = optim.momentum(schedule)
        found = unroll(cost, arr(START), per_step(arr(X)), lr=None, update=update, mode="remat")
        return ops.sum(found.variables * arr(WEIGHTS))

    grads = value_and_grad(objective)(schedule).grads
    assert isinstance(grads, optim.Schedule)
    np.testing.assert_allclose(
        [float(to_np(x)) for x in tree.leaves(grads)], slopes_by_hand("warmup"), rtol=1e-10
    )


def test_a_rate_for_each_variable(arr: Call, to_np: Call) -> None:
    def rates(count: Any, w: Any) -> Any:
        return {"w": w * 0.5**count, "b": 0.1}

    update = optim.sgd(optim.Schedule(rates, (arr(0.2),)))
    v = {"w": arr(1.0), "b": arr(1.0)}
    found = unroll(lambda _, v: v["w"] + v["b"], v, (), steps=2, lr=None, update=update)
    assert to_np(found.variables) == pytest.approx({"w": 1 - 0.2 - 0.1, "b": 0.8}, rel=1e-15)


def test_the_precision_is_that_of_the_variables(backend: Any, arr: Call, to_np: Call) -> None:
    """A rate of another precision, or of NumPy, widens nothing."""
    w = backend.asarray(np.array([1.0, 2.0]), "float32")
    for rate in (arr(0.1), np.array(0.1), 0.1):
        update = optim.adam(optim.cosine(rate, 10))
        step, state = update.update(w, update.init(w), w)
        assert backend.dtype_name(step) == backend.dtype_name(state.count) == "float32"
        np.testing.assert_allclose(to_np(step), [-0.1, -0.1], rtol=1e-6)


def test_bad_arguments(arr: Call) -> None:
    with pytest.raises(InputError, match="start: the learning rate must be finite"):
        optim.linear(-1.0, 0.0, 10)
    with pytest.raises(InputError, match="steps must be at least 1"):
        optim.exponential(0.1, 0.5, 0)
    with pytest.raises(InputError, match=r"shape .K,. with K at least 1, received shape .0,."):
        optim.table([])
    with pytest.raises(InputTypeError, match="fn must be a function"):
        optim.Schedule(0.1)  # type: ignore[arg-type]
    for schedule in (optim.cosine(0.1, 10), lambda count: 0.1):
        with pytest.raises(InputTypeError, match=r"lr must be a number .* optim.sgd.schedule."):
            unroll(cost, arr(START), per_step(arr(X)), lr=schedule)
    update = optim.sgd(optim.cosine(0.1, 10))
    with pytest.raises(InputError, match="learning rate is given twice"):
        unroll(cost, arr(START), per_step(arr(X)), lr=0.1, update=update)
