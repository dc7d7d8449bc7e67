"""Arrays: making them, reading them, and what neutral code does with them."""

from __future__ import annotations

import functools
import operator
from typing import Any

import numpy as np

from metaframe.backend.selection import FLOATING_DTYPES, use_backend
from metaframe.errors import BackendError
from metaframe.testing.conformance.clause import Bench, Chapter, close, equal, same

DTYPES, ARRAYS = Chapter("dtype"), Chapter("arrays")


def _floating(dtype: str, b: Bench) -> None:
    with use_backend(b.backend.name, dtype=dtype) as backend:
        x = backend.asarray([1.5, -2.0], dtype)
        equal(backend.dtype_name(x), dtype)
        equal(backend.is_floating(x), True)
        found = backend.to_numpy(x)
        equal(str(found.dtype), dtype)
        same(found.astype("float64"), [1.5, -2.0])
        if dtype == "float64":
            same(backend.to_numpy(backend.asarray(0.1, dtype)), 0.1)


for _dtype in FLOATING_DTYPES:
    DTYPES.add(
        _dtype,
        f"{_dtype} is a dtype that can be selected, and arrives unrounded.",
        functools.partial(_floating, _dtype),
    )


def _exact(dtype: str, b: Bench) -> None:
    values = np.array([0, 1, 1], dtype)
    x = b.backend.asarray(values)
    equal(b.backend.dtype_name(x), dtype)
    equal(b.backend.is_floating(x), False)
    found = b.to_np(x)
    equal(str(found.dtype), dtype)
    same(found, values)


for _dtype in ("bool", "int32", "uint8"):
    DTYPES.add(_dtype, f"{_dtype} arrays keep their dtype.", functools.partial(_exact, _dtype))


@ARRAYS.clause("owns")
def _owns(b: Bench) -> None:
    """A backend owns its arrays, and nothing else."""
    equal(b.backend.owns(b.arr([1.0])), True)
    for stranger in (np.ones(2), np.float32(1.0), 1.0, True, [1.0], "text", None, b.backend):
        equal((stranger, b.backend.owns(stranger)), (stranger, False))


@ARRAYS.clause("traced", compiles=True)
def _traced(b: Bench) -> None:
    """Inside vmap and compile arrays are owned and have no value; outside they have one."""
    seen: list[tuple[bool, bool]] = []

    def probe(xs: Any) -> Any:
        seen.append((b.backend.owns(xs[0]), b.backend.is_traced(xs[0])))
        return xs

    x = b.arr([1.0, 2.0])
    b.backend.vmap(probe)((x,))
    b.backend.compile(probe, (x,))((x,))
    equal(set(seen), {(True, True)})
    equal(b.backend.is_traced(x), False)


@ARRAYS.clause("owned-in-gradients")
def _owned_in_gradients(b: Bench) -> None:
    """Inside value_and_grad, at any depth, arrays are owned."""
    seen: list[bool] = []

    def square(x: Any) -> Any:
        seen.append(b.backend.owns(x))
        return x * x

    b.gradient(lambda x: x * b.gradient(square, x)[0], b.arr([1.0, 2.0]))
    equal(set(seen), {True})


@ARRAYS.clause("round-trip")
def _round_trip(b: Bench) -> None:
    """NumPy arrays of any shape and memory layout arrive, and come back, with every bit."""
    grid = np.arange(6.0).reshape(2, 3) / 7
    frozen = grid.copy()
    frozen.flags.writeable = False
    layouts = (grid, grid.T, grid[::-1, ::-1], np.asfortranarray(grid), frozen, grid[:, 1])
    for dtype in ("float32", b.dtype, "int32"):
        for values in (*layouts, np.zeros((0, 3)), np.array(0.5), np.zeros((2, 0, 1))):
            # `astype` keeps the layout with order "K".
            cast = values.astype(dtype, order="K", copy=values is not frozen)
            found = b.to_np(b.backend.asarray(cast))
            equal(str(found.dtype), dtype)
            same(found, cast)


@ARRAYS.clause("asarray/dtype")
def _dtypes(b: Bench) -> None:
    """`asarray` takes arrays of the backend, numbers and lists too, and converts the dtype."""
    name, own = b.backend.dtype_name, b.arr([0.5, 2.0], "float32")
    equal(name(b.backend.asarray(own)), "float32")
    same(b.to_np(b.backend.asarray(own)), [0.5, 2.0])
    for dtype in dict.fromkeys((b.dtype, "float16", "int32")):
        found = b.backend.asarray(own, dtype)
        equal(name(found), dtype)
        same(b.to_np(found), np.array([0.5, 2.0]).astype(dtype))
    for neutral in (2.0, [[1.0, 2.0]], np.array([1, 2], "int32")):
        found = b.backend.asarray(neutral, b.dtype)
        equal(name(found), b.dtype)
        same(b.to_np(found), neutral)


