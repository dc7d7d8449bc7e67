"""Paths on which a framework computes a wrong gradient without a word, and that we avoid them.

Every test here fails if metaframe ever takes the path that its docstring describes.
"""

from __future__ import annotations

import functools
import importlib
import random
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest

from frameworks import require, slow
from meta_problems import meta_step, quick, regression
from metaframe import (
    fomaml_step,
    inner_loop,
    maml_step,
    map_tasks,
    meta_value_and_grad,
    nn,
    ops,
    optim,
    reptile_step,
    tree,
    use_backend,
)
from metaframe.core.inner_loop import Mode
from metaframe.errors import InputError
from metaframe.testing.conformance.closed_form import assert_close

Call = Callable[..., Any]


# -- moments in TensorFlow ---------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["reverse", slow("remat"), slow("mixed")])
def test_moments_of_tensorflow(mode: Any) -> None:
    """`tf.nn.moments` takes the mean in the variance for a constant; Keras normalises by it."""
    require("tensorflow")
    tf = importlib.import_module("tensorflow")
    x = np.random.default_rng(0).normal(size=(3, 5, 2))

    def cost(moments: Call) -> Call:
        def normalised(task: Any, v: Any) -> Any:
            mean, var = moments(ops.tanh(task["x"] * v["w"]))
            return ops.mean(ops.square(ops.sqrt(var + 0.1) * v["w"] - mean - task["y"]))

        return normalised

    def composed(x: Any) -> tuple[Any, Any]:
        mean = ops.mean(x, 0)
        return mean, ops.mean(ops.square(x - mean), 0)

    with use_backend("tensorflow", dtype="float64") as backend:
        batch = tree.map(backend.asarray, {"x": x, "y": x[:, 0]})
        v = {"w": backend.asarray(np.array([0.7, -1.2]))}
        found, expected = (
            tree.map(backend.to_numpy, maml_step(*args, 2, 0.1, batched="vmap", mode=mode)[:2])
            for args in (
                (batch, cost(which), None, v) for which in (lambda x: tf.nn.moments(x, 0), composed)
            )
        )
        assert_close(found, expected)
    assert np.max(np.abs(tf.nn.moments(x, [0, 1])[1] - x.var((0, 1)))) < 1e-15
    with tf.GradientTape() as outer, tf.GradientTape() as inner:
        point = tf.constant([1.0, 2.0])
        outer.watch(point)
        inner.watch(point)
        gradient = inner.gradient(tf.nn.moments(point, 0)[1], point)[0]
    assert outer.gradient(gradient, point).numpy().tolist() == [1.0, 0.0]  # left to TensorFlow


# -- fused normalisation in torch ------------------------------------------------------------


def _batch_norm(x: Any, scale: Any, shift: Any) -> Any:
    functional = importlib.import_module("torch.nn.functional")
    return functional.batch_norm(x, None, None, scale, shift, training=True)


def _instance_norm(x: Any, scale: Any, shift: Any) -> Any:
    functional = importlib.import_module("torch.nn.functional")
    return functional.instance_norm(x, weight=scale, bias=shift)


def _layer_norm(x: Any, scale: Any, shift: Any) -> Any:
    functional = importlib.import_module("torch.nn.functional")
    return functional.layer_norm(x.mT, (4,), scale, shift).mT


NORMALISATIONS = {
    "batch_norm": _batch_norm,
    "instance_norm": _instance_norm,
    "layer_norm": _layer_norm,
}


@pytest.fixture
def normalised() -> dict[str, Any]:
    """Tasks of (6, 4, 5) signals and the variables of one affine normalisation on torch."""
    require("torch")
    rng = np.random.default_rng(2)
    return {
        "batch": {"x": rng.normal(size=(3, 6, 4, 5)), "y": rng.normal(size=(3, 6, 4, 5))},
        "variables": {
            "w": rng.normal(size=(4, 4)),
            "scale": 1 + rng.normal(size=4) / 3,
            "shift": rng.normal(size=4) / 3,
        },
    }


def normalised_cost(norm: str) -> Callable[[Any, Any], Any]:
    def cost(task: Any, v: Any) -> Any:
        x, y = (x.reshape(6, 4, 5) for x in (task["x"], task["y"]))
        hidden = NORMALISATIONS[norm]((x.mT @ v["w"]).mT, v["scale"], v["shift"])
        return ((hidden.tanh() - y) ** 2).mean()

    return cost


