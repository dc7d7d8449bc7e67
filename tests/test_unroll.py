"""`unroll`: batches and rates for each step, state in and out, costs and aux of each step."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from frameworks import compiles_on_torch, require, slow
from metaframe import (
    compile as compile_whole,
)
from metaframe import (
    inner_loop,
    maml_step,
    map_tasks,
    meta_value_and_grad,
    ops,
    optim,
    per_step,
    reptile_step,
    tree,
    unroll,
    value_and_grad,
)
from metaframe.core.inner_loop import MODES
from metaframe.core.recompute import segment
from metaframe.errors import InputError, InputTypeError

Call = Callable[..., Any]
DECAY = 0.9
STEPS = 5
RNG = np.random.default_rng(7)
GIVEN = {
    "v": RNG.normal(size=2),
    "x": RNG.normal(size=(STEPS, 2)),
    "shift": RNG.normal(size=2),
    "lr": RNG.uniform(0.05, 0.2, size=STEPS),
    "m": RNG.normal(size=2),
}
END, COSTS, STATE = RNG.normal(size=2), RNG.normal(size=STEPS), RNG.normal(size=2)


def cost(batch: Any, v: Any) -> Any:
    x, shift = batch
    return ops.sum(ops.square(v - x) * (1 + ops.square(v)) + shift * v)


def weighted(x: Any, weights: Any) -> Any:
    return ops.sum(x * ops.asarray(weights))


def objective(given: Any, **how: Any) -> Any:
    """A number that depends on everything that `unroll` returns."""
    batch = (per_step(given["x"]), given["shift"])
    rule = optim.momentum(decay=DECAY)
    found = unroll(
        cost, given["v"], batch, lr=per_step(given["lr"]), update=rule, state=given["m"], **how
    )
    ends = ((found.variables, END), (found.costs, COSTS), (found.state, STATE))
    return sum(weighted(x, weights) for x, weights in ends)


def by_hand(given: dict[str, Any]) -> Any:
    """The same in plain NumPy, for complex numbers too."""
    v, m, total = given["v"], given["m"], 0.0
    for k in range(STEPS):
        x, shift = given["x"][k], given["shift"]
        total = total + COSTS[k] * np.sum((v - x) ** 2 * (1 + v**2) + shift * v)
        gradient = 2 * (v - x) * (1 + v**2) + (v - x) ** 2 * 2 * v + shift
        m = DECAY * m + gradient
        v = v - given["lr"][k] * m
    return total + np.sum(v * END) + np.sum(m * STATE)


def slopes_by_hand() -> dict[str, Any]:
    """The gradient of `by_hand` by complex steps, which are exact to rounding."""
    found = {}
    for name, value in GIVEN.items():
        slope = np.zeros(value.shape)
        for place in np.ndindex(value.shape):
            moved = value.astype(complex)
            moved[place] += 1e-30j
            slope[place] = by_hand({**GIVEN, name: moved}).imag / 1e-30
        found[name] = slope
    return found


SLOPES = slopes_by_hand()


def close(found: Any, expected: Any) -> None:
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_everything_has_its_gradient(mode: Any, arr: Call, to_np: Call) -> None:
    """Rows of the batch and of the rate, what stays, the state and the start."""
    found = value_and_grad(lambda given: objective(given, mode=mode))(arr(GIVEN))
    np.testing.assert_allclose(to_np(found.cost), by_hand(GIVEN), rtol=1e-12)
    close(to_np(found.grads), SLOPES)


@compiles_on_torch
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("task_map", ["vmap", slow("scan")])
def test_compiled_and_over_tasks(mode: Any, task_map: Any, arr: Call, to_np: Call) -> None:
    def task_cost(given: Any, task: Any) -> Any:
        return objective({**given, "shift": given["shift"] * task}, mode=mode)

    step = compile_whole(
        lambda given, tasks: meta_value_and_grad(task_cost, task_map=task_map)(given, tasks)
    )
    found = step(arr(GIVEN), arr(np.ones(2)))
    close(to_np(found.grads), SLOPES)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rule", [optim.adam(), optim.momentum()], ids=["adam", "momentum"])
def test_two_loops_are_one(mode: Any, rule: Any, arr: Call, to_np: Call) -> None:
    """Twice 10 steps are 20, bit for bit, and so are the costs."""
    rows = arr(RNG.normal(size=(20, 2)))
    shift, v = arr(GIVEN["shift"]), arr(GIVEN["v"])

    def run(v: Any, rows: Any, state: Any = None) -> Any:
        how = {"lr": 0.01, "update": rule, "state": state, "mode": mode}
        return unroll(cost, v, (per_step(rows), shift), **how)

    whole = to_np(run(v, rows))
    first = run(v, rows[:10])
    second = to_np(run(first.variables, rows[10:], first.state))
    np.testing.assert_array_equal(second.variables, whole.variables)
    for a, b in zip(tree.leaves(second.state), tree.leaves(whole.state), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(np.concatenate([to_np(first.costs), second.costs]), whole.costs)


def test_aux_is_stacked(arr: Call, to_np: Call) -> None:
    def with_aux(batch: Any, v: Any) -> Any:
        return cost(batch, v), {"at": v, "index": batch[0]}

    batch = (per_step(arr(GIVEN["x"])), arr(GIVEN["shift"]))
    found = to_np(unroll(with_aux, arr(GIVEN["v"]), batch, lr=0.1, has_aux=True))
    np.testing.assert_array_equal(found.aux["index"], GIVEN["x"])
    np.testing.assert_array_equal(found.aux["at"][0], GIVEN["v"])
    assert found.aux["at"].shape == (STEPS, 2)
    plain = to_np(unroll(cost, arr(GIVEN["v"]), batch, lr=0.1))
    assert plain.aux == ()
    np.testing.assert_array_equal(plain.costs, found.costs)


def test_inner_loop_is_its_first_field(arr: Call, to_np: Call) -> None:
    batch = (per_step(arr(GIVEN["x"])), arr(GIVEN["shift"]))
    a = inner_loop(cost, arr(GIVEN["v"]), batch, lr=0.1)
    b = unroll(cost, arr(GIVEN["v"]), batch, steps=STEPS, lr=0.1).variables
    np.testing.assert_array_equal(to_np(a), to_np(b))


@pytest.mark.parametrize("last", [0, 2, STEPS, STEPS + 3])
def test_truncation(last: int, arr: Call, to_np: Call) -> None:
    """As if the loop had begun at a constant, so many steps before its end."""
    begin = max(STEPS - last, 0)

    def run(given: Any, **how: Any) -> Any:
        batch = (per_step(given["x"]), given["shift"])
        return unroll(cost, given["v"], batch, lr=per_step(given["lr"]), **how)

    def truncated(given: Any) -> Any:
        found = run(given, last=last)
        return weighted(found.variables, END) + weighted(found.costs, COSTS)

    given = arr(GIVEN)
    before = tree.map(lambda x: x[:begin], {name: given[name] for name in ("x", "lr")})
    first = run({**given, **before}) if begin else None

    def afterwards(given: Any) -> Any:
        if first is None:
            return truncated(given)
        rest = {name: given[name][begin:] for name in ("x", "lr")}
        found = run({**given, **rest, "v": arr(to_np(first.variables))}, steps=min(last, STEPS))
        total = weighted(found.variables, END) + weighted(found.costs, COSTS[begin:])
        return total + ops.sum(0 * given["v"])

    close(
        to_np(value_and_grad(truncated)(given).grads),
        to_np(value_and_grad(afterwards)(given).grads),
    )


def test_first_order(arr: Call, to_np: Call) -> None:
    """The result and the costs have the gradient of the point where the loop was."""

    def costs(v: Any) -> Any:
        batch = (per_step(arr(GIVEN["x"])), arr(GIVEN["shift"]))
        return weighted(unroll(cost, v, batch, lr=0.1, order=1).costs, COSTS)

    def constants(v: Any) -> Any:
        """The same from the points of the loop, as constants that move with the start."""
        at, total = arr(GIVEN["v"]), 0.0
        for k in range(STEPS):
            task = (arr(GIVEN["x"][k]), arr(GIVEN["shift"]))
            total = total + cost(task, at + v - arr(GIVEN["v"])) * float(COSTS[k])
            at = inner_loop(cost, at, task, steps=1, lr=0.1)
        return total

    found, expected = (value_and_grad(fn)(arr(GIVEN["v"])) for fn in (costs, constants))
    np.testing.assert_allclose(to_np(found.grads), to_np(expected.grads), rtol=1e-12)


@pytest.mark.parametrize("batched", [False, True, "vmap", "scan"])
def test_steps_take_rows(batched: Any, arr: Call, to_np: Call) -> None:
    """As the same tasks one by one through `inner_loop`."""
    tasks, steps = 3, 2
    x, y = RNG.normal(size=(tasks, steps, 4, 2)), RNG.normal(size=(tasks, 4))
    w = RNG.normal(size=2)

    def loss(batch: Any, w: Any) -> Any:
        x = batch["x"]
        prediction = ops.sum(x * (w[:, None, :] if batched is True else w), axis=-1)
        return ops.mean(ops.square(prediction - batch["y"]))

    def outer(batch: Any, w: Any) -> Any:
        first = batch["x"][:, 0] if isinstance(batched, bool) else batch["x"][0]
        return loss({"x": first, "y": batch["y"]}, w)

    v = arr(np.tile(w, (tasks, 1)) if batched is True else w)
    batch = {"x": per_step(arr(x)), "y": arr(y)}
    value, grads, _ = maml_step(batch, loss, outer, v, steps, 0.1, batched=batched)

    def plain(batch: Any, w: Any) -> Any:
        return ops.mean(ops.square(ops.sum(batch["x"] * w, axis=-1) - batch["y"]))

    def task_cost(w: Any, task: Any) -> Any:
        rows = {"x": per_step(task["x"]), "y": task["y"]}
        at = inner_loop(plain, w, rows, lr=0.1)
        return plain({"x": task["x"][0], "y": task["y"]}, at)

    expected = meta_value_and_grad(task_cost)(arr(w), {"x": arr(x), "y": arr(y)})
    np.testing.assert_allclose(to_np(value), to_np(expected.cost), rtol=1e-12)
    np.testing.assert_allclose(to_np(grads), to_np(expected.grads), rtol=1e-12)


@compiles_on_torch
def test_replay_of_a_long_loop(arr: Call, to_np: Call) -> None:
    """Several levels with a rest, against the modes that have none."""
    steps = 101
    assert 1 < segment(steps) < steps
    assert steps % segment(steps)
    rows = arr(RNG.normal(size=(steps, 2)))

    def end(given: Any, mode: Any) -> Any:
        batch = (per_step(given["rows"]), given["shift"])
        how = {"lr": given["lr"], "update": optim.adam(), "mode": mode}
        found = unroll(cost, given["v"], batch, **how)
        return ops.sum(found.variables) + ops.mean(found.costs)

    given = arr({"v": GIVEN["v"], "shift": GIVEN["shift"], "lr": np.array(0.01)})
    given["rows"] = rows
    replay, reverse = (
        to_np(
            compile_whole(
                lambda given, mode=mode: value_and_grad(lambda given: end(given, mode))(given)
            )(given).grads
        )
        for mode in ("replay", "reverse")
    )
    close(replay, reverse)


def test_numpy_is_converted(arr: Call, to_np: Call) -> None:
    found = unroll(
        cost,
        GIVEN["v"],
        (per_step(GIVEN["x"]), GIVEN["shift"]),
        lr=per_step(GIVEN["lr"]),
        update=optim.momentum(decay=DECAY),
        state=GIVEN["m"],
    )
    expected = unroll(
        cost,
        arr(GIVEN["v"]),
        (per_step(arr(GIVEN["x"])), arr(GIVEN["shift"])),
        lr=per_step(arr(GIVEN["lr"])),
        update=optim.momentum(decay=DECAY),
        state=arr(GIVEN["m"]),
    )
    np.testing.assert_array_equal(to_np(found.variables), to_np(expected.variables))


def test_no_steps(arr: Call, to_np: Call) -> None:
    batch = (arr(GIVEN["x"][0]), arr(GIVEN["shift"]))
    found = unroll(cost, arr(GIVEN["v"]), batch, steps=0, lr=0.1)
    assert to_np(found.costs).shape == (0,)
    np.testing.assert_array_equal(to_np(found.variables), GIVEN["v"])


def test_under_map_tasks(arr: Call, to_np: Call) -> None:
    """A marked structure is a node: tasks may hold it."""

    def run(task: Any) -> Any:
        return unroll(cost, arr(GIVEN["v"]), task, lr=0.1).costs

    tasks = (per_step(arr(np.stack([GIVEN["x"]] * 2))), arr(np.stack([GIVEN["shift"]] * 2)))
    found = to_np(map_tasks(run)(tasks))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-14)
    assert found.shape == (2, STEPS)


@pytest.mark.parametrize("mode", MODES)
def test_numbers_in_the_aux(mode: Any, arr: Call, to_np: Call) -> None:
    def with_aux(batch: Any, v: Any) -> Any:
        return cost(batch, v), {"number": 2.5, "rows": np.arange(2), "flag": True}

    batch = (per_step(arr(GIVEN["x"])), arr(GIVEN["shift"]))
    found = to_np(unroll(with_aux, arr(GIVEN["v"]), batch, lr=0.1, has_aux=True, mode=mode).aux)
    np.testing.assert_array_equal(found["number"], [2.5] * STEPS)
    np.testing.assert_array_equal(found["rows"], [[0, 1]] * STEPS)
    assert found["flag"].all()


@pytest.mark.parametrize("mode", MODES)
def test_the_aux_alone_closes_over(mode: Any, arr: Call, to_np: Call, backend: Any) -> None:
    """Its gradient is there, or refused where a step is run again on torch."""

    def aux_of(factor: Any) -> Any:
        def with_aux(batch: Any, v: Any) -> Any:
            return cost(batch, v), factor * ops.sum(v)

        batch = (per_step(arr(GIVEN["x"])), arr(GIVEN["shift"]))
        found = unroll(with_aux, arr(GIVEN["v"]), batch, lr=0.1, mode=mode, has_aux=True)
        return ops.sum(found.aux)

    if backend.name == "torch" and mode != "reverse":
        with pytest.raises(InputError, match="closes over"):
            value_and_grad(aux_of)(arr(0.7))
        return
    found = to_np(value_and_grad(aux_of)(arr(0.7)))
    np.testing.assert_allclose(found.grads, found.cost / 0.7, rtol=1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["cost", "function", "update"])
def test_closures_within_a_graph_of_tensorflow(kind: str, mode: Any) -> None:
    """Within a rule, a `tf.function` or an update of a step that runs again."""
    require("tensorflow")
    tf = importlib.import_module("tensorflow")
    start = tf.constant([1.0, -0.5], tf.float64)

    @tf.function
    def inside(w: Any, h: Any) -> Any:
        return tf.reduce_sum(tf.sin(w * h))

    def slope(h: Any) -> Any:
        costs = {
            "cost": lambda batch, w: tf.reduce_sum(tf.sin(w * h)),
            "function": lambda batch, w: inside(w, h),
            "update": lambda batch, w: tf.reduce_sum(tf.sin(w)),
        }
        how = {} if kind != "update" else {"update": lambda v, g, lr, **_: v - lr * h * g}
        with tf.GradientTape() as tape:
            tape.watch(h)
            w = inner_loop(costs[kind], start, (), steps=3, lr=0.01, mode=mode, **how)
            end = tf.reduce_sum(w**2)
        return tape.gradient(end, h)

    def end(h: float) -> float:
        w = np.array([1.0, -0.5])
        for _ in range(3):
            w = w - 0.01 * (h * np.cos(w * h) if kind != "update" else h * np.cos(w))
        return float(np.sum(w**2))

    step = 1e-3
    pairs = ((8, step), (-8, -step), (-1, 2 * step), (1, -2 * step))
    expected = sum(factor * end(0.7 + by) for factor, by in pairs) / (12 * step)
    found = tf.function(slope)(tf.constant(0.7, tf.float64))
    np.testing.assert_allclose(float(found), expected, rtol=1e-9)


def test_bad_arguments(arr: Call) -> None:
    v, shift = arr(GIVEN["v"]), arr(GIVEN["shift"])
    fixed, rows = (arr(GIVEN["x"][0]), shift), (per_step(arr(GIVEN["x"])), shift)
    bad: list[tuple[type[Exception], str, Any, dict[str, Any]]] = [
        (InputError, "steps is missing", fixed, {}),
        (InputError, "'steps': 3, 'batch': 5", rows, {"steps": 3}),
        (InputError, "'batch': 5, 'lr': 2", rows, {"lr": per_step(np.ones(2))}),
        (InputError, r"lr\['0'\].*no step axis", rows, {"lr": per_step([0.1] * 5)}),
        (InputError, "batch.*no step axis", (per_step(arr(1.0)), shift), {}),
        (InputError, "step axis.*differs", (per_step([arr(np.ones(2)), arr(np.ones(3))]), 1), {}),
        (InputError, "lr: .*not negative", rows, {"lr": per_step(np.array([0.1] * 4 + [-1.0]))}),
        (InputError, "state has another structure", rows, {"state": {"a": v}}),
        (InputError, "state has .*shape", rows, {"update": optim.momentum(), "state": arr([1.0])}),
        (InputTypeError, "with has_aux=True returns", rows, {"has_aux": True}),
        (InputError, "last", rows, {"last": -1}),
        (InputError, "Mark it once", (per_step({"a": per_step(arr(np.ones(5)))}), shift), {}),
    ]
    for error, match, batch, how in bad:
        with pytest.raises(error, match=match):
            unroll(cost, v, batch, **{"lr": 0.1, **how})
    with pytest.raises(InputError, match="v is marked by per_step"):
        unroll(cost, per_step(v), fixed, steps=1, lr=0.1)
    changing = iter(range(9))

    def differing(batch: Any, v: Any) -> Any:
        return cost(batch, v), arr(np.ones(next(changing)))

    with pytest.raises(InputError, match="aux of cost differs"):
        unroll(differing, v, rows, lr=0.1, has_aux=True)
    with pytest.raises(InputTypeError, match="aux of cost has str"):
        unroll(lambda b, v: (cost(b, v), "a"), v, rows, lr=0.1, has_aux=True)
    tasks = (per_step(arr(np.ones((2, 3, 2)))), arr(np.ones((2, 2))))
    with pytest.raises(InputError, match="inner_learning_rate is marked by per_step"):
        maml_step(tasks, cost, None, v, 3, per_step(np.ones(3)), batched="vmap")
    with pytest.raises(InputError, match="no step axis after the task axis"):
        maml_step((per_step(arr(np.ones(2))), tasks[1]), cost, None, v, 2, 0.1, batched=False)
    with pytest.raises(InputError, match="inner_grad_steps"):
        maml_step(tasks, cost, lambda b, v: cost((b[0][0], b[1]), v), v, 2, 0.1, batched="vmap")
    with pytest.raises(InputError, match="after the last step"):
        reptile_step(tasks, cost, v, 3, 0.1, batched="vmap")
