"""`compile`: what is one program, what is another, and what cannot be one."""

from __future__ import annotations

import gc
import importlib
import logging
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import metaframe
from frameworks import require, slow
from metaframe import Container, ops
from metaframe.backend import Backend
from metaframe.errors import CompileError, InputTypeError

Arr = Callable[..., Any]


def scaled(v: Any, factor: Any = 2) -> Any:
    return {"scaled": v["w"] * factor, "factor": factor}


@pytest.mark.parametrize("factors", [(1, True, 1.0), slow((0.5, 0.25, 2))])
def test_constants_belong_to_the_program(
    backend: Backend, arr: Arr, factors: tuple[Any, ...]
) -> None:
    """1, True and 1.0 are equal and are three programs all the same."""
    compiled = metaframe.compile(scaled)
    for factor in factors:
        result = compiled({"w": arr([3.0])}, factor=factor)
        assert type(result["factor"]) is type(factor)
        np.testing.assert_array_equal(backend.to_numpy(result["scaled"]), [3.0 * factor])
    assert compiled.traces == len(factors)


def test_closed_over_arrays_belong_to_the_program(backend: Backend, arr: Arr) -> None:
    """Also where a compiler keeps the code of one program for others that look alike."""
    for factor in (arr([1.0, 2.0]), arr([3.0, 4.0])):
        compiled = metaframe.compile(lambda x, factor=factor: x * factor)
        found = backend.to_numpy(compiled(arr([5.0, 7.0])))
        np.testing.assert_array_equal(found, backend.to_numpy(factor) * [5.0, 7.0])


def test_a_program_keeps_no_arrays(backend: Backend, arr: Arr) -> None:
    """Neither those it was first called with nor those it was traced with."""
    compiled, w = metaframe.compile(scaled), arr([1.0, 2.0])
    first = weakref.ref(w)
    compiled({"w": w})
    del w
    gc.collect()
    assert first() is None
    if backend.name == "jax":
        jax = importlib.import_module("jax")
        with jax.checking_leaks():
            metaframe.compile(scaled)({"w": arr([1.0])})


def test_neutral_arrays_are_inputs_and_not_constants(backend: Backend) -> None:
    compiled = metaframe.compile(scaled)
    for value in (1.0, 5.0):
        result = compiled({"w": np.array([value])})
        assert backend.owns(result["scaled"])
        np.testing.assert_array_equal(backend.to_numpy(result["scaled"]), [2 * value])
    assert compiled.traces == 1


def test_another_selection_is_another_program(backend: Backend, arr: Arr) -> None:
    """Neutral numbers inside the function become arrays of what is selected."""
    compiled = metaframe.compile(lambda v: (v["w"], ops.asarray(1.0)))
    for dtype in ("float64", "float32", "float64"):
        with metaframe.use_backend(backend.name, dtype=dtype):
            assert backend.dtype_name(compiled({"w": arr([1.0])})[1]) == dtype
    assert compiled.traces == 2


def test_a_result_on_torch_is_as_differentiable_as_the_function() -> None:
    require("torch")
    torch = importlib.import_module("torch")

    def step(v: Any, x: Any) -> Any:
        def cost(x: Any, v: Any) -> Any:
            return (torch.tanh(v["w"] * x) ** 2).mean()

        return metaframe.maml_step(x, cost, None, v, 2, 0.3, batched="vmap", stop_gradients=False)[
            0
        ]

    v = {"w": torch.tensor([0.3, -0.8], dtype=torch.float64, requires_grad=True)}
    x = torch.tensor([[1.0, 2.0], [0.5, -1.0]], dtype=torch.float64)
    compiled = metaframe.compile(step)
    for differentiated in (
        lambda fn: torch.autograd.grad(fn(v, x), v["w"])[0],
        lambda fn: torch.func.grad(lambda w: fn({"w": w}, x))(v["w"].detach()),
        lambda fn: torch.func.vmap(lambda x: fn({"w": v["w"].detach()}, x[None]))(x),
    ):
        torch.testing.assert_close(
            differentiated(compiled), differentiated(step), rtol=1e-12, atol=0
        )
    assert not compiled({"w": v["w"].detach()}, x).requires_grad


@pytest.mark.parametrize("traced_with_grad", [True, False])
def test_gradients_on_torch_reach_what_a_function_closes_over(traced_with_grad: bool) -> None:
    require("torch")
    torch = importlib.import_module("torch")
    w = torch.tensor([0.3, -0.8], dtype=torch.float64, requires_grad=True)
    x = torch.tensor([2.0, 5.0], dtype=torch.float64)
    compiled = metaframe.compile(lambda x: (w**2 * x).sum())

    with torch.set_grad_enabled(traced_with_grad), warnings.catch_warnings(action="ignore"):
        compiled(x)
    with pytest.warns(UserWarning, match="a compiled one, uses tensors that require grad"):
        (gradient,) = torch.autograd.grad(compiled(x), w)
    torch.testing.assert_close(gradient, 2 * w.detach() * x, rtol=1e-12, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), (w**2 * x).sum(), rtol=1e-12, atol=0)


