"""Refusals of data that no framework takes, by every public function that takes arrays.

Object, text, date and masked arrays, structures without an end, keys that name two places, choices
of another form, axes that tracing does not know: one of our errors, which names the argument.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import metaframe as mf
from bad_inputs import BATCH, STEPS, VARIABLES, CountedCost, assert_refused, call_step
from frameworks import require
from metaframe import Container, ops, tree
from metaframe.errors import BackendError, InputError, InputTypeError, MetaframeError

Call = Callable[..., Any]

NO_NUMBERS = {
    "object": np.array([[1, None]] * 3, object),
    "numbers as objects": np.array([[1, 2]] * 3, object),
    "text": np.array([["a", "b"]] * 3),
    "bytes": np.array([[b"a", b"b"]] * 3),
    "dates": np.array([["2020-01-01", "2020-01-02"]] * 3, "M8[D]"),
    "times": np.array([[1, 2]] * 3, "m8[s]"),
    "records": np.zeros((3, 2), [("a", "f8")]),
    "raw": np.zeros((3, 2), "V8"),
}
MASKED = {
    "masked": np.ma.masked_array(np.ones((3, 2)), [[False, True]] * 3),
    "masked nowhere": np.ma.masked_array(np.ones((3, 2))),
}
WIDE = {
    "big-endian": np.arange(6.0).reshape(3, 2).astype(">f8"),
    "big-endian half": np.arange(6.0).reshape(3, 2).astype(">f2"),
    "long double": np.arange(6.0).reshape(3, 2).astype(np.longdouble),
}
"""Forms of numbers that a framework may not have, of the values 0 to 5."""


@pytest.fixture
def counted() -> CountedCost:
    return CountedCost()


def calls(x: Any, cost: Call) -> dict[str, Call]:
    """Public functions on the array `x` of three tasks, by the name an error gives it."""
    batch, row = {**BATCH, "x": x}, {"x": x[0], "y": BATCH["y"][0]}
    wrong = {**VARIABLES, "latent": x[0]}
    return {
        **{
            f"{step} batch['x']": lambda step=step: call_step(
                step, cost, lambda given: given, batch=batch
            )
            for step in STEPS
        },
        "maml_step variables['latent']": lambda: call_step(
            "maml_step", cost, lambda given: given, variables=wrong
        ),
        "inner_loop batch['x']": lambda: mf.inner_loop(cost, VARIABLES, row, steps=1, lr=0.1),
        "inner_loop v['latent']": lambda: mf.inner_loop(cost, wrong, BATCH, steps=1, lr=0.1),
        "meta_value_and_grad batch['x']": lambda: mf.meta_value_and_grad(
            lambda v, task: cost(task, v)
        )(VARIABLES, batch),
        "value_and_grad args['0/x']": lambda: mf.value_and_grad(lambda v, task: cost(task, v))(
            VARIABLES, row
        ),
        "map_tasks batch['0']": lambda: mf.map_tasks(lambda rows: rows)(x),
        "convert 'x'": lambda: mf.convert({"x": x}, to=mf.current_backend().name),
        "ops.mean received": lambda: ops.mean(x),
        "compile received": lambda: mf.compile(lambda rows: rows)(x),
    }


@pytest.mark.parametrize("kind", [*NO_NUMBERS, *MASKED])
def test_arrays_of_something_else(backend: Any, counted: CountedCost, kind: str) -> None:
    x = {**NO_NUMBERS, **MASKED}[kind]
    why = "mask" if kind in MASKED else "no numbers"
    for where, call in calls(x, counted).items():
        assert_refused(counted, TypeError, [where.partition(" ")[2], why], call)
    with pytest.raises(InputTypeError, match=why):
        backend.asarray(x)


@pytest.mark.parametrize("kind", [*NO_NUMBERS, *MASKED])
def test_rates_of_something_else(backend: Any, counted: CountedCost, kind: str) -> None:
    rate = {**NO_NUMBERS, **MASKED}[kind][0]
    for lr in (rate, {"latent": rate, "bias": 0.1}):
        with pytest.raises(InputTypeError, match="learning"):
            call_step("maml_step", counted, lambda given: given, rate=lr)
    assert counted.calls == 0


@pytest.mark.parametrize("kind", WIDE)
def test_forms_of_numbers(backend: Any, arr: Call, to_np: Call, kind: str) -> None:
    x = WIDE[kind]
    plain = {**BATCH, "x": x.astype(np.float64)}
    expected = to_np(call_step("maml_step", CountedCost(), arr))
    for how in ({"batch": {**BATCH, "x": x}}, {"rate": np.array(0.1, x.dtype.newbyteorder(">"))}):
        given = {"batch": plain, **how}
        found = to_np(call_step("maml_step", CountedCost(), lambda given: given, **given))
        tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3), found, expected)
    rates = {"latent": WIDE[kind][0] / 10, "bias": 0.1}
    call_step("maml_step", CountedCost(), lambda given: given, batch=plain, rate=rates)
    assert to_np(backend.asarray(x)).tolist() == x.tolist()


def test_an_integer_that_nothing_holds(backend: Any) -> None:
    with pytest.raises(InputError, match=r"variables\['w'\] is 1180591620717411303424"):
        mf.meta_value_and_grad(lambda v, task: v["w"] * task)({"w": 2**70}, np.ones(3))


# -- structures without an end -----------------------------------------------------------------


def endless(kind: str) -> Any:
    if kind == "dict":
        mapping: dict[str, Any] = {}
        mapping["a"] = mapping
        return mapping
    if kind == "list":
        sequence: list[Any] = []
        sequence.append(sequence)
        return sequence
    nest: Any = np.ones(3)
    for _ in range(5000):
        nest = {"a": nest} if kind == "deep dict" else [nest]
    return nest


@pytest.mark.parametrize("kind", ["dict", "list", "deep dict", "deep list"])
def test_structures_without_an_end(backend: Any, counted: CountedCost, kind: str) -> None:
    given = endless(kind)
    for name, call in {
        "batch": lambda: call_step("maml_step", counted, lambda x: x, batch=given),
        "variables": lambda: call_step("maml_step", counted, lambda x: x, variables=given),
        "v": lambda: mf.inner_loop(counted, given, BATCH, steps=1, lr=0.1),
        "the arguments": lambda: mf.value_and_grad(counted)(VARIABLES, given),
        "the structure": lambda: mf.convert(given, to=backend.name),
    }.items():
        assert_refused(counted, ValueError, [name, "holds itself", "deeply"], call)
    for lr in (given, {"latent": given, "bias": 0.1}):
        with pytest.raises(InputError, match="holds itself"):
            call_step("maml_step", counted, lambda x: x, rate=lr)
    with pytest.raises(MetaframeError):
        call_step("maml_step", counted, lambda x: x, inner_v=given)


@pytest.mark.parametrize("kind", ["dict", "deep dict"])
def test_containers_without_an_end(kind: str) -> None:
    with pytest.raises(InputError, match="the Container holds itself"):
        Container(a=endless(kind))


# -- keys that name two places -----------------------------------------------------------------

SLASH = {"a/b": np.ones(2), "a": {"b": np.ones(2), "c": np.ones(2)}}
NUMBER = {1: np.ones(2), "1": np.ones(2)}


def test_a_key_chain_that_names_two_leaves(backend: Any) -> None:
    """Without a choice they are told apart; a choice by that name is refused."""

    def task_cost(v: Any, task: Any) -> Any:
        return sum(ops.sum(x * task) * (i + 1) for i, x in enumerate(tree.leaves(v)))

    for variables, chain in ((SLASH, "a/b"), (NUMBER, "1")):
        grads = mf.meta_value_and_grad(task_cost)(variables, np.ones(3)).grads
        found = [float(backend.to_numpy(g)[0]) for g in tree.leaves(grads)]
        assert found == [i + 1.0 for i in range(len(found))]
        for choice in (chain, [chain], {1: True} if chain == "1" else {"a": {"b": True}}):
            with pytest.raises(InputError, match=f"outer_v: the key chain '{chain}' names 2"):
                mf.meta_value_and_grad(task_cost, outer_v=choice)(variables, np.ones(3))
        with pytest.raises(InputError, match=f"two leaves have the key chain '{chain}'"):
            mf.inner_loop(
                lambda batch, v: task_cost(v, batch), variables, 1.0, steps=1, lr={chain: 0.1}
            )


def test_a_key_that_begins_like_another() -> None:
    """Haiku's keys have slashes: "mlp" is a module, and so is "mlp/linear"."""
    params = {"mlp": {"w": 0.0}, "mlp/linear": {"w": 0.0, "b": 0.0}}
    assert tree.chosen(params, "mlp") == (True, False, False)
    assert tree.chosen(params, ["mlp/linear/w"]) == (False, False, True)
    assert tree.chosen(params, {"mlp/linear": {"b": True}}) == (False, True, False)


