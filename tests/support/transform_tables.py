"""Every function of metaframe under every transform of a framework: what comes out.

The functions map an array of four numbers to a scalar. Next to each stands the same function in
plain operations of the framework, with the inner gradients worked out by hand: under a transform
both have to give the same numbers, or metaframe's an error of its own.

`python tests/support/transform_tables.py` writes the tables into docs/transforms.md.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import metaframe
from metaframe import ops
from metaframe.backend.contract import Backend

PAGE = Path(__file__).resolve().parents[2] / "docs/transforms.md"
FRAMEWORKS = {"torch": "PyTorch", "jax": "JAX", "tensorflow": "TensorFlow"}

Fn = Callable[[Any], Any]
Transform = Callable[[Fn, Any], Any]
"""`(function, w) -> arrays`."""

RIGHT = "right"
"""The same numbers as the function in plain operations."""


class Refused(NamedTuple):
    """An error of metaframe's own."""

    error: type[Exception]
    reason: str

    def __str__(self) -> str:
        return f"`{self.error.__name__}`: {self.reason}"


class Row(NamedTuple):
    """One transform."""

    run: Transform
    outcome: dict[str, object] | object = RIGHT
    """Of all functions, or by the names of functions, "" for the others."""
    slow: bool = False

    def of(self, function: str) -> object:
        """The result of one function."""
        if not isinstance(self.outcome, dict):
            return self.outcome
        return self.outcome.get(function, self.outcome.get("", RIGHT))


def rows(framework: str) -> dict[str, Row]:
    """The transforms of a framework, by name."""
    found: dict[str, Row] = importlib.import_module(f"transforms_{framework}").ROWS
    return found


# -- the functions -------------------------------------------------------------------------------

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(2, 2, 4))
W = np.array([0.3, -0.8, 0.5, 1.2])
STEPS, RATE = 2, 0.1


class Problem:
    """One function and the same in plain operations, for arrays of a backend."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.x, self.y = self.arr(X), self.arr(Y)
        self.batch = {"x": self.x, "y": self.y}
        self.weights = self.arr(np.arange(1.0, 5.0))

    def arr(self, x: Any) -> Any:
        """`x` in float64."""
        return self.backend.asarray(x, "float64")

    def cost(self, batch: Any, v: Any) -> Any:
        """The inner cost and the outer one."""
        return ops.mean((ops.tanh(v["w"]) * batch["x"] - batch["y"]) ** 2)

    def task_cost(self, v: Any, task: Any) -> Any:
        """The cost after adaptation."""
        return self.cost(task, metaframe.inner_loop(self.cost, v, task, steps=STEPS, lr=RATE))

    def weighed(self, x: Any) -> Any:
        """A scalar of all elements."""
        return ops.sum(x * self.weights)

    # The same by hand.

    def points(self, w: Any, i: int) -> list[Any]:
        """The points that the inner loop of task i visits."""
        found = [w]
        for _ in range(STEPS):
            found.append(found[-1] - RATE * self.gradient(found[-1], i))
        return found

    def gradient(self, w: Any, i: int) -> Any:
        """The gradient of the cost of task i."""
        tanh = ops.tanh(w)
        return 2 * (tanh * self.x[i] - self.y[i]) * self.x[i] * (1 - tanh * tanh) / 4

    def of_task(self, w: Any, i: int) -> Any:
        """The cost of task i."""
        return self.cost({"x": self.x[i], "y": self.y[i]}, {"w": w})

    def shifted(self, w: Any, to: Any) -> Any:
        """`to` with the derivative of `w`."""
        stop = self.backend.stop_gradient
        return w + (stop(to) - stop(w))

    def second_order(self, w: Any) -> Any:
        """The cost of MAML."""
        return (self.of_task(self.points(w, 0)[-1], 0) + self.of_task(self.points(w, 1)[-1], 1)) / 2

    def first_order(self, w: Any) -> Any:
        """The cost of FOMAML."""
        ends = [self.shifted(w, self.points(w, i)[-1]) for i in (0, 1)]
        return (self.of_task(ends[0], 0) + self.of_task(ends[1], 1)) / 2

    def visited(self, w: Any) -> Any:
        """The cost of Reptile."""
        costs = [
            self.of_task(self.shifted(w, point), i) for i in (0, 1) for point in self.points(w, i)
        ]
        return sum(costs[1:], start=costs[0]) / len(costs)

    def meta_gradient(self, w: Any) -> Any:
        """The gradient of MAML's cost, in one direction."""

        def run(xs: Any) -> Any:
            return self.second_order(xs[0]), ()

        return self.weighed(self.backend.value_and_grad(run)((w,))[2][0])


