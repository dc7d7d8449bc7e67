"""Frameworks' own optimizers take the step that ours take, and their state can be restored."""

from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import zoo
from frameworks import require
from metaframe import MAML, nn, optim, tree
from metaframe.backend import load_backend
from metaframe.errors import CheckpointError, InputError
from metaframe.tasks import Task, stack_tasks
from metaframe.training import MetaTrainer, load_checkpoint, save_checkpoint
from metaframe.training._keras import KerasOptimizer

BY_ID = {library.id: library for library in zoo.LIBRARIES}


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
    runner = MetaTrainer(maml, optimizer, nn.mse, zoo.Fixed())
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
    runner = MetaTrainer(second, make(second), nn.mse, zoo.Fixed())
    runner.restore(*state)
    assert runner.step == 2
    runner.fit(2, 3)
    backend = load_backend(library.backend)
    for key, value in whole.meta_parameters().items():
        np.testing.assert_array_equal(
            backend.to_numpy(second.meta_parameters()[key]), backend.to_numpy(value)
        )


def _torch_trainer(make: Any, dtype: str = "float64", seed: int = 0) -> MetaTrainer:
    import torch

    module = BY_ID["torch"].build(zoo.weights(seed=seed)).to(getattr(torch, dtype))
    maml = MAML(module, 0.1, 1)
    return MetaTrainer(maml, make(maml.parameters()), nn.mse, zoo.Fixed())


def _narrow(tasks: list[Task], dtype: Any) -> Task:
    import torch

    return tree.map(lambda x: torch.from_numpy(x).to(dtype), stack_tasks(tasks))


def test_a_checkpoint_of_a_narrow_model_and_optimizer(tmp_path: Path) -> None:
    """Bfloat16 parameters and moments come back with the same bits."""
    require("torch")
    import torch

    def build(seed: int) -> MetaTrainer:
        return _torch_trainer(lambda ps: torch.optim.Adam(ps, lr=0.01), "bfloat16", seed)

    one, other = build(0), build(1)
    batch = _narrow(zoo.tasks(), torch.bfloat16)
    one.meta_step(batch)
    save_checkpoint(tmp_path / "c", one)
    load_checkpoint(tmp_path / "c", other)
    for runner in (one, other):
        runner.meta_step(batch)
        moments = runner.meta_optimizer.state_dict()["state"]
        assert {m["exp_avg"].dtype for m in moments.values()} == {torch.bfloat16}
    pairs = zip(one.maml.parameters(), other.maml.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_narrow_state_of_a_keras_optimizer() -> None:
    require("tensorflow")
    keras = pytest.importorskip("keras")
    import tensorflow as tf

    variables = {"w": keras.Variable([1.0, 2.0], dtype="bfloat16")}
    one, other = (
        KerasOptimizer(keras.optimizers.SGD(0.1, momentum=0.9), variables) for _ in range(2)
    )
    one.step(variables, {"w": tf.constant([0.3, 0.7], tf.bfloat16)})
    arrays, plain = one.state()
    assert {x.dtype.name for x in arrays.values()} <= {"float32", "int64", "int32"}
    other.restore(arrays, plain)
    for name, value in other.state()[0].items():
        np.testing.assert_array_equal(value, arrays[name])


def test_options_that_are_tensors_are_kept(tmp_path: Path) -> None:
    """As numbers in the file, and as tensors again where the optimizer has tensors."""
    require("torch")
    import torch

    def adam(ps: Any) -> Any:
        return torch.optim.Adam(ps, lr=torch.tensor(0.01, dtype=torch.float64), foreach=False)

    one, other = _torch_trainer(adam), _torch_trainer(adam, seed=1)
    one.meta_step(zoo.tasks())
    one.meta_optimizer.param_groups[0]["lr"].fill_(0.3)
    save_checkpoint(tmp_path / "c", one)
    load_checkpoint(tmp_path / "c", other)
    (group,) = other.meta_optimizer.param_groups
    assert torch.equal(group["lr"], torch.tensor(0.3, dtype=torch.float64))
    assert group["betas"] == (0.9, 0.999)
    for runner in (one, other):
        runner.meta_step(zoo.tasks())
    pairs = zip(one.maml.parameters(), other.maml.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_checkpoint_of_another_native_optimizer_is_refused() -> None:
    require("torch")
    import torch

    one = _torch_trainer(torch.optim.Adam)
    one.meta_step(zoo.tasks())
    other = _torch_trainer(lambda ps: torch.optim.SGD(ps, lr=0.1), seed=1)
    before = [p.detach().clone() for p in other.maml.parameters()]
    with pytest.raises(CheckpointError, match=r"of Adam, and this one is a SGD"):
        other.restore(*one.state())
    split = _torch_trainer(lambda ps: torch.optim.Adam([{"params": [p]} for p in ps]), seed=1)
    with pytest.raises(CheckpointError, match=r"of another optimizer: .*parameter groups"):
        split.restore(*one.state())
    ours = MetaTrainer(split.maml, optim.adam(0.1), nn.mse, zoo.Fixed())
    with pytest.raises(CheckpointError, match="no optimizer of torch's own"):
        other.restore(*ours.state())
    assert other.step == 0
    for value, was in zip(other.maml.parameters(), before, strict=True):
        assert torch.equal(value, was)


def test_a_checkpoint_of_another_keras_optimizer_is_refused() -> None:
    """Also where both keep as many variables of the same shapes."""
    require("tensorflow")
    optimizers = pytest.importorskip("keras").optimizers

    def build(optimizer: Any) -> MetaTrainer:
        maml = MAML(BY_ID["keras"].build(zoo.weights()), 0.1, 1)
        return MetaTrainer(maml, optimizer, nn.mse, zoo.Fixed())

    one, other = build(optimizers.SGD(0.01, momentum=0.9)), build(optimizers.RMSprop(0.01))
    arrays, plain = one.state()
    with pytest.raises(CheckpointError, match="of SGD, and this one is a RMSprop"):
        other.restore(arrays, plain)
    other.restore(arrays, {**plain, "optimizer": {}})  # as written before the class was kept


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
    with pytest.raises(InputError, match="schedule= is for optimizers of"):
        MetaTrainer(maml, make(maml), nn.mse, zoo.Fixed(), schedule=lambda step: 0.1)
    runner = MetaTrainer(maml, make(maml), nn.mse, zoo.Fixed())
    runner.schedule = lambda step: 0.1
    with pytest.raises(InputError, match="schedule= is for optimizers of"):
        runner.meta_step(zoo.tasks())


def test_a_schedule_is_not_ignored_by_another_pair() -> None:
    """Neither optax's nor anyone else's: such a pair has nowhere to put a rate."""
    require("torch")
    ours = optim.sgd(0.1)
    pair = types.SimpleNamespace(init=ours.init, update=lambda g, s, p: ours.update(g, s, p))
    maml = MAML(BY_ID["torch"].build(zoo.weights()), 0.1, 1)
    with pytest.raises(InputError, match="schedule= is for optimizers of"):
        MetaTrainer(maml, pair, nn.mse, zoo.Fixed(), schedule=lambda step: 0.0)
    runner = MetaTrainer(maml, pair, nn.mse, zoo.Fixed())
    runner.schedule = lambda step: 0.0
    with pytest.raises(InputError, match="schedule= is for optimizers of"):
        runner.meta_step(zoo.tasks())
    assert runner.step == 0