def test_torch_is_asked_anew_whether_it_records() -> None:
    """A function may do something else under no_grad, and what it does there may be all it can."""
    require("torch")
    torch = importlib.import_module("torch")
    w = torch.tensor([0.5, 1.0])
    x = torch.ones(2)
    compiled = metaframe.compile(lambda x: x * (2 if torch.is_grad_enabled() else 3))
    with torch.no_grad():
        assert compiled(x).tolist() == [3, 3]
    assert compiled(x).tolist() == compiled(x).tolist() == [2, 2]
    assert compiled.traces == 2
    known = metaframe.compile(lambda x: x * torch.from_numpy(w.numpy()) * w.max().new_ones(2))
    assert known(x).tolist() == [0.5, 1]


def test_tensorflow_variables_may_take_the_place_of_tensors() -> None:
    require("tensorflow")
    tf = importlib.import_module("tensorflow")
    double = metaframe.compile(lambda x: 2 * x)
    for x in (tf.constant([1.0, 2.0]), tf.Variable([1.0, 2.0]), tf.constant([1.0, 2.0])):
        np.testing.assert_array_equal(double(x), [2, 4])
    assert double.traces == 1


def test_tensorflow_records_a_compiled_call_and_reads_variables_anew() -> None:
    require("tensorflow")
    tf = importlib.import_module("tensorflow")
    w = tf.Variable([0.5, 1.0], dtype=tf.float64)
    v, x = (tf.constant(a, tf.float64) for a in ([0.3, -0.8], [2.0, 5.0]))
    closed = metaframe.compile(lambda x: tf.reduce_sum(w**2 * x))
    given = metaframe.compile(lambda v, x: tf.reduce_sum(v**3 * x))

    closed(x), given(v, x)  # the quick way, which nothing records
    with tf.GradientTape() as tape:
        tape.watch(v)
        cost = closed(x) + given(v, x)
    for gradient, expected in zip(
        tape.gradient(cost, [w, v]), [2 * w * x, 3 * v**2 * x], strict=True
    ):
        np.testing.assert_allclose(gradient, expected, rtol=1e-12)
    with tf.autodiff.ForwardAccumulator(v, tf.ones_like(v)) as forward:
        cost = given(v, x)
    np.testing.assert_allclose(forward.jvp(cost), tf.reduce_sum(3 * v**2 * x), rtol=1e-12)
    np.testing.assert_allclose(tf.function(given)(v, x), cost, rtol=1e-12)
    w.assign([3.0, 4.0])
    np.testing.assert_allclose(closed(x), 98, rtol=1e-12)


def test_results_without_arrays(arr: Arr) -> None:
    compiled = metaframe.compile(lambda x: {"a": 3})
    assert [compiled(arr([1.0])) for _ in range(2)] == [{"a": 3}] * 2


def test_threads_compile_at_once(arr: Arr) -> None:
    def run(k: int) -> float:
        return float(metaframe.compile(lambda x: ops.sum(x * k))(x[k]))

    x = [arr([1.0] * (k + 1)) for k in range(4)]
    with ThreadPoolExecutor() as pool:
        assert list(pool.map(run, range(4))) == [0, 2, 6, 12]


def test_constant_that_changed_makes_another_program(arr: Arr) -> None:
    @dataclass(unsafe_hash=True)
    class Settings:
        rate: float

    settings = Settings(2.0)
    compiled = metaframe.compile(lambda x, settings: x * settings.rate)
    compiled(arr([1.0]), settings)
    settings.rate = 3.0
    assert float(compiled(arr([1.0]), settings)[0]) == 3
    assert compiled.traces == 2


def test_structure_of_results_is_kept(arr: Arr) -> None:
    compiled = metaframe.compile(lambda v: (v, Container(a=v["w"]), [None, "text", 3]))
    first, container, rest = compiled({"w": arr([1.0])})
    assert set(first) == {"w"}
    assert isinstance(container, Container)
    assert rest == [None, "text", 3]


def test_new_program_is_reported(arr: Arr, caplog: pytest.LogCaptureFixture) -> None:
    compiled = metaframe.compile(scaled)
    with caplog.at_level(logging.DEBUG, logger="metaframe.compile"):
        compiled({"w": arr([1.0])})
        compiled({"w": arr([2.0])})
        compiled({"w": arr([1.0, 2.0])})
    messages = [r.message for r in caplog.records if r.message.startswith("program ")]
    assert [m.split(":")[0].rsplit(" on ", 1)[0] for m in messages] == [
        "program 1 of scaled",
        "program 2 of scaled",
    ]


def branches_on_a_value(v: Any) -> Any:
    if ops.sum(v["w"]) > 0:
        return v["w"]
    return -v["w"]


def test_branch_on_a_value_is_an_error_with_its_line(arr: Arr) -> None:
    compiled = metaframe.compile(branches_on_a_value)
    line = branches_on_a_value.__code__.co_firstlineno + 1
    with pytest.raises(CompileError, match=rf"test_compile.py:{line} needs the value.*ops.where"):
        compiled({"w": arr([1.0])})
    assert compiled.traces == 0


def test_unhashable_argument_is_named(arr: Arr) -> None:
    with pytest.raises(InputTypeError, match="received set"):
        metaframe.compile(lambda v, s: v)({"w": arr([1.0])}, {1, 2})


def test_name_and_docstring_survive() -> None:
    compiled = metaframe.compile(scaled)
    assert compiled.__name__ == "scaled"  # type: ignore[attr-defined]
    assert compiled.__wrapped__ is scaled  # type: ignore[attr-defined]
