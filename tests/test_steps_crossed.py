"""The three steps against matrix algebra, in float64 to 1e-12, with all of their arguments crossed.

`test_steps_closed_form.py`, `test_batching.py` and the conformance suite vary one at a time.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

from frameworks import require, slow
from meta_problems import quick
from metaframe import fomaml_step, maml_step, reptile_step, tree
from metaframe.backend import Backend
from metaframe.testing.conformance.closed_form import (
    RATE,
    SIZE,
    Problem,
    assert_close,
    mask,
    query_cost,
    support_cost,
    unpacked,
)
from test_batching import FORMS, only

Call = Callable[..., Any]

LAYOUTS = (True, False, "vmap", "scan")
STEPS = (0, 1, 2, 3)
TASKS = 3


class Case(NamedTuple):
    """The arguments of one call, apart from the layout and the number of steps."""

    same_cost: bool
    average: bool
    stop: bool
    inner: str
    outer: str
    returned: Any
    num_tasks: int | None

    @property
    def how(self) -> dict[str, Any]:
        (inner, keep_inner, _), (outer, keep_outer, _) = FORMS[self.inner], FORMS[self.outer]
        return {
            "average_across_steps": self.average,
            "stop_gradients": self.stop,
            "inner_v": inner,
            "keep_inner_v": keep_inner,
            "outer_v": outer,
            "keep_outer_v": keep_outer,
            **self.how_of_reptile,
        }

    @property
    def how_of_reptile(self) -> dict[str, Any]:
        return {
            "stop_gradients": self.stop,
            "return_inner_v": self.returned,
            "num_tasks": self.num_tasks,
        }

    def problem(self, steps: int) -> Problem:
        return Problem(
            steps,
            tasks=self.num_tasks or TASKS,
            adapted=mask(*FORMS[self.inner][2]),
            average_across_steps=self.average,
            same_cost=self.same_cost,
        )


def cases() -> Iterator[Case]:
    """The switches crossed; with each combination another pair of forms, all of them in turn."""
    switches = itertools.product(
        (False, True), (False, True), (True, False), (False, "first", "all", True), (None, 2)
    )
    forms = itertools.cycle(itertools.product(FORMS, FORMS))
    skip = 7  # has no divisor in common with the number of pairs, so that all pairs have their turn
    for same_cost, average, stop, returned, num_tasks in switches:
        for _ in range(4):
            inner, outer = next(itertools.islice(forms, skip - 1, None))
            yield Case(same_cost, average, stop, inner, outer, returned, num_tasks)


def arguments(problem: Problem, batched: Any) -> tuple[Any, Any, Any]:
    """The batch of all tasks, the variables, and the nine numbers these are made of."""
    torch = importlib.import_module("torch")
    theta = torch.tensor(problem.theta, requires_grad=True)
    rows = theta.expand(problem.tasks, SIZE) if batched is True else theta
    v = {
        "body": {"b": rows[..., :2], "w": rows[..., 2:6].unflatten(-1, (2, 2))},
        "head": rows[..., 6:],
    }
    everything = Problem(tasks=TASKS, same_cost=problem.same_cost).batch
    return tree.map(torch.from_numpy, everything), v, theta


def check(found: tuple[Any, ...], expected: tuple[Any, ...], stop: bool, theta: Any) -> None:
    """`expected`: cost, gradients, derivative of the cost by the numbers, adapted variables."""
    torch = importlib.import_module("torch")
    cost, grads, derivative, adapted = expected
    assert_close(plain(found[:2]), [cost, grads])
    assert found[0].requires_grad is not stop
    if not stop:
        (by_theta,) = torch.autograd.grad(found[0], theta, retain_graph=True)
        assert_close(plain(by_theta), derivative)
    if len(found) == 3 and found[2] != ():
        assert_close(plain(found[2]), adapted)
    else:
        assert adapted is None


def plain(values: Any) -> Any:
    return tree.map(lambda x: x.detach().numpy(), values)


def adapted_of(case: Case, problem: Problem) -> Any:
    if not case.returned:
        return None
    rows = slice(0, 1) if case.returned == "first" else slice(None)
    return tree.map(lambda x: x[rows], problem.adapted_variables)


def check_maml_and_fomaml(case: Case, steps: int, batched: Any) -> None:
    problem = case.problem(steps)
    batch, v, theta = arguments(problem, batched)
    chains = FORMS[case.outer][2]
    costs = (support_cost, None if case.same_cost else query_cost)
    for step, exact in ((maml_step, problem.maml), (fomaml_step, problem.fomaml)):
        found = step(batch, *costs, v, steps, RATE, batched=batched, **case.how)
        assert len(found) == (3 if step is maml_step or case.returned else 2)
        expected = (problem.cost, only(chains, exact), exact, adapted_of(case, problem))
        check(found, expected, case.stop, theta)


@pytest.mark.slow
@pytest.mark.parametrize("batched", LAYOUTS)
@pytest.mark.parametrize("steps", STEPS)
def test_maml_and_fomaml(steps: int, batched: Any) -> None:
    """On torch, which compiles nothing; the others agree with it in `test_backends_agree.py`."""
    require("torch")
    for case in cases():
        try:
            check_maml_and_fomaml(case, steps, batched)
        except Exception as error:
            error.add_note(str(case))
            raise


def test_every_pair_of_choices_has_its_turn() -> None:
    assert len({(case.inner, case.outer) for case in cases()}) == len(FORMS) ** 2


# The variables reach each task by a closure, which torch differentiates one task at a time.
@pytest.mark.filterwarnings("ignore:a function of one task, or a compiled")
@pytest.mark.parametrize("batched", LAYOUTS)
@pytest.mark.parametrize("steps", STEPS[1:])
def test_reptile(steps: int, batched: Any) -> None:
    require("torch")
    arguments_of = itertools.product(
        ("gradients", "displacement"), (True, False), (False, "first", "all", True), (None, 2)
    )
    for direction, stop, returned, num_tasks in arguments_of:
        problem = Problem(steps, tasks=num_tasks or TASKS)
        case = Case(False, False, stop, "everything", "everything", returned, num_tasks)
        batch, v, theta = arguments(problem, batched)
        how = {"batched": batched, "direction": direction, **case.how_of_reptile}
        found = reptile_step(batch, support_cost, v, steps, RATE, **how)
        assert len(found) == (3 if returned else 2)
        grads = unpacked(problem.reptile(direction))
        # The cost of every point with its own gradient: the mean of the inner gradients.
        derivative = RATE * problem.reptile("gradients")
        expected = (problem.reptile_cost, grads, derivative, adapted_of(case, problem))
        check(found, expected, stop, theta)


@pytest.mark.parametrize("average", [False, True], ids=["last", "average"])
@pytest.mark.parametrize("batched", ["vmap", slow(False)])
def test_first_order_costs_stay_differentiable(
    backend: Backend, arr: Call, to_np: Call, batched: Any, average: bool
) -> None:
    """The derivative of the returned cost is FOMAML's gradient, and the mean of Reptile's."""
    problem = Problem(average_across_steps=average)
    batch = arr(problem.batch)
    leaves, spec = tree.flatten(problem.variables)
    how = {"batched": batched, "stop_gradients": False}

    def derivatives(*xs: Any) -> Any:
        def fomaml(xs: Any) -> Any:
            costs, v = (support_cost, query_cost), tree.unflatten(spec, xs)
            settings = {"average_across_steps": average, **how}
            return fomaml_step(batch, *costs, v, 2, RATE, **settings)[0], ()

        def reptile(xs: Any) -> Any:
            return reptile_step(batch, support_cost, tree.unflatten(spec, xs), 2, RATE, **how)[
                0
            ], ()

        return [backend.value_and_grad(fn)(xs)[2] for fn in (fomaml, reptile)]

    found = to_np(quick(backend, derivatives)(*map(arr, leaves)))
    for grads, exact in zip(
        found, (problem.fomaml, RATE * problem.reptile("gradients")), strict=True
    ):
        assert_close(tree.unflatten(spec, grads), unpacked(exact))
