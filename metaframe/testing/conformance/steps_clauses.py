"""Whole algorithms against matrix algebra: the inner loop in every mode, and the three steps."""

from __future__ import annotations

import functools
import re
from typing import Any

import numpy as np

from metaframe import ops, tree
from metaframe.backend.selection import use_backend
from metaframe.core.compile import compile as compile_whole
from metaframe.core.container import Container
from metaframe.core.inner_loop import MODES
from metaframe.core.meta_gradient import meta_value_and_grad
from metaframe.core.steps import fomaml_step, maml_step, reptile_step
from metaframe.core.unroll import inner_loop
from metaframe.errors import MetaframeError
from metaframe.testing.conformance.clause import Bench, Chapter, equal
from metaframe.testing.conformance.closed_form import (
    RATE,
    SIZE,
    Problem,
    assert_close,
    query_cost,
    support_cost,
    unpacked,
)

INNER, STEPS = Chapter("inner_loop"), Chapter("steps")

# -- the inner loop ----------------------------------------------------------------------------


def _adapted(mode: Any, steps: int, b: Bench) -> None:
    problem = Problem(steps)
    task = b.arr(tree.map(lambda x: x[0], problem.batch))
    v = b.arr(problem.variables)
    found = inner_loop(support_cost, v, task, steps=steps, lr=RATE, mode=mode)
    assert_close(b.to_np(found), unpacked(problem.points(0)[-1][0]), b.exact)


def _given_gradients(mode: Any, steps: int, b: Bench) -> None:
    problem = Problem(steps, tasks=1)
    matrix, centre = problem.support.matrix[0], problem.support.centre[0]
    weight = np.random.default_rng(8).normal(size=SIZE)

    def meta_cost(given: Any, task: Any) -> Any:
        inner = {"support": {**task["support"], "centre": given["centre"]}}
        v = inner_loop(support_cost, given["v"], inner, steps=steps, lr=given["rate"], mode=mode)
        pairs = zip(tree.leaves(v), tree.leaves(task["weight"]), strict=True)
        return sum(ops.sum(x * w) for x, w in pairs)

    given = {"v": problem.variables, "rate": np.array(RATE), "centre": centre}
    tasks = {"support": problem.batch["support"], "weight": unpacked(weight[None])}
    step: Any = meta_value_and_grad(meta_cost)
    if b.backend.compiles_quickly:
        step = compile_whole(step)
    _, grads, _ = b.to_np(step(b.arr(given), b.arr(tasks)))

    # theta' = theta - rate A (theta - c), and the derivatives of theta by the rate and by c.
    by_rate, by_centre = np.zeros(SIZE), np.zeros((SIZE, SIZE))
    keep = np.eye(SIZE) - RATE * matrix
    for theta, _ in problem.points(0)[:-1]:
        by_rate = keep @ by_rate - matrix @ (theta - centre)
        by_centre = keep @ by_centre + RATE * matrix
    # Each part against its own norm: they differ by orders of magnitude.
    assert_close(grads["v"], unpacked(problem.points(0)[-1][1].T @ weight), b.exact)
    assert_close(grads["rate"], np.asarray(weight @ by_rate), b.exact)
    assert_close(grads["centre"], by_centre.T @ weight, b.exact)


def _closed_over(mode: Any, b: Bench) -> None:
    def meta_cost(v: Any, task: Any) -> Any:
        def cost(batch: Any, inner: Any) -> Any:
            return v["scale"] * ops.square(inner["u"] - batch["x"])

        return ops.square(inner_loop(cost, {"u": v["u"]}, task, steps=2, lr=0.1, mode=mode)["u"])

    x, u, scale = 0.3, 1.5, 0.7
    step = meta_value_and_grad(meta_cost, task_map="loop")
    try:
        _, grads, _ = b.to_np(step(b.arr({"u": u, "scale": scale}), b.arr({"x": [x]})))
    except Exception as error:
        if mode == "reverse" or not re.search("closes over|closed-over", str(error)):
            raise
        return
    assert_close(grads["scale"], np.asarray(_by_scale(x, u, scale)), b.exact)


