"""Learning rates in every form: numbers, arrays, by name, by layer; what is refused, and its name.

The cost is half the squared distance to the data, so a step takes each variable to w - r (w - x).
"""

from __future__ import annotations

import types
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bad_inputs import assert_refused, call_step
from frameworks import compiles_on_torch, hardly_depends_on_the_backend, slow
from metaframe import (
    Container,
    fomaml_step,
    gradient_descent_update,
    inner_loop,
    inner_step,
    maml_step,
    meta_value_and_grad,
    ops,
    optim,
    reptile_step,
    tree,
)
from metaframe import compile as compile_whole
from metaframe.backend import Backend
from metaframe.core.rates import spread
from metaframe.errors import InputError, InputTypeError, MetaframeError
from metaframe.testing.conformance.closed_form import assert_close

Call = Callable[..., Any]

V = {"body": {"w": np.array([1.0, -2.0, 0.5]), "b": np.array(0.25)}, "head": np.ones((2, 1))}
X = {"body": {"w": np.array([0.5, 1.0, 2.0]), "b": np.array(-1.0)}, "head": np.full((2, 1), 3.0)}
Pair = namedtuple("Pair", ["body", "head"])
W = np.array([0.1, 0.2, 0.3])


def distance(batch: Any, v: Any) -> Any:
    pairs = zip(tree.leaves(v), tree.leaves(batch), strict=True)
    return sum(ops.sum(ops.square(x - y)) for x, y in pairs) / 2


def after(rates: Any, v: Any = V, x: Any = X) -> Any:
    """One step, with one rate for each variable."""
    return tree.map(lambda v, x, r: v - r * (v - x), v, x, rates)


def everywhere(rate: float) -> Any:
    return tree.map(lambda v: rate, V)


BY_NAME = {"body": {"w": W, "b": 0.4}, "head": 0.5}
FORMS: dict[str, tuple[Any, Any]] = {
    "number": (0.1, everywhere(0.1)),
    "integer": (1, everywhere(1.0)),
    "zero": (0, everywhere(0.0)),
    "float32 of NumPy": (np.float32(0.5), everywhere(0.5)),
    "integer of NumPy": (np.int64(1), everywhere(1.0)),
    "array of NumPy": (np.array(0.1), everywhere(0.1)),
    "one element": (np.array([0.1]), everywhere(0.1)),
    "by name": (BY_NAME, BY_NAME),
    "integers by name": ({"body": {"w": np.array([0, 1, 2]), "b": 1}, "head": 1}, None),
    "float32 by name": ({"body": np.float32(0.5), "head": np.ones((2, 1), "f4")}, None),
    "a row for a matrix": ({"body": 0.1, "head": np.array([0.2])}, None),
    "one element for a scalar": ({"body": {"w": 0.1, "b": np.array([[0.2]])}, "head": 0.1}, None),
    "by layer": (
        {"body": 0.1, "head": 0.2},
        {"body": {"w": 0.1, "b": 0.1}, "head": 0.2},
    ),
    "Container": (Container(body=Container(w=W, b=0.4), head=0.5), BY_NAME),
    "another order": (OrderedDict(head=0.5, body=OrderedDict(w=W, b=0.4)), BY_NAME),
    "namedtuple": (Pair({"w": W, "b": 0.4}, 0.5), BY_NAME),
    "read-only": (types.MappingProxyType(BY_NAME), BY_NAME),
}
EXPECTED = {
    "integers by name": {"body": {"w": np.array([0.0, 1.0, 2.0]), "b": 1.0}, "head": 1.0},
    "float32 by name": {"body": {"w": 0.5, "b": 0.5}, "head": 1.0},
    "a row for a matrix": {"body": {"w": 0.1, "b": 0.1}, "head": 0.2},
    "one element for a scalar": {"body": {"w": 0.1, "b": 0.2}, "head": 0.1},
}


def expected(form: str) -> Any:
    return EXPECTED.get(form, FORMS[form][1])


def assert_kept(found: Any, given: Any, backend: Backend) -> None:
    """Every variable has the shape and dtype that it had."""
    for x, like in zip(tree.leaves(found), tree.leaves(given), strict=True):
        assert (tuple(x.shape), backend.dtype_name(x)) == (
            tuple(like.shape),
            backend.dtype_name(like),
        )


