"""Clauses about one portable function each, from its formula in NumPy.

The truth is independent of the code under test: values come from the formula in float64, first and
second derivatives from finite differences of it. Mapped derivatives are compared with the same ones
taken task by task, once those are known to be right.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from metaframe.backend.contract import Backend
from metaframe.backend.selection import use_backend
from metaframe.testing.conformance.clause import Bench, Chapter, Values, close, equal

VALUE = {"float64": 5e-13, "float32": 1e-6}
"""Half of what two backends may differ by."""
DERIVATIVE = {"float64": 2e-8, "float32": 2e-5}
"""The accuracy of differences of differences in float64, and in float32."""
STEP = 1e-3


@dataclass(frozen=True, eq=False)
class Case:
    """One call of a portable function. Its floating inputs are the differentiable ones."""

    id: str
    function: Callable[..., Any]
    formula: Callable[..., Any]
    inputs: tuple[Values, ...]

    @property
    def floating(self) -> tuple[Values, ...]:
        """The inputs to differentiate by."""
        return tuple(x for x in self.inputs if x.dtype.kind == "f")

    def fill(self, floating: Sequence[Any], convert: Callable[[Values], Any]) -> list[Any]:
        """All inputs, given the floating ones."""
        given = iter(floating)
        return [next(given) if x.dtype.kind == "f" else convert(x) for x in self.inputs]

    def expected(self, floating: Sequence[Values]) -> Values:
        """The formula's value."""
        return np.asarray(self.formula(*self.fill(floating, lambda x: x)))

    @functools.cached_property
    def weight(self) -> Values:
        """The weights of the output in the sum that makes a scalar of it."""
        return weights(self.expected(self.floating))

    @functools.cached_property
    def directions(self) -> tuple[Values, ...]:
        """Along which the gradients are differentiated."""
        return tuple(weights(x, 2) for x in self.floating)

    @functools.cached_property
    def derivatives(self) -> tuple[Values, ...]:
        """Gradients of the weighted sum, then its Hessian times the directions."""
        gradients = self._gradients(self.floating)

        def along(t: float, k: int) -> Values:
            pairs = zip(self.floating, self.directions, strict=True)
            return self._gradients([x + t * d for x, d in pairs])[k]

        products = [slope(functools.partial(along, k=k)) for k in range(len(gradients))]
        return (*gradients, *products)

    def _gradients(self, xs: Sequence[Values]) -> list[Values]:
        return [self._gradient(xs, k) for k in range(len(xs))]

    def _gradient(self, xs: Sequence[Values], k: int) -> Values:
        def along(t: float, index: tuple[int, ...]) -> float:
            moved = [np.array(x) for x in xs]
            moved[k][index] += t
            return float(np.sum(self.weight * self.expected(moved)))

        gradient: Values = np.zeros(xs[k].shape)
        for index in np.ndindex(xs[k].shape):
            gradient[index] = slope(functools.partial(along, index=index))
        return gradient


def label(name: str, inputs: Sequence[Values], options: Mapping[str, Any]) -> str:
    """An id: the function, the shapes it gets, and its options."""
    shapes = ["x".join(map(str, x.shape)) or "scalar" for x in inputs]
    kinds = ["" if x.dtype.kind == "f" else str(x.dtype) for x in inputs]
    given = [kind + shape for kind, shape in zip(kinds, shapes, strict=True)]
    return "-".join([name, *given, *(f"{k}={v}" for k, v in options.items())])


def weights(like: Values, seed: int = 1) -> Values:
    """Random numbers of the shape of `like`."""
    return np.asarray(np.random.default_rng(seed).normal(size=like.shape))


def slope(fn: Callable[[float], Any], step: float = STEP) -> Any:
    """The derivative of `fn` at zero by the fourth-order stencil."""
    near = fn(step) - fn(-step)
    far = fn(2 * step) - fn(-2 * step)
    return (8 * near - far) / (12 * step)


def derivatives(case: Case, bench: Bench) -> Callable[[Any], Any]:
    """`xs -> (gradients of the weighted sum of the output, Hessian times the directions)`."""
    backend = bench.backend
    weight, directions = bench.arr(case.weight), bench.arr(case.directions)

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


