"""The portable array functions: what is the same on every backend by construction.

What each of them computes is for the conformance suite to check.
"""

from __future__ import annotations

import doctest
import importlib
import inspect
import math
import pkgutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import metaframe
from frameworks import checked_functions, require
from metaframe import nn, ops
from metaframe.backend import Backend, unset_backend, use_backend
from metaframe.errors import BackendError, InputError, InputTypeError


@pytest.mark.parametrize("package", ["ops", "nn"])
def test_examples_print_the_same_everywhere(backend: Backend, package: str) -> None:
    path = getattr(metaframe, package).__path__
    for found in pkgutil.iter_modules(path, f"metaframe.{package}."):
        module = importlib.import_module(found.name)
        assert doctest.testmod(module, extraglobs={"nn": nn, "ops": ops}).failed == 0


def test_every_function_is_tested_and_documented() -> None:
    special = {"asarray", "stop_gradient", "to_numpy"}  # have tests below
    assert checked_functions("ops") | special == set(ops.__all__)
    assert all(">>>" in inspect.getdoc(getattr(ops, name)) for name in ops.__all__)


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


@pytest.mark.parametrize("name", ["mean", "var", "std", "norm", "softplus"])
def test_a_mean_of_integers_is_refused(backend: Backend, name: str) -> None:
    with pytest.raises(InputTypeError, match=f"{name} needs a floating array, received int"):
        getattr(ops, name)(np.array([1, 2]))


@pytest.mark.parametrize(
    ("x", "exponent", "error", "message"),
    [
        ([1, 2], -1, InputTypeError, "negative or fractional exponent needs a floating array"),
        ([1, 2], 0.5, InputTypeError, "negative or fractional exponent needs a floating array"),
        ([1.0], math.inf, InputError, "finite exponent, received inf"),
        ([1.0], np.ones(1), InputTypeError, "a Python number as the exponent, received ndarray"),
        ([1.0], True, InputTypeError, "a Python number as the exponent, received bool"),
    ],
)
def test_an_unusable_power(
    backend: Backend, x: Any, exponent: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ops.power(np.array(x), exponent)


def test_a_power_of_integers(backend: Backend) -> None:
    x = np.array([-2, 0, 3])
    for exponent in (0, 1, 2, 5, 17):
        found = backend.to_numpy(ops.power(x, exponent))
        np.testing.assert_array_equal(found, x**exponent)
        assert found.dtype == x.dtype


@pytest.mark.parametrize("name", ["maximum", "minimum"])
def test_a_fraction_next_to_integers_is_refused(backend: Backend, name: str) -> None:
    with pytest.raises(InputTypeError, match=r"0\.5 next to an array of int64"):
        getattr(ops, name)(np.array([0, 1]), 0.5)


def test_integers_that_jax_would_wrap_are_refused() -> None:
    require("jax")
    jax = importlib.import_module("jax")
    with jax.enable_x64(False), use_backend("jax"):
        assert ops.to_numpy(ops.asarray(np.array([7]))).tolist() == [7]
        with pytest.raises(InputError, match=r"received int64 .* jax's int32 cannot hold"):
            ops.asarray(np.array([2**40]))


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
