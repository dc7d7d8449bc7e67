"""The road from a step to the user's cost: its frames, and how often structures are taken apart.

Every frame and every structure on it is paid for by each call of an eager step, and by whoever
reads a traceback.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import optree
import pytest

import metaframe
from metaframe import maml_step, ops
from metaframe.backend import Backend
from metaframe.core import steps

FLATTENED_AT_MOST = 10
UNFLATTENED_AT_MOST = 10
FRAMES_AT_MOST = 14
_STEPS = steps.__file__
_PACKAGE = Path(metaframe.__file__).parent
_SOURCES = (f"{_PACKAGE}/", f"{_PACKAGE.parent / 'backends'}/")


def _frames_to_the_step() -> list[str]:
    """Our functions between the cost, which calls this, and the step."""
    frame: FrameType | None = sys._getframe(2)
    found = []
    while frame is not None:
        code = frame.f_code
        if code.co_filename == _STEPS and code.co_name == "maml_step":
            return found
        if code.co_filename.startswith(_SOURCES):
            found.append(f"{Path(code.co_filename).name}: {code.co_qualname}")
        frame = frame.f_back
    raise AssertionError("the cost was not called by the step")


@pytest.fixture
def problem(arr: Callable[..., Any]) -> tuple[Any, Any]:
    """Three tasks with two examples each, and variables."""
    batch = {"x": [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], "y": [[2.0, 4.0], [6.0, 8.0], [1.0, 2.0]]}
    return arr(batch), arr({"w": 0.5, "layer": {"b": 0.25}})


def _step(cost: Callable[..., Any], problem: tuple[Any, Any]) -> None:
    batch, v = problem
    maml_step(batch, cost, None, v, 1, 0.1, batched="vmap")


def _cost(batch: Any, v: Any) -> Any:
    return ops.mean(ops.square(v["w"] * batch["x"] + v["layer"]["b"] - batch["y"]))


def test_structures_are_taken_apart_and_put_together_few_times(
    backend: Backend, problem: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Counter[str] = Counter()

    def counted(name: str) -> Callable[..., Any]:
        real = getattr(optree, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return real(*args, **kwargs)

        return call

    _step(_cost, problem)  # the first call learns the classes of the backend
    for name in ("tree_flatten", "tree_unflatten"):
        monkeypatch.setattr(optree, name, counted(name))
    _step(_cost, problem)
    assert 2 <= calls["tree_flatten"] <= FLATTENED_AT_MOST
    assert 2 <= calls["tree_unflatten"] <= UNFLATTENED_AT_MOST


def test_few_frames_lie_between_the_step_and_the_cost(
    backend: Backend, problem: tuple[Any, Any]
) -> None:
    seen: list[list[str]] = []

    def cost(batch: Any, v: Any) -> Any:
        seen.append(_frames_to_the_step())
        return _cost(batch, v)

    _step(cost, problem)
    inner, outer = max(seen, key=len), min(seen, key=len)
    assert len(outer) < len(inner) <= FRAMES_AT_MOST, "\n".join(inner)