def _by_scale(x: float, u: float, scale: float) -> float:
    """Of theta'^2, with theta' = x + (1 - 2 rate scale)^2 (u - x)."""
    shrink = 1 - 0.2 * scale
    return 2 * (x + shrink**2 * (u - x)) * 2 * shrink * -0.2 * (u - x)


def _closed_over_outside(mode: Any, b: Bench) -> None:
    x, u, scale = 0.3, 1.5, 0.7

    def meta_cost(scale: Any) -> Any:
        def cost(task: Any, v: Any) -> Any:
            return scale * ops.square(v["u"] - task["x"])

        def outer(task: Any, v: Any) -> Any:
            del task
            return ops.square(v["u"])

        args = b.arr({"x": [x]}), cost, outer, b.arr({"u": u}), 2, 0.1
        return maml_step(*args, batched="vmap", mode=mode, stop_gradients=False)[0]

    try:
        (found,) = b.to_np(b.gradient(meta_cost, b.arr(scale)))
    except MetaframeError as error:
        if mode == "reverse" or "closes over" not in str(error):
            raise
        return
    assert_close(found, np.asarray(_by_scale(x, u, scale)), b.exact)


for _mode in MODES:
    INNER.add(
        f"{_mode}/closed-over",
        "What a cost closes over gets its gradient; with a rule in between, that or an error.",
        functools.partial(_closed_over, _mode),
    )
    INNER.add(
        f"{_mode}/closed-over-outside",
        "The same for a gradient around a whole step, whose own gradients are in between.",
        functools.partial(_closed_over_outside, _mode),
    )
    INNER.add(
        f"{_mode}/adapted",
        "The adapted variables of 11 steps.",
        functools.partial(_adapted, _mode, 11),
    )
    INNER.add(
        f"{_mode}/gradients",
        "Gradients through the loop by the variables, the rate and the data.",
        functools.partial(_given_gradients, _mode, 3),
    )
    INNER.add(
        f"{_mode}/many-steps",
        "The same past the number of steps that are unrolled.",
        functools.partial(_given_gradients, _mode, 11),
        heavy=True,
    )


# -- the three steps ---------------------------------------------------------------------------

LAYOUTS = {"batched": True, "loop": False, "vmap": "vmap", "scan": "scan"}
"""The names of `batched=` in the clauses."""
POINTS = [(0, False), (1, True), (3, False)]
"""Inner steps, and whether to average over them."""
MORE_POINTS = [(0, True), (1, False), (2, False), (2, True), (3, True)]


def arguments(problem: Problem, b: Bench, batched: Any) -> tuple[Any, Any]:
    """The batch, and the variables, tiled if the layout needs it."""
    return (
        b.arr(problem.batch),
        b.arr(problem.tiled if batched is True else problem.variables),
    )


def _gradient(algorithm: str, batched: Any, steps: int, average: bool, b: Bench) -> None:
    problem = Problem(steps, average_across_steps=average)
    batch, v = arguments(problem, b, batched)
    step, exact = {
        "maml": (maml_step, problem.maml),
        "fomaml": (fomaml_step, problem.fomaml),
    }[algorithm]
    how = {"batched": batched, "average_across_steps": average}
    found = b.to_np(step(batch, support_cost, query_cost, v, steps, RATE, **how))
    assert_close(found[:2], [problem.cost, unpacked(exact)], b.exact)


def _reptile(batched: Any, steps: int, direction: Any, b: Bench) -> None:
    problem = Problem(steps)
    batch, v = arguments(problem, b, batched)
    how = {"batched": batched, "direction": direction}
    found = b.to_np(reptile_step(batch, support_cost, v, steps, RATE, **how))
    assert_close(found, [problem.reptile_cost, unpacked(problem.reptile(direction))], b.exact)


for _layout, _batched in LAYOUTS.items():
    # The other two run task by task, which takes a framework a while that has to be compiled.
    _slow = _layout in ("loop", "scan")
    for _algorithm in ("maml", "fomaml"):
        for _steps, _average in (*POINTS, *MORE_POINTS):
            STEPS.add(
                f"{_algorithm}/{_layout}-{_steps}{'-average' * _average}",
                "The mean cost after adaptation and its gradient are the closed form's.",
                functools.partial(_gradient, _algorithm, _batched, _steps, _average),
                heavy=_slow or (_steps, _average) in MORE_POINTS,
            )
    for _direction in ("gradients", "displacement"):
        for _steps in (1, 2, 3):
            STEPS.add(
                f"reptile/{_layout}-{_steps}-{_direction}",
                "The mean cost over the points and Reptile's direction are the closed form's.",
                functools.partial(_reptile, _batched, _steps, _direction),
                heavy=_slow or (_steps, _direction) not in ((1, "displacement"), (3, "gradients")),
            )


