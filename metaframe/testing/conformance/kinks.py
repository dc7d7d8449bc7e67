"""The derivatives of the portable functions at kinks, ties and bounds: one table for all backends.

The clauses hold every backend to the table, and the page docs/reference/derivatives.md shows it.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from metaframe import nn, ops
from metaframe.backend.types import Array, Arrays, ArraysFn
from metaframe.testing.conformance.cases import quickest
from metaframe.testing.conformance.clause import Bench, Chapter, Values, equal, same

KINKS = Chapter("kinks")
INF, NAN = math.inf, math.nan


@dataclass(frozen=True, eq=False)
class Kink:
    """The derivatives of the sum of a function's outputs at one point."""

    call: str
    """The function as the table writes it."""
    function: Callable[..., Any]
    at: Mapping[str, Any]
    """The arguments it is differentiated by, numbers or lists, by the names they have in `call`."""
    first: Any
    """Its gradient: a number, or one number for each element of all arguments in order."""
    second: Any = 0.0
    """Its Hessian; a single 0 stands for zeros."""

    @property
    def name(self) -> str:
        """The function alone: rows of one name are checked together."""
        return self.call.partition("(")[0]

    @property
    def inputs(self) -> tuple[Values, ...]:
        """The arguments as arrays."""
        return tuple(np.asarray(value, "float64") for value in self.at.values())

    @property
    def directions(self) -> tuple[Values, ...]:
        """1, 2, 3 and so on, in the shapes of the arguments: no two entries cancel by accident."""
        numbers = itertools.count(1)
        return tuple(
            np.reshape([float(next(numbers)) for _ in range(x.size)], x.shape) for x in self.inputs
        )

    @property
    def expected(self) -> tuple[Values, Values]:
        """The gradient, and the Hessian times the directions, both flat."""
        direction = np.concatenate([d.reshape(-1) for d in self.directions])
        gradient = np.broadcast_to(np.asarray(self.first, "float64"), direction.shape)
        hessian = np.broadcast_to(np.asarray(self.second, "float64"), (direction.size,) * 2)
        return gradient, hessian @ direction

    def row(self) -> str:
        """The row of the table, in Markdown."""
        point = ", ".join(f"{name} = {_shown(value)}" for name, value in self.at.items())
        return f"| `{self.call}` | {point} | {_shown(self.first)} | {_shown(self.second)} |"


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return f"({', '.join(map(_shown, value))})"
    return {INF: "∞", -INF: "-∞"}.get(value, f"{value:.5g}".replace("nan", "NaN"))


def table() -> str:
    """All rows in Markdown, as they stand on the page.

    >>> table().splitlines()[2]
    '| `abs(x)` | x = 0 | 0 | 0 |'
    """
    head = ["| function | at | first derivative | second derivative |", "| --- | --- | --- | --- |"]
    return "\n".join([*head, *(kink.row() for kink in TABLE)])


def _integer(value: int) -> Array:
    return ops.asarray(np.array(value))


def _logistic(z: Array) -> Array:
    return ops.maximum(z, 0.0) - z + ops.log(1.0 + ops.exp(-ops.abs(z)))


def _guarded_log(x: Array) -> Array:
    return ops.where(x > 0, ops.log(ops.where(x > 0, x, 1.0)), 0.0)


def _pooled(x: Array) -> Array:
    return nn.max_pool2d(ops.reshape(x, (1, 2, 2, 1)))


def _batch_norm(eps: float) -> Callable[[Array], Array]:
    return lambda x: nn.batch_norm(x[:, None], eps=eps)[0]


def _layer_norm(eps: float) -> Callable[[Array], Array]:
    return lambda x: nn.layer_norm(x, eps=eps)[0]


def _cross_entropy(label: int) -> Callable[[Array], Array]:
    return lambda z: nn.cross_entropy(z, _integer(label))


_SPREAD = [[0.25, -0.25], [-0.25, 0.25]]
"""The Hessian of `logsumexp` at two equal numbers."""

