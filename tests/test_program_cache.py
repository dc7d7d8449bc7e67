"""The compiled programs of a function: how many are kept, and what is said when they pile up."""

from __future__ import annotations

import gc
import importlib
import os
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import metaframe
from frameworks import require
from metaframe import nn, ops
from metaframe.backend import Backend
from metaframe.core import program_cache
from metaframe.learners import MAML
from metaframe.tasks import SinusoidTaskSampler

Arr = Callable[..., Any]


@pytest.fixture
def few(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two programs are many, the second is worth a warning, and nothing takes long to compile."""
    monkeypatch.setattr(type(backend), "compile", lambda self, fn, examples: fn)
    monkeypatch.setattr(program_cache, "PROGRAMS_KEPT", 2)
    monkeypatch.setattr(program_cache, "WARN_FROM", 2)


def scaled(x: Any, factor: Any) -> Any:
    return x * (factor if isinstance(factor, float) else factor(2.0))


@pytest.mark.filterwarnings("ignore:scaled was compiled")
@pytest.mark.usefixtures("few")
def test_program_that_was_not_used_for_longest_goes(backend: Backend, arr: Arr) -> None:
    compiled, x = metaframe.compile(scaled), arr([1.0])
    for factor, traces in ((1.5, 1), (2.5, 2), (1.5, 2), (3.5, 3), (1.5, 3), (2.5, 4)):
        np.testing.assert_array_equal(backend.to_numpy(compiled(x, factor)), [factor])
        assert compiled.traces == traces
    assert len(compiled.signatures) == 2


@pytest.mark.filterwarnings("ignore:scaled was compiled")
@pytest.mark.usefixtures("few")
def test_program_that_goes_keeps_nothing(arr: Arr) -> None:
    compiled, x = metaframe.compile(scaled), arr([1.0])

    def double(x: float) -> float:
        return 2 * x

    gone = weakref.ref(double)
    compiled(x, double)
    del double
    for factor in (1.5, 2.5):
        compiled(x, factor)
    gc.collect()
    assert gone() is None


def told(calls: Callable[[], object]) -> str:
    with pytest.warns(UserWarning, match="was compiled 2 times") as caught:
        calls()
    assert len(caught) == 1
    assert caught[0].filename == __file__
    return str(caught[0].message).removesuffix(
        " Each combination is a program of its own, and the 2 used last are kept."
    )


@pytest.mark.usefixtures("few")
def test_warning_names_what_changes(backend: Backend, arr: Arr) -> None:
    del backend
    one, two = arr([1.0]), arr([1.0, 2.0])

    def both(fn: Callable[..., Any], *calls: tuple[Any, ...]) -> str:
        compiled = metaframe.compile(fn)
        with warnings.catch_warnings(action="error"):
            compiled(*calls[0])
            compiled(*calls[0])
        return told(lambda: compiled(*calls[1]))

    assert both(scaled, (one, 1.5), (two, 1.5)) == (
        "scaled was compiled 2 times. What changes between its calls: the shape of argument 'x' "
        "((1,), (2,)): pad to a few sizes."
    )
    assert "the float of argument 'factor' (1.5, 2.5): pass an array" in both(
        scaled, (one, 1.5), (one, 2.5)
    )
    new = "the function of argument 'factor' (test_warning_names_what_changes.<locals>.<lambda>): "
    assert new + "pass the same function" in both(
        scaled, (one, lambda x: x), (one, lambda x: 1.0 * x)
    )
    assert "the structure of the arguments" in both(
        lambda v: v["a"] + 1.0, ({"a": one},), ({"a": one, "b": one},)
    )


@pytest.mark.usefixtures("few")
def test_warning_of_a_learner_names_its_loss(backend: Backend) -> None:
    del backend
    model = nn.mlp([1, 2, 1])
    maml = MAML((model, model.init(seed=0)), 0.01, 1)
    tasks = SinusoidTaskSampler(seed=0).sample(1)

    def step() -> None:
        maml.meta_value_and_grad(lambda p, y: ops.mean((p - y) ** 2), tasks, compiled=True)

    step()
    with pytest.warns(UserWarning, match=r"a learner's meta-gradient was.*'fn.setting.losses") as w:
        step()
    assert "the function of argument" in str(w[0].message)


def test_dropped_function_leaves_nothing(backend: Backend, arr: Arr) -> None:
    """Neither itself nor objects in the tables of its framework."""
    x = arr([1.0, 2.0])

    def made() -> weakref.ref[Any]:
        def doubled(x: Any) -> Any:
            return 2.0 * x

        metaframe.compile(doubled)(x)
        return weakref.ref(doubled)

    def objects() -> int:
        gc.collect()
        return len(gc.get_objects())

    functions = [made() for _ in range(3)]
    before = objects()
    functions += [made() for _ in range(10)]
    assert objects() - before < 50, "five for each function"
    assert not any(function() for function in functions)


def test_tensorflow_compiles_what_it_knows_no_second_time() -> None:
    """XLA frees no program, and a third of a megabyte would stay of each function like this."""
    require("tensorflow")
    x = importlib.import_module("tensorflow").ones(3)

    def memory_after(functions: int) -> float:
        for _ in range(functions):
            metaframe.compile(lambda x: ops.tanh(2.0 * x))(x)
        gc.collect()
        resident = Path("/proc/self/statm").read_text().split()[1]
        return int(resident) * os.sysconf("SC_PAGE_SIZE") / 1024

    start = memory_after(10)
    assert memory_after(30) - start < 30 * 100, "KiB"


def test_tensorflow_tells_gradients_apart_that_go_with_the_same_values() -> None:
    require("tensorflow")
    tf = importlib.import_module("tensorflow")
    x = tf.constant([1.0, 2.0])
    for slope in (3.0, 5.0):

        @tf.custom_gradient
        def double(x: Any, slope: float = slope) -> Any:
            return 2 * x, lambda up: slope * up

        compiled = metaframe.compile(double)
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = compiled(x)
        np.testing.assert_array_equal(tape.gradient(y, x), [slope, slope])
