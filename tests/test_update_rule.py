"""Update rules of every kind: what is taken, and what changes a variable and is refused by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from frameworks import compiles_on_torch, require
from metaframe import Container, inner_loop, maml_step, ops, optim, tree, use_backend
from metaframe import compile as compile_whole
from metaframe.backend import Backend, load_backend
from metaframe.errors import InputError, InputTypeError
from metaframe.learners import MAML

Call = Callable[..., Any]

V = {"b": np.array(0.5), "w": np.array([1.0, 2.0])}


def cost(batch: Any, v: Any) -> Any:
    return ops.sum(ops.square(v["w"] * batch)) + ops.square(v["b"])


def returning(change: Call) -> Call:
    """An update function that returns `change(variables)`."""

    def update(v: Any, grads: Any, lr: Any, *, stop_gradients: bool) -> Any:
        del grads, lr, stop_gradients
        return change(v)

    return update


def moving(change: Call) -> Any:
    """The same as a pair whose updates are `change(gradients)`."""
    return optim.Optimizer(lambda v: (), lambda grads, state, v, lr: (change(grads), state))


def loop(arr: Call, update: Any, mode: Any = "reverse", steps: int = 2) -> Any:
    v, x = arr(V), arr(np.array([1.0, -1.0]))
    return inner_loop(cost, v, x, steps=steps, lr=0.1, update=update, mode=mode)


CHANGES: dict[str, tuple[Call, str]] = {
    "wider": (
        lambda v: tree.map(lambda x: ops.stack([x] * 2), v),
        r"shape \(2,\).*'b'.*shape \(\)",
    ),
    "an axis more": (lambda v: {**v, "b": ops.reshape(v["b"], (1,))}, r"shape \(1,\).*'b'"),
    "narrower": (lambda v: {**v, "w": v["w"][:1]}, r"shape \(1,\).*'w'.*shape \(2,\)"),
    "another dtype": (
        lambda v: tree.map(lambda x: ops.astype(x, "float32"), v),
        "32.*'b'.*64",
    ),
    "integers": (lambda v: tree.map(lambda x: ops.astype(x, "int32"), v), "int32.*'b'.*float64"),
    "a number": (lambda v: {**v, "b": 0.5}, r"0\.5 \(float\) for 'b'"),
    "an array of NumPy": (lambda v: {**v, "b": np.array(0.5)}, "ndarray.*'b'"),
    "None": (lambda v: {**v, "b": None}, r"missing \['b'\]"),
    "nothing": (lambda v: None, r"missing \['b', 'w'\]"),
    "a key less": (lambda v: {"w": v["w"]}, r"missing \['b'\]"),
    "a key more": (lambda v: {**v, "c": v["b"]}, r"unexpected \['c'\]"),
    "a tuple": (lambda v: (v["b"], v["w"]), r"missing \['b', 'w'\]; unexpected \['0', '1'\]"),
    "another container": (lambda v: Container(v), r"made of \['Container'\] and not of \['dict'\]"),
}


ADDED = ("a number", "an array of NumPy", "another dtype", "integers", "narrower")
"""What changes nothing when it is added to a variable."""


@pytest.mark.parametrize("mode", ["reverse", "remat"])
@pytest.mark.parametrize(
    ("kind", "change"),
    [
        *((returning, change) for change in CHANGES),
        *((moving, change) for change in CHANGES if change not in ADDED),
    ],
)
def test_what_changes_a_variable_is_refused(arr: Call, kind: Call, change: str, mode: Any) -> None:
    how, message = CHANGES[change]
    with pytest.raises(InputError, match=f"inner update returned.*{message}"):
        loop(arr, kind(how), mode)


@compiles_on_torch
@pytest.mark.parametrize("change", ["wider", "another dtype", "None"])
def test_a_compiled_step_refuses_it_too(arr: Call, change: str) -> None:
    how, message = CHANGES[change]
    step = compile_whole(
        lambda v, x: inner_loop(cost, v, x, steps=2, lr=0.1, update=returning(how))
    )
    with pytest.raises(InputError, match=f"inner update returned.*{message}"):
        step(arr(V), arr(np.array([1.0, -1.0])))


def test_a_step_and_a_learner_refuse_it_too(backend: Backend, arr: Call) -> None:
    update = returning(CHANGES["wider"][0])
    args = arr(np.ones((2, 2))), cost, None, arr(V), 1, 0.1
    with pytest.raises(InputError, match=r"inner update returned.*'b'"):
        maml_step(*args, batched="vmap", inner_optimization_step=update)
    model = (lambda p, x: p["w"] * x, arr({"w": np.ones(2)}))
    if backend.name == "torch":
        model = importlib.import_module("torch").nn.Linear(2, 2).double()
    learner = MAML(model, update=update).clone()
    x = arr(np.ones((3, 2)))
    with pytest.raises(InputError, match="inner update returned"):
        learner.adapt_on(lambda prediction, y: ops.mean(ops.square(prediction - y)), x, x)


def test_arrays_of_another_framework(backend: Backend, arr: Call) -> None:
    other = "jax" if backend.name == "torch" else "torch"
    require(other)
    foreign = load_backend(other).asarray(np.float64(0.5))
    with pytest.raises(InputError, match=rf"\({other}\) for 'b'.*\({backend.name}\)"):
        loop(arr, returning(lambda v: {**v, "b": foreign}))


# -- states ----------------------------------------------------------------------------------

STATES: dict[str, tuple[Call, Call, str]] = {
    "a number that counts": (lambda v: {"t": 0}, lambda s: {"t": s["t"] + 1}, r"1 \(int\) at 't'"),
    "a list that grows": (lambda v: [], lambda s: [*s, 0], r"state.*unexpected \['0'\]"),
    "a wider array": (
        lambda v: ops.zeros_like(v["w"]),
        lambda s: ops.stack([s, s]),
        r"state.*shape \(2, 2\)",
    ),
    "another dtype": (
        lambda v: {"m": ops.zeros_like(v["w"])},
        lambda s: {"m": ops.astype(s["m"], "float32")},
        "state.*float32.* at 'm'",
    ),
}


@pytest.mark.parametrize("mode", ["reverse", "remat"])
@pytest.mark.parametrize("case", STATES)
def test_what_changes_a_state_is_refused(arr: Call, case: str, mode: Any) -> None:
    """A number in a state would stay what it was, and a loop that is rolled has one shape."""
    init, change, message = STATES[case]
    rule = optim.Optimizer(init, lambda grads, state, v, lr: (grads, change(state)))
    with pytest.raises(InputError, match=message):
        loop(arr, rule, mode)


def test_constants_in_a_state(arr: Call, to_np: Call) -> None:
    def update(grads: Any, state: Any, v: Any, lr: Any) -> Any:
        return tree.map(lambda g: -lr * state["scale"] * g, grads), state

    rule = optim.Optimizer(lambda v: {"scale": 0.5, "name": "mine", "table": np.ones(2)}, update)
    found, plain = to_np((loop(arr, rule, "remat", 1), loop(arr, optim.sgd(), steps=1)))
    for x, y, start in zip(tree.leaves(found), tree.leaves(plain), tree.leaves(V), strict=True):
        np.testing.assert_allclose(x - start, (y - start) / 2)


# -- signatures ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("update", "form"),
    [
        (lambda v, grads: v, r"update\(v, grads, lr, stop_gradients=...\)"),
        (lambda v, grads, lr: v, r"update\(v, grads, lr, stop_gradients=...\)"),
        (lambda v, grads, lr, more, *, stop_gradients: v, r"update\(v, grads, lr, stop_"),
        (optim.Optimizer(lambda: (), lambda g, s, v, lr: (g, s)), r"init\(v\)"),
        (optim.Optimizer(lambda v: (), lambda g, s: (g, s)), r"update\(grads, state, v, lr\)"),
    ],
)
def test_a_signature_that_does_not_fit(arr: Call, update: Any, form: str) -> None:
    with pytest.raises(InputTypeError, match=f"called as {form}"):
        loop(arr, update)


@pytest.mark.parametrize("result", [None, {}, (1, 2, 3), []])
def test_a_pair_that_returns_no_pair(arr: Call, result: Any) -> None:
    rule = optim.Optimizer(lambda v: (), lambda grads, state, v, lr: result)
    with pytest.raises(InputTypeError, match=r"returns \(updates, new state\), received"):
        loop(arr, rule)


# -- optax -----------------------------------------------------------------------------------


def test_optax_accumulates_in_a_dtype_of_its_own() -> None:
    """Its updates are applied in the dtype of the variables, as optax applies them."""
    require("jax")
    optax = importlib.import_module("optax")
    with use_backend("jax") as jax:
        v = {"w": jax.asarray(np.ones(2), "bfloat16")}
        rule = optax.chain(optax.scale_by_adam(mu_dtype="float32"), optax.scale(-0.1))
        found = inner_loop(
            lambda x, v: ops.sum(v["w"] * x), v, v["w"], steps=2, lr=None, update=rule
        )
        assert jax.dtype_name(found["w"]) == "bfloat16"


def test_optax_takes_no_rate_of_the_loop() -> None:
    require("jax")
    optax = importlib.import_module("optax")
    with use_backend("jax") as jax:
        v, calls = {"w": jax.asarray(np.ones(2))}, []

        def counted(x: Any, v: Any) -> Any:
            calls.append(1)
            return ops.sum(v["w"] * x)

        with pytest.raises(InputError, match="pass None as lr"):
            inner_loop(counted, v, v["w"], steps=2, lr=0.1, update=optax.sgd(0.1))
        assert not calls
