"""Every strategy for the tasks of a batch against sums written out: order, chunks, means."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from frameworks import require
from metaframe import map_tasks, meta_value_and_grad, ops
from metaframe.backend.workers import Share
from metaframe.core import task_map
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
    ("count", "loops", "sizes"),
    [
        (4, True, {4}),  # of a size that is vectorised whatever the model
        (9, True, {9}),  # they fit
        (11, True, {3, 4}),
        (40, True, {5}),
        (40, False, {10}),  # four chunks at most, if each is compiled again
    ],
)
def test_many_tasks_go_in_chunks_of_their_own_accord(
    backend: Any,
    arr: Call,
    to_np: Call,
    monkeypatch: pytest.MonkeyPatch,
    count: int,
    loops: bool,
    sizes: set[int],
) -> None:
    """Each has three elements in its data and two in its copy of the variables."""
    monkeypatch.setattr(task_map, "FEWEST_AT_ONCE", 4)
    monkeypatch.setattr(type(backend), "chunk_elements", 50)
    monkeypatch.setattr(type(backend), "loops_in_programs", loops)
    mapped, seen = backend.mapped_value_and_grad, set()

    def noting(objective: Any) -> Any:
        inner = mapped(objective)

        def run(xs: Any, held: Any, tasks: Any) -> Any:
            seen.add(tasks[0].shape[0])
            return inner(xs, held, tasks)

        return run

    monkeypatch.setattr(backend, "mapped_value_and_grad", noting)
    tasks = np.random.default_rng(0).normal(size=(count, 3))

    def task_cost(v: Any, task: Any) -> Any:
        return ops.sum(v) * ops.sum(task)

    _, grads, _ = to_np(meta_value_and_grad(task_cost)(arr(np.ones(2)), arr(tasks)))
    assert seen == sizes
    np.testing.assert_allclose(grads, [tasks.sum() / count] * 2, rtol=1e-12)
    monkeypatch.setattr(backend, "on_cpu", lambda x: False)
    meta_value_and_grad(task_cost)(arr(np.ones(2)), arr(tasks))
    assert seen == sizes | {count}


def test_one_task_alone_takes_no_vmap_on_torch(
    execution: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    require("torch")
    torch = importlib.import_module("torch")
    monkeypatch.setattr(torch.func, "vmap", None)
    v, tasks = torch.tensor([1.0, 2.0]), torch.tensor([[3.0, 4.0]])
    step = execution(meta_value_and_grad(lambda v, task: ops.sum(v * v * task)))
    assert step(v, tasks).grads.tolist() == [6, 16]
    assert map_tasks(lambda task: 2 * task)(tasks).tolist() == [[6, 8]]


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
