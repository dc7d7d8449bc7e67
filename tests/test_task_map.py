"""Every strategy for the tasks of a batch against sums written out: order, chunks, means."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from metaframe import meta_value_and_grad, ops
from metaframe.backend.workers import Share
from metaframe.core.task_map import Execution, strategy
from metaframe.errors import InputError

Call = Callable[..., Any]
CASES = [("loop", None), ("scan", None), ("vmap", None), *(("vmap", size) for size in (1, 2, 3, 9))]


@pytest.mark.parametrize(("task_map", "chunk_size"), CASES)
@pytest.mark.parametrize("count", [1, 5])
def test_means_and_rows(
    arr: Call, to_np: Call, task_map: Any, chunk_size: int | None, count: int
) -> None:
    """Of (v . t)^2 / 2: the means of the cost and of (v . t) t, and 2t of each task in order."""
    v, tasks = np.array([1.0, -2.0]), np.random.default_rng(0).normal(size=(count, 2))

    def task_cost(v: Any, task: Any) -> Any:
        product = ops.sum(v * task)
        return product * product / 2, 2 * task

    run = meta_value_and_grad(task_cost, task_map=task_map, chunk_size=chunk_size, has_aux=True)
    cost, grads, rows = to_np(run(arr(v), arr(tasks)))
    products = tasks @ v
    np.testing.assert_allclose(cost, np.mean(products**2 / 2), rtol=1e-14)
    np.testing.assert_allclose(grads, np.mean(products[:, None] * tasks, axis=0), rtol=1e-14)
    np.testing.assert_array_equal(rows, 2 * tasks)


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [(((3, 3),), "vmap"), (((3, 3), (3, 3, 1, 2)), "scan"), (((1, 2, 3, 4, 5),), "scan")],
)
def test_the_default_is_sequential_for_convolutions_on_a_cpu(
    backend: Any, arr: Call, monkeypatch: pytest.MonkeyPatch, shapes: Any, expected: str
) -> None:
    variables = tuple(arr(np.zeros(shape)) for shape in shapes)
    monkeypatch.setattr(backend, "on_cpu", lambda x: True)
    assert strategy("auto", variables) == expected
    monkeypatch.setattr(backend, "on_cpu", lambda x: False)
    assert strategy("auto", variables) == "vmap"
    assert strategy("loop", variables) == "loop"


@pytest.mark.parametrize(
    ("settings", "argument"),
    [
        ({"task_map": "map"}, "task_map"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"distributed": "yes"}, "distributed"),
        ({"distributed": Share(0)}, "num_tasks"),
    ],
)
def test_settings_are_checked_when_they_are_made(settings: Any, argument: str) -> None:
    with pytest.raises(InputError, match=argument):
        Execution(**settings)