def functions(backend: Backend) -> dict[str, tuple[Fn, Fn]]:
    """Metaframe's function and the plain one, by name."""
    p = Problem(backend)

    def cubic(w: Any) -> Any:
        return p.weighed(w * w * w)

    def maml(w: Any) -> Any:
        return metaframe.maml_step(
            p.batch, p.cost, None, {"w": w}, STEPS, RATE, batched="vmap", stop_gradients=False
        )[0]

    def maml_scan(w: Any) -> Any:
        return metaframe.maml_step(
            p.batch, p.cost, None, {"w": w}, STEPS, RATE, batched="scan", stop_gradients=False
        )[0]

    def fomaml(w: Any) -> Any:
        return metaframe.fomaml_step(
            p.batch, p.cost, None, {"w": w}, STEPS, RATE, batched="vmap", stop_gradients=False
        )[0]

    def reptile(w: Any) -> Any:
        return metaframe.reptile_step(
            p.batch, p.cost, {"w": w}, STEPS, RATE, batched="vmap", stop_gradients=False
        )[0]

    def inner(w: Any) -> Any:
        task = {"x": p.x[0], "y": p.y[0]}
        after = metaframe.inner_loop(p.cost, {"w": w}, task, steps=STEPS, lr=RATE)
        return p.weighed(after["w"])

    def meta_gradient(w: Any) -> Any:
        return p.weighed(metaframe.meta_value_and_grad(p.task_cost)({"w": w}, p.batch).grads["w"])

    def mapped(w: Any) -> Any:
        return ops.mean(metaframe.map_tasks(lambda task: p.task_cost({"w": w}, task))(p.batch))

    return {
        "compile": (metaframe.compile(cubic), cubic),
        "compile(maml_step)": (metaframe.compile(maml), p.second_order),
        "maml_step": (maml, p.second_order),
        "maml_step, scan": (maml_scan, p.second_order),
        "fomaml_step": (fomaml, p.first_order),
        "reptile_step": (reptile, p.visited),
        "inner_loop": (inner, lambda w: p.weighed(p.points(w, 0)[-1])),
        "meta_value_and_grad": (meta_gradient, p.meta_gradient),
        "map_tasks": (mapped, p.second_order),
    }


FUNCTIONS = (
    "compile",
    "compile(maml_step)",
    "maml_step",
    "maml_step, scan",
    "fomaml_step",
    "reptile_step",
    "inner_loop",
    "meta_value_and_grad",
    "map_tasks",
)
BY_DEFAULT = {
    "torch": ("compile", "maml_step", "inner_loop"),
    "jax": ("compile", "inner_loop"),
    "tensorflow": ("compile", "inner_loop"),
}
"""Those that the tests which are not slow run."""


# -- the page ------------------------------------------------------------------------------------


def table(framework: str) -> str:
    """The transforms of a framework, and what comes out of each function under each of them."""
    head = ["transform", *(f"`{name}`" for name in FUNCTIONS)]
    lines = [head, ["---"] * len(head)]
    notes: list[str] = []
    for name, row in rows(framework).items():
        cells = [_cell(row.of(function), notes) for function in FUNCTIONS]
        lines.append([f"`{name}`", *cells])
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n\n".join([text, *(f"[{i}] {note}" for i, note in enumerate(notes, 1))])


def _cell(outcome: object, notes: list[str]) -> str:
    if not isinstance(outcome, Refused):
        return str(outcome)
    if str(outcome) not in notes:
        notes.append(str(outcome))
    return f"refused [{notes.index(str(outcome)) + 1}]"


def page_with_tables(text: str) -> str:
    """The page with its tables as they should be."""
    for framework in FRAMEWORKS:
        begin, end = f"<!-- {framework} -->\n", f"<!-- end of {framework} -->"
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = f"{before}{begin}\n{table(framework)}\n\n{end}{after}"
    return text


if __name__ == "__main__":
    # Of the module that the rows are made with, whose classes are others than this one's.
    tables = importlib.import_module("transform_tables")
    PAGE.write_text(tables.page_with_tables(PAGE.read_text()))
