"""A compiled step belongs to the attributes that its model had, and to no others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import metaframe
import zoo
from frameworks import require, slow
from metaframe import MAML, nn
from metaframe.backend import Backend
from metaframe.models.lookup import adapter_of
from metaframe.tasks import stack_tasks


class Steps:
    """Meta-gradients of one learner in programs that are counted."""

    def __init__(self, model: Any) -> None:
        self.maml = MAML(model, 0.1)
        self.run = metaframe.compile(lambda fn, *given: fn(*given).cost)
        self.batch = metaframe.tree.map(self.backend.asarray, stack_tasks(zoo.tasks()))

    @property
    def backend(self) -> Backend:
        return self.maml.backend

    def __call__(self) -> float:
        gradient = self.maml.meta_gradient(nn.mse, task_map="scan")
        cost = self.run(gradient, self.maml.meta_arrays(), self.maml.constants(), self.batch)
        return float(self.backend.to_numpy(cost))


def _torch() -> tuple[Any, Any, str]:
    import torch

    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LeakyReLU(0.1)).double()
    return model, model[1], "negative_slope"


def _nnx() -> tuple[Any, Any, str]:
    import jax.numpy as jnp

    nnx = pytest.importorskip("flax.nnx")

    class Net(nnx.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self.w, self.slope = nnx.Param(jnp.ones((3, 2))), 0.1

        def __call__(self, x: Any) -> Any:
            y = x @ self.w[...]
            return jnp.where(y > 0, y, self.slope * y)

    model = Net()
    return model, model, "slope"


def _keras() -> tuple[Any, Any, str]:
    keras = pytest.importorskip("keras")
    layers = keras.layers.Dense(2, dtype="float64"), keras.layers.LeakyReLU(0.1, dtype="float64")
    model = keras.Sequential([keras.layers.Input((3,), dtype="float64"), *layers])
    return model, layers[1], "negative_slope"


def _tf_module() -> tuple[Any, Any, str]:
    import tensorflow as tf

    class Leaky(tf.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.slope = 0.1

        def __call__(self, x: Any) -> Any:
            return tf.where(x > 0, x, self.slope * x)

    class Net(tf.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.w, self.layers = tf.Variable(np.ones((3, 2))), {"act": [Leaky()]}

        def __call__(self, x: Any) -> Any:
            return self.layers["act"][0](x @ self.w)

    model = Net()
    return model, model.layers["act"][0], "slope"


LEAKY: dict[str, tuple[str, Callable[[], tuple[Any, Any, str]]]] = {
    "torch": ("torch", _torch),
    "nnx": ("jax", _nnx),
    "keras": ("tensorflow", _keras),
    "tf_module": ("tensorflow", _tf_module),
}


@pytest.mark.parametrize("name", [slow("torch"), "nnx", "keras", "tf_module"])
def test_another_value_is_another_program(name: str) -> None:
    backend, make = LEAKY[name]
    require(backend)
    model, layer, attribute = make()
    step, costs = Steps(model), []
    for slope in (0.1, 0.9, 0.1):
        setattr(layer, attribute, slope)
        costs += [step(), step()]
        fresh = MAML(model, 0.1).meta_value_and_grad(
            nn.mse, step.batch, compiled=False, task_map="loop"
        )
        assert costs[-1] == pytest.approx(float(step.backend.to_numpy(fresh.cost)), rel=1e-6)
    assert abs(costs[0] - costs[2]) > 1e-3
    assert step.run.traces == 2


@pytest.mark.parametrize(
    "library",
    [slow(lib) if lib.backend == "torch" else lib for lib in zoo.LIBRARIES],
    ids=lambda lib: f"{lib.backend}-{lib.id}",
)
def test_one_program_while_nothing_changes(library: zoo.Library) -> None:
    step = Steps(zoo.built(library))
    assert step() == step() == step()
    assert step.run.traces == 1


def test_a_dropout_rate_is_part_of_the_signature() -> None:
    require("torch")
    import torch

    dropout = torch.nn.Dropout(0.5)
    adapter = adapter_of(torch.nn.Sequential(torch.nn.Linear(3, 2), dropout))
    before = adapter.signature()
    dropout.p = 0.1
    assert adapter.signature() != before
    dropout.p = 0.5
    assert adapter.signature() == before


def test_what_a_model_counts_itself_is_not() -> None:
    """Each call would be another program."""
    require("torch")
    import torch

    class Counting(torch.nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 2)
            self.calls, self.scale = 0, 1.0

        def forward(self, x: Any) -> Any:
            self.calls += 1
            return self.scale * super().forward(x)

    model = Counting().double()
    adapter = adapter_of(model)
    maml = MAML(adapter, 0.1)
    maml.meta_value_and_grad(nn.mse, zoo.tasks())
    before, calls = adapter.signature(), model.calls
    maml.meta_value_and_grad(nn.mse, zoo.tasks())
    assert model.calls > calls
    assert adapter.signature() == before
    model.scale = 2.0
    assert adapter.signature() != before