@pytest.mark.parametrize("way", ["vmap", "chunks", "scan"])
@pytest.mark.parametrize("norm", NORMALISATIONS)
def test_fused_normalisation_under_vmap(normalised: dict[str, Any], norm: str, way: str) -> None:
    """torch: `grad` of a mean over `vmap` has wrong second derivatives; `vmap` of `grad` not."""
    how: dict[str, Any] = {
        "vmap": {"batched": "vmap"},
        "chunks": {"batched": "vmap", "chunk_size": 2},
        "scan": {"batched": "scan"},
    }[way]
    with use_backend("torch", dtype="float64") as torch:
        batch, variables = tree.map(torch.asarray, (normalised["batch"], normalised["variables"]))
        args = (batch, normalised_cost(norm), None, variables, 2, 0.3)
        found, expected = (
            tree.map(torch.to_numpy, result[:2])
            for result in (maml_step(*args, **how), maml_step(*args, batched=False))
        )
    assert_close(found, expected)


@pytest.mark.parametrize("norm", NORMALISATIONS)
def test_differentiating_a_vmap_from_outside(normalised: dict[str, Any], norm: str) -> None:
    """torch: by a tape or a transform around a step or a `meta_value_and_grad`, in every order."""
    torch = importlib.import_module("torch")
    cost = normalised_cost(norm)

    def step(v: Any, batched: Any) -> Any:
        return maml_step(batch, cost, None, v, 2, 0.3, batched=batched, stop_gradients=False)[0]

    def composed(v: Any) -> Any:
        def task_cost(v: Any, task: Any) -> Any:
            return cost(task, inner_loop(cost, v, task, steps=2, lr=0.3))

        return meta_value_and_grad(task_cost, task_map="vmap")(v, batch).cost

    def evaluated(v: Any) -> Any:
        adapt = functools.partial(inner_loop, cost, v, steps=2, lr=0.3)
        return map_tasks(lambda task: cost(task, adapt(task)))(batch).mean()

    with use_backend("torch", dtype="float64") as backend:
        batch, v = tree.map(backend.asarray, (normalised["batch"], normalised["variables"]))
        leaves = tree.map(lambda x: x.clone().requires_grad_(), v)

        def taped(fn: Callable[[Any], Any]) -> Any:
            first = torch.autograd.grad(fn(leaves), tree.leaves(leaves), create_graph=True)
            again = torch.autograd.grad(sum((g**2).sum() for g in first), tree.leaves(leaves))
            return tree.map(backend.to_numpy, (first, again))

        expected = taped(lambda v: step(v, False))
        assert_close(taped(lambda v: step(v, "vmap")), expected)
        assert_close(taped(composed), expected)
        with pytest.warns(UserWarning, match="tasks run one by one"):
            found = taped(evaluated)
        assert_close(found, expected)
        transformed = torch.func.grad(lambda v: step(v, "vmap"))(v)
    assert_close(tree.leaves(tree.map(backend.to_numpy, transformed)), expected[0])


# -- the second-order term --------------------------------------------------------------------


def curved(task: Any, v: Any) -> Any:
    """X * u**3, so that the second-order term is large."""
    return ops.mean(task["x"]) * ops.mean(v["u"]) ** 3


def curved_answer(x: Any, u: float, steps: int, rate: float) -> tuple[float, float]:
    """MAML and FOMAML gradients of the mean over tasks."""
    maml, fomaml = [], []
    for xi in x:
        at, slope = u, 1.0
        for _ in range(steps):
            slope *= 1 - rate * 6 * xi * at
            at -= rate * 3 * xi * at**2
        fomaml.append(3 * xi * at**2)
        maml.append(fomaml[-1] * slope)
    return float(np.mean(maml)), float(np.mean(fomaml))


def every_mode(batch: Any, variables: Any, optimizer: optim.Optimizer, batched: Any) -> list[Any]:
    """MAML's gradient in every mode; one function, so that it compiles as one program."""
    return [
        maml_step(
            batch,
            curved,
            None,
            variables,
            2,
            0.05,
            batched=batched,
            mode=mode,
            inner_optimization_step=optimizer,
        )[1]
        for mode in get_args(Mode)
    ]


