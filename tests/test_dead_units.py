"""A unit that no example reaches, under rules that divide by the root of a second moment.

Its gradients are zero, so the second moments are, and the root of zero has no derivative. Without
the unit nothing else changes, which is what the meta-gradient is compared with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

import metaframe
from frameworks import compiles_on_torch, require, slow
from metaframe import MAML, inner_loop, maml_step, meta_value_and_grad, nn, ops, optim, tree
from metaframe.backend import Backend, load_backend

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(2, 4, 1)), RNG.normal(size=(2, 4, 1))
ALIVE = {
    "w1": np.array([[1.0, -0.7]]),
    "b1": np.array([5.0, 4.0]),  # above every input, away from the kink
    "w2": np.array([[0.4], [-0.3]]),
}
DEAD = {"w1": np.array([[-1.0]]), "b1": np.array([-9.0]), "w2": np.array([[0.8]])}
WITH_DEAD = {
    name: np.concatenate([ALIVE[name], DEAD[name]], axis=0 if name == "w2" else -1)
    for name in ALIVE
}


def predict(v: Any, x: Any) -> Any:
    return ops.matmul(nn.relu(ops.matmul(x, v["w1"]) + v["b1"]), v["w2"])


def cost(batch: Any, v: Any) -> Any:
    return ops.mean(ops.square(predict(v, batch["x"]) - batch["y"]))


def native(name: str) -> Callable[[Any], Any]:
    """The square root of a framework itself, which has no derivative at zero."""
    if name == "torch":
        import torch

        return torch.sqrt
    if name == "jax":
        import jax.numpy as jnp

        return jnp.sqrt  # type: ignore[no-any-return]
    import tensorflow as tf

    return tf.sqrt  # type: ignore[no-any-return]


class Pair(NamedTuple):
    """A gradient transformation in optax's sense."""

    init: Any
    update: Any


def pair(root: Callable[[Any], Any]) -> Pair:
    """RMSprop with momentum of the usual kind, by someone else."""

    def init(v: Any) -> Any:
        zeros = tree.map(ops.zeros_like, v)
        return zeros, zeros

    def update(grads: Any, state: Any, v: Any) -> Any:
        del v
        m = tree.map(lambda m, g: 0.9 * m + 0.1 * g, state[0], grads)
        s = tree.map(lambda s, g: 0.99 * s + 0.01 * g * g, state[1], grads)
        return tree.map(lambda m, s: -0.05 * m / (root(s) + 1e-8), m, s), (m, s)

    return Pair(init, update)


def function(root: Callable[[Any], Any]) -> Any:
    """As an update function, with a division by zero that is masked."""

    def update(v: Any, grads: Any, lr: Any, *, stop_gradients: bool) -> Any:
        del stop_gradients

        def moved(p: Any, g: Any) -> Any:
            size = root(g * g + 0.01 * ops.square(root(g * g)))
            return p - ops.where(size > 0, lr * g / size * root(size), 0 * g)

        return tree.map(moved, v, grads)

    return update


OURS: dict[str, Any] = {
    "adam": optim.adam(0.05),
    "adamw": optim.adamw(0.05),
    "rmsprop": optim.rmsprop(0.05),
    "adagrad": optim.adagrad(0.05, initial_accumulator=0.0),
    "clipped": optim.clipped(optim.adam(0.05), value=5.0),
}


def check(step: Callable[[Any, Any], Any], backend: Backend) -> None:
    """`step(batch, v) -> gradients`, with the dead unit and without it."""
    step = metaframe.compile(step) if backend.name == "jax" else step  # eagerly it takes longer
    batch = {"x": backend.asarray(X), "y": backend.asarray(Y)}
    found, expected = (
        {n: backend.to_numpy(g) for n, g in step(batch, tree.map(backend.asarray, v)).items()}
        for v in (WITH_DEAD, ALIVE)
    )
    for name, grad in expected.items():
        alive = found[name][:2] if name == "w2" else found[name][..., :2]
        scale = np.abs(grad).max()
        np.testing.assert_allclose(alive, grad, rtol=0, atol=1e-9 * scale, err_msg=name)
        dead = found[name][2:] if name == "w2" else found[name][..., 2:]
        assert np.isfinite(dead).all(), name


def gradients(rule: Any, lr: Any = None, **how: Any) -> Callable[[Any, Any], Any]:
    def task_cost(v: Any, task: Any) -> Any:
        mode = how.get("mode", "reverse")
        return cost(task, inner_loop(cost, v, task, steps=2, lr=lr, update=rule, mode=mode))

    step = meta_value_and_grad(task_cost, task_map=how.get("task_map", "loop"))
    return lambda batch, v: step(v, batch).grads


@pytest.mark.parametrize("name", OURS)
def test_our_rules(name: str, backend: Backend) -> None:
    check(gradients(OURS[name]), backend)


@pytest.mark.parametrize("mode", ["reverse", slow("remat"), slow("mixed")])
@pytest.mark.parametrize("kind", ["pair", "power", "function"])
def test_rules_of_others(kind: str, mode: Any, backend: Backend) -> None:
    root = native(backend.name)
    rules = {"pair": pair(root), "power": pair(lambda x: x**0.5), "function": function(root)}
    check(gradients(rules[kind], 0.01 if kind == "function" else None, mode=mode), backend)


