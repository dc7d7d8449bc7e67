"""The examples of ivy's documentation of its meta steps print their documented numbers.

The documentation shows float32. Every example is also worked out here in float64, by recurrences
on the one number that matters in it: the mean `u` of the latent, because the cost is `x / u`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from metaframe import Container, maml_step, reptile_step
from metaframe import compile as compile_whole

Call = Callable[..., Any]


def cost_fn(sub_batch: Any, v: Any) -> Any:
    return sub_batch.mean().x / v.mean().latent


@dataclass(frozen=True)
class Trajectory:
    """Descent of `x / u` on a latent of `size` numbers with mean `u`."""

    x: float
    rate: float
    means: list[float]
    """`u` before each step and after the last."""
    size: int = 1

    @staticmethod
    def of(x: float, start: float, steps: int, rate: float, size: int = 1) -> Trajectory:
        means = [start]
        for _ in range(steps):
            # Each of the `size` numbers has the gradient -x / (size * u**2).
            means.append(means[-1] + rate * x / (size * means[-1] ** 2))
        return Trajectory(x, rate, means, size)

    @property
    def costs(self) -> list[float]:
        return [self.x / u for u in self.means]

    @property
    def gradients(self) -> list[float]:
        return [-self.x / (self.size * u**2) for u in self.means]

    @property
    def meta_gradient(self) -> float:
        slope = self.gradients[-1]
        for u in self.means[:-1]:
            slope *= 1 - 2 * self.rate * self.x / (self.size * u**3)
        return slope


@pytest.fixture(
    params=[
        ("eager", "float32"),
        ("eager", "float64"),
        ("compiled", "float32"),
        pytest.param(("compiled", "float64"), marks=pytest.mark.slow),
    ],
    ids="-".join,
)
def variant(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def execution(variant: Any) -> Call:
    """`execution(step)`: the step as it is, or compiled."""
    return compile_whole if variant[0] == "compiled" else lambda step: step


@pytest.fixture
def dtype(variant: Any) -> str:
    name: str = variant[1]
    return name


@pytest.fixture
def agree(dtype: str) -> Call:
    """`agree(found, documented, exact)`: to the precision that each of the two has."""

    def check(found: Any, documented: Any, exact: Any) -> None:
        assert found.dtype == dtype
        np.testing.assert_allclose(found, documented, rtol=1e-6)
        np.testing.assert_allclose(found, exact, rtol=1e-6 if dtype == "float32" else 1e-12)

    return check


def test_maml_step(arr: Call, to_np: Call, execution: Call, dtype: str, agree: Call) -> None:
    batch = arr(Container(x=np.array([1.0, 2.0])), dtype)
    variables = arr(Container(latent=np.ones((2, 1))), dtype)

    result = execution(maml_step)(batch, cost_fn, cost_fn, variables, 5, 0.01)

    cost, grads, inner_v = to_np(result)
    exact = Trajectory.of(x=1.5, start=1.0, steps=5, rate=0.01)
    assert isinstance(grads, Container)
    assert list(grads) == ["latent"]
    assert inner_v == ()
    assert cost.shape == ()
    agree(cost, 1.40069818, exact.costs[-1])
    agree(grads.latent, [-1.13723135], [exact.meta_gradient])


def test_reptile_step(arr: Call, to_np: Call, execution: Call, dtype: str, agree: Call) -> None:
    batch = arr(Container(x=np.array([1.0, 2.0])), dtype)
    variables = arr(Container(latent=np.ones((2, 1))), dtype)

    result = execution(reptile_step)(batch, cost_fn, variables, 5, 0.01, num_tasks=2)

    cost, grads = to_np(result)
    exact = Trajectory.of(x=1.5, start=1.0, steps=5, rate=0.01)
    assert isinstance(grads, Container)
    agree(cost, 1.4485182, np.mean(exact.costs))
    agree(grads.latent, [-139.9569855], [np.mean(exact.gradients) / 0.01])


def test_reptile_step_with_the_first_tasks_variables(
    arr: Call, to_np: Call, execution: Call, dtype: str, agree: Call
) -> None:
    batch = arr(Container(x=np.array([1.0, 2.0, 3.0])), dtype)
    variables = arr(Container(latent=np.array([1.0, 2.0])), dtype)

    result = execution(reptile_step)(
        batch, cost_fn, variables, 4, 0.025, batched=False, num_tasks=2, return_inner_v="first"
    )

    cost, grads, firsts = to_np(result)
    tasks = [Trajectory.of(x, start=1.5, steps=4, rate=0.025, size=2) for x in (1.0, 2.0)]
    moved = tasks[0].means[-1] - 1.5
    agree(cost, 0.9880483, np.mean([task.costs for task in tasks]))
    agree(
        grads.latent,
        [-13.01766968, -13.01766968],
        [np.mean([task.gradients for task in tasks]) / 0.025] * 2,
    )
    agree(firsts.latent, [[1.02197957, 2.02197981]], [[1.0 + moved, 2.0 + moved]])