@ARRAYS.clause("devices")
def _devices(b: Bench) -> None:
    """Every listed device takes arrays and is what `device_of` names; another is an error."""
    names = b.backend.devices()
    equal(len(names) > 0, True)
    for device in names:
        same(b.to_np(b.backend.asarray(np.ones(2), "float32", device)), [1.0, 1.0])
        moved = b.backend.asarray(b.arr([1.0, 2.0], "float32"), None, device)
        same(b.to_np(moved), [1.0, 2.0])
        equal(b.backend.device_of(moved), device)
        equal(b.backend.on_cpu(moved), "cpu" in device.lower())
    for unknown in ("abacus", "abacus:7"):
        try:
            b.backend.asarray(0.0, "float32", unknown)
        except BackendError as error:
            equal(repr(unknown) in str(error), True)
        else:
            raise AssertionError(f"no BackendError for device={unknown!r}")


@ARRAYS.clause("detached")
def _detached(b: Bench) -> None:
    """`to_numpy` reads an array that a gradient was taken of, and its result is NumPy's own."""
    (gradient,) = b.gradient(lambda x: x * x, b.arr([1.0, 2.0]))
    found = b.backend.to_numpy(gradient)
    equal(type(found), np.ndarray)
    same(found, [2.0, 4.0])


@ARRAYS.clause("signature")
def _signature(b: Bench) -> None:
    """Arrays alike have one signature, which is hashable; shape and dtype make another."""
    of = b.backend.signature
    alike = {of(b.arr([1.0, 2.0])), of(b.arr([3.0, 4.0]))}
    equal(len(alike), 1)
    others = {of(b.arr([1.0])), of(b.arr([[1.0, 2.0]])), of(b.arr([1.0, 2.0], "float16"))}
    equal(len(alike | others), 4)


@ARRAYS.clause("dlpack")
def _dlpack(b: Bench) -> None:
    """`from_dlpack` shares the memory of what `to_dlpack` gives, or says None."""
    values = np.arange(6, dtype="float32").reshape(2, 3)
    found = b.backend.from_dlpack(b.backend.to_dlpack(b.backend.asarray(values)))
    if found is not None:
        equal(b.backend.owns(found), True)
        same(b.to_np(found), values)


OPERATORS = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "**": operator.pow,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}


@ARRAYS.clause("operators")
def _operators(b: Bench) -> None:
    """Arithmetic and comparisons are written as in NumPy, between arrays and with numbers."""
    x, y = np.array([0.5, 2.0, 0.1]), np.array([3.0, 2.0, 0.7])
    for operation in OPERATORS.values():
        found = operation(b.arr(x), b.arr(y))
        close(b.to_np(found), operation(x, y), b.exact)
        close(b.to_np(operation(b.arr(x), 2.0)), operation(x, 2.0), b.exact)
        close(b.to_np(operation(b.arr(x), 2)), operation(x, 2), b.exact)
        close(b.to_np(operation(2.0, b.arr(x))), operation(2.0, x), b.exact)
    grid = np.stack([x, y])
    close(b.to_np(b.arr(grid) @ b.arr(grid.T)), grid @ grid.T, b.exact)
    same(b.to_np(-b.arr(x)), -x)
    yes, no = b.arr(np.array([True, False])), b.arr(np.array([True, True]))
    for logical in (operator.and_, operator.or_):
        same(b.to_np(logical(yes, no)), logical(np.array([True, False]), np.array([True, True])))
    same(b.to_np(~yes), [False, True])


@ARRAYS.clause("numbers")
def _numbers(b: Bench) -> None:
    """A Python number next to an array takes its dtype, and keeps all the digits that it has."""
    for dtype in dict.fromkeys(("float32", b.dtype)):
        one = b.arr(np.array([1.0]), dtype)
        for operation in (operator.add, operator.mul, operator.sub, operator.truediv):
            expected = operation(np.ones(1, dtype), np.array(0.1, dtype))
            found = operation(one, 0.1)
            equal(b.backend.dtype_name(found), dtype)
            same(b.to_np(found), expected)


@ARRAYS.clause("indexing")
def _indexing(b: Bench) -> None:
    """`x[...]` takes integers, slices, None and the ellipsis; `shape` is a sequence of ints."""
    values = np.arange(24.0).reshape(2, 3, 4)
    x = b.arr(values)
    equal(tuple(x.shape), (2, 3, 4))
    equal({type(size) for size in x.shape}, {int})
    for index in (1, -1, slice(1, None), (slice(None), 0), (..., None), (0, slice(None, 2)), None):
        same(b.to_np(x[index]), values[index])
    same(b.to_np(x[:, 1, 2]), values[:, 1, 2])
    same(b.to_np(b.gradient(lambda y: y[0, 1:, 2] * 2.0, x)[0]).sum(), 4.0)
