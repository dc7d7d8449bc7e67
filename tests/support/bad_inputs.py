"""Good arguments for every step, one of which a test replaces, and what a refusal looks like."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from metaframe import fomaml_step, maml_step, ops, reptile_step
from metaframe.errors import MetaframeError

BATCH = {"x": np.arange(6.0).reshape(3, 2), "y": np.ones(3)}
VARIABLES = {"bias": np.array(0.5), "latent": np.array([1.0, 2.0])}
STEPS = ("maml_step", "fomaml_step", "reptile_step")


class CountedCost:
    """A cost for one task, and how often it was called."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, task: Any, v: Any) -> Any:
        self.calls += 1
        off = ops.sum(task["x"] * v["latent"]) + v["bias"] - task["y"]
        return ops.square(off)


def call_step(name: str, counted: CountedCost, arr: Callable[..., Any], /, **changed: Any) -> Any:
    """The step called `name` on good arguments, with some replaced."""
    given = {
        "batch": arr(BATCH),
        "cost": counted,
        "variables": arr(VARIABLES),
        "steps": 1,
        "rate": 0.1,
        "batched": "vmap",
        **changed,
    }
    batch, cost_fn, variables, steps, rate = (
        given.pop(argument) for argument in ("batch", "cost", "variables", "steps", "rate")
    )
    if name == "reptile_step":
        return reptile_step(batch, cost_fn, variables, steps, rate, **given)
    step = {"maml_step": maml_step, "fomaml_step": fomaml_step}[name]
    return step(batch, cost_fn, None, variables, steps, rate, **given)


def assert_refused(
    cost: CountedCost, kind: type[Exception], fragments: list[str], call: Callable[[], Any]
) -> None:
    """`call` raises our error and the builtin `kind`, says all this, and never ran `cost`."""
    with pytest.raises(kind) as caught:
        call()
    assert isinstance(caught.value, MetaframeError)
    missing = [part for part in fragments if part not in str(caught.value)]
    assert not missing, f"{str(caught.value)!r} lacks {missing}"
    assert cost.calls == 0