def test_compiling_keeps_the_second_order_term(arr: Call, to_np: Call, execution: Call) -> None:
    """torch.compile of a cost alone gives the first-order answer; so does ivy on JAX."""
    x = np.array([0.4, 0.9])
    batch, variables = arr({"x": x}), arr({"u": np.array(0.8)})
    found = execution(every_mode)(batch, variables, optim.sgd(), "vmap")
    maml, fomaml = curved_answer(x, 0.8, 2, 0.05)
    assert abs(maml - fomaml) > 0.1
    for gradient in to_np(found):
        assert_close(gradient["u"], np.asarray(maml))


def test_first_order_is_something_else(arr: Call, to_np: Call) -> None:
    """FOMAML is the gradient at the adapted point, and not that of MAML."""
    x = np.array([0.4, 0.9])
    args = (arr({"x": x}), curved, None, arr({"u": np.array(0.8)}), 3, 0.05)
    _, grads = to_np(fomaml_step(*args, batched="vmap"))
    maml, fomaml = curved_answer(x, 0.8, 3, 0.05)
    assert abs(grads["u"] - maml) > 0.1
    assert_close(grads["u"], np.asarray(fomaml))


# -- recomputation ------------------------------------------------------------------------------


def closed_over(backend: Any, mode: str) -> Callable[[Any], Any]:
    """The meta-gradient of a parameter that reaches the inner cost through a closure."""

    def meta_cost(v: Any, task: Any) -> Any:
        def cost(batch: Any, inner: Any) -> Any:
            return v["scale"] * ops.square(inner["u"] - batch["x"])

        adapted = inner_loop(cost, {"u": v["u"]}, task, steps=2, lr=0.1, mode=mode)
        return ops.square(adapted["u"])

    return meta_value_and_grad(meta_cost, task_map="loop")


def closed_over_answer(x: float, u: float, scale: float) -> float:
    shrink = 1 - 0.2 * scale
    adapted = x + shrink**2 * (u - x)
    return 2 * adapted * 2 * shrink * -0.2 * (u - x)


def test_a_closed_over_meta_parameter(backend: Any, arr: Call, to_np: Call) -> None:
    v, task = arr({"u": np.array(1.5), "scale": np.array(0.7)}), arr({"x": np.array([0.3])})
    _, grads, _ = to_np(closed_over(backend, "reverse")(v, task))
    assert_close(grads["scale"], np.asarray(closed_over_answer(0.3, 1.5, 0.7)))


@pytest.mark.parametrize("mode", ["remat", "mixed"])
def test_recomputing_with_a_closed_over_meta_parameter(
    backend: Any, arr: Call, to_np: Call, mode: str
) -> None:
    """A custom rule differentiates its arguments only, and torch and TensorFlow do not say so."""
    v, task = arr({"u": np.array(1.5), "scale": np.array(0.7)}), arr({"x": np.array([0.3])})
    if backend.name == "torch":  # has no way to make it an argument
        with pytest.raises(InputError, match=f"mode='{mode}'.* closes over.*Make it an argument"):
            closed_over(backend, mode)(v, task)
        return
    _, grads, _ = to_np(closed_over(backend, mode)(v, task))
    assert_close(grads["scale"], np.asarray(closed_over_answer(0.3, 1.5, 0.7)))


@pytest.mark.parametrize("mode", ["remat", "mixed"])
def test_recomputing_with_random_numbers(mode: str) -> None:
    """torch: another mask in the backward pass, a gradient of no function at all."""
    functional = importlib.import_module("torch.nn.functional")

    def cost(task: Any, v: Any) -> Any:
        return (functional.dropout(v["u"] * task["x"]) ** 2).mean()

    with use_backend("torch", dtype="float64") as torch:
        batch, v = tree.map(torch.asarray, ({"x": np.ones((2, 5))}, {"u": np.array(0.7)}))
        for batched in ("vmap", False):
            with pytest.raises(InputError, match=f"mode='{mode}'.* draws random numbers"):
                maml_step(batch, cost, None, v, 2, 0.1, batched=batched, mode=mode)
        maml_step(batch, cost, None, v, 2, 0.1, batched="vmap")


