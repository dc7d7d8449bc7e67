"""Random calls of the public functions: the outcome is a right result or an error of metaframe.

Structures, dtypes, shapes and options are drawn from a seed. A call whose arguments are sound has
the result of a closed form; any other raises one of our errors, and never another.
METAFRAME_FUZZ_SEED chooses the seed of the long form; a failure names it and its case.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import metaframe as mf
from metaframe import Container, ops, tree
from metaframe.errors import MetaframeError

Call = Callable[..., Any]
SHORT, LONG = 12, 3000
RATE = 0.1


def cost(batch: Any, v: Any) -> Any:
    """The half square distance of every variable to the mean of every leaf of the batch."""
    at = sum(ops.mean(ops.astype(x, "float64")) for x in tree.leaves(batch))
    return sum(ops.sum((x - at) ** 2) for x in tree.leaves(v)) * 0.5


def expected(batch: Any, v: Any, tasks: int, steps: int, rate: float) -> tuple[float, list[Any]]:
    """The meta-cost and its gradient: every step takes a part `1 - rate` of the distance."""
    shrink = (1.0 - rate) ** steps
    leaves = [np.asarray(x, np.float64) for x in tree.leaves(v)]
    costs, grads = [], [np.zeros(x.shape) for x in leaves]
    for i in range(tasks):
        at = sum(np.mean(np.asarray(x[i], np.float64)) for x in tree.leaves(batch))
        costs.append(0.5 * sum(np.sum((shrink * (x - at)) ** 2) for x in leaves))
        grads = [g + shrink**2 * (x - at) / tasks for g, x in zip(grads, leaves, strict=True)]
    return float(np.mean(costs)), grads


class Draw:
    """Random arguments; `sound` is whether a result is due."""

    def __init__(self, seed: int, number: int) -> None:
        self._rng = np.random.default_rng((seed, number))
        self.sound = True

    def pick(self, *choices: Any) -> Any:
        return choices[int(self._rng.integers(len(choices)))]

    def rarely(self) -> bool:
        return bool(self._rng.random() < 0.12)

    def bad(self, *choices: Any) -> Any:
        self.sound = False
        return self.pick(*choices)

    def array(self, shape: tuple[int, ...], *, data: bool) -> Any:
        values = self._rng.normal(size=shape)
        if self.rarely():
            return self.bad(
                values.astype(object),
                values.astype(str),
                np.ma.masked_array(values),
                np.zeros(shape, "M8[s]"),
                values.astype(complex) if not data else values.astype("S4"),
                "text",
                object(),
            )
        if data:
            kind = self.pick("f8", ">f8", "i4", ">i8", "?")
            return np.asarray(values * 3).astype(kind)
        return np.asarray(values).astype(self.pick("f8", ">f8"))

    def structure(self, shape: Callable[[], tuple[int, ...]], depth: int, *, data: bool) -> Any:
        if depth == 0 or self._rng.random() < 0.3:
            return self.array(shape(), data=data)
        keys = ("a", "b", "a/b", 1)[: int(self._rng.integers(1, 4))]
        below = [self.structure(shape, depth - 1, data=data) for _ in keys]
        kind = self.pick("dict", "list", "tuple", "container")
        if kind == "dict":
            return dict(zip(keys, below, strict=True))
        if kind == "container" and depth == 1 and "a/b" not in keys:
            return Container(dict(zip(map(str, keys), below, strict=True)))
        return below if kind == "list" else tuple(below)

    def case(self) -> tuple[Any, Any, int, dict[str, Any]]:
        tasks = int(self._rng.integers(1, 4))
        shapes = lambda: self.pick((), (2,), (2, 1), (1, 3))  # noqa: E731
        odd = tasks + 1 if self.rarely() else None
        batch = self.structure(lambda: (tasks, *shapes()), 2, data=True)
        if odd is not None:
            self.sound, batch = False, {"x": batch, "y": np.ones(odd)}
        v = self.structure(shapes, 2, data=False)
        steps = int(self._rng.integers(0, 4))
        how: dict[str, Any] = {
            "batched": self.pick("vmap", "loop"),
            "mode": self.pick("reverse", "remat", "mixed", "replay"),
        }
        if self.rarely():
            how[self.pick("inner_v", "outer_v")] = self.bad(3, 2.5, True, object(), ["zzz"], [])
        if self.rarely():
            how |= self.bad({"mode": "rev"}, {"batched": "map"}, {"num_tasks": 99}, {"mode": 3})
        return batch, v, steps, how

    def rate(self) -> Any:
        if self.rarely():
            return self.bad(True, -1.0, "x", float("nan"), [0.1, [0.2]], {"zzz": 0.1}, 1j)
        return self.pick(RATE, np.float32(RATE), np.array(RATE), np.array(RATE, ">f8"))


def run(backend: Any, seed: int, number: int) -> None:
    """One case."""
    draw = Draw(seed, number)
    batch, v, steps, how = draw.case()
    lr = draw.rate()
    where = f"seed {seed}, case {number}: {how}, {steps} steps, rate {lr!r}"
    try:
        found, grads, _ = mf.maml_step(batch, cost, None, v, steps, lr, **how)
    except MetaframeError as error:
        if draw.sound:
            raise AssertionError(f"{where} refused: {error}") from error
        return
    except Exception as error:
        raise AssertionError(f"{where} raised {type(error).__name__}: {error}") from error
    assert draw.sound, f"{where}: a result of unsound arguments"
    tasks = len(tree.leaves(batch)[0])
    value, slopes = expected(batch, v, tasks, steps, float(lr))
    near = 1e-6 if isinstance(lr, np.float32) else 1e-12
    assert float(backend.to_numpy(found)) == pytest.approx(value, rel=near, abs=near), where
    for leaf, slope in zip(tree.leaves(grads), slopes, strict=True):
        np.testing.assert_allclose(backend.to_numpy(leaf), slope, rtol=near, atol=near)


def test_random_calls(backend: Any) -> None:
    for number in range(SHORT):
        run(backend, 0, number)


@pytest.mark.slow
def test_many_random_calls(backend: Any) -> None:
    seed = int(os.environ.get("METAFRAME_FUZZ_SEED", "1"))
    for number in range(LONG):
        run(backend, seed, number)