@pytest.fixture(params=["NumPy", "framework"])
def made(request: pytest.FixtureRequest, arr: Call) -> Call:
    """The arrays among rates as they are, and as arrays of the framework."""
    if request.param == "NumPy":
        return lambda rate: rate

    def convert(x: Any) -> Any:
        return arr(x) if isinstance(x, np.ndarray | np.generic) else x

    return lambda rate: tree.map(
        convert, dict(rate) if isinstance(rate, types.MappingProxyType) else rate
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", ["reverse", slow("remat")])
def test_every_form(
    backend: Backend, arr: Call, to_np: Call, made: Call, form: str, mode: Any
) -> None:
    v, lr = arr(V), made(FORMS[form][0])
    found = inner_loop(distance, v, arr(X), steps=1, lr=lr, mode=mode)
    assert_kept(found, v, backend)
    assert_close(to_np(found), after(expected(form)))


@compiles_on_torch
def test_every_form_compiled(backend: Backend, arr: Call, to_np: Call, made: Call) -> None:
    """In one program, with the rates as constants and as arguments of it."""
    forms = {form: made(rate) for form, (rate, _) in FORMS.items() if form != "read-only"}

    def run(v: Any, rates: Any) -> Any:
        constants = {f: inner_loop(distance, v, arr(X), steps=1, lr=r) for f, r in forms.items()}
        given = {f: inner_loop(distance, v, arr(X), steps=1, lr=r) for f, r in rates.items()}
        return constants, given

    for results in to_np(compile_whole(run)(arr(V), forms)):
        for form, found in results.items():
            assert_close(found, after(expected(form)))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_rate_is_taken_in_the_dtype_of_its_variable(backend: Backend, dtype: str) -> None:
    v = tree.map(lambda x: backend.asarray(x, dtype), V)
    batch = tree.map(lambda x: backend.asarray(x, dtype), X)
    for wide in (np.array(0.5), {"body": np.array(0.5), "head": np.full((2, 1), 0.5)}):
        for lr in (wide, tree.map(lambda x: backend.asarray(x, "float64"), wide)):
            for update in (gradient_descent_update, optim.sgd(), optim.adam(), optim.momentum()):
                assert_kept(
                    inner_loop(distance, v, batch, steps=2, lr=lr, update=update), v, backend
                )


def test_neutral_variables_and_data(backend: Backend, to_np: Call) -> None:
    found = inner_loop(distance, V, X, steps=1, lr=BY_NAME)
    assert all(map(backend.owns, tree.leaves(found)))
    assert_close(to_np(found), after(BY_NAME))


def test_numbers_in_the_data_stay_numbers(arr: Call) -> None:
    def cost(batch: Any, v: Any) -> Any:
        assert type(batch["times"]) is int
        return sum(ops.sum(v["w"]) for _ in range(batch["times"]))

    inner_loop(cost, arr({"w": np.ones(2)}), {"times": 2}, steps=1, lr=0.1)


def test_rates_of_variables_that_do_not_adapt_are_left_alone(arr: Call, to_np: Call) -> None:
    found = inner_loop(distance, arr(V), arr(X), steps=1, lr=BY_NAME, inner_v="body")
    kept = after({**BY_NAME, "head": 0.0})
    assert_close(to_np(found), kept)
    with pytest.raises(InputError, match=r"lr has no rate for the adapted variables \['body/b'\]"):
        inner_loop(distance, arr(V), arr(X), steps=1, lr={"body": {"w": 0.1}}, inner_v="body")


@pytest.mark.parametrize("mode", ["reverse", "remat", "mixed"])
def test_the_rate_of_a_layer_is_differentiated(
    backend: Backend, arr: Call, to_np: Call, mode: Any
) -> None:
    """The derivative of sum(v') is -sum(v - x), over the variables of the layer."""

    def meta_cost(rates: Any, x: Any) -> Any:
        v = inner_loop(distance, arr(V), x, steps=1, lr=rates, mode=mode)
        return sum(map(ops.sum, tree.leaves(v)))

    tasks = tree.map(lambda x: x[None], X)
    rates = {"body": np.array([0.1]), "head": np.full((2, 1), 0.2)}
    grads = to_np(meta_value_and_grad(meta_cost, task_map="loop")(arr(rates), arr(tasks)).grads)
    off = tree.map(lambda v, x: v - x, V, X)
    body = -(off["body"]["w"].sum() + off["body"]["b"])
    assert_close(grads, {"body": np.array([body]), "head": -off["head"]})


# -- properties ------------------------------------------------------------------------------


class Leaf:
    """A variable in a structure that is still to be made of containers."""


nested = st.recursive(
    st.just(Leaf()),
    lambda inner: st.dictionaries(st.sampled_from("abcd"), inner, min_size=1, max_size=3),
    max_leaves=6,
).filter(lambda node: isinstance(node, dict))


def built(node: Any, draw: Call, leaf: Call, cut: bool) -> Any:
    """`node` of containers that are drawn, with a leaf of any part of it where `cut` allows."""
    if isinstance(node, Leaf) or (cut and draw(st.booleans())):
        return leaf()
    below = {key: built(x, draw, leaf, cut) for key, x in node.items()}
    kind = draw(st.sampled_from(["dict", "Container", "OrderedDict", "namedtuple"]))
    if kind == "namedtuple":
        return namedtuple("Node", list(below))(**below)
    return {"dict": dict, "Container": Container, "OrderedDict": OrderedDict}[kind](below)


@hardly_depends_on_the_backend
@settings(max_examples=60)
@given(data=st.data())
def test_any_part_of_any_structure(backend: Backend, data: Any) -> None:
    """The rate of a variable is the one at it or at the nearest node above it."""
    node = data.draw(nested)
    v = built(node, data.draw, lambda: backend.asarray(np.ones(2)), cut=False)
    count = iter(range(1, 100))
    rates = built(node, data.draw, lambda: next(count) / 128, cut=True)
    found = spread(rates, v)
    if not isinstance(rates, float):
        assert tree.structure(found) == tree.structure(v)
    given_at = dict(zip(tree.key_chains(rates), tree.leaves(rates), strict=True))
    for i, chain in enumerate(tree.key_chains(v)):
        above = [chain.rsplit("/", k)[0] for k in range(chain.count("/") + 1)] + [""]
        nearest = next(given_at[part] for part in above if part in given_at)
        assert (found if isinstance(found, float) else tree.leaves(found)[i]) == nearest


# -- the steps -------------------------------------------------------------------------------


def batched_distance(task: Any, v: Any) -> Any:
    return distance({"body": {"w": task["x"], "b": task["y"]}, "head": task["z"]}, v)


BATCH = {"x": np.stack([X["body"]["w"]] * 2), "y": np.zeros(2), "z": np.ones((2, 2, 1))}


@pytest.mark.parametrize(
    "form", [slow("by name"), "by layer", slow("Container"), slow("one element")]
)
def test_the_steps_take_every_form(backend: Backend, arr: Call, to_np: Call, form: str) -> None:
    lr, full = FORMS[form][0], tree.map(lambda r, v: r * np.ones_like(v), expected(form), V)
    for step, args in (
        (maml_step, (arr(BATCH), batched_distance, None, arr(V), 2)),
        (fomaml_step, (arr(BATCH), batched_distance, None, arr(V), 2)),
        (reptile_step, (arr(BATCH), batched_distance, arr(V), 2)),
    ):
        found, wanted = (to_np(step(*args, rate, batched="vmap")[:2]) for rate in (lr, arr(full)))
        assert_close(found, wanted)


@pytest.mark.parametrize("direction", ["gradients", "displacement"])
@pytest.mark.parametrize("batched", [True, "vmap"])
def test_reptile_divides_by_the_rate_of_each_variable(
    arr: Call, to_np: Call, direction: Any, batched: Any
) -> None:
    """One step of the paper's direction is the gradient: the rates cancel."""
    v = tree.map(lambda x: np.stack([x] * 2), V) if batched is True else V

    def cost(task: Any, v: Any) -> Any:
        total = batched_distance(task, v)
        return total / 2 if batched is True else total  # the mean over tasks

    rates = {"body": {"w": W, "b": 0.4}, "head": np.full((2, 1), 0.5)}
    args = (arr(BATCH), cost, arr(v), 1)
    _, found = to_np(reptile_step(*args, rates, batched=batched, direction=direction))
    if direction == "displacement":
        wanted = {
            "body": {"w": V["body"]["w"] - X["body"]["w"], "b": V["body"]["b"]},
            "head": V["head"] - 1.0,
        }
    else:
        _, plain = to_np(reptile_step(*args, optim_rates(rates), batched=batched))
        wanted = plain
    assert_close(found, wanted)


def optim_rates(rates: Any) -> Any:
    """The same rates as full arrays of NumPy."""
    return tree.map(lambda r, v: np.broadcast_to(r, v.shape), rates, V)


@pytest.mark.parametrize("rate", [0, np.zeros(1), {"body": 0.1, "head": np.array([[0.1], [0.0]])}])
def test_reptile_refuses_to_divide_by_zero(arr: Call, rate: Any) -> None:
    args = (arr(BATCH), batched_distance, arr(V), 1)
    with pytest.raises(InputError, match=r"inner_learning_rate.*reptile_step divides by"):
        reptile_step(*args, rate, batched="vmap")
    with pytest.raises(InputError, match=r"optimizer's learning_rate.*reptile_step divides by"):
        reptile_step(*args, None, batched="vmap", inner_optimization_step=optim.sgd(rate))


# -- what is refused -------------------------------------------------------------------------

REFUSED: dict[str, tuple[Any, type[Exception], list[str]]] = {
    "boolean": (True, TypeError, ["number", "True"]),
    "boolean of NumPy": (np.bool_(True), TypeError, ["number"]),
    "text": ("fast", TypeError, ["number", "'fast'"]),
    "complex": (1j, TypeError, ["number", "1j"]),
    "objects": (np.array([None]), TypeError, ["number"]),
    "function": (len, TypeError, ["number", "received a function", "schedule"]),
    "negative": (-0.1, ValueError, ["finite and not negative", "-0.1"]),
    "not finite": (float("nan"), ValueError, ["finite and not negative", "nan"]),
    "negative of NumPy": ({"bias": 0.1, "latent": np.array([0.1, -1.0])}, ValueError, ["'latent'"]),
    "a key that is none": (
        {"bias": 0.1, "latnt": 0.1},
        ValueError,
        ["has 'latnt', which is no variable", "Did you mean 'latent'?"],
    ),
    "a key too deep": ({"bias": {"x": 0.1}, "latent": 0.1}, ValueError, ["'bias/x'"]),
    "a key too few": ({"bias": 0.1}, ValueError, ["no rate for", "'latent'"]),
    "None for a variable": ({"bias": 0.1, "latent": None}, ValueError, ["no rate for", "'latent'"]),
    "nothing": ({}, ValueError, ["no rate for", "'bias'", "'latent'"]),
    "a list for names": ([0.1, 0.1], ValueError, ["has '0', which is no variable"]),
    "wider": (
        {"bias": 0.1, "latent": np.ones((3, 2))},
        ValueError,
        ["['latent'] has shape (3, 2)", "shape (2,)", "broadcasts"],
    ),
    "wider for a scalar": (
        {"bias": np.ones(2), "latent": 0.1},
        ValueError,
        ["['bias'] has shape (2,)", "shape ()"],
    ),
    "wider for all": (np.ones((3, 2)), ValueError, ["has shape (3, 2)"]),
}


class Counted:
    """The cost of `bad_inputs`, without the tasks."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, task: Any, v: Any) -> Any:
        self.calls += 1
        return ops.square(ops.sum(task["x"] * v["latent"]) + v["bias"] - task["y"])


@pytest.mark.parametrize("bad", REFUSED)
@pytest.mark.parametrize("step", ["maml_step", "fomaml_step", "reptile_step", "inner_loop"])
def test_what_is_refused_before_any_work(arr: Call, bad: str, step: str) -> None:
    rate, kind, parts = REFUSED[bad]
    cost = Counted()
    name = "lr" if step == "inner_loop" else "inner_learning_rate"

    def call() -> Any:
        if step != "inner_loop":
            return call_step(step, cost, arr, rate=rate)  # type: ignore[arg-type]
        task = arr({"x": np.ones(2), "y": np.ones(())})
        v = arr({"bias": np.array(0.5), "latent": np.ones(2)})
        return inner_loop(cost, v, task, steps=1, lr=rate)

    assert_refused(cost, kind, [name, *parts], call)  # type: ignore[arg-type]
    with pytest.raises(MetaframeError) as caught:
        call()
    assert not {"tree", "PyTreeSpec", "result"} & set(str(caught.value).split())


def test_boolean_and_complex_arrays_are_refused(backend: Backend, arr: Call) -> None:
    v = arr({"w": np.ones(2)})
    for bad in (arr(np.array(True)), {"w": backend.asarray(np.array(1j))}):
        with pytest.raises(InputTypeError, match=r"lr: .* must be a number .* of (bool|comp)"):
            inner_loop(distance, v, v, steps=1, lr=bad)


def test_no_rate_where_the_update_brings_none(arr: Call) -> None:
    with pytest.raises(InputError, match="no learning rate"):
        inner_loop(distance, arr(V), arr(X), steps=1, lr=None)


# -- optimizers ------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["by name", "by layer", "Container", "one element"])
def test_the_rate_of_an_optimizer_takes_every_form(arr: Call, to_np: Call, form: str) -> None:
    rule = optim.sgd(FORMS[form][0])
    found = inner_loop(distance, arr(V), arr(X), steps=1, lr=None, update=rule)
    assert_close(to_np(found), after(expected(form)))
    gradients = tree.map(lambda v, x: v - x, V, X)
    updates, _ = rule.update(arr(gradients), (), arr(V))
    assert_close(to_np(optim.apply_updates(arr(V), updates)), after(expected(form)))
    again = gradient_descent_update(arr(V), arr(gradients), FORMS[form][0])
    assert_close(to_np(again), after(expected(form)))


@pytest.mark.parametrize("make", [optim.sgd, optim.momentum, optim.adam, optim.adamw])
@pytest.mark.parametrize("rate", [True, -0.1, float("nan"), "fast", {"w": -1.0}])
def test_the_rate_of_an_optimizer_is_checked(make: Call, rate: Any) -> None:
    with pytest.raises((InputError, InputTypeError), match="learning_rate"):
        make(rate)


def test_the_rate_of_an_optimizer_has_to_fit(arr: Call) -> None:
    for rate in ({"body": 0.1}, np.ones((2, 3))):
        with pytest.raises(InputError, match="the optimizer's learning_rate"):
            inner_loop(distance, arr(V), arr(X), steps=1, lr=None, update=optim.adam(rate))


@pytest.mark.parametrize(
    ("make", "name", "value"),
    [
        (optim.adam, "b1", -0.1),
        (optim.adam, "b2", 1.0),
        (optim.adam, "b1", float("nan")),
        (optim.adam, "b1", "a"),
        (optim.adam, "b2", None),
        (optim.adam, "b1", True),
        (optim.adam, "eps", -1e-8),
        (optim.adamw, "weight_decay", -0.1),
        (optim.momentum, "decay", -0.5),
        (optim.momentum, "nesterov", 1),
        (optim.rmsprop, "decay", 1.5),
        (optim.rmsprop, "eps", float("inf")),
        (optim.adagrad, "initial_accumulator", -1.0),
    ],
)
def test_the_settings_of_an_optimizer_are_checked(make: Call, name: str, value: Any) -> None:
    with pytest.raises((InputError, InputTypeError), match=f"{name} (has|must) .* received"):
        make(0.1, **{name: value})


def test_a_decay_of_adam_is_no_array(arr: Call) -> None:
    with pytest.raises(InputTypeError, match="b1 must be a Python number, received an array"):
        optim.adam(0.1, b1=arr(0.9))


# -- parameters by name ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "lr",
    [
        {"layer.w": W, "layer.b": 0.4},
        {"layer": {"w": W, "b": np.array([0.4])}},
        {"layer.w": W, "layer": 0.4},
    ],
)
def test_parameters_take_the_rate_of_their_layer(arr: Call, to_np: Call, lr: Any) -> None:
    """Of names with dots too, and the nearest counts."""
    params = {"layer.w": V["body"]["w"], "layer.b": V["body"]["b"]}
    target = arr({"layer.w": X["body"]["w"], "layer.b": X["body"]["b"]})
    found = inner_step(params, lambda p: distance(target, p), lr)
    wanted = after({"layer.w": W, "layer.b": 0.4}, params, to_np(target))
    assert_close(to_np(found), wanted)