def drawn_in_tensorflow() -> dict[str, Call]:
    """Ways to draw a number in TensorFlow; each has its state in another place."""
    tf, keras = map(importlib.import_module, ("tensorflow", "keras"))
    generator, ones = tf.random.Generator.from_seed(0), tf.ones((), tf.float64)
    dropout = keras.layers.Dropout(0.5, dtype="float64")
    return {
        "uniform": lambda: tf.random.uniform((), dtype=tf.float64),
        "seeded": lambda: tf.random.normal((), dtype=tf.float64, seed=3),
        "function": tf.function(lambda: tf.random.uniform((), dtype=tf.float64)),
        "branch": lambda: tf.cond(
            ones > 0, lambda: tf.random.uniform((), dtype=tf.float64), lambda: ones
        ),
        "generator": lambda: generator.uniform((), dtype=tf.float64),
        "keras": lambda: dropout(ones, training=True),
    }


@pytest.mark.parametrize(
    "draw", ["uniform", "seeded", slow("function"), "branch", slow("generator"), "keras"]
)
@pytest.mark.parametrize("mode", ["remat", "mixed"])
def test_recomputing_with_random_numbers_of_tensorflow(mode: str, draw: str) -> None:
    require("tensorflow")
    drawn = drawn_in_tensorflow()[draw]
    what = "changes a tf.Variable" if draw == "keras" else "draws random numbers"

    def cost(task: Any, v: Any) -> Any:
        return drawn() * ops.mean(ops.square(v["u"] * task["x"]))

    with use_backend("tensorflow", dtype="float64") as tensorflow:
        batch, v = tree.map(tensorflow.asarray, ({"x": np.ones((2, 5))}, {"u": np.array(0.7)}))
        for batched in ("vmap", False):
            with pytest.raises(InputError, match=f"mode='{mode}'.* {what}"):
                maml_step(batch, cost, None, v, 2, 0.1, batched=batched, mode=mode)
        maml_step(batch, cost, None, v, 2, 0.1, batched="vmap")


def test_recomputing_with_random_numbers_of_a_state_that_is_given() -> None:
    """TensorFlow: a stateless draw is a function of its seed, and may be drawn again."""
    require("tensorflow")
    tf = importlib.import_module("tensorflow")

    def cost(task: Any, v: Any) -> Any:
        mask = tf.random.stateless_uniform((5,), [1, 2], dtype=tf.float64)
        return ops.mean(mask * ops.square(v["u"] * task["x"]))

    with use_backend("tensorflow", dtype="float64") as tensorflow:
        batch, v = tree.map(tensorflow.asarray, ({"x": np.ones((2, 5))}, {"u": np.array(0.7)}))
        plain, again = (
            maml_step(batch, cost, None, v, 2, 0.1, batched=False, mode=mode)[1]["u"]
            for mode in ("reverse", "remat")
        )
        assert_close(tensorflow.to_numpy(again), tensorflow.to_numpy(plain))


@pytest.mark.parametrize(
    "draw",
    [random.random, functools.partial(random.gauss, 0, 1), np.random.rand, np.random.randn],
    ids=["random", "gauss", "rand", "randn"],
)
@pytest.mark.parametrize("mode", ["remat", slow("mixed")])
def test_recomputing_with_random_numbers_of_no_framework(
    backend: Any, arr: Call, mode: Any, draw: Call
) -> None:
    """Python's and NumPy's global streams: another factor in the backward pass."""

    def cost(task: Any, v: Any) -> Any:
        return draw() * ops.mean(ops.square(v["u"] * task["x"]))

    def meta_cost(v: Any, task: Any) -> Any:
        return inner_loop(cost, v, task, steps=1, lr=0.1, mode=mode)["u"]

    batch, v = arr({"x": np.ones((2, 5))}), arr({"u": np.array(0.7)})
    draw()  # of the second of a pair of normal numbers the position in the stream says nothing
    for task_map in ("loop", "vmap"):
        with pytest.raises(InputError, match="draws random numbers"):
            meta_value_and_grad(meta_cost, task_map=task_map)(v, batch)


@pytest.mark.parametrize("batched", [slow(False), "vmap", slow("scan")])
def test_recomputing_reaches_the_inner_gradient(arr: Call, to_np: Call, batched: Any) -> None:
    """TensorFlow: `tf.recompute_grad` inside a tape has no inner gradient and says nothing."""
    x = arr({"x": np.array([0.4, 0.9])})
    u = arr({"u": np.array(0.8)})
    reverse, *others = to_np(every_mode(x, u, optim.momentum(), batched))
    for gradient in others:
        assert_close(gradient, reverse)


# -- precision ---------------------------------------------------------------------------------