def test_rates_of_keys_with_slashes(backend: Any, to_np: Call) -> None:
    params = {"mlp": {"w": np.ones(1)}, "mlp/linear": {"w": np.ones(1)}}
    found = mf.inner_loop(
        lambda batch, v: sum(ops.sum(x) for x in tree.leaves(v)),
        params,
        1.0,
        steps=1,
        lr={"mlp": 0.25, "mlp/linear": 0.5},
    )
    assert [x.tolist() for x in tree.leaves(to_np(found))] == [[0.75], [0.5]]


def test_two_rates_for_one_variable(backend: Any) -> None:
    with pytest.raises(InputError, match="lr has two rates for one variable"):
        mf.inner_loop(
            lambda batch, v: ops.sum(v["a"]["b"]),
            {"a": {"b": np.ones(1)}},
            1.0,
            steps=1,
            lr={"a.b": 0.1, "a": {"b": 0.2}},
        )


# -- choices of another form -------------------------------------------------------------------


@pytest.mark.parametrize(
    "choice",
    [3, 3.5, True, False, b"latent", object(), len, [True], [None], [["latent"], 3], [2.5]],
    ids=lambda choice: "object" if type(choice) is object else repr(choice),
)
@pytest.mark.parametrize("name", ["inner_v", "outer_v"])
def test_choices_of_another_form(
    backend: Any, counted: CountedCost, name: str, choice: Any
) -> None:
    def step() -> None:
        call_step("maml_step", counted, lambda x: x, **{name: choice})

    with pytest.raises(MetaframeError, match=name) as caught:
        step()
    assert isinstance(caught.value, (TypeError, ValueError))
    assert counted.calls == 0


