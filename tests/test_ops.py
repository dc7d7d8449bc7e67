"""The portable array functions against NumPy, on every backend."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cases import (
    Case,
    check_compiled,
    check_derivatives,
    check_value,
    check_vmap,
    run_examples,
)
from metaframe import ops
from metaframe.backend import Backend, unset_backend, use_backend
from metaframe.errors import BackendError, InputError, InputTypeError

_rng = np.random.default_rng(0)
X = _rng.normal(size=(2, 3, 4))
Y = _rng.normal(size=(3, 4))
POSITIVE = np.abs(X) + 1.0
IDS = np.array([[2, 0], [1, 2]])


def _case(name: str, formula: Callable[..., Any], *inputs: Any, **options: Any) -> Case:
    label = "-".join([name, *(f"{k}={v}" for k, v in options.items())])
    function = getattr(ops, name)
    return Case(label, lambda *xs: function(*xs, **options), formula, inputs)


def _matmul(*shapes: tuple[int, ...]) -> Case:
    x, y = (_rng.normal(size=shape) for shape in shapes)
    return Case(f"matmul-{shapes}", ops.matmul, np.matmul, (x, y))


def _einsum(equation: str, *xs: Any) -> Case:
    return Case(
        f"einsum-{equation}",
        lambda *a: ops.einsum(equation, *a),
        lambda *a: np.einsum(equation, *a),
        xs,
    )


CASES = [
    _case("exp", np.exp, X),
    _case("expm1", np.expm1, X),
    _case("log", np.log, POSITIVE),
    _case("log1p", np.log1p, POSITIVE),
    _case("sqrt", np.sqrt, POSITIVE),
    _case("safe_sqrt", np.sqrt, POSITIVE),
    _case("square", np.square, X),
    _case("abs", np.abs, X),
    _case("sign", np.sign, X),
    _case("sin", np.sin, X),
    _case("cos", np.cos, X),
    _case("tanh", np.tanh, X),
    _case("sigmoid", lambda x: 1 / (1 + np.exp(-x)), X),
    _case("maximum", np.maximum, X, Y),
    _case("maximum", lambda x: np.maximum(x, 0.1), X, y=0.1),
    _case("minimum", np.minimum, X, Y),
    _case("minimum", lambda x: np.minimum(x, 0.1), X, y=0.1),
    _case("clip", lambda x: np.clip(x, -0.3, 0.1), X, low=-0.3, high=0.1),
    _case("where", np.where, X > 0, X, Y),
    _case("where", lambda c, x: np.where(c, x, 0.1), X > 0, X, y=0.1),
    _case("sum", np.sum, X),
    _case("sum", np.sum, np.array(0.7)),
    _case("sum", lambda x: np.sum(x, -1), X, axis=-1),
    _case("sum", lambda x: np.sum(x, (0, 2), keepdims=True), X, axis=(0, 2), keepdims=True),
    _case("mean", np.mean, X),
    _case("mean", lambda x: np.mean(x, (0, 2)), X, axis=(0, 2)),
    _case("var", np.var, X),
    _case("var", lambda x: np.var(x, (0, 2), keepdims=True), X, axis=(0, 2), keepdims=True),
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
    _matmul((2, 3), (3, 4)),
    _matmul((3,), (3,)),
    _matmul((3,), (3, 4)),
    _matmul((2, 3), (3,)),
    _matmul((3,), (2, 3, 4)),
    _matmul((2, 2, 3), (3,)),
    _matmul((2, 2, 3), (3, 4)),
    _matmul((2, 3), (2, 3, 4)),
    _matmul((2, 1, 2, 3), (2, 3, 2)),
    _einsum("ijk,jk->i", X, Y),
    _einsum("...k,jk->...j", X, Y),
    _einsum("ij->ji", Y),
]

INTEGER_CASES = [
    _case("argmax", lambda x: np.argmax(x, -1), X),
    _case("argmax", lambda x: np.argmax(x, 0), X, axis=0),
    _case("sum", np.sum, X > 0),
    _case("astype", lambda x: x.astype("int32"), 10 * X, dtype="int32"),
    _case("one_hot", lambda i: np.eye(3, dtype=bool)[i], IDS, classes=3, dtype="bool"),
    _case("zeros_like", np.zeros_like, X),
    _case("ones_like", np.ones_like, X),
]

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", [*CASES, *INTEGER_CASES], ids=lambda case: case.id)
def test_values(case: Case, backend: Backend, dtype: str) -> None:
    check_value(case, backend, dtype)


@every_case
def test_both_derivatives(case: Case, backend: Backend) -> None:
    check_derivatives(case, backend)


@every_case
def test_vmap(case: Case, backend: Backend) -> None:
    check_vmap(case, backend)


@pytest.mark.slow
def test_compiled(backend: Backend) -> None:
    check_compiled(CASES, backend)


def test_examples_print_the_same_everywhere(backend: Backend) -> None:
    run_examples(ops)


def test_every_function_is_tested_and_documented() -> None:
    special = {"arange", "asarray", "stop_gradient", "to_numpy", "zeros"}  # have tests below
    tested = {case.id.partition("-")[0] for case in [*CASES, *INTEGER_CASES]}
    assert tested | special == set(ops.__all__)
    assert all(">>>" in inspect.getdoc(getattr(ops, name)) for name in ops.__all__)


def _gradients(backend: Backend, fn: Callable[..., Any], *xs: Any) -> list[Any]:
    arrays = tuple(backend.asarray(x, "float64") for x in xs)
    _, _, grads = backend.value_and_grad(lambda v: (backend.ops.sum(fn(*v)), ()))(arrays)
    return [backend.to_numpy(g).tolist() for g in grads]


@pytest.mark.parametrize("name", ["maximum", "minimum"])
def test_two_equal_arguments_get_half_the_gradient_each(backend: Backend, name: str) -> None:
    function = getattr(ops, name)
    assert _gradients(backend, function, [2.0], [2.0]) == [[0.5], [0.5]]
    assert _gradients(backend, lambda x: function(x, 2.0), [2.0]) == [[0.5]]


@pytest.mark.parametrize("name", ["max", "min"])
def test_equal_elements_share_the_gradient(backend: Backend, name: str) -> None:
    assert _gradients(backend, getattr(ops, name), [[2.0, 2.0], [2.0, 2.0]]) == [[[0.25] * 2] * 2]


@pytest.mark.parametrize("name", ["maximum", "minimum"])
def test_integers_have_a_larger_and_a_smaller(backend: Backend, name: str) -> None:
    found = getattr(ops, name)(np.array([1, 5]), 3)
    assert backend.to_numpy(found).tolist() == getattr(np, name)([1, 5], 3).tolist()


def test_infinities_and_nan_pass_through_maximum(backend: Backend) -> None:
    found = ops.maximum(np.array([-np.inf, np.inf, np.nan]), np.array([np.inf, np.inf, 0.0]))
    np.testing.assert_array_equal(backend.to_numpy(found), [np.inf, np.inf, np.nan])


def test_safe_sqrt_is_flat_at_zero_in_every_order(backend: Backend) -> None:
    assert _gradients(backend, ops.safe_sqrt, [0.0, 4.0]) == [[0.0, 0.25]]

    def slope(x: Any) -> Any:
        _, _, (gradient,) = backend.value_and_grad(
            lambda v: (backend.ops.sum(ops.safe_sqrt(v[0])), ())
        )((x,))
        return gradient

    assert _gradients(backend, slope, [0.0, 4.0]) == [[0.0, -1 / 32]]
    values = backend.to_numpy(ops.safe_sqrt(np.array([-1.0, np.nan])))
    assert np.isnan(values).all()


@pytest.mark.parametrize("number", [0.1, np.float64(0.1)], ids=["float", "np.float64"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_number_takes_the_dtype_of_the_array(backend: Backend, dtype: str, number: Any) -> None:
    x = backend.asarray([-1.0, 1.0], dtype)
    for found in (ops.maximum(x, number), ops.maximum(number, x), ops.where(x > 0, x, number)):
        assert backend.dtype_name(found) == dtype
        expected = np.array([number, 1.0], dtype)  # exactly: not by way of float32
        np.testing.assert_array_equal(backend.to_numpy(found), expected)


def test_stop_gradient_leaves_no_gradient(backend: Backend) -> None:
    assert _gradients(backend, lambda x: x * ops.stop_gradient(x), [3.0]) == [[3.0]]


def test_new_arrays_take_after_an_array_or_the_selection(backend: Backend) -> None:
    like = backend.asarray([1.0], "float32")
    assert backend.dtype_name(ops.zeros((2,), like=like)) == "float32"
    assert backend.dtype_name(ops.zeros((2,))) == "float64"  # as selected by the fixture
    assert backend.dtype_name(ops.zeros((2,), "int32", like=like)) == "int32"
    assert backend.dtype_name(ops.arange(2, "float32")) == "float32"
    assert backend.to_numpy(ops.arange(3, like=like)).tolist() == [0, 1, 2]


def test_asarray_goes_straight_to_the_dtype(backend_name: str) -> None:
    with use_backend(backend_name, dtype="float32") as backend:
        assert backend.to_numpy(ops.asarray([0.1], "float64")).tolist() == [0.1]
        assert backend.dtype_name(ops.asarray([0.1])) == "float32"
        assert backend.dtype_name(ops.asarray(np.array([1], "int32"))) == "int32"
        own = backend.asarray([0.5], "float64")
        assert ops.asarray(own) is own
        assert backend.dtype_name(ops.asarray(own, "float32")) == "float32"


def test_arrays_choose_the_backend_when_none_is_selected(backend_name: str) -> None:
    with use_backend(backend_name, dtype="float32") as backend:
        x = backend.asarray([1.0], "float64")
    unset_backend()
    assert backend.owns(ops.exp(x))
    with pytest.raises(BackendError, match="no backend is selected"):
        ops.asarray([1.0])
    assert ops.to_numpy([1.0]).tolist() == [1.0]


@pytest.mark.parametrize("name", ["mean", "var"])
def test_a_mean_of_integers_is_refused(backend: Backend, name: str) -> None:
    with pytest.raises(InputTypeError, match=f"{name} needs a floating array, received int"):
        getattr(ops, name)(np.array([1, 2]))


def test_only_an_axis_of_size_one_is_squeezed(backend: Backend) -> None:
    with pytest.raises(InputError, match=r"axis=0 of shape \(2, 3\)"):
        ops.squeeze(np.zeros((2, 3)), 0)


@pytest.mark.parametrize("join", [ops.concat, ops.stack])
def test_nothing_cannot_be_joined(backend: Backend, join: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match="at least one array"):
        join([])


def test_only_numbers_become_an_array(backend: Backend) -> None:
    with pytest.raises(InputTypeError, match="received dict"):
        ops.asarray({"a": 1.0})


def test_a_label_out_of_range_has_no_one(backend: Backend) -> None:
    found = ops.one_hot(np.array([0, 3, -1]), 3, "float64")
    assert backend.to_numpy(found).tolist() == [[1.0, 0.0, 0.0], [0.0] * 3, [0.0] * 3]
