"""A long life: steps, shapes and models by the thousand, and nothing grows.

Every test has a short form that runs by default. Memory is that of the process once it has warmed
up; what a framework's own allocator keeps is within the allowance.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import metaframe as mf
from frameworks import slow
from metaframe import nn, ops
from metaframe.tasks import Task

Call = Callable[..., Any]
ALLOWED = 24.0
"""MiB by which a long run may grow."""


def resident() -> float:
    """MiB of memory the process holds."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096 / 2**20


def handles() -> tuple[int, int]:
    """The threads and the open files of the process."""
    return threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))


def lives(act: Callable[[int], None], times: int, warm: int) -> None:
    """`act(i)` so many times: after the first `warm`, nothing grows."""
    for i in range(warm):
        act(i)
    gc.collect()
    memory, (threads, files) = resident(), handles()
    for i in range(warm, times):
        act(i)
    gc.collect()
    assert resident() - memory <= ALLOWED
    after = handles()
    assert after[0] <= threads
    assert after[1] <= files


def cost(task: Any, v: Any) -> Any:
    return ops.mean((ops.tanh(task["x"] * v["w"]) - task["y"]) ** 2)


def problem(arr: Call, size: int = 3) -> tuple[Any, Any]:
    batch = {"x": np.ones((2, size)), "y": np.zeros((2, size))}
    return arr(batch), arr({"w": np.full(size, 0.5)})


times = pytest.mark.parametrize("times", [30, slow(10_000)])


@times
def test_steps(backend: Any, arr: Call, execution: Call, times: int) -> None:
    batch, v = problem(arr)
    step = execution(lambda batch, v: mf.maml_step(batch, cost, None, v, 1, 0.1, batched="vmap"))
    lives(lambda i: step(batch, v), times, warm=times // 3)


@pytest.mark.parametrize("times", [5, slow(1000)])
def test_shapes(backend: Any, arr: Call, times: int) -> None:
    def act(i: int) -> None:
        batch, v = problem(arr, size=i % times + 1)
        mf.maml_step(batch, cost, None, v, 1, 0.1, batched="loop")

    lives(act, 2 * times, warm=times)


@pytest.mark.parametrize("times", [6, slow(1000)])
def test_models_made_and_dropped(backend: Any, times: int) -> None:
    x, y = np.ones((2, 3)), np.zeros((2, 1))
    task = Task(x, y, x, y)

    def act(i: int) -> None:
        model = nn.mlp([3, 4, 1])
        maml = mf.MAML((model.apply, model.init(i)), 0.1, 1)
        maml.meta_value_and_grad(nn.mse, [task], compiled=False)

    lives(act, times, warm=times // 3)
