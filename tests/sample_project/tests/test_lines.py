"""Written as a user would: with the plugin's fixtures and metaframe.testing, on every backend."""

from __future__ import annotations

from typing import Any

import lines
import numpy as np
import pytest

import metaframe
from metaframe import testing
from metaframe.backend import Backend

ADAPTATION = testing.Adaptation(
    steps=2, lr=lines.LR, inner_batch_fn=lines.support, outer_batch_fn=lines.query
)
V = {"offset": np.array(0.1), "slope": np.array(0.5)}


@pytest.fixture
def tasks() -> dict[str, Any]:
    """Two tasks, in NumPy: without `backend`, which comes later, nothing is selected."""
    task = lines.Lines(seed=3, dtype="float64").sample_batch(2)
    return {
        "support": (task.support_x, task.support_y),
        "query": (task.query_x, task.query_y),
    }


def test_meta_gradient(tasks: dict[str, Any], backend: Backend) -> None:
    testing.assert_meta_gradient(lines.cost, V, tasks, ADAPTATION)


def test_own_step(tasks: dict[str, Any], backend: Backend) -> None:
    """A compiled step, which finite differences call often and with the same shapes."""
    step = lines.new_meta_step()
    testing.assert_meta_gradient(lines.cost, V, tasks, ADAPTATION, step=step)
    testing.assert_compiled_once(step)


def test_backends_agree(tasks: dict[str, Any]) -> None:
    step = metaframe.meta_value_and_grad(lines.task_cost)
    testing.assert_backends_agree(lambda v, tasks: step(v, tasks)[:2], V, tasks, rtol=1e-11)


def test_samplers() -> None:
    splits = (lines.Lines(seed=0, split=split) for split in ("train", "validation", "test"))
    testing.assert_no_leak(*splits)


@pytest.mark.backend_gap("tensorflow", reason="eager tensors have no item assignment")
@pytest.mark.backend_gap("jax", reason="arrays cannot be changed", raises=TypeError)
def test_a_known_gap(backend: Backend) -> None:
    x = backend.asarray([1.0, 2.0])
    x[0] = 5.0
