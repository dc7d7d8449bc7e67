"""Refusals after a cost has run: mixed frameworks, values that are not finite."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from bad_inputs import BATCH, STEPS, VARIABLES, CountedCost, assert_refused, call_step
from frameworks import BACKENDS, require
from metaframe import compile as compile_whole
from metaframe import (
    inner_loop,
    maml_step,
    meta_value_and_grad,
    ops,
    reptile_step,
    unset_backend,
    use_backend,
)
from metaframe.backend import load_backend
from metaframe.errors import InputError, InputTypeError, NonFiniteError, UnknownKeyError

Call = Callable[..., Any]


@pytest.fixture
def cost() -> CountedCost:
    return CountedCost()


@pytest.fixture(params=STEPS)
def step(request: pytest.FixtureRequest, arr: Call, cost: CountedCost) -> Call:
    """Each step on good arguments, any of which can be replaced."""
    return functools.partial(call_step, request.param, cost, arr)


@pytest.fixture
def maml(arr: Call, cost: CountedCost) -> Call:
    """`maml_step` on good arguments."""
    return functools.partial(call_step, "maml_step", cost, arr)


@pytest.fixture
def refused(cost: CountedCost) -> Call:
    """`refused(builtin, fragments, call)`: it raises ours and the builtin, before any work."""
    return functools.partial(assert_refused, cost)


# -- the cost ----------------------------------------------------------------------------


def test_a_cost_that_is_no_function(step: Call, refused: Call) -> None:
    refused(TypeError, ["must be a function", "received float"], lambda: step(cost=3.0))


@pytest.mark.parametrize("name", ["inner_batch_fn", "outer_batch_fn"])
def test_a_batch_function_that_is_none(maml: Call, refused: Call, name: str) -> None:
    refused(TypeError, [name, "function", "dict"], lambda: maml(**{name: {}}))


def test_an_update_that_is_none(step: Call, refused: Call) -> None:
    parts = ["inner update", "optim.Optimizer", "received str"]
    refused(TypeError, parts, lambda: step(inner_optimization_step="adam"))


@pytest.mark.parametrize("batched", [False, "vmap", "scan"])
def test_a_cost_that_is_no_scalar(step: Call, batched: Any) -> None:
    def vector(task: Any, v: Any) -> Any:
        return ops.reshape(task["x"], (2,)) * v["latent"]

    pattern = r"cost.* returned shape \(2,\), need a scalar; did you forget a mean\?"
    with pytest.raises(InputError, match=pattern):
        step(cost=vector, batched=batched)


def test_an_outer_cost_that_is_no_scalar(arr: Call, cost: CountedCost) -> None:
    with pytest.raises(InputError, match=r"outer_cost_fn returned shape \(2,\), need a scalar"):
        maml_step(
            arr(BATCH), cost, lambda _, v: v["latent"], arr(VARIABLES), 1, 0.1, batched="vmap"
        )


def test_a_cost_that_is_a_number(step: Call, backend: Any) -> None:
    with pytest.raises(InputTypeError, match=f"returned float, need a scalar.*{backend.name}"):
        step(cost=lambda task, v: 1.0)


def test_a_cost_that_ignores_its_variables(step: Call) -> None:
    with pytest.raises(InputError, match="cost does not depend on any inner variable"):
        step(cost=lambda task, v: ops.sum(ops.square(task["x"])))


def test_a_cost_that_ignores_the_adapted_variables(arr: Call) -> None:
    def cost(task: Any, v: Any) -> Any:
        return ops.sum(task["x"] * v["latent"])

    with pytest.raises(InputError, match="cost does not depend on any inner variable"):
        maml_step(arr(BATCH), cost, None, arr(VARIABLES), 1, 0.1, batched="vmap", inner_v="bias")


def test_a_cost_that_ignores_some_variables(arr: Call, to_np: Call) -> None:
    def cost(task: Any, v: Any) -> Any:
        return ops.sum(task["x"] * ops.square(v["latent"]))

    _, grads, _ = maml_step(arr(BATCH), cost, None, arr(VARIABLES), 1, 0.1, batched="vmap")
    assert to_np(grads["bias"]).tolist() == 0.0


def test_an_update_that_changes_the_structure(step: Call) -> None:
    def update(v: Any, grads: Any, lr: Any, *, stop_gradients: bool) -> Any:
        del grads, lr, stop_gradients
        return {"bias": v["bias"]}

    with pytest.raises(InputError, match=r"inner update returned.*missing \['latent'\]"):
        step(inner_optimization_step=update)


# -- frameworks --------------------------------------------------------------------------


@pytest.fixture(params=[1, 2], ids=["next", "one after"])
def other(request: pytest.FixtureRequest, backend_name: str) -> Any:
    """Each backend but the one under test."""
    name = BACKENDS[(BACKENDS.index(backend_name) + request.param) % len(BACKENDS)]
    require(name)
    return load_backend(name)


def test_a_batch_of_another_framework(step: Call, refused: Call, backend: Any, other: Any) -> None:
    batch = {name: other.asarray(x) for name, x in BATCH.items()}
    parts = [repr(backend.name), repr(other.name), "set_backend"]
    refused(TypeError, parts, lambda: step(batch=batch))


def test_a_batch_of_another_framework_with_none_selected(
    backend_name: str, other: Any, cost: CountedCost, refused: Call
) -> None:
    here = load_backend(backend_name)
    batch = {name: other.asarray(x) for name, x in BATCH.items()}
    variables = {name: here.asarray(x) for name, x in VARIABLES.items()}
    parts = ["two frameworks", repr(here.name), repr(other.name), "Convert"]
    refused(TypeError, parts, lambda: maml_step(batch, cost, None, variables, 1, 0.1))


def test_a_cost_of_another_framework(step: Call, backend: Any, other: Any) -> None:
    pattern = f"returned an array of '{other.name}', need a scalar array of '{backend.name}'"
    with pytest.raises(InputTypeError, match=pattern):
        step(cost=lambda task, v: other.asarray(1.0))


def test_a_rate_of_another_framework(step: Call, refused: Call, backend: Any, other: Any) -> None:
    parts = [repr(backend.name), repr(other.name)]
    refused(TypeError, parts, lambda: step(rate=other.asarray(0.1)))


def test_neutral_inputs_and_nothing_selected(cost: CountedCost, refused: Call) -> None:
    unset_backend()
    refused(
        RuntimeError,
        ["no backend is selected", "set_backend"],
        lambda: maml_step(BATCH, cost, None, VARIABLES, 1, 0.1, batched="vmap"),
    )


# -- values that are not finite ----------------------------------------------------------


def not_finite(task: Any, v: Any) -> Any:
    """NaN where the task asks for it."""
    return ops.sum(ops.square(v["latent"])) * ops.sum(task["y"])


@pytest.mark.parametrize("batched", [False, "vmap", "scan"])
def test_the_first_task_that_is_not_finite_is_named(step: Call, arr: Call, batched: Any) -> None:
    y = np.array([1.0, np.nan, np.inf])
    with pytest.raises(NonFiniteError, match="task 1 is nan") as caught:
        step(batch=arr({**BATCH, "y": y}), cost=not_finite, batched=batched, check_finite=True)
    assert isinstance(caught.value, FloatingPointError)


UNSPECIFIC = {"x": np.array([[1.0], [np.nan], [1.0]])}


def squared(task: Any, v: Any) -> Any:
    return ops.sum(ops.square(v["u"])) * ops.mean(task["x"])


def test_a_mean_over_all_tasks_blames_none_of_them(arr: Call) -> None:
    batch, v = arr(UNSPECIFIC), arr({"u": np.ones((3, 1))})
    for step in (
        functools.partial(maml_step, batch, squared, None),
        functools.partial(reptile_step, batch, squared),
    ):
        with pytest.raises(NonFiniteError, match="the mean cost of all tasks is nan"):
            step(v, 1, 0.1, check_finite=True)


def test_with_a_choice_a_task_the_task_is_named(arr: Call) -> None:
    batch, v = arr(UNSPECIFIC), arr({"u": np.ones(1)})
    how = {"batched": False, "inner_v": [["u"], None, ["u"]], "check_finite": True}
    with pytest.raises(NonFiniteError, match="task 1 is nan"):
        maml_step(batch, squared, None, v, 1, 0.1, **how)


@pytest.mark.parametrize("batched", [True, False, "vmap"])
def test_a_direction_that_is_not_finite_is_named(arr: Call, batched: Any) -> None:
    def cost(task: Any, v: Any) -> Any:
        # Zero everywhere, with a derivative of 0 * inf.
        x = ops.mean(task["x"])
        return ops.sum(ops.where(x > 0, ops.log(v["u"] * x), 0.0))

    shape = (3, 1) if batched is True else (1,)
    batch, v = arr({"x": np.zeros((3, 2))}), arr({"u": np.ones(shape)})
    with pytest.raises(NonFiniteError, match="gradient of 'u'"):
        reptile_step(batch, cost, v, 1, 0.1, batched=batched, check_finite=True)


def test_not_finite_is_not_looked_for_unless_asked(step: Call, arr: Call, to_np: Call) -> None:
    batch = arr({**BATCH, "y": np.array([1.0, np.nan, 1.0])})
    assert np.isnan(to_np(step(batch=batch, cost=not_finite)[0]))


def test_a_gradient_that_is_not_finite_is_named(step: Call, arr: Call) -> None:
    def cost(task: Any, v: Any) -> Any:
        # The root is finite at zero and its derivative is not.
        return ops.sum(ops.sqrt(v["latent"] * task["x"])) + v["bias"] * 0.0

    batch = arr({"x": np.zeros((3, 2)), "y": np.ones(3)})
    with pytest.raises(NonFiniteError, match=r"not finite|is nan|is inf"):
        step(batch=batch, cost=cost, check_finite=True)


def test_check_finite_cannot_look_into_a_compiled_function(arr: Call, cost: CountedCost) -> None:
    compiled = compile_whole(maml_step)
    args = (arr(BATCH), cost, None, arr(VARIABLES), 1, 0.1)
    with pytest.raises(InputError, match=r"check_finite looks at values.*outside"):
        compiled(*args, batched="vmap", check_finite=True)


# -- the composable core -----------------------------------------------------------------


def test_inner_loop_checks_its_arguments(arr: Call, cost: CountedCost, refused: Call) -> None:
    task = arr({"x": BATCH["x"][0], "y": BATCH["y"][0]})
    v = arr(VARIABLES)

    def loop(**changed: Any) -> Any:
        given = {"steps": 1, "lr": 0.1, **changed}
        return inner_loop(cost, v, task, **given)

    refused(ValueError, ["steps", "at least 0", "-1"], lambda: loop(steps=-1))
    refused(TypeError, ["steps", "int", "1.5"], lambda: loop(steps=1.5))
    refused(ValueError, ["learning rate", "-0.1"], lambda: loop(lr=-0.1))
    refused(ValueError, ["mode", "'fast'"], lambda: loop(mode="fast"))
    refused(KeyError, ["'bais'", "'bias'"], lambda: loop(inner_v="bais"))
    refused(ValueError, ["inner_v", "none"], lambda: loop(inner_v=[]))


def test_meta_value_and_grad_checks_its_arguments(
    arr: Call, cost: CountedCost, refused: Call
) -> None:
    v, tasks = arr(VARIABLES), arr(BATCH)
    step = meta_value_and_grad(cost)
    parts = ["num_tasks=9", "batch has 3"]
    refused(ValueError, parts, lambda: step(v, tasks, num_tasks=9))
    refused(TypeError, ["variable 'n'", "int64"], lambda: step(arr({"n": np.arange(2)}), tasks))
    refused(ValueError, ["no arrays"], lambda: step(v, {}))
    refused(
        KeyError,
        ["'laten'", "'latent'"],
        lambda: meta_value_and_grad(cost, outer_v="laten")(v, tasks),
    )
    refused(TypeError, ["task_cost", "function"], lambda: meta_value_and_grad(None))  # type: ignore[arg-type]
    refused(ValueError, ["chunk_size", "0"], lambda: meta_value_and_grad(cost, chunk_size=0))


def test_ours_derive_from_what_a_user_would_catch() -> None:
    assert issubclass(InputError, ValueError)
    assert issubclass(InputTypeError, TypeError)
    assert issubclass(UnknownKeyError, KeyError)


def test_a_message_reads_as_a_sentence(maml: Call) -> None:
    with pytest.raises(UnknownKeyError) as caught:
        maml(inner_v="laten")
    assert str(caught.value) == "no variable at key chain 'laten'. Did you mean 'latent'?"


def test_dtype_of_the_selection_applies_to_neutral_inputs(backend_name: str) -> None:
    with use_backend(backend_name, dtype="float64") as selected:
        cost, grads, _ = maml_step(BATCH, CountedCost(), None, VARIABLES, 1, 0.01, batched="vmap")
        assert {selected.dtype_name(x) for x in (cost, *grads.values())} == {"float64"}