_SLOPES = [
    Kink("abs(x)", ops.abs, {"x": 0.0}, 0.0),
    Kink("sign(x)", ops.sign, {"x": 0.0}, 0.0),
    Kink("relu(x)", nn.relu, {"x": 0.0}, 0.0),
    Kink("gelu(x)", nn.gelu, {"x": 0.0}, 0.5, math.sqrt(2 / math.pi)),
    Kink("softplus(x)", ops.softplus, {"x": 0.0}, 0.5, 0.25),
    Kink("softplus(x)", ops.softplus, {"x": 1e4}, 1.0),
    Kink("softplus(x)", ops.softplus, {"x": -1e4}, 0.0),
    Kink("sigmoid(x)", ops.sigmoid, {"x": 1e4}, 0.0),
    Kink("tanh(x)", ops.tanh, {"x": 1e4}, 0.0),
]
_ROOTS = [
    Kink("sqrt(x)", ops.sqrt, {"x": 0.0}, INF, -INF),
    Kink("safe_sqrt(x)", ops.safe_sqrt, {"x": 0.0}, 0.0),
    Kink("log(x)", ops.log, {"x": 0.0}, INF, -INF),
    Kink("log1p(x)", ops.log1p, {"x": -1.0}, INF, -INF),
    Kink("power(x, 0)", lambda x: ops.power(x, 0), {"x": 0.0}, 0.0),
    Kink("power(x, 1)", lambda x: ops.power(x, 1), {"x": 0.0}, 1.0),
    Kink("power(x, 2)", lambda x: ops.power(x, 2), {"x": 0.0}, 0.0, 2.0),
    Kink("power(x, 2)", lambda x: ops.power(x, 2), {"x": -3.0}, -6.0, 2.0),
    Kink("power(x, -1)", lambda x: ops.power(x, -1), {"x": 0.0}, -INF, INF),
    Kink("power(x, 0.5)", lambda x: ops.power(x, 0.5), {"x": 0.0}, INF, -INF),
    Kink("power(x, 1.5)", lambda x: ops.power(x, 1.5), {"x": 0.0}, 0.0, INF),
    Kink("power(x, 0.5)", lambda x: ops.power(x, 0.5), {"x": -1.0}, NAN, NAN),
]
_TIES = [
    Kink("maximum(x, y)", ops.maximum, {"x": 2.0, "y": 2.0}, [0.5, 0.5]),
    Kink("maximum(x, 0.0)", lambda x: ops.maximum(x, 0.0), {"x": 0.0}, 0.5),
    Kink("maximum(x * x, -x)", lambda x: ops.maximum(x * x, -x), {"x": 0.0}, -0.5, 1.0),
    Kink("minimum(x, y)", ops.minimum, {"x": 2.0, "y": 2.0}, [0.5, 0.5]),
    Kink("minimum(x, 0.0)", lambda x: ops.minimum(x, 0.0), {"x": 0.0}, 0.5),
    Kink("clip(x, 0.0, 1.0)", lambda x: ops.clip(x, 0.0, 1.0), {"x": 0.0}, 0.5),
    Kink("clip(x, 0.0, 1.0)", lambda x: ops.clip(x, 0.0, 1.0), {"x": 1.0}, 0.5),
    Kink("clip(x, 2.0, 2.0)", lambda x: ops.clip(x, 2.0, 2.0), {"x": 2.0}, 0.0),
    Kink("clip(x, a, b)", ops.clip, {"x": 0.0, "a": 0.0, "b": 1.0}, [0.5, 0.5, 0.0]),
    Kink("clip(x, a, b)", ops.clip, {"x": 1.0, "a": 0.0, "b": 1.0}, [0.5, 0.0, 0.5]),
    Kink("clip(x, a, b)", ops.clip, {"x": 2.0, "a": 2.0, "b": 2.0}, [0.0, 0.5, 0.5]),
    Kink("clip(x, a, b)", ops.clip, {"x": 1.0, "a": 2.0, "b": 1.0}, [0.0, 0.0, 1.0]),
    Kink("max(x)", ops.max, {"x": [2.0, 2.0, 1.0]}, [0.5, 0.5, 0.0]),
    Kink("max(x)", ops.max, {"x": [-INF, -INF, -INF]}, [1 / 3] * 3),
    Kink("min(x)", ops.min, {"x": [2.0, 1.0, 1.0]}, [0.0, 0.5, 0.5]),
    Kink("max_pool2d(x)", _pooled, {"x": [1.0, 2.0, 2.0, 2.0]}, [0.0, 1.0, 0.0, 0.0]),
    Kink("where(x > 0, x, -x)", lambda x: ops.where(x > 0, x, -x), {"x": 0.0}, -1.0),
    Kink("where(x > 0, log(where(x > 0, x, 1.0)), 0.0)", _guarded_log, {"x": 0.0}, 0.0),
]
_REDUCTIONS = [
    Kink("norm(x)", ops.norm, {"x": [0.0, 0.0]}, [0.0, 0.0]),
    Kink("var(x)", ops.var, {"x": [3.0, 3.0]}, [0.0, 0.0], [[0.5, -0.5], [-0.5, 0.5]]),
    Kink("std(x)", ops.std, {"x": [3.0, 3.0]}, [0.0, 0.0]),
    Kink("logsumexp(x)", ops.logsumexp, {"x": [2.0, 2.0]}, [0.5, 0.5], _SPREAD),
    Kink("logsumexp(x)", ops.logsumexp, {"x": [1e4, -1e4]}, [1.0, 0.0]),
    Kink("logsumexp(x)", ops.logsumexp, {"x": [0.0, -INF]}, [1.0, 0.0]),
    Kink("logsumexp(x)", ops.logsumexp, {"x": [-INF, -INF]}, [NAN, NAN], NAN),
    Kink("softmax(x)[0]", lambda x: nn.softmax(x)[0], {"x": [1e4, 1e4]}, [0.25, -0.25]),
    Kink("softmax(x)[0]", lambda x: nn.softmax(x)[0], {"x": [0.0, -INF]}, [0.0, 0.0]),
    Kink("log_softmax(x)[0]", lambda x: nn.log_softmax(x)[0], {"x": [0.0, -INF]}, [0.0, 0.0]),
    Kink("layer_norm(x, eps=0.25)[0]", _layer_norm(0.25), {"x": [3.0, 3.0]}, [1.0, -1.0]),
    Kink("layer_norm(x, eps=0.0)[0]", _layer_norm(0.0), {"x": [3.0, 3.0]}, [NAN, NAN], NAN),
    Kink("batch_norm(x, eps=0.25)[0]", _batch_norm(0.25), {"x": [3.0, 3.0]}, [1.0, -1.0]),
    Kink("batch_norm(x, eps=0.0)[0]", _batch_norm(0.0), {"x": [3.0, 3.0]}, [NAN, NAN], NAN),
]
_COSTS = [
    Kink("mse(x, y)", nn.mse, {"x": 2.0, "y": 2.0}, [0.0, 0.0], [[2.0, -2.0], [-2.0, 2.0]]),
    Kink("cross_entropy(z, 0)", _cross_entropy(0), {"z": [0.0, 0.0]}, [-0.5, 0.5], _SPREAD),
    Kink("cross_entropy(z, 0)", _cross_entropy(0), {"z": [1e4, -1e4]}, [0.0, 0.0]),
    Kink("cross_entropy(z, 1)", _cross_entropy(1), {"z": [1e4, -1e4]}, [1.0, -1.0]),
    Kink("cross_entropy(z, 0)", _cross_entropy(0), {"z": [0.0, -INF]}, [0.0, 0.0]),
    Kink(
        "binary_cross_entropy(z, y)",
        nn.binary_cross_entropy,
        {"z": 0.0, "y": 1.0},
        [-0.5, 0.0],
        [[0.25, -1.0], [-1.0, 0.0]],
    ),
    *(
        Kink(
            f"binary_cross_entropy(z, {y})",
            lambda z, y=y: nn.binary_cross_entropy(z, _integer(y)),
            {"z": z},
            slope,
        )
        for y, z, slope in ((1, 1e4, 0.0), (1, -1e4, -1.0), (0, 1e4, 1.0), (1, INF, 0.0))
    ),
    Kink("maximum(z, 0.0) - z + log(1 + exp(-abs(z)))", _logistic, {"z": 0.0}, -0.5),
]

