"""The threads of torch's operations while `fit` trains a small model."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest

from frameworks import require
from metaframe import nn, optim, use_backend
from metaframe.learners import MAML
from metaframe.tasks import SinusoidTaskSampler
from metaframe.training import Callback, MetaTrainer, StepSettings


@pytest.fixture
def torch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The framework as it is on a machine with two cores."""
    require("torch")
    framework = importlib.import_module("torch")
    threads = importlib.import_module("metaframe_torch._threads")
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "AT_IMPORT", 2)
    monkeypatch.setattr(threads, "cores", lambda: 2)
    before = framework.get_num_threads()
    framework.set_num_threads(2)
    with use_backend("torch"):
        yield framework
    framework.set_num_threads(before)


def threads_in_fit(torch: Any, *, width: int = 4, steps_per_call: int | None = None) -> set[int]:
    seen = set()

    class Looks(Callback):
        def on_step(self, run: Any) -> None:
            seen.add(torch.get_num_threads())
            if run.iteration == 1:
                raise KeyError

    model = nn.mlp([1, width, 1])
    settings = StepSettings(steps_per_call=steps_per_call)
    maml = MAML((model, model.init(seed=0)), 0.01, 1)
    sampler = SinusoidTaskSampler(seed=0)
    trainer = MetaTrainer(maml, optim.adam(1e-3), nn.mse, sampler, settings=settings)
    with pytest.raises(KeyError):
        trainer.fit(2, 2, callbacks=[Looks()])
    return seen


@pytest.mark.parametrize("steps_per_call", [None, 1])
def test_small_model_trains_on_one_thread(torch: Any, steps_per_call: int | None) -> None:
    assert threads_in_fit(torch, steps_per_call=steps_per_call) == {1}
    assert torch.get_num_threads() == 2, "restored, though training failed"


def test_large_model_keeps_its_threads(torch: Any) -> None:
    assert threads_in_fit(torch, width=2**18) == {2}


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_number_of_the_environment_stays(
    torch: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "2")
    assert threads_in_fit(torch) == {2}


def test_number_that_is_not_torchs_own_stays(torch: Any) -> None:
    torch.set_num_threads(3)
    assert threads_in_fit(torch) == {3}
    assert torch.get_num_threads() == 3
