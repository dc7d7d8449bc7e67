"""Calls of another library's model that computes with a framework: what the backend sees to."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from frameworks import require
from metaframe.backend import load_backend
from metaframe.errors import BackendError, InputError


def mapped(fn: Any, x: Any) -> Any:
    """`fn`, called as another library's model, for every row of `x`."""
    backend = load_backend("torch")

    def of_row(xs: Any) -> Any:
        return (backend.run_foreign(lambda: fn(*xs), twice=True)[0],)

    return backend.vmap(of_row)((x,))[0]


def test_torch_attention_has_a_second_derivative() -> None:
    require("torch")
    import torch

    backend = load_backend("torch")
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(1, 1, 4, 3).requires_grad_()

    def attended(twice: bool) -> Any:
        attend = torch.nn.functional.scaled_dot_product_attention
        y = backend.run_foreign(lambda: attend(x, x, x), twice=twice)[0]
        (grad,) = torch.autograd.grad((y**2).sum(), x, create_graph=True)
        return torch.autograd.grad((grad**2).sum(), x)[0]

    assert attended(True).shape == x.shape
    with pytest.raises(RuntimeError, match="not implemented"):
        attended(False)


def test_numbers_of_a_torch_generator_are_those_of_a_task_alone() -> None:
    require("torch")
    import torch

    def noisy(x: Any) -> Any:
        return x + torch.rand(3, generator=torch.Generator().manual_seed(1))

    x = torch.zeros(4, 3)
    torch.testing.assert_close(mapped(noisy, x), torch.stack([noisy(row) for row in x]))


def test_a_torch_order_in_memory_is_no_hindrance_to_vmap() -> None:
    require("torch")
    import torch

    def laid_out(x: Any) -> Any:
        return 2 * x.contiguous(memory_format=torch.channels_last)

    x = torch.arange(240.0).reshape(2, 2, 3, 4, 5)
    torch.testing.assert_close(mapped(laid_out, x), 2 * x)


def test_parameters_that_are_read() -> None:
    require("torch")
    import torch

    read, frozen, other = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    frozen.requires_grad_(False)
    found = load_backend("torch").run_foreign(
        lambda: torch.stack([read * 2, frozen, torch.ones(2)]), twice=False
    )[1]
    assert [x is read for x in found] == [True]
    del other


def test_variables_that_are_read_or_made() -> None:
    require("tensorflow")
    import tensorflow as tf

    backend = load_backend("tensorflow")
    read, other = tf.Variable(np.ones(2)), tf.Variable(np.ones(2))
    frozen = tf.Variable(np.ones(2), trainable=False)
    result, found = backend.run_foreign(lambda: read * frozen, twice=True)
    np.testing.assert_array_equal(result, [1.0, 1.0])
    assert [x is read for x in found] == [True]
    with pytest.raises(InputError, match="makes the variable 'late' when it is called"):
        backend.run_foreign(lambda: tf.Variable(1.0, name="late"), twice=True)
    del other


@pytest.mark.parametrize("compiled", [False, True])
def test_what_tensorflow_cannot_vectorise(compiled: bool) -> None:
    """A branch has no derivative there; an error of the function itself stays what it is."""
    require("tensorflow")
    import tensorflow as tf

    backend = load_backend("tensorflow")

    def slope(xs: Any) -> Any:
        def branched(xs: Any) -> Any:
            return tf.cond(xs[0] > 0, lambda: tf.exp(xs[0]) * xs[0], lambda: xs[0]), ()

        return backend.value_and_grad(branched)(xs)[2]

    def failing(xs: Any) -> Any:
        raise KeyError("of the function")

    how = tf.function(autograph=False) if compiled else lambda fn: fn
    x = (tf.constant([1.0, -1.0]),)
    with pytest.raises(BackendError, match=r"cannot vectorise.*tf\.cond.*task_map=\"scan\""):
        how(backend.vmap(slope))(x)
    with pytest.raises(KeyError, match="of the function"):
        how(backend.vmap(failing))(x)