TABLE = (*_SLOPES, *_ROOTS, *_TIES, *_REDUCTIONS, *_COSTS)


# -- the clauses -------------------------------------------------------------------------------


def gradients(kink: Kink, b: Bench) -> ArraysFn:
    """`xs -> gradients of the sum of the outputs`."""
    run = b.backend.value_and_grad(lambda xs: (ops.sum(kink.function(*xs)), ()))
    return lambda xs: run(xs)[2]


def derivatives(kink: Kink, b: Bench) -> ArraysFn:
    """`xs -> (*gradients, *the Hessian times the directions)`, both in reverse mode."""
    directions, first = b.arr(kink.directions), gradients(kink, b)

    def along(xs: Arrays) -> tuple[Array, Arrays]:
        found = first(xs)
        pairs = zip(directions, found, strict=True)
        return sum(ops.sum(d * g) for d, g in pairs), found

    def both(xs: Arrays) -> Arrays:
        _, found, second = b.backend.value_and_grad(along)(xs)
        return (*found, *second)

    return both


def flat(arrays: Arrays, b: Bench) -> Values:
    """All elements in order, as NumPy has them."""
    return np.concatenate([np.reshape(b.to_np(x), -1) for x in arrays])


def compare(kink: Kink, found: Arrays, b: Bench) -> None:
    """The arrays of `derivatives` are those of the table."""
    expected = np.concatenate(kink.expected)
    message = f"gradient, and Hessian times 1, 2, ...: {kink.row()}"
    np.testing.assert_allclose(flat(found, b), expected, rtol=0, atol=b.exact, err_msg=message)


