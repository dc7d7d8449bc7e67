"""Compiling: what is one program, what is none, and programs under transforms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from metaframe import ops
from metaframe.core.compile import compile
from metaframe.core.container import Container
from metaframe.errors import CompileError
from metaframe.testing.conformance.clause import Bench, Chapter, close, equal, same

COMPILE = Chapter("compile")


def _scaled(v: Any, factor: Any = 2) -> Any:
    return {"scaled": v["w"] * factor, "factor": factor}


@COMPILE.clause("one-program", compiles=True)
def _one_program(b: Bench) -> None:
    """Arrays alike are one program, which does not run the Python function again."""
    runs: list[int] = []

    def fn(v: Any) -> Any:
        runs.append(1)
        return _scaled(v)

    compiled = compile(fn)
    for start in (0.0, 1.0, 2.0):
        found = compiled({"w": b.arr([start, start + 1])})
        same(b.to_np(found["scaled"]), [2 * start, 2 * start + 2])
        if start == 0.0:
            first = len(runs)
    equal((compiled.traces, len(runs)), (1, first))


@COMPILE.clause("programs", compiles=True)
def _programs(b: Bench) -> None:
    """Another shape, dtype or structure is another program, and each is kept."""
    compiled = compile(_scaled)
    calls = [
        {"w": b.arr([1.0, 2.0])},
        {"w": b.arr([1.0, 2.0, 3.0])},
        {"w": b.arr([1.0, 2.0], "float16")},
        Container(w=b.arr([1.0, 2.0])),
    ]
    for _ in range(2):
        for v in calls:
            found = compiled(v)["scaled"]
            equal(b.backend.dtype_name(found), b.backend.dtype_name(v["w"]))
            same(b.to_np(found), 2 * b.to_np(v["w"]))
    equal(compiled.traces, len(calls))


@COMPILE.clause("layouts", compiles=True)
def _layouts(b: Bench) -> None:
    """The memory layout of the inputs does not matter: transposed, broadcast, plain."""
    compiled = compile(lambda x: x @ x)
    plain = np.arange(9.0).reshape(3, 3)
    for x, expected in (
        (b.arr(plain), plain),
        (ops.transpose(b.arr(plain), (1, 0)), plain.T),
        (ops.broadcast_to(b.arr(plain[0]), (3, 3)), np.broadcast_to(plain[0], (3, 3))),
    ):
        close(b.to_np(compiled(x)), expected @ expected, b.exact)
    equal(compiled.traces, 1)


def _branches_on_a_value(v: Any) -> Any:
    if ops.sum(v["w"]) > 0:
        return v["w"]
    return -v["w"]


@COMPILE.clause("branch-on-a-value")
def _branch(b: Bench) -> None:
    """A branch on a value is a CompileError: `needed_a_value` knows the framework's own."""
    compiled = compile(_branches_on_a_value)
    try:
        compiled({"w": b.arr([1.0])})
    except CompileError as error:
        equal("needs the value" in str(error), True)
    else:
        raise AssertionError("no CompileError: the function was compiled for one value only")
    equal(compiled.traces, 0)


@COMPILE.clause("errors")
def _errors(b: Bench) -> None:
    """An error in the function stays what it is."""

    def broken(v: Any) -> Any:
        raise LookupError("mine")

    try:
        compile(broken)({"w": b.arr([1.0])})
    except LookupError as error:
        equal(str(error), "mine")
    else:
        raise AssertionError("the error is gone")


def _refused(b: Bench, read: Callable[[Any], Any]) -> None:
    """A function that reads a value is a CompileError, of which the line is named."""

    def fn(x: Any) -> Any:
        return x * float(np.max(read(x)))

    compiled = compile(fn)
    try:
        compiled(b.arr(2.0))
    except CompileError as error:
        equal("needs the value" in str(error), True)
    else:
        raise AssertionError("no CompileError: the value became part of the program")
    equal(compiled.traces, 0)


