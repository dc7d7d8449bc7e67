"""Frameworks' own optimizers take the step that ours take, and their state can be restored."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import zoo
from frameworks import require
from metaframe import MAML, nn, optim
from metaframe.backend import load_backend
from metaframe.errors import InputError
from metaframe.tasks import Task
from metaframe.training import MetaTrainer

BY_ID = {library.id: library for library in zoo.LIBRARIES}


class Fixed:
    def sample(self, meta_batch_size: int) -> list[Task]:
        return zoo.tasks(meta_batch_size)


def _torch_adam(maml: Any) -> Any:
    import torch

    return torch.optim.Adam(maml.parameters(), lr=0.01)


def _optax_adam(maml: MAML) -> Any:
    del maml
    return pytest.importorskip("optax").adam(0.01)


def _keras_adam(maml: MAML) -> Any:
    del maml
    return pytest.importorskip("keras").optimizers.Adam(0.01, epsilon=1e-8)


ADAMS: list[tuple[str, Callable[[MAML], Any], float]] = [
    ("torch", _torch_adam, 1e-12),
    ("equinox", _optax_adam, 1e-12),
    ("nnx", _optax_adam, 1e-12),
    # Keras corrects the bias in float32, where 1 - 0.999**t has three digits less.
    ("keras", _keras_adam, 1e-5),
    ("tf_module", _keras_adam, 1e-5),
]
each_adam = pytest.mark.parametrize(("name", "make", "within"), ADAMS, ids=[a[0] for a in ADAMS])


def trained(maml: MAML, optimizer: Any, steps: int) -> MetaTrainer:
    runner = MetaTrainer(maml, optimizer, nn.mse, Fixed())
    runner.fit(steps, 3)
    return runner


@each_adam
def test_native_adam_is_our_adam(name: str, make: Callable[[MAML], Any], within: float) -> None:
    library = BY_ID[name]
    require(library.backend)
    backend = load_backend(library.backend)
    native, ours = (MAML(library.build(zoo.weights()), 0.1, 1) for _ in range(2))
    trained(native, make(native), 3)
    trained(ours, optim.adam(0.01), 3)
    found, expected = (library.canonical(m.meta_parameters(), backend) for m in (native, ours))
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=0, atol=within)
        assert np.abs(value - zoo.weights()[key]).max() > 0.02


@each_adam
def test_state_of_a_native_optimizer_is_restored(
    name: str, make: Callable[[MAML], Any], within: float
) -> None:
    del within
    library = BY_ID[name]
    require(library.backend)
    whole = MAML(library.build(zoo.weights()), 0.1, 1)
    trained(whole, make(whole), 4)
    first = MAML(library.build(zoo.weights()), 0.1, 1)
    state = trained(first, make(first), 2).state()
    second = MAML(library.build(zoo.weights(seed=7)), 0.1, 1)
    runner = MetaTrainer(second, make(second), nn.mse, Fixed())
    runner.restore(*state)
    assert runner.step == 2
    runner.fit(2, 3)
    backend = load_backend(library.backend)
    for key, value in whole.meta_parameters().items():
        np.testing.assert_array_equal(
            backend.to_numpy(second.meta_parameters()[key]), backend.to_numpy(value)
        )


def test_an_optimizer_of_another_model_is_refused() -> None:
    require("torch")
    maml, other = (MAML(BY_ID["torch"].build(zoo.weights()), 0.1, 1) for _ in range(2))
    with pytest.raises(InputError, match="holds none of the meta-parameters"):
        trained(maml, _torch_adam(other), 1)


@pytest.mark.parametrize(("name", "make"), [("torch", _torch_adam), ("equinox", _optax_adam)])
def test_a_schedule_is_for_our_optimizers(name: str, make: Callable[[MAML], Any]) -> None:
    library = BY_ID[name]
    require(library.backend)
    maml = MAML(library.build(zoo.weights()), 0.1, 1)
    runner = MetaTrainer(maml, make(maml), nn.mse, Fixed(), schedule=lambda step: 0.1)
    with pytest.raises(InputError, match="schedule= is for optimizers of"):
        runner.meta_step(zoo.tasks())


def test_a_schedule_is_not_ignored_by_another_pair() -> None:
    """Neither optax's nor anyone else's: such a pair has nowhere to put a rate."""
    require("torch")
    ours = optim.sgd(0.1)
    pair = types.SimpleNamespace(init=ours.init, update=lambda g, s, p: ours.update(g, s, p))
    maml = MAML(BY_ID["torch"].build(zoo.weights()), 0.1, 1)
    runner = MetaTrainer(maml, pair, nn.mse, Fixed(), schedule=lambda step: 0.0)
    with pytest.raises(InputError, match="schedule= is for optimizers of"):
        runner.meta_step(zoo.tasks())
    assert runner.step == 0