def grouped(key: str) -> dict[str, list[Kink]]:
    """The rows of the table by their `call` or their `name`."""
    found: dict[str, list[Kink]] = {}
    for kink in TABLE:
        found.setdefault(getattr(kink, key), []).append(kink)
    return found


def _mapped(name: str, b: Bench) -> None:
    for kinks in grouped("call").values():
        if kinks[0].name == name:
            columns = zip(*(kink.inputs for kink in kinks), strict=True)
            xs = tuple(b.arr(np.stack(column)) for column in columns)
            mapped = b.backend.vmap(derivatives(kinks[0], b))
            found = quickest(b.backend, mapped, xs)(xs)
            for i, kink in enumerate(kinks):
                compare(kink, tuple(y[i] for y in found), b)


def _one_by_one(name: str, b: Bench) -> None:
    for kink in grouped("name")[name]:
        xs, first = b.arr(kink.inputs), gradients(kink, b)
        compare(kink, derivatives(kink, b)(xs), b)
        if np.isfinite(kink.expected).all():  # else infinity times a tangent of zero
            forward = b.backend.jvp(first, xs, b.arr(kink.directions))
            compare(kink, (*first(xs), *forward), b)


for _name in grouped("name"):
    KINKS.add(
        _name,
        "First and second derivatives at its kinks are those of the table, at several at once.",
        functools.partial(_mapped, _name),
    )
    KINKS.add(
        f"{_name}/one-by-one",
        "They are at each alone, where they are finite by forward over reverse mode too.",
        functools.partial(_one_by_one, _name),
        heavy=True,
    )


def _compiled(b: Bench) -> None:
    sizes = [len(kink.inputs) for kink in TABLE]
    functions = [derivatives(kink, b) for kink in TABLE]

    def everything(xs: Arrays) -> Arrays:
        rest = iter(xs)
        own = [tuple(itertools.islice(rest, size)) for size in sizes]
        return tuple(y for fn, xs in zip(functions, own, strict=True) for y in fn(xs))

    xs = tuple(x for kink in TABLE for x in b.arr(kink.inputs))
    compiled = b.backend.compile(everything, xs)
    np.testing.assert_allclose(flat(compiled(xs), b), flat(everything(xs), b), rtol=0, atol=b.exact)


KINKS.add("compiled", "All rows in one program.", _compiled, compiles=True, heavy=True)

_PASSING: dict[str, Callable[[Array], Array]] = {
    "abs": ops.abs,
    "sign": ops.sign,
    "relu": nn.relu,
    "gelu": nn.gelu,
    "softplus": ops.softplus,
    "maximum": lambda x: ops.maximum(x, 0.0),
    "maximum, second": lambda x: ops.maximum(ops.zeros_like(x), x),
    "minimum": lambda x: ops.minimum(x, 0.0),
    "clip": lambda x: ops.clip(x, 0.0, 1.0),
    "clip to a point": lambda x: ops.clip(x, 1.0, 1.0),
    "clip by NaN": lambda x: ops.clip(ops.zeros_like(x), x, 1.0),
    "max": lambda x: ops.max(ops.stack([ops.ones_like(x), x, ops.zeros_like(x)])),
    "min": lambda x: ops.min(ops.stack([ops.ones_like(x), x, ops.zeros_like(x)])),
    "norm": lambda x: ops.norm(ops.stack([x, ops.zeros_like(x)])),
    "std": lambda x: ops.std(ops.stack([x, ops.zeros_like(x)])),
    "logsumexp": lambda x: ops.logsumexp(ops.stack([x, ops.zeros_like(x)])),
    "binary_cross_entropy": lambda x: nn.binary_cross_entropy(x, ops.zeros_like(x)),
}


@KINKS.clause("nan")
def _nan(b: Bench) -> None:
    """NaN passes through every function with a kink, and is the largest element for `argmax`."""
    xs = (b.arr(NAN),)
    values = quickest(b.backend, lambda xs: tuple(fn(*xs) for fn in _PASSING.values()), xs)(xs)
    stopped = [
        name for name, y in zip(_PASSING, values, strict=True) if not math.isnan(float(b.to_np(y)))
    ]
    equal(stopped, [])
    rows = [[1.0, NAN, NAN], [INF, NAN, 1.0], [NAN, 1.0, 2.0]]
    same(b.to_np(ops.astype(ops.argmax(b.arr(rows)), "int32")), np.array([1, 1, 0], "int32"))
