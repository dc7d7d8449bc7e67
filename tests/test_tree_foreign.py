"""Another library's array class and container, as metaframe/interop makes them known.

The classes here stand for such a library; tests/with_ivy has the real one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import metaframe
from metaframe import backend as backends
from metaframe import ops, tree
from metaframe.backend import selection as selection_module
from metaframe.errors import InputTypeError


class Wrapped:
    """Around one array; cost functions get it back."""

    def __init__(self, data: Any) -> None:
        self.data = data


class Bag(dict[str, Any]):
    """A container of a class of its own."""


def _flatten(bag: Bag) -> tuple[list[Any], tuple[str, ...], tuple[str, ...]]:
    keys = tuple(sorted(bag))
    return [bag[key] for key in keys], keys, keys


tree.register(Bag, _flatten, lambda keys, values: Bag(zip(keys, values, strict=True)))
tree.register_wrapper(Wrapped, lambda x: x.data, Wrapped)


@pytest.fixture
def wrapped(arr: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x: Wrapped(arr(x))


def cost(task: Bag, v: Bag) -> Wrapped:
    """(w x - y)^2, with wrappers in and out."""
    error = v["w"].data * task["x"].data - task["y"].data
    return Wrapped(ops.mean(ops.square(error)))


X, Y, W, LR = np.array([1.0, 2.0]), np.array([3.0, -1.0]), 0.5, 0.1


@pytest.fixture
def batch(wrapped: Callable[..., Any]) -> Bag:
    return Bag(x=wrapped(X), y=wrapped(Y))


def exact() -> tuple[float, float]:
    """One inner step: w' = w - lr * 2 x (w x - y), dw'/dw = 1 - 2 lr x^2."""
    adapted = W - LR * 2 * X * (W * X - Y)
    error = adapted * X - Y
    return float(np.mean(error**2)), float(np.mean(2 * error * X * (1 - 2 * LR * X**2)))


@pytest.mark.parametrize("batched", ["vmap", "scan"])
@pytest.mark.parametrize("rate", ["number", "wrapped"])
def test_in_and_out(
    batch: Bag, wrapped: Callable[..., Any], to_np: Callable[..., Any], batched: Any, rate: str
) -> None:
    lr = LR if rate == "number" else wrapped(LR)
    found_cost, grads, inner = metaframe.maml_step(
        batch, cost, None, Bag(w=wrapped(W)), 1, lr, batched=batched, return_inner_v="all"
    )
    assert type(found_cost) is Wrapped
    assert type(grads) is Bag
    assert type(inner["w"]) is Wrapped
    value, slope = exact()
    np.testing.assert_allclose(to_np(found_cost).data, value, rtol=1e-12)
    np.testing.assert_allclose(to_np(grads)["w"].data, slope, rtol=1e-12)


def test_reptile(batch: Bag, wrapped: Callable[..., Any], to_np: Callable[..., Any]) -> None:
    options: dict[str, Any] = {"batched": "vmap", "direction": "displacement"}
    found_cost, grads = metaframe.reptile_step(batch, cost, Bag(w=wrapped(W)), 1, LR, **options)
    assert type(found_cost) is Wrapped
    expected = np.mean(2 * X * (W * X - Y))
    np.testing.assert_allclose(to_np(grads)["w"].data, expected, rtol=1e-12)


def test_one_choice_a_task(wrapped: Callable[..., Any], to_np: Callable[..., Any]) -> None:
    batch = Bag(x=wrapped(X), y=wrapped(Y))
    choices = [["w"], ["w"]]
    found_cost, _, _ = metaframe.maml_step(
        batch, cost, None, Bag(w=wrapped(W)), 1, LR, batched=False, inner_v=choices
    )
    np.testing.assert_allclose(to_np(found_cost).data, exact()[0], rtol=1e-12)


def test_key_chains_do_not_mention_the_wrapper() -> None:
    v = Bag(a=Bag(w=Wrapped(1.0)), b=Wrapped(2.0))
    assert tree.key_chains(v) == ("a/w", "b")
    assert tree.chosen(v, "a") == (True, False)
    assert tree.chosen(v, Bag(b=Wrapped(True))) == (False, True)
    assert tree.key_chains(tree.prune(v, (False, True))) == ("b",)
    assert tree.children(v["b"]) == {}


@pytest.fixture
def followed(backend_name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A library that has selected each backend in turn, and metaframe nothing."""
    selection = selection_module.Selection(backends.load_backend(backend_name), by="bags")
    monkeypatch.setattr(selection_module, "_followed", {Bag: lambda: selection})
    return backend_name


def test_the_librarys_selection_decides_where_arrays_do_not(followed: str) -> None:
    def plain_cost(task: Bag, v: Bag) -> Any:
        return ops.square(v["w"] * task["x"] - task["y"])

    _, grads, _ = metaframe.maml_step(
        Bag(x=X, y=Y), plain_cost, None, Bag(w=np.array(W)), 1, LR, batched="vmap"
    )
    assert metaframe.current_backend(grads["w"]).name == followed
    with pytest.raises(metaframe.errors.BackendError, match="no backend is selected"):
        metaframe.maml_step({"x": X}, plain_cost, None, {"w": np.array(W)}, 1, LR, batched="vmap")


def test_the_librarys_selection_is_named_in_errors(followed: str) -> None:
    other = "torch" if followed != "torch" else "jax"
    array = backends.load_backend(other).asarray(W)
    with pytest.raises(InputTypeError, match=rf"bags.set_backend\(\"{other}\"\)"):
        metaframe.maml_step(Bag(x=X, y=Y), cost, None, Bag(w=array), 1, LR, batched="vmap")
