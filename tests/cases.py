"""Checks of a portable function against a NumPy formula: values, both derivatives, vmap, compile.

The truth is independent of the code under test: values come from NumPy, first derivatives from
finite differences of the NumPy formula, second derivatives from finite differences of the first.
"""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from metaframe import nn, ops
from metaframe.backend import Backend, use_backend

Values = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Case:
    """One call of a portable function. Its floating inputs are the differentiable ones."""

    id: str
    function: Callable[..., Any]
    formula: Callable[..., Any]
    inputs: tuple[Values, ...]

    @property
    def floating(self) -> tuple[Values, ...]:
        return tuple(x for x in self.inputs if x.dtype.kind == "f")

    def fill(self, floating: Any, convert: Callable[[Values], Any]) -> list[Any]:
        """All inputs, given the floating ones."""
        given = iter(floating)
        return [next(given) if x.dtype.kind == "f" else convert(x) for x in self.inputs]

    def expected(self, floating: Any) -> Values:
        return np.asarray(self.formula(*self.fill(floating, lambda x: x)))


def weights(like: Values, seed: int = 1) -> Values:
    return np.random.default_rng(seed).normal(size=like.shape)


def close(found: Any, expected: Any, tolerance: float) -> None:
    """Equal shapes, and no element off by more than `tolerance` of the largest."""
    assert tuple(found.shape) == tuple(expected.shape)
    scale = max(1.0, float(np.abs(expected).max(initial=0.0)))
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * scale)


def slope(fn: Callable[[float], Any], step: float = 1e-3) -> Any:
    """The derivative of `fn` at zero by the fourth-order stencil."""
    near = fn(step) - fn(-step)
    far = fn(2 * step) - fn(-2 * step)
    return (8 * near - far) / (12 * step)


def gradient_by_differences(case: Case) -> list[Values]:
    weight = weights(case.expected(case.floating))
    gradients = []
    for k, x in enumerate(case.floating):
        gradient = np.zeros_like(x)
        for index in np.ndindex(x.shape):

            def along(t: float, k: int = k, index: Any = index) -> float:
                moved = [y.copy() for y in case.floating]
                moved[k][index] += t
                return float(np.sum(weight * case.expected(moved)))

            gradient[index] = slope(along)
        gradients.append(gradient)
    return gradients


def derivatives(case: Case, backend: Backend) -> Callable[[Any], Any]:
    """`xs -> (gradients of a weighted sum of the output, Hessian times `weights`)`."""
    weight = backend.asarray(weights(case.expected(case.floating)))
    directions = [backend.asarray(weights(x, 2)) for x in case.floating]

    def scalar(xs: Any) -> Any:
        output = case.function(*case.fill(xs, backend.asarray))
        return backend.ops.sum(weight * output), ()

    def along(xs: Any) -> Any:
        _, _, gradients = backend.value_and_grad(scalar)(xs)
        total = sum(backend.ops.sum(d * g) for d, g in zip(directions, gradients, strict=True))
        return total, gradients

    def both(xs: Any) -> Any:
        _, gradients, products = backend.value_and_grad(along)(xs)
        return (*gradients, *products)

    return both


def check_value(case: Case, backend: Backend, dtype: str) -> None:
    with use_backend(backend.name, dtype=dtype):
        found = backend.to_numpy(
            case.function(
                *[backend.asarray(x, dtype if x.dtype.kind == "f" else None) for x in case.inputs]
            )
        )
    expected = case.expected(case.floating)
    if expected.dtype.kind == "f":
        assert found.dtype == dtype
    # Half of what two backends may differ by.
    close(found, expected, 5e-13 if dtype == "float64" else 1e-6)


def check_derivatives(case: Case, backend: Backend) -> None:
    at_start = tuple(map(backend.asarray, case.floating))
    both, count = quickest(backend, derivatives(case, backend), at_start), len(case.floating)

    def at(t: float) -> Any:
        moved = [x + t * weights(x, 2) for x in case.floating]
        return [backend.to_numpy(g) for g in both(tuple(map(backend.asarray, moved)))]

    found = at(0.0)
    for gradient, expected in zip(found[:count], gradient_by_differences(case), strict=True):
        close(gradient, expected, 1e-9)
    for k, product in enumerate(found[count:]):
        close(product, slope(lambda t, k=k: at(t)[k]), 1e-9)


def quickest(backend: Backend, fn: Callable[[Any], Any], xs: Any) -> Callable[[Any], Any]:
    """`fn`, compiled where one program is made sooner than one for every operation."""
    return backend.compile(fn, xs) if backend.compiles_quickly else fn


def tasks(case: Case, count: int = 3) -> tuple[Values, ...]:
    """The floating inputs of several tasks, stacked."""
    return tuple(np.stack([x * (1 + 0.1 * i) for i in range(count)]) for x in case.floating)


def check_vmap(case: Case, backend: Backend) -> None:
    both, stacked = derivatives(case, backend), tasks(case)
    xs = tuple(map(backend.asarray, stacked))
    found = [backend.to_numpy(g) for g in quickest(backend, backend.vmap(both), xs)(xs)]
    one = quickest(backend, both, tuple(x[0] for x in xs))
    for i in range(len(stacked[0])):
        alone = one(tuple(x[i] for x in xs))
        for row, expected in zip(found, alone, strict=True):
            close(row[i], backend.to_numpy(expected), 1e-12)


def check_compiled(cases: list[Case], backend: Backend) -> None:
    """All derivatives of all cases in one compiled function: what a compiled step contains."""
    counts = np.cumsum([0] + [len(case.floating) for case in cases])
    functions = [derivatives(case, backend) for case in cases]

    def everything(xs: Any) -> Any:
        parts = zip(functions, counts[:-1], counts[1:], strict=True)
        return tuple(y for fn, start, stop in parts for y in fn(xs[start:stop]))

    xs = tuple(backend.asarray(x) for case in cases for x in case.floating)
    compiled = backend.compile(everything, xs)
    for found, expected in zip(compiled(xs), everything(xs), strict=True):
        close(backend.to_numpy(found), backend.to_numpy(expected), 1e-12)


def run_examples(package: ModuleType) -> None:
    """The examples in the docstrings, on the selected backend."""
    for found in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        module = importlib.import_module(found.name)
        assert doctest.testmod(module, extraglobs={"nn": nn, "ops": ops}).failed == 0