@pytest.mark.parametrize("value", ["no", 3, 0.5, np.array([True, False])], ids=repr)
def test_a_choice_that_is_no_boolean(backend: Any, counted: CountedCost, value: Any) -> None:
    parts = ["inner_v['latent']", "True or False"]
    choice = {"latent": value}
    assert_refused(
        counted,
        TypeError,
        parts,
        lambda: call_step("maml_step", counted, lambda x: x, inner_v=choice),
    )
    assert tree.chosen({"a": 0, "b": 0}, {"a": np.True_, "b": 0}) == (True, False)


# -- what tracing does not know, and devices without values -----------------------------------


@pytest.mark.parametrize("shape", [(None, 2), None])
def test_a_task_axis_of_unknown_length(shape: Any) -> None:
    require("tensorflow")
    tf = importlib.import_module("tensorflow")
    v = {"w": tf.ones(2)}

    def cost(batch: Any, v: Any) -> Any:
        return ops.sum(batch) * ops.sum(v["w"])

    for fn, axis in (
        (lambda x: mf.maml_step(x, cost, None, v, 1, 0.1, batched="vmap"), "task"),
        (lambda x: mf.meta_value_and_grad(lambda v, t: cost(t, v))(v, x).cost, "task"),
        (lambda x: mf.map_tasks(ops.sum)(x), "task"),
        (lambda x: mf.inner_loop(cost, v, mf.per_step(x), lr=0.1), "step"),
    ):
        traced = tf.function(fn, input_signature=[tf.TensorSpec(shape)], autograph=False)
        with pytest.raises(InputError, match=f"batch.* the length of its {axis} axis is not known"):
            traced.get_concrete_function()


def test_a_device_without_values(counted: CountedCost) -> None:
    require("torch")
    torch = importlib.import_module("torch")
    on_meta = torch.device("meta")

    def given(structure: Any) -> Any:
        return tree.map(lambda x: torch.ones(x.shape), structure)

    with on_meta, mf.use_backend("torch"):
        for arr in (lambda structure: structure, given):
            assert_refused(
                counted,
                BackendError,
                ["'meta'", "no values"],
                lambda arr=arr: call_step("maml_step", counted, arr),
            )
    with pytest.raises(BackendError, match="'meta'"):
        mf.set_backend("torch", device="meta")
    model = torch.nn.Linear(2, 1, device=on_meta)
    x, y = np.ones((3, 2), "float32"), np.ones((3, 1), "float32")
    task = mf.Task(x, y, x, y)
    with pytest.raises(BackendError, match="'meta'"):
        mf.MAML(model).meta_value_and_grad(lambda out, y: ((out - y) ** 2).mean(), [task])
