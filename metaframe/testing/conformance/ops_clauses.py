"""The portable array functions against NumPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from metaframe import ops
from metaframe.ops._dispatch import ELEMENTWISE
from metaframe.testing.conformance.cases import Case, add_cases, label
from metaframe.testing.conformance.clause import Bench, Chapter, Values, equal, same

_rng = np.random.default_rng(0)


def _drawn(shape: tuple[int, ...]) -> Values:
    return _rng.normal(size=shape)


X = _drawn((2, 3, 4))
Y = _drawn((3, 4))
POSITIVE = np.abs(X) + 1.0
FAR = np.array([[-1e4, -30.0, -0.1, 0.0], [0.1, 30.0, 1e4, 1e4]])
IDS = np.array([[2, 0], [1, 2]])
MATMULS = [
    ((2, 3), (3, 4)),
    ((3,), (3,)),
    ((3,), (3, 4)),
    ((2, 3), (3,)),
    ((3,), (2, 3, 4)),
    ((2, 2, 3), (3,)),
    ((2, 2, 3), (3, 4)),
    ((2, 3), (2, 3, 4)),
    ((2, 1, 2, 3), (2, 3, 2)),
]

OPS = Chapter("ops")


def _case(name: str, formula: Callable[..., Any], *inputs: Any, **options: Any) -> Case:
    function = getattr(ops, name)
    return Case(label(name, inputs, options), lambda *xs: function(*xs, **options), formula, inputs)


def _domain(formula: Callable[..., Any]) -> Values:
    """Numbers for which the formula has a value: positive ones if negative ones are out of it."""
    with np.errstate(invalid="ignore"):
        return X if np.isfinite(formula(X)).all() else POSITIVE


def _einsum(equation: str, *xs: Any) -> Case:
    return Case(
        f"einsum-{equation}",
        lambda *a: ops.einsum(equation, *a),
        lambda *a: np.einsum(equation, *a),
        xs,
    )


CASES = [
    *(_case(name, formula, _domain(formula)) for name, formula in ELEMENTWISE.items()),
    _case("safe_sqrt", np.sqrt, POSITIVE),
    *(_case("power", lambda x, n=n: x**n, POSITIVE, exponent=n) for n in (7, 0, 1, 2, -3, 20, 2.5)),
    _case("softplus", lambda x: np.logaddexp(0, x), X),
    _case("maximum", np.maximum, X, Y),
    _case("maximum", lambda x: np.maximum(x, 0.2), X, y=0.2),
    _case("minimum", np.minimum, X, Y),
    _case("minimum", lambda x: np.minimum(x, 0.2), X, y=0.2),
    _case("clip", lambda x: np.clip(x, -0.3, 0.2), X, low=-0.3, high=0.2),
    _case("where", np.where, X > 0, X, Y),
    _case("where", lambda c, x: np.where(c, x, 0.2), X > 0, X, y=0.2),
    _case("sum", np.sum, X),
    _case("sum", np.sum, np.array(0.7)),
    _case("sum", lambda x: np.sum(x, -1), X, axis=-1),
    _case("sum", lambda x: np.sum(x, (0, 2), keepdims=True), X, axis=(0, 2), keepdims=True),
    _case("mean", np.mean, X),
    _case("mean", lambda x: np.mean(x, (0, 2)), X, axis=(0, 2)),
    _case("var", np.var, X),
    _case("var", lambda x: np.var(x, (0, 2), keepdims=True), X, axis=(0, 2), keepdims=True),
    _case("std", np.std, X),
    _case("std", lambda x: np.std(x, (0, 2), keepdims=True), X, axis=(0, 2), keepdims=True),
    _case("norm", np.linalg.norm, Y),
    _case("norm", lambda x: np.linalg.norm(x, axis=(0, 2)), X, axis=(0, 2)),
    _case("max", np.max, X),
    _case("max", lambda x: np.max(x, (0, 2)), X, axis=(0, 2)),
    _case("min", np.min, X),
    _case("min", lambda x: np.min(x, 1, keepdims=True), X, axis=1, keepdims=True),
    _case("logsumexp", lambda x: np.log(np.sum(np.exp(x))), X),
    _case("logsumexp", lambda x: np.log(np.sum(np.exp(x), (0, 2))), X, axis=(0, 2)),
    _case("reshape", lambda x: x.reshape(4, -1), X, shape=(4, -1)),
    _case("transpose", lambda x: x.transpose(2, 0, 1), X, axes=(2, 0, 1)),
    _case("broadcast_to", lambda x: np.broadcast_to(x, (2, 3, 4)), Y, shape=(2, 3, 4)),
    _case("expand_dims", lambda x: x[:, None], X, axis=1),
    _case("squeeze", lambda x: x[:, 0], X[:, :1], axis=1),
    _case("take", lambda x, i: np.take(x, i, 1), X, IDS, axis=1),
    _case("take", lambda x, i: np.take(x, i, 1), X, np.array(1), axis=1),
    _case("pad", lambda x: np.pad(x, ((0, 1), (2, 0))), Y, widths=((0, 1), (2, 0))),
    Case("concat", lambda *a: ops.concat(a, 1), lambda *a: np.concatenate(a, 1), (X, X[:, :2])),
    Case("stack", lambda *a: ops.stack(a, 1), lambda *a: np.stack(a, 1), (Y, 2 * Y)),
    *(_case("matmul", np.matmul, *map(_drawn, shapes)) for shapes in MATMULS),
    _einsum("ijk,jk->i", X, Y),
    _einsum("...k,jk->...j", X, Y),
    _einsum("ij->ji", Y),
]

VALUES_ONLY = [
    _case("softplus", lambda x: np.logaddexp(0, x), FAR),
    _case("logsumexp", lambda x: np.logaddexp.reduce(x, -1), FAR, axis=-1),
    _case("argmax", lambda x: np.argmax(x, -1), X),
    _case("argmax", lambda x: np.argmax(x, 0), X, axis=0),
    _case("sum", np.sum, X > 0),
    _case("astype", lambda x: x.astype("int32"), 10 * X, dtype="int32"),
    _case("one_hot", lambda i: np.eye(3, dtype=bool)[i], IDS, classes=3, dtype="bool"),
    _case("zeros_like", np.zeros_like, X),
    _case("ones_like", np.ones_like, X),
]


add_cases(OPS, CASES, VALUES_ONLY)


# -- numbers and infinities ---------------------------------------------------------------------


@OPS.clause("maximum/integers")
def _integers(b: Bench) -> None:
    """Integers have a larger and a smaller one, next to a number too."""
    same(b.to_np(ops.maximum(np.array([1, 5]), 3)), [3, 5])
    same(b.to_np(ops.minimum(np.array([1, 5]), 3)), [1, 3])


@OPS.clause("maximum/infinities")
def _infinities(b: Bench) -> None:
    """Infinities and NaN pass through."""
    x, y = np.array([-np.inf, np.inf, np.nan]), np.array([np.inf, np.inf, 0.0])
    same(b.to_np(ops.maximum(x, y)), [np.inf, np.inf, np.nan])


@OPS.clause("safe_sqrt/negative")
def _safe_sqrt(b: Bench) -> None:
    """The root is NaN where it does not exist."""
    equal(bool(np.isnan(b.to_np(ops.safe_sqrt(np.array([-1.0, np.nan])))).all()), True)


@OPS.clause("maximum/numbers")
def _numbers(b: Bench) -> None:
    """A number takes the dtype of the array next to it, exactly."""
    for dtype in dict.fromkeys(("float32", b.dtype)):
        x = b.arr([-1.0, 1.0], dtype)
        for number in (0.1, np.float64(0.1)):
            found = (ops.maximum(x, number), ops.maximum(number, x), ops.where(x > 0, x, number))
            for y in found:
                equal(b.backend.dtype_name(y), dtype)
                same(b.to_np(y), np.array([number, 1.0], dtype))


@OPS.clause("one_hot/out-of-range")
def _out_of_range(b: Bench) -> None:
    """A label out of range has no one."""
    found = ops.one_hot(np.array([0, 3, -1]), 3, b.dtype)
    same(b.to_np(found), [[1.0, 0.0, 0.0], [0.0] * 3, [0.0] * 3])


@OPS.clause("zeros/dtype")
def _new(b: Bench) -> None:
    """New arrays take after an array, or after the selection."""
    name, like = b.backend.dtype_name, b.arr([1.0], "float32")
    equal(name(ops.zeros((2,), like=like)), "float32")
    equal(name(ops.zeros((2,))), b.dtype)
    equal(name(ops.zeros((2,), "int32", like=like)), "int32")
    same(b.to_np(ops.zeros((2, 1), like=like)), [[0.0], [0.0]])


@OPS.clause("arange/dtype")
def _arange(b: Bench) -> None:
    """A range counts in the dtype asked for, int32 unless told otherwise."""
    name = b.backend.dtype_name
    equal(name(ops.arange(2, "float32")), "float32")
    for counted in (ops.arange(3), ops.arange(3, like=b.arr([1.0]))):
        equal(name(counted), "int32")
        same(b.to_np(counted), [0, 1, 2])