def all_three(
    batch: Any, variables: Any, steps: int, batched: Any, average: bool
) -> dict[str, Any]:
    """One function with all three steps in it: compiling it costs about as much as one."""
    costs, inner = (support_cost, query_cost), (variables, steps, RATE)
    maml, fomaml = (
        step(batch, *costs, *inner, batched=batched, average_across_steps=average)
        for step in (maml_step, fomaml_step)
    )
    directions = {
        direction: reptile_step(batch, support_cost, *inner, batched=batched, direction=direction)
        for direction in ("gradients", "displacement")
    }
    return {"maml": maml, "fomaml": fomaml, **directions}


def check_all_three(found: dict[str, Any], problem: Problem, tolerance: float = 1e-12) -> None:
    """The results of `all_three`, against the closed form."""
    assert_close(found["maml"][:2], [problem.cost, unpacked(problem.maml)], tolerance)
    assert_close(found["fomaml"], [problem.cost, unpacked(problem.fomaml)], tolerance)
    for direction in ("gradients", "displacement"):
        expected = [problem.reptile_cost, unpacked(problem.reptile(direction))]
        assert_close(found[direction], expected, tolerance)


@STEPS.clause("compiled", compiles=True)
def _compiled(b: Bench) -> None:
    """All three steps compiled as a whole: one program for every batch alike."""
    compiled = compile_whole(all_three)
    for seed in (0, 9):
        problem = Problem(average_across_steps=True, seed=seed)
        found = compiled(*arguments(problem, b, "vmap"), 2, "vmap", True)
        check_all_three(b.to_np(found), problem, b.exact)
    equal(compiled.traces, 1)


def _compiled_grid(batched: Any, steps: int, average: bool, b: Bench) -> None:
    problem = Problem(steps, average_across_steps=average)
    found = compile_whole(all_three)(*arguments(problem, b, batched), steps, batched, average)
    check_all_three(b.to_np(found), problem, b.exact)


for _layout, _batched in LAYOUTS.items():
    # More than a backend unrolls, once: where it unrolls tasks too, compiling those takes minutes.
    for _steps in (1, 3, 9) if _layout == "vmap" else (1, 3):
        for _average in (False, True):
            STEPS.add(
                f"compiled/{_layout}-{_steps}{'-average' * _average}",
                "All three steps as one program are the closed form's.",
                functools.partial(_compiled_grid, _batched, _steps, _average),
                compiles=True,
                heavy=True,
            )


@STEPS.clause("documented")
def _documented(b: Bench) -> None:
    """The documented example of maml_step prints its documented numbers."""

    def cost_fn(sub_batch: Any, v: Any) -> Any:
        return sub_batch.mean().x / v.mean().latent

    batch, variables = b.arr(Container(x=np.array([1.0, 2.0]))), Container(latent=np.ones((2, 1)))
    found = maml_step(batch, cost_fn, cost_fn, b.arr(variables), 5, 0.01)
    cost, grads, _ = b.to_np(found)
    equal(type(grads), Container)
    # They were printed in float32, and are right to 8 digits.
    assert_close([cost, grads.latent], [np.array(1.40069818), np.array([-1.13723135])], 2e-7)


@STEPS.clause("float32")
def _float32(b: Bench) -> None:
    """In float32 the steps are exact to 2e-6 of the gradient, and stay in float32."""
    problem = Problem()
    with use_backend(b.backend.name, dtype="float32"):
        args = b.arr(problem.batch, "float32"), b.arr(problem.variables, "float32")
        found = b.to_np(all_three(*args, 2, "vmap", False))
    equal({str(x.dtype) for x in tree.leaves(found)}, {"float32"})
    check_all_three(found, problem, 2e-6)
