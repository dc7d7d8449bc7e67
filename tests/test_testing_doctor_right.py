"""The doctor calls right problems right, however awkward their numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from metaframe import nn, ops
from metaframe.testing import Adaptation, Report, check_meta_gradient

Call = Callable[..., Any]

RNG = np.random.default_rng(7)
HIDDEN = 3


def attention(task: Any, v: Any) -> Any:
    """One head over four positions."""
    q, k, x = (ops.matmul(task["x"], v[name]) for name in ("q", "k", "v"))
    weights = nn.softmax(ops.matmul(q, ops.transpose(k, (1, 0))) / 2.0, axis=-1)
    return ops.mean(ops.tanh(ops.matmul(weights, x)) ** 2 * task["y"])


def lstm(task: Any, v: Any) -> Any:
    """Two steps of a cell with its four gates."""
    state = cell = ops.zeros_like(v["h"][:, 0])
    for t in range(2):
        gates = ops.matmul(task["x"][t], v["x"]) + ops.matmul(state, v["h"]) + v["b"]
        i, f, o, g = ops.reshape(gates, (4, HIDDEN))
        cell = ops.sigmoid(f) * cell + ops.sigmoid(i) * ops.tanh(g)
        state = ops.sigmoid(o) * ops.tanh(cell)
    return ops.mean((state - task["y"][0]) ** 2)


def scaled(task: Any, v: Any) -> Any:
    """A bias of size 1e6 and weights of size 1e-6, in a cost of size 1."""
    hidden = ops.tanh(1e6 * v["small"] * task["x"][0] + 1e-6 * v["large"])
    return ops.mean((hidden - task["y"][0]) ** 2)


def steep(task: Any, v: Any) -> Any:
    """Costs of size 1e6 for one variable and of size 1e-3 for another."""
    return 1e6 * ops.mean(ops.sin(v["w"]) * task["x"][0]) + 1e-3 * ops.mean(ops.cos(v["b"]))


def deep(task: Any, v: Any) -> Any:
    """40 hidden units, with relus some of whose kinks are near."""
    hidden = nn.relu(ops.matmul(task["x"], v["w1"]) + v["b1"])
    return nn.mse(ops.matmul(nn.relu(ops.matmul(hidden, v["w2"])), v["w3"]), task["y"])


def normal(*shape: int) -> Any:
    return RNG.normal(size=shape)


PROBLEMS: dict[str, tuple[Call, dict[str, Any]]] = {
    "attention": (attention, {name: normal(3, 3) for name in ("q", "k", "v")}),
    "lstm": (lstm, {"x": normal(3, 12) / 2, "h": normal(3, 12) / 2, "b": normal(12)}),
    "ill-scaled": (scaled, {"small": 1e-6 * normal(3), "large": 1e6 * normal(3)}),
    "steep": (steep, {"w": normal(3), "b": normal(3)}),
}
BATCH = {"x": normal(2, 4, 3), "y": normal(2, 4, 3)}
RATES = {"ill-scaled": 1e-13, "steep": 1e-8}


def check(name: str, arr: Call, **how: Any) -> Report:
    cost, variables = PROBLEMS[name]
    adaptation = Adaptation(steps=1, lr=RATES.get(name, 0.1))
    given = arr(variables, **how), arr(BATCH, **how), adaptation
    return check_meta_gradient(cost, *given, executions=())


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_right_problem(backend: Any, arr: Call, name: str) -> None:
    report = check(name, arr)
    assert report.ok, str(report)
    assert report.findings == ()
    assert f"finite differences in {len(PROBLEMS[name][1])} variables" in str(report)


@pytest.mark.parametrize("name", ["attention", "lstm"])
def test_a_right_problem_in_float32(backend: Any, arr: Call, name: str) -> None:
    report = check(name, arr, dtype="float32")
    assert report.ok, str(report)
    assert report.findings == ()


def test_a_right_problem_of_many_relus(backend: Any, arr: Call) -> None:
    """Some are near their kinks, which finer differences step between."""
    variables = {"w1": normal(3, 40), "b1": normal(40), "w2": normal(40, 40) / 6}
    given = arr({**variables, "w3": normal(40, 3) / 6}), arr(BATCH)
    report = check_meta_gradient(deep, *given, Adaptation(lr=0.1), executions=())
    assert report.ok, str(report)
    assert set(report.kinds()) <= {"kink"}


@pytest.mark.parametrize(
    "kinked",
    [
        lambda task, v: ops.mean(nn.relu(ops.matmul(task["x"], v["w"])) * task["y"]),
        lambda task, v: ops.sum(ops.max(v["w"] * task["x"][:3], axis=-1)) ** 2,
        lambda task, v: ops.mean(ops.abs(ops.matmul(task["x"], v["w"])) * task["y"]),
    ],
)
def test_a_kink_or_a_tie_is_a_note(backend: Any, arr: Call, kinked: Call) -> None:
    """All weights are 0: every relu is at 0, and all values of a maximum are equal."""
    given = arr({"w": np.zeros((3, 3))}), arr(BATCH)
    report = check_meta_gradient(kinked, *given, Adaptation(steps=0), executions=())
    assert report.ok, str(report)
    assert report.kinds() == ("kink",)
    assert not report.findings[0].wrong


@pytest.mark.parametrize("name", ["small", "large"])
def test_a_fault_among_badly_scaled_numbers(backend: Any, arr: Call, name: str) -> None:
    def planted(task: Any, v: Any) -> Any:
        return scaled(task, {**v, name: ops.stop_gradient(v[name])})

    given = arr(PROBLEMS["ill-scaled"][1]), arr(BATCH), Adaptation(steps=0)
    report = check_meta_gradient(planted, *given, executions=())
    assert report.kinds() == ("disconnected variable",), str(report)
    assert report.findings[0].where == repr(name)
