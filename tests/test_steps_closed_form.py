"""MAML, FOMAML and Reptile against matrix algebra, in float64 to 1e-12: their arguments.

The grid of layouts, numbers of steps and judged points is the conformance suite's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from frameworks import BACKENDS, slow
from metaframe import compile as compile_whole
from metaframe import fomaml_step, maml_step, reptile_step
from metaframe.testing.conformance.closed_form import (
    RATE,
    Problem,
    assert_close,
    cost,
    query,
    query_cost,
    support,
    support_cost,
    unpacked,
)
from metaframe.testing.conformance.steps_clauses import all_three, check_all_three

Call = Callable[..., Any]

LAYOUTS = [True, False, "vmap", "scan"]


def layouts() -> list[Any]:
    """Every layout on torch, which is quick eagerly; two of them on the others by default."""
    return [
        (name, layout) if name == "torch" or layout in (True, "vmap") else slow(name, layout)
        for name in BACKENDS
        for layout in LAYOUTS
    ]


every_layout = pytest.mark.parametrize(
    ("backend_name", "batched"), layouts(), indirect=["backend_name"]
)


@pytest.fixture
def data(arr: Call, batched: Any) -> Call:
    """`data(problem)`: its batch and its variables, tiled if the layout needs it."""
    return lambda problem: (
        arr(problem.batch),
        arr(problem.tiled if batched is True else problem.variables),
    )


# -- costs and batches ------------------------------------------------------------------------


@every_layout
def test_the_outer_cost_is_the_inner_one_unless_given(
    data: Call, to_np: Call, batched: Any
) -> None:
    problem = Problem(same_cost=True)
    batch, variables = data(problem)
    found = to_np(maml_step(batch, support_cost, None, variables, 2, RATE, batched=batched))
    assert_close(found[:2], [problem.cost, unpacked(problem.maml)])


@every_layout
def test_batch_functions_choose_what_each_cost_sees(data: Call, to_np: Call, batched: Any) -> None:
    problem = Problem()
    batch, variables = data(problem)
    found = to_np(
        maml_step(
            batch,
            cost,
            None,
            variables,
            2,
            RATE,
            batched=batched,
            inner_batch_fn=support,
            outer_batch_fn=query,
        )
    )
    assert_close(found[:2], [problem.cost, unpacked(problem.maml)])


@every_layout
def test_a_cost_that_takes_v_by_keyword(data: Call, to_np: Call, batched: Any) -> None:
    problem = Problem(same_cost=True)
    batch, variables = data(problem)

    def by_keyword(sub_batch: Any, *, v: Any) -> Any:
        return support_cost(sub_batch, v)

    class Model:
        def cost(self, sub_batch: Any, *, v: Any) -> Any:
            return support_cost(sub_batch, v)

        def forwarded(self, *args: Any, **kwargs: Any) -> Any:
            return self.cost(*args, **kwargs)

        forwarded.__signature__ = inspect.signature(cost)  # type: ignore[attr-defined]

    for by_kind in (by_keyword, Model().cost, Model().forwarded):
        found = to_np(maml_step(batch, by_kind, None, variables, 2, RATE, batched=batched))
        assert_close(found[:2], [problem.cost, unpacked(problem.maml)])


@pytest.mark.parametrize("average", [False, True], ids=["last", "average"])
def test_the_outer_cost_is_computed_no_more_often_than_it_is_used(
    backend: Any, arr: Call, average: bool
) -> None:
    calls = {"inner": 0, "outer": 0}

    def counted(name: str, fn: Call) -> Call:
        def counting(batch: Any, v: Any) -> Any:
            calls[name] += 1
            return fn(batch, v)

        return counting

    problem = Problem()
    maml_step(
        arr(problem.batch),
        counted("inner", support_cost),
        counted("outer", query_cost),
        arr(problem.tiled),
        3,
        RATE,
        average_across_steps=average,
    )
    assert calls == {"inner": 3, "outer": 4 if average else 1}


# -- numbers of tasks --------------------------------------------------------------------------


@every_layout
@pytest.mark.parametrize("step", [maml_step, fomaml_step])
def test_num_tasks_uses_the_first_tasks(data: Call, to_np: Call, batched: Any, step: Any) -> None:
    problem = Problem(tasks=2)
    _, variables = data(problem)
    batch, _ = data(Problem(tasks=5))
    found = to_np(
        step(batch, support_cost, query_cost, variables, 2, RATE, batched=batched, num_tasks=2)
    )
    exact = problem.maml if step is maml_step else problem.fomaml
    assert_close(found[:2], [problem.cost, unpacked(exact)])


@every_layout
def test_num_tasks_of_reptile(data: Call, to_np: Call, batched: Any) -> None:
    problem = Problem(tasks=2)
    _, variables = data(problem)
    batch, _ = data(Problem(tasks=5))
    found = to_np(
        reptile_step(batch, support_cost, variables, 2, RATE, batched=batched, num_tasks=2)
    )
    assert_close(found, [problem.reptile_cost, unpacked(problem.reptile("gradients"))])


@every_layout
def test_one_task(data: Call, to_np: Call, batched: Any) -> None:
    problem = Problem(tasks=1)
    found = to_np(all_three(*data(problem), 2, batched, False))
    check_all_three(found, problem)


@pytest.mark.parametrize("chunk_size", [slow(1), 2, slow(3), slow(5), slow(9)])
def test_chunks(backend: Any, arr: Call, to_np: Call, chunk_size: int) -> None:
    problem = Problem(tasks=5)
    batch, variables = arr(problem.batch), arr(problem.variables)
    how = {"batched": "vmap", "chunk_size": chunk_size, "return_inner_v": "all"}
    maml = to_np(maml_step(batch, support_cost, query_cost, variables, 2, RATE, **how))
    reptile = to_np(reptile_step(batch, support_cost, variables, 2, RATE, **how))
    adapted = problem.adapted_variables
    assert_close(maml, [problem.cost, unpacked(problem.maml), adapted])
    exact = [problem.reptile_cost, unpacked(problem.reptile("gradients")), adapted]
    assert_close(reptile, exact)


@pytest.mark.slow
def test_compiled_chunks(backend: Any, arr: Call, to_np: Call) -> None:
    problem = Problem(tasks=5)
    found = to_np(
        compile_whole(maml_step)(
            arr(problem.batch),
            support_cost,
            query_cost,
            arr(problem.variables),
            2,
            RATE,
            batched="vmap",
            chunk_size=2,
            return_inner_v="all",
        )
    )
    assert_close(found, [problem.cost, unpacked(problem.maml), problem.adapted_variables])


# -- adapted variables -------------------------------------------------------------------------


@every_layout
@pytest.mark.parametrize("which", ["all", slow("first"), slow(True)])
def test_returned_variables(data: Call, to_np: Call, batched: Any, which: Any) -> None:
    problem = Problem()
    batch, variables = data(problem)
    exact = problem.adapted_variables
    if which == "first":
        exact = {
            "body": {"b": exact["body"]["b"][:1], "w": exact["body"]["w"][:1]},
            "head": exact["head"][:1],
        }
    settings = {"batched": batched, "return_inner_v": which}
    maml = maml_step(batch, support_cost, query_cost, variables, 2, RATE, **settings)
    fomaml = fomaml_step(batch, support_cost, query_cost, variables, 2, RATE, **settings)
    reptile = reptile_step(batch, support_cost, variables, 2, RATE, **settings)
    for result in (maml, fomaml, reptile):
        assert len(result) == 3
        assert_close(to_np(result[2]), exact)


# -- rates ---------------------------------------------------------------------------------------


@every_layout
def test_a_rate_as_an_array(data: Call, arr: Call, to_np: Call, batched: Any) -> None:
    problem = Problem()
    batch, variables = data(problem)
    found = to_np(
        maml_step(batch, support_cost, query_cost, variables, 2, arr(RATE), batched=batched)
    )
    assert_close(found[:2], [problem.cost, unpacked(problem.maml)])


@every_layout
def test_a_rate_for_each_variable(data: Call, arr: Call, to_np: Call, batched: Any) -> None:
    rates = {"body": {"b": 0.02, "w": arr(0.05)}, "head": 0.11}
    each = np.repeat([0.02, 0.05, 0.11], [2, 4, 3])
    problem = Problem(rate=each)
    batch, variables = data(problem)
    maml = to_np(maml_step(batch, support_cost, query_cost, variables, 2, rates, batched=batched))
    reptile = to_np(reptile_step(batch, support_cost, variables, 2, rates, batched=batched))
    assert_close(maml[:2], [problem.cost, unpacked(problem.maml)])
    exact = unpacked(problem.reptile("gradients"))
    assert_close(reptile, [problem.reptile_cost, exact])
