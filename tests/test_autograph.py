"""Within a user's `tf.function`: AutoGraph translates the user's code, and leaves ours alone."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import metaframe
from frameworks import require, slow
from metaframe import MAML, inner_loop, map_tasks, meta_value_and_grad
from metaframe.tasks import Task

ROOT = Path(__file__).resolve().parent.parent

PROGRAM = """
import sys
import numpy as np
import tensorflow as tf
import metaframe
from metaframe import nn, ops

def cost(batch, v):
    return ops.mean((ops.tanh(v["w"]) * batch["x"] - batch["y"]) ** 2) + nn.mse(v["w"], v["w"])

def task_cost(v, task):
    return cost(task, metaframe.inner_loop(cost, v, task, steps=2, lr=0.1))

compiled = metaframe.compile(cost)
calls = {
    "maml_step": lambda v, b: metaframe.maml_step(b, cost, None, v, 2, 0.1, batched="vmap")[0],
    "reptile_step": lambda v, b: metaframe.reptile_step(b, cost, v, 2, 0.1, batched="scan")[0],
    "inner_loop": lambda v, b: metaframe.inner_loop(cost, v, b, steps=2, lr=0.1)["w"],
    "meta_value_and_grad": lambda v, b: metaframe.meta_value_and_grad(task_cost)(v, b).cost,
    "map_tasks": lambda v, b: metaframe.map_tasks(lambda t: task_cost(v, t))(b),
    "compile": lambda v, b: compiled(b, v),
    "ops": lambda v, b: cost(b, v),
    "Container": lambda v, b: metaframe.Container(v).map(lambda x: 2 * x)["w"],
}
first = sys.argv[1]
batch = {"x": tf.ones((2, 3)), "y": tf.zeros((2, 3))}
for name in (first, *calls):
    tf.function(calls[name])({"w": tf.constant([0.5, 0.25, 1.0])}, batch)
print("done")
"""


@pytest.mark.parametrize(
    "first", ["ops", slow("maml_step"), slow("compile"), slow("meta_value_and_grad")]
)
def test_nothing_is_printed_about_our_source(first: str, tmp_path: Path) -> None:
    """Also by the first use of metaframe, before it has told TensorFlow anything."""
    require("tensorflow")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    path = os.pathsep.join([str(ROOT), str(ROOT / "backends")])
    done = subprocess.run(
        [sys.executable, str(program), first],
        env={**os.environ, "PYTHONPATH": path, "TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["done"], done.stderr
    assert "AutoGraph" not in done.stderr
    assert "metaframe" not in done.stderr


def branching(batch: Any, v: Any) -> Any:
    if v["w"] > batch:
        cost = v["w"] ** 2
    else:
        cost = v["w"] ** 3
    return cost


def branching_update(v: Any, grads: Any, lr: Any, stop_gradients: bool) -> Any:
    del stop_gradients
    step = grads["w"]
    if step > 3.0:
        step = 0.0 * step
    return {"w": v["w"] - lr * step}


def test_the_users_functions_are_translated() -> None:
    """As if they were called without us: a cost, a task cost, an update rule, a mapped function."""
    require("tensorflow")
    tf = importlib.import_module("tensorflow")

    def loop(w: Any) -> Any:
        return inner_loop(branching, {"w": w}, 0.0 * w, steps=1, lr=0.1)["w"]

    def updated(w: Any) -> Any:
        return inner_loop(branching, {"w": w}, 0.0 * w, steps=1, lr=0.1, update=branching_update)[
            "w"
        ]

    def meta(w: Any) -> Any:
        step = meta_value_and_grad(lambda v, t: branching(t, {"w": v}), task_map="scan")
        return step(w, tf.stack([0.0 * w, 10.0 + w])).cost

    def mapped(w: Any) -> Any:
        return map_tasks(lambda t: branching(t, {"w": w}), task_map="scan")(tf.stack([w - 1.0]))[0]

    for fn, values in (
        (loop, {2.0: 1.6, -2.0: -3.2}),
        (updated, {2.0: 2.0, 1.0: 0.8}),
        (meta, {2.0: 6.0, 3.0: 18.0}),
        (mapped, {2.0: 4.0}),
    ):
        graph = tf.function(fn)
        for w, expected in values.items():
            np.testing.assert_allclose(graph(tf.constant(w, tf.float64)), expected, rtol=1e-12)


def test_a_model_and_a_loss_are_translated() -> None:
    require("tensorflow")
    tf = importlib.import_module("tensorflow")

    class Line(tf.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.w = tf.Variable(2.0, dtype=tf.float64)

        def __call__(self, x: Any) -> Any:
            if tf.reduce_sum(x) > 0:
                y = self.w * x
            else:
                y = 0.0 * self.w * x
            return y

    def loss(y: Any, target: Any) -> Any:
        total = tf.reduce_mean((y - target) ** 2)
        if total > 100.0:
            total = total * 0.0
        return total

    maml = MAML(Line(), 0.1)
    x = tf.ones((1, 3), tf.float64)

    @tf.function
    def cost(x: Any) -> Any:
        task = Task(x, 0 * x, x, 0 * x)
        return maml.meta_value_and_grad(loss, task, task_map="scan", compiled=False).cost

    np.testing.assert_allclose(cost(x), (2 - 0.1 * 4) ** 2, rtol=1e-12)


def test_not_where_autograph_is_off() -> None:
    require("tensorflow")
    tf = importlib.import_module("tensorflow")

    def loop(w: Any) -> Any:
        return inner_loop(branching, {"w": w}, 0.0 * w, steps=1, lr=0.1)["w"]

    with pytest.raises(tf.errors.OperatorNotAllowedInGraphError):
        tf.function(loop, autograph=False)(tf.constant(2.0))
    with pytest.raises(metaframe.errors.CompileError):
        metaframe.compile(loop)(tf.constant(2.0))