@COMPILE.clause("values")
def _values(b: Bench) -> None:
    """Reading a value is a CompileError, by whatever way there is."""
    known = b.arr(2.0)
    ways: dict[str, Callable[[Any], Any]] = {
        "float": float,
        "int": int,
        "bool": bool,
        "numpy": np.asarray,
        "to_numpy": b.backend.to_numpy,
        "method": lambda x: x.tolist() if hasattr(known, "tolist") else x.numpy(),
    }
    for name, read in ways.items():
        try:
            _refused(b, read)
        except Exception as error:
            raise AssertionError(f"{name}: {error}") from error


@COMPILE.clause("once", compiles=True)
def _once(b: Bench) -> None:
    """The first call runs the Python function once, and a further one not at all."""
    runs: list[int] = []

    def fn(x: Any) -> Any:
        runs.append(1)
        return x + 1.0

    compiled = compile(fn)
    for _ in range(2):
        same(b.to_np(compiled(b.arr([1.0]))), [2.0])
        equal(len(runs), 1)


@COMPILE.clause("constants", compiles=True)
def _constants(b: Bench) -> None:
    """0.0 and -0.0 are two programs, and NaN is one."""
    compiled = compile(lambda x, s: x * np.copysign(1.0, s))
    for s, sign in ((0.0, 1.0), (-0.0, -1.0), (float("nan"), 1.0), (float("nan"), 1.0)):
        same(b.to_np(compiled(b.arr([2.0]), s)), [2.0 * sign])
    equal(compiled.traces, 3)


@COMPILE.clause("ambient")
def _ambient(b: Bench) -> None:
    """The state of the framework is a key: hashable, and equal while nothing changes it."""
    before = b.backend.ambient()
    hash(before)
    b.gradient(lambda x: x * x, b.arr([1.0]))
    equal(b.backend.ambient(), before)


def _cubes(b: Bench) -> Callable[[Any], Any]:
    return compile(lambda x: b.backend.ops.sum(x**3))


@COMPILE.clause("differentiated", compiles=True)
def _differentiated(b: Bench) -> None:
    """A compiled function has the derivatives of the function: first, second and forward mode."""
    x = np.array([0.5, -1.25, 2.0])
    cubes = _cubes(b)

    def first(x: Any) -> Any:
        return b.gradient(cubes, x)[0]

    close(b.to_np(cubes(b.arr(x))), np.sum(x**3), b.exact)
    close(b.to_np(first(b.arr(x))), 3 * x**2, b.exact)
    close(b.to_np(b.gradient(first, b.arr(x))[0]), 6 * x, b.exact)
    (tangent,) = b.backend.jvp(lambda xs: (cubes(xs[0]),), b.arr((x,)), b.arr((np.ones(3),)))
    close(b.to_np(tangent), np.sum(3 * x**2), b.exact)


@COMPILE.clause("mapped", compiles=True)
def _mapped(b: Bench) -> None:
    """A compiled function can be mapped, and so can its gradient."""
    rows = np.array([[0.5, -1.25], [2.0, 1.0]])
    cubes = _cubes(b)
    (found,) = b.backend.vmap(lambda xs: (cubes(xs[0]),))(b.arr((rows,)))
    close(b.to_np(found), np.sum(rows**3, axis=1), b.exact)
    (found,) = b.backend.vmap(lambda xs: tuple(b.gradient(cubes, xs[0])))(b.arr((rows,)))
    close(b.to_np(found), 3 * rows**2, b.exact)


@COMPILE.clause("compiled-in-compiled", compiles=True)
def _nested(b: Bench) -> None:
    """A compiled function may call another one."""
    cubes = _cubes(b)
    outer = compile(lambda x: 2.0 * cubes(x) + b.gradient(cubes, x)[0])
    x = np.array([0.5, 2.0])
    close(b.to_np(outer(b.arr(x))), 2 * np.sum(x**3) + 3 * x**2, b.exact)
