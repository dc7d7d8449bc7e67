"""Keras on its JAX and torch backends: each in a process of its own, as Keras has one backend."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import zoo
from frameworks import require
from metaframe import MAML, nn

ROOT = Path(__file__).resolve().parent.parent

# Keras computes products and tanh in float32 on these backends, whatever the dtype asked for.
CODE = """
import numpy as np, {framework}, zoo
from metaframe import ANIL, MAML, nn

library = next(library for library in zoo.LIBRARIES if library.id == "keras")
model = library.build(zoo.weights())
maml = MAML(model, 0.1, 2)
backend = maml._adapter.backend
assert backend.name == "{framework}"
found = library.canonical(maml.meta_value_and_grad(nn.mse, zoo.tasks()).grads, backend)
rates = dict.fromkeys(zoo.NAMES, 0.1)
expected = zoo.differences(lambda v: zoo.meta_cost(v, rates, 2, zoo.tasks()), zoo.weights())
for name, value in expected.items():
    np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-6)
assert sorted(ANIL(model, model.layers[-1]).config.names) == sorted(library.names[2:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_meta_gradient(framework: str) -> None:
    require(framework)
    pytest.importorskip("keras")
    code = CODE.format(framework=framework)
    environment = {**os.environ, "KERAS_BACKEND": framework, "JAX_ENABLE_X64": "1"}
    path = os.pathsep.join(map(str, (ROOT, ROOT / "backends", ROOT / "tests")))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_layers_frozen_after_wrapping_do_not_adapt() -> None:
    require("tensorflow")
    pytest.importorskip("keras")
    library = next(library for library in zoo.LIBRARIES if library.id == "keras")
    model, task = library.build(zoo.weights()), zoo.tasks(1)[0]
    maml = MAML(model, 0.1)
    model.layers[0].trainable = False
    learner = maml.clone().adapt_on(
        nn.mse, *map(maml.backend.asarray, (task.support_x, task.support_y))
    )
    loss = nn.mse(learner(task.query_x), maml.backend.asarray(task.query_y))
    cost = maml.meta_value_and_grad(nn.mse, [task], compiled=False, task_map="loop").cost
    fresh = MAML(model, 0.1)
    expected = fresh.meta_value_and_grad(nn.mse, [task], compiled=False, task_map="loop").cost
    assert float(loss) == pytest.approx(float(expected), rel=1e-12)
    assert float(cost) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras saving
def test_a_copy_keeps_its_names() -> None:
    require("tensorflow")
    pytest.importorskip("keras")
    library = next(library for library in zoo.LIBRARIES if library.id == "keras")
    maml = MAML(library.build(zoo.weights()), 0.1)
    copied = copy.deepcopy(maml)
    assert list(copied.meta_parameters()) == list(maml.meta_parameters())
    how: dict[str, Any] = {"compiled": False, "task_map": "loop"}
    costs = [m.meta_value_and_grad(nn.mse, zoo.tasks(1), **how).cost for m in (maml, copied)]
    assert float(costs[0]) == float(costs[1])
