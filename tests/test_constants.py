"""The identity of a constant of a compiled program."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import functools
import math
import struct
from collections import namedtuple
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import metaframe
from frameworks import compiles_on_torch, require
from metaframe.backend.contract import Backend
from metaframe.backend.registry import load_backend
from metaframe.core.compile import Compiled
from metaframe.core.constants import PARTS_AT_MOST, arrays_in, constant
from metaframe.errors import InputError, InputTypeError

Arr = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Frozen:
    value: Any


@dataclasses.dataclass(unsafe_hash=True)
class ByValue:
    value: Any


class Plain:
    def __init__(self, value: Any) -> None:
        self.value = value

    def method(self, x: Any) -> Any:
        return x * self.value


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


class Private:
    __slots__ = ("__value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    @property
    def value(self) -> Any:
        return self.__value

    @value.setter
    def value(self, value: Any) -> None:
        self.__value = value


@dataclasses.dataclass
class Besides:
    """A dataclass with an attribute that is no field."""

    name: str = "a"

    def __post_init__(self) -> None:
        self.value = 1


class Proxied:
    """What a library puts in the place of a tuple, such as TensorFlow in attributes."""

    def __init__(self, value: Any) -> None:
        self._value = value

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self._value)

    def __iter__(self) -> Any:
        return iter(self._value)

    def __radd__(self, other: Any) -> Any:
        return other + self._value


class Number(float):
    """A number with something to it."""


class Kind(enum.Enum):
    ONE = 1
    TRUE = "true"


class IntKind(enum.IntEnum):
    ONE = 1


Pair = namedtuple("Pair", "a b")
NAN = float("nan")
OTHER_NAN = struct.unpack("d", struct.pack("Q", 0x7FF8_0000_0000_0001))[0]
UTC = datetime.UTC
CET = datetime.timezone(datetime.timedelta(hours=1))
UNEQUAL = [
    (0.0, -0.0),
    (1, True),
    (1, 1.0),
    (NAN, OTHER_NAN),
    (NAN, -NAN),
    (complex(0.0, 0.0), complex(0.0, -0.0)),
    (1.0, np.float64(1.0)),
    (np.float32(1.0), np.float64(1.0)),
    (np.float64(0.0), np.float64(-0.0)),
    ("a", b"a"),
    (1, IntKind.ONE),
    (Kind.ONE, Kind.TRUE),
    (Number(1.0), 1.0),
    (decimal.Decimal("1.0"), decimal.Decimal("1.00")),
    (datetime.datetime(2000, 1, 1, 1, tzinfo=CET), datetime.datetime(2000, 1, 1, tzinfo=UTC)),
    (range(0), range(1, 1)),
    (np.zeros(2), -np.zeros(2)),
    (np.zeros(2), np.zeros(2, np.float32)),
    (np.arange(4), np.arange(4).reshape(2, 2)),
    (np.zeros(2, [("a", "f4")]), np.zeros(2, [("b", "f4")])),
    (np.array([1, "a"], object), np.array([True, "a"], object)),
]


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(lambda x: x, id="alone"),
        pytest.param(Frozen, id="frozen"),
        pytest.param(lambda x: Frozen((x, Frozen([x]))), id="nested"),
        pytest.param(lambda x: Pair(0, x), id="namedtuple"),
        pytest.param(lambda x: {"a": x}, id="dict"),
        pytest.param(lambda x: functools.partial(max, x), id="partial"),
        pytest.param(ByValue, id="by-value"),
    ],
)
@pytest.mark.parametrize("pair", UNEQUAL, ids=repr)
def test_two_constants(pair: tuple[Any, Any], wrap: Callable[[Any], Any]) -> None:
    first, second = (constant(wrap(x)) for x in pair)
    assert first != second
    assert hash(first) is not None
    again = constant(wrap(pair[0]))
    assert again == first
    assert hash(again) == hash(first)


@pytest.mark.parametrize(
    "make",
    [
        lambda: {1.0: "a"},
        lambda: frozenset({1, "b"}),
        lambda: {"a": {1, 2}},
        lambda: functools.partial(max, NAN, key=abs),
        lambda: Frozen((NAN, [1, {"b": 2}])),
        lambda: np.float32(NAN),
        lambda: np.linspace(0, 1, 1000),
        lambda: ByValue(decimal.Decimal(3)),
        lambda: SimpleNamespace(),
    ],
)
def test_constants_of_equal_parts_are_one(make: Callable[[], Any]) -> None:
    if isinstance(make(), SimpleNamespace):
        assert constant(make()) != constant(make())  # without parts there is only its identity
    else:
        assert constant(make()) == constant(make())


@pytest.mark.parametrize("keys", [(1, True), (0.0, -0.0), (1, 1.0)])
def test_keys_inside_a_constant(keys: tuple[Any, Any]) -> None:
    first, second = ({key: "x"} for key in keys)
    assert constant(Frozen(first)) != constant(Frozen(second))


def assign(x: Any) -> None:
    x.value = 2


def extend(x: Any) -> None:
    x.value.append(2)


def deeper(x: Any) -> None:
    x.value.value["a"][0] = 5.0


@pytest.mark.parametrize(
    ("make", "change"),
    [
        (lambda: Plain(1), assign),
        (lambda: Slotted(1), assign),
        (lambda: Private(1), assign),
        (lambda: Plain(Private(1)), lambda x: assign(x.value)),
        (Besides, assign),
        (lambda: Frozen(Besides()), lambda x: assign(x.value)),
        (lambda: ByValue(1), assign),
        (lambda: SimpleNamespace(value=1), assign),
        (lambda: Plain([1]), extend),
        (lambda: Frozen([1]), extend),
        (lambda: Plain(Slotted({"a": np.zeros(2)})), deeper),
        (lambda: Frozen(Plain({"a": [1.0]})), deeper),
    ],
)
def test_a_changed_object_is_another_constant(
    make: Callable[[], Any], change: Callable[[Any], None]
) -> None:
    x = make()
    before = constant(x)
    assert constant(x) == before
    change(x)
    assert constant(x) != before


def test_methods_count_by_their_object() -> None:
    x = Plain(1)
    before = constant(x.method)
    assert constant(x.method) == before
    assert constant(Plain(1).method) != before
    x.value = 2
    assert constant(x.method) != before


def test_objects_that_hold_themselves() -> None:
    x = Plain(None)
    x.value = [x]
    assert constant(x) == constant(x)


def test_too_large_a_constant_is_refused() -> None:
    with pytest.raises(InputTypeError, match=f"more than {PARTS_AT_MOST} parts"):
        constant(Plain([[i] for i in range(PARTS_AT_MOST)]))


def test_arrays_that_a_function_holds() -> None:
    require("jax")
    x = load_backend("jax").asarray([1.0])

    def fn(y: Any, z: Any = x) -> Any:
        return y + z + x

    found = list(arrays_in([Plain(functools.partial(fn, 1)), Plain(1).method]))
    assert len(found) == 1
    assert found[0] is x
    assert list(arrays_in(Proxied((1, x)))) == [x]


# In compiled functions


def scaled(x: Any, constant: Any) -> Any:
    return x * math.copysign(1.0, constant.value)


@compiles_on_torch
def test_programs_by_bits(backend: Backend, arr: Arr) -> None:
    compiled = metaframe.compile(scaled)
    for value, sign in ((0.0, 1), (-0.0, -1), (False, 1), (NAN, 1), (NAN, 1)):
        assert backend.to_numpy(compiled(arr([3.0]), Frozen(value))) == [3.0 * sign]
    assert compiled.traces == 4


@compiles_on_torch
def test_a_changed_argument_makes_another_program(backend: Backend, arr: Arr) -> None:
    compiled = metaframe.compile(lambda x, config: x * config.value)
    config = Plain(2.0)
    for value in (2.0, 3.0, 2.0):
        config.value = value
        assert backend.to_numpy(compiled(arr([1.0]), config)) == [value]
    assert compiled.traces == 2


@compiles_on_torch
def test_keys_of_arguments(backend: Backend, arr: Arr) -> None:
    compiled = metaframe.compile(lambda v: [type(key).__name__ for key in v])
    assert [compiled({key: arr([1.0])}) for key in (1, True, 1.0, 1)] == [
        ["int"],
        ["bool"],
        ["float"],
        ["int"],
    ]
    assert compiled.traces == 3


@compiles_on_torch
def test_what_the_function_changes_itself_makes_no_program(backend: Backend, arr: Arr) -> None:
    class Counting:
        calls = 0

        def __call__(self, x: Any) -> Any:
            self.calls += 1
            return 2 * x

    compiled, counting = metaframe.compile(lambda fn, x: fn(x)), Counting()
    for _ in range(3):
        compiled(counting, arr([1.0]))
    assert compiled.traces == counting.calls == 1
    compiled(Counting(), arr([1.0]))
    assert compiled.traces == 2


@compiles_on_torch
def test_compiled_functions_are_constants(backend: Backend, arr: Arr) -> None:
    inner = metaframe.compile(lambda x: 2 * x)
    outer: Compiled[Any, Any] = metaframe.compile(lambda fn, x: fn(x))
    outer(inner, arr([1.0]))
    inner(arr([1.0, 2.0]))
    outer(inner, arr([3.0]))
    assert outer.traces == 1


def test_an_argument_changed_before_the_backward_pass() -> None:
    require("torch")
    torch_backend = load_backend("torch")
    compiled = metaframe.compile(lambda x, config: (x * config.value).sum())
    x = torch_backend.asarray([1.0]).requires_grad_()
    config = Plain(2.0)
    y = compiled(x, config)
    config.value = 3.0
    with pytest.raises(InputError, match="after an argument of it, a Plain, was changed"):
        y.backward()
