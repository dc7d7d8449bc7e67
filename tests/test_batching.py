"""Which variables adapt and which get gradients: every documented form, against matrix algebra."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest

from frameworks import BACKENDS
from metaframe import Container, fomaml_step, maml_step
from metaframe.testing.conformance.closed_form import (
    RATE,
    SHAPES,
    Problem,
    assert_close,
    mask,
    query_cost,
    support_cost,
    unpacked,
)

Call = Callable[..., Any]

# A choice, whether to keep it, and the key chains it stands for.
FORMS: dict[str, tuple[Any, bool, tuple[str, ...]]] = {
    "everything": (None, True, tuple(SHAPES)),
    "a key": ("head", True, ("head",)),
    "a key chain": ("body/w", True, ("body/w",)),
    "a subtree": ("body", True, ("body/b", "body/w")),
    "key chains": (["head", "body/b"], True, ("body/b", "head")),
    "a tuple": (("head", "body/b"), True, ("body/b", "head")),
    "booleans": ({"body": {"b": True, "w": True}, "head": True}, True, tuple(SHAPES)),
    "False": ({"body": {"b": False, "w": True}, "head": False}, True, ("body/w",)),
    "missing": ({"body": {"w": True}}, True, ("body/w",)),
    "a Container": (Container(body=Container(w=True)), True, ("body/w",)),
    "a subtree as a whole": ({"body": True}, True, ("body/b", "body/w")),
    "all but a key": ("head", False, ("body/b", "body/w")),
    "all but key chains": (["head", "body/b"], False, ("body/w",)),
    "all but booleans": ({"body": {"b": True, "w": False}}, False, ("body/w", "head")),
    "everything, dropped": (None, False, tuple(SHAPES)),
}


@pytest.fixture(params=[True, "vmap"], ids=lambda value: f"batched={value}")
def batched(request: pytest.FixtureRequest) -> Any:
    return request.param


# How a choice is read does not depend on the backend: by default one reads them all.
FORMS_ON_BACKENDS = [
    pytest.param(
        name,
        form,
        id=f"{name}-{label}",
        marks=() if name == "torch" or label in ("False", "all but a key") else pytest.mark.slow,
    )
    for name in BACKENDS
    for label, form in FORMS.items()
]
every_form = pytest.mark.parametrize(
    ("backend_name", "form"), FORMS_ON_BACKENDS, indirect=["backend_name"]
)


def only(chains: tuple[str, ...], theta: Any) -> Any:
    """The part of the variables that the chains name, without empty mappings."""
    v = unpacked(theta)
    body = {name: x for name, x in v["body"].items() if f"body/{name}" in chains}
    head = {"head": v["head"]} if "head" in chains else {}
    return ({"body": body} if body else {}) | head


@every_form
def test_inner_v(arr: Call, to_np: Call, form: Any) -> None:
    choice, keep, chains = form
    problem = Problem(adapted=mask(*chains))
    batch, variables = arr(problem.batch), arr(problem.variables)
    args = (batch, support_cost, query_cost, variables, 2, RATE)
    how = {"batched": "vmap", "inner_v": choice, "keep_inner_v": keep, "return_inner_v": "all"}
    maml, fomaml = to_np((maml_step(*args, **how), fomaml_step(*args, **how)))
    adapted = problem.adapted_variables
    assert_close(maml, [problem.cost, unpacked(problem.maml), adapted])
    assert_close(fomaml, [problem.cost, unpacked(problem.fomaml), adapted])


@every_form
def test_outer_v(arr: Call, to_np: Call, form: Any) -> None:
    choice, keep, chains = form
    problem = Problem()
    batch, variables = arr(problem.batch), arr(problem.variables)
    args = (batch, support_cost, query_cost, variables, 2, RATE)
    how = {"batched": "vmap", "outer_v": choice, "keep_outer_v": keep}
    maml, fomaml = to_np((maml_step(*args, **how), fomaml_step(*args, **how)))
    assert_close(maml[:2], [problem.cost, only(chains, problem.maml)])
    assert_close(fomaml, [problem.cost, only(chains, problem.fomaml)])


@pytest.mark.parametrize("average", [pytest.param(False, marks=pytest.mark.slow), True])
def test_both(arr: Call, to_np: Call, batched: Any, average: bool) -> None:
    problem = Problem(adapted=mask("head"), average_across_steps=average)
    batch = arr(problem.batch)
    variables = arr(problem.tiled if batched is True else problem.variables)
    args = (batch, support_cost, query_cost, variables, 2, RATE)
    how = {
        "batched": batched,
        "inner_v": "head",
        "outer_v": "head",
        "keep_outer_v": False,
        "average_across_steps": average,
    }
    maml, fomaml = to_np((maml_step(*args, **how), fomaml_step(*args, **how)))
    chains = ("body/b", "body/w")
    assert_close(maml[:2], [problem.cost, only(chains, problem.maml)])
    assert_close(fomaml, [problem.cost, only(chains, problem.fomaml)])


def test_rates_for_the_adapted_variables_only(arr: Call, to_np: Call) -> None:
    problem = Problem(rate=np.repeat([0.0, 0.05, 0.11], [2, 4, 3]), adapted=mask("body/w", "head"))
    found = to_np(
        maml_step(
            arr(problem.batch),
            support_cost,
            query_cost,
            arr(problem.variables),
            2,
            {"body": {"w": 0.05}, "head": 0.11},
            batched="vmap",
            inner_v=["body/w", "head"],
        )
    )
    assert_close(found[:2], [problem.cost, unpacked(problem.maml)])


def test_the_rest_may_be_integers(arr: Call, to_np: Call) -> None:
    problem = Problem()
    variables = {**arr(problem.variables), "classes": arr(np.arange(3))}
    found = to_np(
        maml_step(
            arr(problem.batch),
            support_cost,
            query_cost,
            variables,
            2,
            RATE,
            batched="vmap",
            inner_v="classes",
            keep_inner_v=False,
            outer_v="classes",
            keep_outer_v=False,
        )
    )
    assert_close(found[:2], [problem.cost, unpacked(problem.maml)])


# -- one choice a task ---------------------------------------------------------------------


class PerTask(NamedTuple):
    inner: list[Any] | None
    outer: list[Any] | None
    inner_chains: list[tuple[str, ...]]
    outer_chains: list[tuple[str, ...]]


EVERYTHING = [tuple(SHAPES)] * 3
BODY = ("body/b", "body/w")
PER_TASK = {
    "inner chains": PerTask(
        [["head"], ["body/w"], ["body"]], None, [("head",), ("body/w",), BODY], EVERYTHING
    ),
    "inner booleans": PerTask(
        [{"head": True}, {"body": {"w": True}}, None],
        None,
        [("head",), ("body/w",), tuple(SHAPES)],
        EVERYTHING,
    ),
    "outer": PerTask(
        None,
        [["head"], ["head", "body/w"], ["head"]],
        EVERYTHING,
        [("head",), ("body/w", "head"), ("head",)],
    ),
    "both": PerTask(
        [["head"], ["body"], ["body"]],
        [["body"], ["head"], ["body/b"]],
        [("head",), BODY, BODY],
        [BODY, ("head",), ("body/b",)],
    ),
}


@pytest.mark.parametrize("case", PER_TASK.values(), ids=PER_TASK)
def test_one_choice_a_task(arr: Call, to_np: Call, case: PerTask) -> None:
    base = Problem()
    found = to_np(
        maml_step(
            arr(base.batch),
            support_cost,
            query_cost,
            arr(base.variables),
            2,
            RATE,
            batched=False,
            inner_v=case.inner,
            outer_v=case.outer,
            return_inner_v="all",
        )
    )
    alone = [
        _only_task(replace(base, adapted=mask(*chains)), i)
        for i, chains in enumerate(case.inner_chains)
    ]
    gradients = [
        mask(*chains) * gradient
        for (_, gradient, _), chains in zip(alone, case.outer_chains, strict=True)
    ]
    union = tuple(chain for chain in SHAPES if any(chain in c for c in case.outer_chains))
    assert_close(found[0], np.mean([cost for cost, _, _ in alone]))
    assert_close(found[1], only(union, np.mean(gradients, axis=0)))
    assert_close(found[2], unpacked(np.stack([theta for _, _, theta in alone])))


def _only_task(problem: Problem, task: int) -> tuple[float, Any, Any]:
    """Cost, MAML gradient and adapted numbers of one task."""
    theta, jacobian = problem.points(task)[-1]
    return (
        problem.query.value(task, theta),
        jacobian.T @ problem.query.gradient(task, theta),
        theta,
    )


def test_adapted_variables_include_those_that_take_no_part(arr: Call, to_np: Call) -> None:
    """Neither adapted nor differentiated, `b` comes back as it was, once a task."""
    v, batch = arr({"w": np.array(1.0), "b": np.array(2.0)}), arr({"x": np.array([1.0, 2.0, 3.0])})

    def cost(task: Any, v: Any) -> Any:
        return v["w"] * task["x"] + v["b"]

    _, grads, inner = maml_step(
        *(batch, cost, None, v, 1, 0.5),
        batched="vmap",
        inner_v="w",
        outer_v="w",
        return_inner_v="all",
    )
    assert list(grads) == ["w"]
    np.testing.assert_array_equal(to_np(inner)["b"], [2.0, 2.0, 2.0])
    np.testing.assert_array_equal(to_np(inner)["w"], [0.5, 0.0, -0.5])


@pytest.mark.parametrize("batched", ["auto", "loop"])
def test_every_strategy_of_the_task_map_is_one_of_the_steps(
    arr: Call, to_np: Call, execution: Call, batched: Any
) -> None:
    problem = Problem()

    def step(batch: Any, v: Any) -> Any:
        return maml_step(batch, support_cost, query_cost, v, 2, RATE, batched=batched)[:2]

    found = to_np(execution(step)(arr(problem.batch), arr(problem.variables)))
    assert_close(found, [problem.cost, unpacked(problem.maml)])
