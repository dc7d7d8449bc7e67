"""The doctor on costs that take long operation by operation: one compiled gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from frameworks import require
from metaframe import ops, tree
from metaframe.backend import load_backend
from metaframe.testing import Adaptation, check_meta_gradient
from metaframe.testing import _quick as quick
from test_testing_doctor import BATCH, TWO_STEPS, Call, V, check, cost, only


@pytest.fixture(autouse=True)
def compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cost counts as one that takes long; a backend that compiles slowly has none."""
    monkeypatch.setattr(quick, "SLOW", 0.0)


def test_a_right_gradient(backend: Any, arr: Call) -> None:
    compiles = backend.compiles_quickly
    report = check(arr, executions=("compiled", "scan") if compiles else ("scan",))
    assert report.ok, str(report)
    assert report.findings == ()
    assert ("compiled is how the gradient was examined" in str(report)) == compiles
    other = "vmap" if compiles else "a loop over tasks"
    assert f"scan and {other} differ" in str(report)
    assert "finite differences in 2 variables" in str(report)


def test_faults_are_found(backend: Any, arr: Call) -> None:
    def update(v: Any, grads: Any, lr: Any, stop_gradients: bool) -> Any:
        return tree.map(lambda x, g: x - lr * ops.stop_gradient(g), v, grads)

    report = check(arr, adaptation=Adaptation(steps=2, lr=0.1, update=update))
    only(report, "lost second-order term", "'b', 'w'")

    x = np.ones((5, 2)) * np.arange(1, 6)[:, None] / 10
    x[4] = np.nan
    report = check_meta_gradient(cost, arr(V), arr({"x": x}), TWO_STEPS, executions=())
    only(report, "not finite", "batch['x'], task 4")


def test_a_kept_batch_is_found(backend: Any, arr: Call) -> None:
    cache: dict[str, Any] = {}

    def planted(task: Any, v: Any) -> Any:
        return cost({"x": cache.setdefault("x", task["x"])}, v)

    assert "kept batch" in check(arr, planted).kinds()


def test_a_table_that_is_kept_is_no_fault(backend: Any, arr: Call) -> None:
    tables: dict[int, Any] = {}

    def planted(task: Any, v: Any) -> Any:
        table = tables.setdefault(2, arr({"t": np.array([1.0, 2.0])})["t"])
        return cost({"x": task["query"]}, v) * ops.sum(table)

    adaptation = Adaptation(
        lr=0.1,
        inner_batch_fn=lambda task: {"query": task["support"]},
        outer_batch_fn=lambda task: {"query": task["query"]},
    )
    batch = arr({"query": BATCH["x"], "support": BATCH["x"][::-1].copy()})
    report = check_meta_gradient(planted, arr(V), batch, adaptation, executions=())
    assert report.ok, str(report)
    assert report.findings == ()


def test_a_cost_that_counts_is_found(backend: Any, arr: Call) -> None:
    calls = np.zeros(1)

    def planted(task: Any, v: Any) -> Any:
        calls[0] += 1
        return cost(task, v)

    only(check(arr, planted), "in-place change", "calls of cost")


def test_random_numbers_are_found(backend: Any, arr: Call) -> None:
    """A program would draw once: such a cost runs as it is."""
    report = check(arr, lambda task, v: cost(task, v) * np.random.rand())  # noqa: NPY002
    only(report, "randomness")


def test_a_value_that_depends_on_compiling_runs_as_it_is() -> None:
    require("jax")

    def planted(task: Any, v: Any) -> Any:
        try:
            scale = float(task["x"].sum())
        except TypeError:
            scale = 1.0
        return scale * cost(task, v)

    def as_jax(structure: Any) -> Any:
        return tree.map(load_backend("jax").asarray, structure)

    assert "executions disagree" in check(as_jax, planted, executions=("vmap",)).kinds()
