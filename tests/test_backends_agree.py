"""The same meta-gradient on every backend, and by every way of computing it.

Differences are measured against the norm of the gradient. The reference is the loop over tasks on
torch in float64, whose gradients finite differences confirm in `test_meta_gradient_fd.py`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest

from frameworks import BACKENDS, compiles_on_torch, require, slow
from meta_problems import (
    OPTIMIZERS,
    MetaProblem,
    classification,
    meta_step,
    quick,
    regression,
    sequences,
)
from metaframe import compile as compile_whole
from metaframe import tree, use_backend
from metaframe.testing.conformance.closed_form import assert_close

Call = Callable[..., Any]

TOLERANCE = {"float64": 1e-12, "float32": 2e-6}
PROBLEMS: dict[str, Callable[[], MetaProblem]] = {
    "mlp": regression,
    "conv4": classification,
    "transformer": sequences,
}


@functools.cache
def reference(problem: str, steps: int, optimizer: str) -> tuple[Any, Any]:
    """The loop on torch in float64."""
    require("torch")
    with use_backend("torch", dtype="float64") as torch:
        made = PROBLEMS[problem]()
        step = meta_step(made, steps, optimizer=optimizer, batched=False)
        found = step(*tree.map(torch.asarray, (made.batch, made.variables)))
        return tree.map(torch.to_numpy, found)


def check(found: Any, expected: Any, dtype: str) -> None:
    (cost, grads), (expected_cost, expected_grads) = found, expected
    assert {str(x.dtype) for x in (cost, *tree.leaves(grads))} == {dtype}
    assert_close(cost, expected_cost, TOLERANCE[dtype])
    assert_close(grads, expected_grads, TOLERANCE[dtype])


# -- backend against backend ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(
    ("steps", "optimizer"),
    [
        (2, "adamw"),
        *(slow(k, name) for k in (1, 5) for name in OPTIMIZERS),
        *(slow(2, name) for name in OPTIMIZERS if name != "adamw"),
    ],
)
def test_mlp(backend: Any, arr: Call, to_np: Call, steps: int, optimizer: str, dtype: str) -> None:
    problem = regression()
    step = quick(backend, meta_step(problem, steps, optimizer=optimizer))
    with use_backend(backend.name, dtype=dtype):
        found = to_np(step(arr(problem.batch, dtype), arr(problem.variables, dtype)))
    check(found, reference("mlp", steps, optimizer), dtype)


@pytest.mark.parametrize("dtype", ["float64", slow("float32")])
@pytest.mark.parametrize("steps", [1, slow(2), slow(5)])
def test_conv4(backend: Any, arr: Call, to_np: Call, steps: int, dtype: str) -> None:
    problem = classification()
    step = quick(backend, meta_step(problem, steps))
    batch = tree.map(lambda x: arr(x, dtype if x.dtype.kind == "f" else None), problem.batch)
    found = to_np(step(batch, arr(problem.variables, dtype)))
    check(found, reference("conv4", steps, "sgd"), dtype)


# -- one way against another ------------------------------------------------------------------


@pytest.mark.parametrize("problem", ["mlp", slow("conv4"), slow("transformer")])
@pytest.mark.parametrize("batched", [slow(False), "vmap", slow("scan")])
def test_eager(backend: Any, arr: Call, to_np: Call, problem: str, batched: Any) -> None:
    made = PROBLEMS[problem]()
    found = to_np(meta_step(made, 1, batched=batched)(arr(made.batch), arr(made.variables)))
    check(found, reference(problem, 1, "sgd"), "float64")


@pytest.mark.slow
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("batched", [False, "vmap", "scan"])
def test_compiled(backend: Any, arr: Call, to_np: Call, problem: str, batched: Any) -> None:
    made = PROBLEMS[problem]()
    step = compile_whole(meta_step(made, 2, batched=batched))
    check(
        to_np(step(arr(made.batch), arr(made.variables))), reference(problem, 2, "sgd"), "float64"
    )


@compiles_on_torch
@pytest.mark.parametrize("problem", ["mlp", slow("conv4"), slow("transformer")])
def test_compiled_vectorised(backend: Any, arr: Call, to_np: Call, problem: str) -> None:
    made = PROBLEMS[problem]()
    step = compile_whole(meta_step(made, 1))
    check(
        to_np(step(arr(made.batch), arr(made.variables))), reference(problem, 1, "sgd"), "float64"
    )


MODES = ("reverse", "remat", "mixed")
STRATEGIES = (False, "vmap", "scan")

CROSSED = [
    *itertools.product(PROBLEMS, ("sgd", "adam"), STRATEGIES, MODES),
    *itertools.product(["mlp"], ["momentum"], ["scan"], MODES[1:]),
    *itertools.product(["mlp"], sorted(OPTIMIZERS.keys() - {"sgd", "adam"}), ["vmap"], MODES[1:]),
]


def in_the_default_run(name: str, problem: str, optimizer: str, batched: Any, mode: str) -> bool:
    """An MLP everywhere; a transformer where nothing has to be compiled for it."""
    if (optimizer, batched) != ("adam", "vmap") or mode == "reverse":
        return False
    return problem == "mlp" or (name, problem, mode) == ("torch", "transformer", "mixed")


@pytest.mark.parametrize(
    ("backend_name", "problem", "optimizer", "batched", "mode"),
    [
        case if in_the_default_run(*case) else slow(*case)
        for case in ((name, *rest) for name in BACKENDS for rest in CROSSED)
    ],
    indirect=["backend_name"],
)
def test_modes(
    backend: Any, arr: Call, to_np: Call, mode: str, problem: str, optimizer: str, batched: Any
) -> None:
    made = PROBLEMS[problem]()
    step = quick(backend, meta_step(made, 2, optimizer=optimizer, batched=batched, mode=mode))
    found = to_np(step(arr(made.batch), arr(made.variables)))
    check(found, reference(problem, 2, optimizer), "float64")


@pytest.mark.slow
@pytest.mark.parametrize("backend_name", ["torch"], indirect=True)  # above it is not compiled
@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize("problem", ["mlp", "conv4"])  # a transformer compiles for minutes
def test_compiled_modes(backend: Any, arr: Call, to_np: Call, problem: str, mode: str) -> None:
    made = PROBLEMS[problem]()
    step = compile_whole(meta_step(made, 2, mode=mode))
    found = to_np(step(arr(made.batch), arr(made.variables)))
    check(found, reference(problem, 2, "sgd"), "float64")


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_many_steps(backend: Any, arr: Call, to_np: Call, mode: str) -> None:
    """Past the number of steps that are unrolled."""
    made = regression()
    step = quick(backend, meta_step(made, 12, optimizer="adam", mode=mode))
    found = to_np(step(arr(made.batch), arr(made.variables)))
    check(found, reference("mlp", 12, "adam"), "float64")


# -- bit for bit --------------------------------------------------------------------------------


def test_twice_the_same_bits(backend: Any, arr: Call, to_np: Call) -> None:
    made = regression()
    step = quick(backend, meta_step(made, 1))
    first, second = (to_np(step(arr(made.batch), arr(made.variables))) for _ in range(2))
    for a, b in zip(tree.leaves(first), tree.leaves(second), strict=True):
        assert a.tobytes() == b.tobytes()
