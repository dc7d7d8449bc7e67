"""Gradients without tasks: `value_and_grad` and `hessian_vector_product`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from frameworks import compiles_on_torch, require
from metaframe import compile as compile_whole
from metaframe import (
    hessian_vector_product,
    inner_loop,
    ops,
    value_and_grad,
)
from metaframe.errors import InputError, InputTypeError, UnknownKeyError

Call = Callable[..., Any]
RNG = np.random.default_rng(3)
A = RNG.normal(size=(3, 3))
H = A @ A.T + np.eye(3)


# -- value_and_grad -----------------------------------------------------------------------------


def test_value_gradient_and_aux(arr: Call, to_np: Call) -> None:
    def fn(v: Any, x: Any, name: str) -> Any:
        value = ops.sum(ops.square(v["a"])) * v["b"] + ops.sum(v["a"] * x)
        return value, {name: 2 * v["b"]}

    v = {"a": np.array([1.0, -2.0]), "b": np.array(3.0)}
    step = value_and_grad(fn, outer_v="a", has_aux=True)
    found = to_np(step(arr(v), arr(np.array([0.5, 1.0])), "twice"))
    assert found.cost == 15.0 - 1.5
    assert list(found.grads) == ["a"]
    np.testing.assert_array_equal(found.grads["a"], [6.5, -11.0])
    assert found.aux == {"twice": 6.0}


def test_gradients_of_gradients(arr: Call, to_np: Call) -> None:
    def first(x: Any) -> Any:
        return value_and_grad(lambda x: x**3)(x).grads

    assert to_np(value_and_grad(first)(arr(2.0)).grads) == 12.0


def test_numpy_is_converted(to_np: Call, arr: Call) -> None:
    found = value_and_grad(lambda v, x: ops.sum(v * x))(np.ones(2), np.array([1.0, 2.0]))
    np.testing.assert_array_equal(to_np(found.grads), [1.0, 2.0])


def test_what_is_refused(arr: Call) -> None:
    v = arr({"a": 1.0})
    with pytest.raises(InputTypeError, match="fn must be"):
        value_and_grad(3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="fn returned shape"):
        value_and_grad(lambda v: ops.stack([v["a"], v["a"]]))(v)
    with pytest.raises(InputTypeError, match="has_aux=True returns"):
        value_and_grad(lambda v: v["a"], has_aux=True)(v)
    with pytest.raises(UnknownKeyError, match="no variable at key chain 'b'"):
        value_and_grad(lambda v: v["a"], outer_v="b")(v)
    with pytest.raises(InputTypeError, match="int"):
        value_and_grad(lambda v: v["a"])(arr({"a": np.array(1)}))


# -- hessian_vector_product ------------------------------------------------------------------------


def product_with_the_hessian(execution: Call, arr: Call, to_np: Call) -> None:
    """Of a function whose Hessian is known in closed form."""
    x, u = RNG.normal(size=3), RNG.normal(size=3)

    def fn(v: Any, h: Any) -> Any:
        w = v["w"]
        return ops.sum(w * ops.matmul(h, w)) / 2 + ops.sum(w**4) / 12

    product = execution(lambda v, d, h: hessian_vector_product(fn, v, d, h))
    found = to_np(product(arr({"w": x}), arr({"w": u}), arr(H)))
    np.testing.assert_allclose(found["w"], H @ u + x**2 * u, rtol=1e-12)


def test_products_with_the_hessian(arr: Call, to_np: Call) -> None:
    product_with_the_hessian(lambda fn: fn, arr, to_np)


@compiles_on_torch
def test_compiled_products_with_the_hessian(arr: Call, to_np: Call) -> None:
    product_with_the_hessian(compile_whole, arr, to_np)


def test_products_are_differentiable(arr: Call, to_np: Call) -> None:
    def quadratic_form(x: Any) -> Any:
        direction = arr(np.array([1.0, 2.0]))
        return ops.sum(direction * hessian_vector_product(lambda v: ops.sum(v**4), x, direction))

    x = np.array([0.5, -1.0])
    found = value_and_grad(quadratic_form)(arr(x)).grads
    np.testing.assert_allclose(to_np(found), 24 * x * np.array([1.0, 4.0]), rtol=1e-12)


def test_directions_fit(arr: Call) -> None:
    def fn(v: Any) -> Any:
        return ops.sum(v["w"])

    v = arr({"w": np.ones(2)})
    with pytest.raises(InputError, match=r"direction\['w'\] has shape \(3,\)"):
        hessian_vector_product(fn, v, arr({"w": np.ones(3)}))
    with pytest.raises(InputError, match="direction has another structure"):
        hessian_vector_product(fn, v, arr({"u": np.ones(2)}))


# -- the tape of torch -------------------------------------------------------------------------


@pytest.mark.parametrize("start_is_constant", [True, False])
def test_a_result_holds_no_tape_unless_someone_may_differentiate_it(
    start_is_constant: bool,
) -> None:
    """Also where an inner loop began at a constant; what is closed over is differentiated."""
    require("torch")
    torch = importlib.import_module("torch")
    outside = torch.tensor(2.0, requires_grad=True)

    def run(factor: Any) -> Any:
        def validation(rate: Any) -> Any:
            start = torch.tensor(0.0) if start_is_constant else rate
            w = inner_loop(lambda x, w: factor * (w - x) ** 2, start, 3.0, steps=2, lr=rate)
            return (w - 1.0) ** 2

        return value_and_grad(validation)(torch.tensor(0.1))

    plain, attached = run(2.0), run(outside)
    assert not plain.cost.requires_grad
    assert not plain.grads.requires_grad
    assert attached.cost.requires_grad
    torch.testing.assert_close(attached.grads.detach(), plain.grads)
    (slope,) = torch.autograd.grad(attached.cost, outside)
    high, low = (float(run(2.0 + h).cost) for h in (1e-2, -1e-2))
    np.testing.assert_allclose(float(slope), (high - low) / 2e-2, rtol=1e-2)
