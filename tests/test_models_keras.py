"""Keras on its JAX and torch backends: each in a process of its own, as Keras has one backend."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from frameworks import require

ROOT = Path(__file__).resolve().parent.parent

# An activation made of plain arithmetic: Keras computes its own in float32 on these backends.
CODE = """
import numpy as np, {framework}, keras
from metaframe import MAML, nn
from metaframe.tasks import Task

def layer(size):
    return keras.layers.Dense(size, dtype="float64")

keras.utils.set_random_seed(0)
layers = [keras.layers.Input((3,), dtype="float64"), layer(4),
          keras.layers.Activation(lambda x: x / (1 + x * x), dtype="float64"), layer(2)]
rng = np.random.default_rng(0)
shapes = ((6, 3), (6, 2), (5, 3), (5, 2))
tasks = [Task(*[rng.normal(size=shape) for shape in shapes]) for _ in range(3)]
model = keras.Sequential(layers)
maml = MAML(model, 0.1, 2)
backend = maml._adapter.backend
assert backend.name == "{framework}"
start = {{n: backend.to_numpy(p).copy() for n, p in maml.meta_parameters().items()}}
towards = {{n: rng.normal(size=p.shape) for n, p in start.items()}}

def cost(t):
    maml.assign({{n: backend.asarray(p + t * towards[n]) for n, p in start.items()}})
    return float(maml.meta_value_and_grad(nn.mse, tasks).cost)

expected = (8 * (cost(1e-3) - cost(-1e-3)) - (cost(2e-3) - cost(-2e-3))) / 12e-3
maml.assign({{n: backend.asarray(p) for n, p in start.items()}})
grads = maml.meta_value_and_grad(nn.mse, tasks).grads
found = sum(float((backend.to_numpy(g) * towards[n]).sum()) for n, g in grads.items())
assert abs(found - expected) < 1e-10 * abs(expected), (found, expected)
"""


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_meta_gradient(framework: str) -> None:
    require(framework)
    pytest.importorskip("keras")
    code = CODE.format(framework=framework)
    environment = {**os.environ, "KERAS_BACKEND": framework, "JAX_ENABLE_X64": "1"}
    path = os.pathsep.join(map(str, (ROOT, ROOT / "backends")))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