def check_value(case: Case, bench: Bench) -> None:
    """In float32, and in float64 where there is such a thing."""
    for dtype in dict.fromkeys(("float32", bench.dtype)):
        with use_backend(bench.backend.name, dtype=dtype):
            found = bench.to_np(case.function(*bench_inputs(case, bench, dtype)))
        expected = case.expected(case.floating)
        if expected.dtype.kind == "f":
            equal(str(found.dtype), dtype)
        close(found, expected, VALUE[dtype])


def bench_inputs(case: Case, bench: Bench, dtype: str) -> list[Any]:
    """The inputs as arrays, the floating ones in `dtype`."""
    return case.fill([bench.arr(x, dtype) for x in case.floating], bench.arr)


def check_derivatives(case: Case, bench: Bench) -> None:
    """Both of them, against differences of the formula."""
    xs = tuple(map(bench.arr, case.floating))
    found = _derivatives_of_a_task(case, bench)(xs)
    for derivative, expected in zip(bench.to_np(tuple(found)), case.derivatives, strict=True):
        close(derivative, expected, DERIVATIVE[bench.dtype])


@functools.lru_cache(maxsize=1)  # two clauses of a case that are checked in a row
def _derivatives_of_a_task(case: Case, bench: Bench) -> Callable[[Any], Any]:
    xs = tuple(map(bench.arr, case.floating))
    return quickest(bench.backend, derivatives(case, bench), xs)


def quickest(backend: Backend, fn: Callable[[Any], Any], xs: Any) -> Callable[[Any], Any]:
    """`fn`, compiled where one program is made sooner than one for every operation."""
    return backend.compile(fn, xs) if backend.compiles_quickly else fn


def check_vmap(case: Case, bench: Bench) -> None:
    """The derivatives of three tasks at once are those of each."""
    backend, both = bench.backend, derivatives(case, bench)
    xs = tuple(bench.arr(np.stack([x * (1 + 0.1 * i) for i in range(3)])) for x in case.floating)
    found = bench.to_np(tuple(quickest(backend, backend.vmap(both), xs)(xs)))
    one = _derivatives_of_a_task(case, bench)
    for i in range(3):
        alone = bench.to_np(tuple(one(tuple(x[i] for x in xs))))
        for row, expected in zip(found, alone, strict=True):
            close(row[i], expected, bench.exact)


def check_compiled(cases: Sequence[Case], bench: Bench) -> None:
    """All derivatives of all cases in one compiled function: what a compiled step contains."""
    counts = np.cumsum([0] + [len(case.floating) for case in cases])
    functions = [derivatives(case, bench) for case in cases]

    def everything(xs: Any) -> Any:
        parts = zip(functions, counts[:-1], counts[1:], strict=True)
        return tuple(y for fn, start, stop in parts for y in fn(xs[start:stop]))

    xs = tuple(bench.arr(x) for case in cases for x in case.floating)
    compiled = bench.backend.compile(everything, xs)
    for found, expected in zip(compiled(xs), everything(xs), strict=True):
        close(bench.to_np(found), bench.to_np(expected), bench.exact)


def add_cases(chapter: Chapter, smooth: Sequence[Case], others: Sequence[Case] = ()) -> None:
    """The clauses of every case; `others` have values and no derivatives."""
    for name, promise, check, case in _checks(smooth, others):
        chapter.add(f"{case.id}/{name}", promise, functools.partial(check, case))
    chapter.add(
        "compiled",
        "All functions and both of their derivatives in one compiled program.",
        functools.partial(check_compiled, smooth),
        compiles=True,
        heavy=True,
    )


def _checks(
    smooth: Sequence[Case], others: Sequence[Case]
) -> Iterator[tuple[str, str, Callable[[Case, Bench], None], Case]]:
    for case in (*smooth, *others):
        yield "value", "It computes its formula, in float32 and float64.", check_value, case
    for case in smooth:
        promise = "First and second derivatives are those of its formula."
        yield "derivatives", promise, check_derivatives, case
        yield "vmap", "Mapped derivatives are those of each task.", check_vmap, case
