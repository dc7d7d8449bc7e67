"""Refusals of the steps among their arguments, in words, before any work.

Every message names the argument and what came in, and says what was expected or how to go on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from bad_inputs import BATCH, STEPS, VARIABLES, CountedCost, assert_refused, call_step
from metaframe import inner_loop, meta_value_and_grad, optim, reptile_step
from metaframe.errors import InputError

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


# -- the batch ---------------------------------------------------------------------------


def test_leaves_with_different_task_axes(step: Call, refused: Call, arr: Call) -> None:
    batch = arr({"x": np.ones((8, 2)), "y": np.ones(7)})
    parts = ["task axis differs", "batch['x'] has 8", "batch['y'] has 7"]
    refused(ValueError, parts, lambda: step(batch=batch))


def test_a_leaf_without_a_task_axis(step: Call, refused: Call, arr: Call) -> None:
    batch = arr({"x": np.ones((8, 2)), "y": np.array(1.0)})
    refused(ValueError, ["batch['y']", "scalar", "task axis"], lambda: step(batch=batch))


@pytest.mark.parametrize("batch", [{}, None, {"x": np.ones((0, 2)), "y": np.ones(0)}])
def test_no_tasks(step: Call, refused: Call, arr: Call, batch: Any) -> None:
    refused(ValueError, ["batch holds no", "tasks"], lambda: step(batch=arr(batch)))


def test_more_tasks_than_there_are(step: Call, refused: Call) -> None:
    parts = ["num_tasks=4", "batch has 3"]
    refused(ValueError, parts, lambda: step(num_tasks=4))


@pytest.mark.parametrize("value", [0, -1])
def test_no_task_asked_for(step: Call, refused: Call, value: int) -> None:
    parts = ["num_tasks", "at least 1", f"received {value}"]
    refused(ValueError, parts, lambda: step(num_tasks=value))


@pytest.mark.parametrize("value", [2.0, True, "2"])
def test_num_tasks_is_an_int(step: Call, refused: Call, value: Any) -> None:
    parts = ["num_tasks", "int", repr(value)]
    refused(TypeError, parts, lambda: step(num_tasks=value))


def test_variables_that_are_not_tiled(step: Call, refused: Call) -> None:
    parts = ["batched=True", "task axis of 3", "'bias'", "shape ()", '"vmap"']
    refused(ValueError, parts, lambda: step(batched=True))


def test_variables_tiled_to_another_length(step: Call, refused: Call, arr: Call) -> None:
    variables = arr({"bias": np.ones(3), "latent": np.ones((2, 2))})
    parts = ["task axis of 3", "'latent'", "shape (2, 2)"]
    refused(ValueError, parts, lambda: step(batched=True, variables=variables))


# -- the variables -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["int32", "bool"])
def test_variables_that_cannot_be_differentiated(
    step: Call, refused: Call, arr: Call, dtype: str
) -> None:
    variables = arr({**VARIABLES, "n": np.ones(2, dtype)})
    parts = ["variable 'n'", dtype, "float dtype"]
    refused(TypeError, parts, lambda: step(variables=variables))


def test_no_variables(step: Call, refused: Call) -> None:
    refused(ValueError, ["variables", "no arrays"], lambda: step(variables={}))


@pytest.mark.parametrize("name", ["inner_v", "outer_v"])
@pytest.mark.parametrize("choice", ["laten", ["laten"], {"laten": True}, {"laten": False}])
def test_a_key_that_does_not_exist(maml: Call, refused: Call, name: str, choice: Any) -> None:
    parts = ["'laten'", "Did you mean 'latent'?"]
    refused(KeyError, parts, lambda: maml(**{name: choice}))


@pytest.mark.parametrize("name", ["inner_v", "outer_v"])
@pytest.mark.parametrize("choice", [[], {}, {"latent": False}])
def test_a_choice_of_nothing(maml: Call, refused: Call, name: str, choice: Any) -> None:
    parts = [name, "none of the variables", "bias", "latent", "at least one"]
    refused(ValueError, parts, lambda: maml(**{name: choice}))


@pytest.mark.parametrize("name", ["inner_v", "outer_v"])
@pytest.mark.parametrize("batched", [True, "vmap", "scan"])
def test_choices_per_task_need_tasks_one_by_one(
    maml: Call, refused: Call, arr: Call, name: str, batched: Any
) -> None:
    tiled = {"bias": np.ones(3), "latent": np.ones((3, 2))}
    choice = {name: [["latent"], ["bias"], ["bias"]], "batched": batched}
    variables = tiled if batched is True else VARIABLES
    refused(ValueError, [name, "batched=False"], lambda: maml(variables=arr(variables), **choice))


@pytest.mark.parametrize("name", ["inner_v", "outer_v"])
def test_one_choice_for_each_task(maml: Call, refused: Call, name: str) -> None:
    choice = {name: [["latent"], ["bias"]], "batched": False}
    refused(ValueError, [name, "2 choices", "3 tasks"], lambda: maml(**choice))


# -- numbers -----------------------------------------------------------------------------


def test_negative_steps(step: Call, refused: Call) -> None:
    parts = ["inner_grad_steps", "at least", "-1"]
    refused(ValueError, parts, lambda: step(steps=-1))


@pytest.mark.parametrize("value", [1.0, True, "1", None])
def test_steps_that_are_no_int(step: Call, refused: Call, value: Any) -> None:
    parts = ["inner_grad_steps", "int", repr(value)]
    refused(TypeError, parts, lambda: step(steps=value))


def test_reptile_without_a_step(arr: Call, cost: CountedCost, refused: Call) -> None:
    args = (arr(BATCH), cost, arr(VARIABLES), 0, 0.1)
    parts = ["inner_grad_steps", "at least 1", "received 0"]
    refused(ValueError, parts, lambda: reptile_step(*args, batched="vmap"))


@pytest.mark.parametrize("rate", [-0.1, float("nan"), float("inf"), np.float64(-1.0)])
def test_a_rate_that_is_no_rate(step: Call, refused: Call, rate: Any) -> None:
    parts = ["learning rate", "finite and not negative", repr(rate)]
    refused(ValueError, parts, lambda: step(rate=rate))


def test_a_bad_rate_in_a_structure_is_named(step: Call, refused: Call) -> None:
    parts = ["learning rate", "'latent'", "-0.1"]
    refused(ValueError, parts, lambda: step(rate={"bias": 0.1, "latent": -0.1}))


@pytest.mark.parametrize("rate", ["fast", True])
def test_a_rate_of_another_type(step: Call, refused: Call, rate: Any) -> None:
    refused(TypeError, ["learning rate", "number", repr(rate)], lambda: step(rate=rate))


def test_reptile_divides_by_the_rate(arr: Call, cost: CountedCost, refused: Call) -> None:
    parts = ["reptile_step", "learning rate", "received 0"]
    refused(
        ValueError,
        parts,
        lambda: reptile_step(arr(BATCH), cost, arr(VARIABLES), 1, 0.0, batched="vmap"),
    )


def test_a_rate_given_twice(step: Call, arr: Call) -> None:
    with pytest.raises(InputError, match="given twice: to the optimizer and to the loop"):
        step(inner_optimization_step=optim.adam(0.1))


def test_a_rate_given_nowhere(step: Call, arr: Call) -> None:
    with pytest.raises(InputError, match="no learning rate: give it to the optimizer or"):
        step(rate=None)


@pytest.mark.parametrize("value", [0, -2])
def test_a_chunk_of_no_tasks(step: Call, refused: Call, value: int) -> None:
    parts = ["chunk_size", "at least 1", f"received {value}"]
    refused(ValueError, parts, lambda: step(chunk_size=value))


# -- choices by name ---------------------------------------------------------------------


@pytest.mark.parametrize("value", ["vmpa", 1, None])
def test_an_unknown_layout(step: Call, refused: Call, value: Any) -> None:
    parts = ["batched", "'vmap'", "'scan'", f"received {value!r}"]
    refused(ValueError, parts, lambda: step(batched=value))


def test_the_nearest_name_is_suggested(step: Call, refused: Call) -> None:
    refused(ValueError, ["Did you mean 'vmap'?"], lambda: step(batched="vmpa"))


def test_an_unknown_mode(maml: Call, refused: Call) -> None:
    parts = ["mode", "'remat'", "received 'rematt'", "Did you mean 'remat'?"]
    refused(ValueError, parts, lambda: maml(mode="rematt"))


@pytest.mark.parametrize("value", ["last", 1])
def test_an_unknown_part_to_return(step: Call, refused: Call, value: Any) -> None:
    parts = ["return_inner_v", "'first'", "'all'", repr(value)]
    refused(ValueError, parts, lambda: step(return_inner_v=value))


def test_an_unknown_direction(arr: Call, cost: CountedCost, refused: Call) -> None:
    args = (arr(BATCH), cost, arr(VARIABLES), 1, 0.1)
    parts = ["direction", "'displacement'", "'paper'"]
    refused(ValueError, parts, lambda: reptile_step(*args, direction="paper"))  # type: ignore[arg-type]


def test_an_unknown_order(arr: Call, cost: CountedCost, refused: Call) -> None:
    task = {"x": BATCH["x"][0], "y": BATCH["y"][0]}
    refused(
        ValueError,
        ["order", "1, 2", "received 3"],
        lambda: inner_loop(cost, arr(VARIABLES), arr(task), steps=1, lr=0.1, order=3),  # type: ignore[arg-type]
    )


def test_an_unknown_task_map(cost: CountedCost, refused: Call, backend: Any) -> None:
    parts = ["task_map", "'loop'", "received 'lop'", "Did you mean 'loop'?"]
    refused(ValueError, parts, lambda: meta_value_and_grad(cost, task_map="lop"))  # type: ignore[arg-type]