@compiles_on_torch
def test_in_a_compiled_step_and_one_task_after_the_other(backend: Backend) -> None:
    rule = pair(native(backend.name))

    def step(batch: Any, v: Any) -> Any:
        return maml_step(
            batch, cost, None, v, 2, None, inner_optimization_step=rule, batched="scan"
        )[1]

    check(metaframe.compile(step), backend)


def test_through_a_learner(backend: Backend) -> None:
    rule = pair(native(backend.name))

    def step(batch: Any, v: Any) -> Any:
        maml = MAML((predict, v), None, 2, update=rule)

        def task_loss(v: Any, task: Any) -> Any:
            learner = maml.clone(v).adapt_on(nn.mse, task["x"], task["y"])
            return nn.mse(learner(task["x"]), task["y"])

        return meta_value_and_grad(task_loss, task_map="loop")(v, batch).grads

    check(step, backend)


@pytest.mark.parametrize(
    "name",
    [
        "adam",
        slow("adamw"),
        slow("amsgrad"),
        slow("nadam"),
        slow("adadelta"),
        slow("novograd"),
        slow("yogi"),
        slow("lion"),
        "apply_if_finite",
    ],
)
def test_optax(name: str) -> None:
    """With its default `eps_root=0`, and under a branch of `lax`."""
    require("jax")
    optax = pytest.importorskip("optax")
    if name == "apply_if_finite":
        rule = optax.apply_if_finite(optax.rmsprop(0.05, eps_in_sqrt=False), 3)
    else:
        rule = getattr(optax, name)(0.05)
    jax = load_backend("jax")
    step = gradients(rule)
    if name == "novograd":  # one second moment a layer, so the dead unit is a part of it
        batch, v = ({n: jax.asarray(x) for n, x in xs.items()} for xs in ({"x": X, "y": Y}, DEAD))
        assert all(np.isfinite(g).all() for g in step(batch, v).values())
    else:
        check(step, jax)


# -- the parts ------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[Any], Any]] = {
    "root": ops.sqrt,
    "power": lambda x: x**0.5,
    "square": lambda x: x**2 + x**3.0,
    "logarithm": lambda x: x * ops.where(x > 0, ops.log(x), 0 * x),
    "quotient": lambda x: ops.where(x > 0, (1 + x) / x, 0 * x),
    "reciprocal": lambda x: ops.where(x > 0, 1 / x, 0 * x),
    "root of a root": lambda x: ops.sqrt(ops.sqrt(x) + x * x),
}
POINTS = np.array([0.0, 0.3, 0.0, 2.0])


@pytest.mark.parametrize("name", PARTS)
def test_values_and_derivatives_elsewhere_are_what_they_were(name: str, backend: Backend) -> None:
    """And at zero the derivative is that of everything but the root."""
    part = PARTS[name]

    def derivatives(fn: Callable[[Any], Any]) -> list[Any]:
        def first(x: Any) -> Any:
            return backend.value_and_grad(lambda xs: (ops.sum(fn(xs[0])), ()))((x,))[2][0]

        def second(x: Any) -> Any:
            return backend.value_and_grad(lambda xs: (ops.sum(first(xs[0])), ()))((x,))[2][0]

        x = backend.asarray(POINTS)
        return [backend.to_numpy(y) for y in (fn(x), first(x), second(x))]

    plain = derivatives(part)
    found = derivatives(lambda x: backend.with_finite_roots(lambda xs: (part(xs[0]),))((x,))[0])
    np.testing.assert_array_equal(found[0], plain[0])
    for there, before in zip(found[1:], plain[1:], strict=True):
        np.testing.assert_allclose(there[1::2], before[1::2], rtol=1e-13)
        regular = np.isfinite(before)
        np.testing.assert_allclose(there[regular], before[regular], rtol=1e-13)
        np.testing.assert_array_equal(there[~regular], 0.0)


def test_a_rule_that_looks_at_values_runs_as_it_is(backend: Backend) -> None:
    """There is no trace of it, and nothing to repair."""

    def update(v: Any, grads: Any, lr: Any, *, stop_gradients: bool) -> Any:
        del stop_gradients
        large = float(backend.to_numpy(backend.stop_gradient(grads["w1"])).max()) > 0
        return tree.map(lambda p, g: p - lr * g if large else p + lr * g, v, grads)

    batch = {"x": backend.asarray(X[0]), "y": backend.asarray(Y[0])}
    v = tree.map(backend.asarray, ALIVE)
    found = inner_loop(cost, v, batch, steps=1, lr=0.01, update=update)
    grads = backend.value_and_grad(lambda xs: (cost(batch, dict(zip(v, xs, strict=True))), ()))(
        tuple(v.values())
    )[2]
    sign = 1 if backend.to_numpy(grads[0]).max() > 0 else -1
    for name, grad in zip(v, grads, strict=True):
        expected = ALIVE[name] - sign * 0.01 * backend.to_numpy(grad)
        np.testing.assert_allclose(backend.to_numpy(found[name]), expected, rtol=1e-13)