def test_the_learning_rate_keeps_its_digits(backend: Any, arr: Call, to_np: Call) -> None:
    """`tf.cast(0.01, tf.float64)` goes through float32 and gives 0.00999999977648258."""
    batch, variables = arr({"x": np.array([1.0])}), arr({"u": np.array(0.0)})

    def cost(task: Any, v: Any) -> Any:
        return ops.mean(task["x"] * v["u"])

    def run(batch: Any, variables: Any) -> list[Any]:
        how: dict[str, Any] = {"batched": "vmap", "return_inner_v": "all"}
        maml = maml_step(batch, cost, None, variables, 1, 0.01, **how)
        reptile = reptile_step(batch, cost, variables, 1, 0.01, **how)
        return [maml[2], reptile[2]]

    for adapted in to_np(quick(backend, run)(batch, variables)):
        assert adapted["u"].tolist() == [-0.01]


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_numbers_in_an_optimizer_keep_their_digits(
    backend: Any, arr: Call, to_np: Call, optimizer: str
) -> None:
    rule = {"sgd": optim.sgd, "adam": optim.adam}[optimizer](0.01)
    grads = arr({"u": np.array([0.3, -1.7])})
    updates, _ = rule.update(grads, rule.init(grads), grads)
    # The first step of Adam is the sign of the gradient.
    exact = -0.01 * (np.array([0.3, -1.7]) if optimizer == "sgd" else np.array([1.0, -1.0]))
    assert_close(to_np(updates), {"u": exact}, 1e-12 if optimizer == "sgd" else 1e-7)


@pytest.mark.parametrize("batched", [False, "vmap", "scan"])
def test_reptile_in_float32(backend: Any, arr: Call, to_np: Call, batched: Any) -> None:
    """The difference of two nearby float32 vectors loses digits that the sum of updates keeps."""

    def displacement(dtype: str) -> Any:
        def cost(task: Any, v: Any) -> Any:
            return ops.mean(ops.square(ops.sum(task["x"] * v["w"], axis=-1) - 1000.0))

        rng = np.random.default_rng(4)
        batch = {"x": rng.normal(size=(3, 5, 4)) / 10}
        variables = {"w": 1000 + rng.normal(size=4)}
        _, grads = reptile_step(
            arr(batch, dtype),
            cost,
            arr(variables, dtype),
            3,
            1e-4,
            batched=batched,
            direction="displacement",
        )
        return to_np(grads)

    assert_close(displacement("float32"), displacement("float64"), 1e-6)


# -- kinks and infinities ------------------------------------------------------------------------


def test_first_of_tied_maxima_gets_the_gradient(backend: Any, arr: Call, to_np: Call) -> None:
    """At a tie one framework picks a pixel, another shares, and the second derivative is NaN."""
    images = np.ones((1, 1, 2, 2, 1))

    def cost(task: Any, v: Any) -> Any:
        x = ops.reshape(task["x"], (1, 2, 2, 1)) * v["scale"]
        return -ops.mean(ops.square(nn.max_pool2d(x)))

    args = (arr({"x": images}), cost, None, arr({"scale": np.ones((1, 2, 2, 1))}), 1, 0.1)
    value, grads, inner = to_np(maml_step(*args, batched="vmap", return_inner_v="all"))
    # The first pixel moves from 1 by 0.1 * 2, which depends on it: -(1.2 v)^2 at v = 1.
    first = np.zeros((1, 2, 2, 1))
    first[0, 0, 0, 0] = 1.0
    assert_close(inner["scale"], 1.0 + 0.2 * first[None])
    assert_close(value, np.asarray(-(1.2**2)))
    assert_close(grads["scale"], -2 * 1.2**2 * first)


@pytest.mark.parametrize("optimizer", ["adam", slow("rmsprop"), slow("clipped_norm")])
def test_no_root_of_zero(backend: Any, arr: Call, to_np: Call, optimizer: str) -> None:
    """The derivative of sqrt at 0 is infinite, and 0 * infinity is NaN."""
    problem = regression()
    frozen = {**problem.variables, "unused": np.zeros(3)}
    step = quick(backend, meta_step(problem, 1, optimizer=optimizer))
    _, grads = to_np(step(arr(problem.batch), arr(frozen)))
    assert all(np.all(np.isfinite(g)) for g in tree.leaves(grads))
    assert grads["unused"].tolist() == [0.0] * 3
    assert np.abs(grads["head"]["w"]).max() > 1e-3
