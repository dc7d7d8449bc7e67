"""A physics-informed network that solves any equation of a family in a few steps.

    python examples/physics.py --backend torch

The family is Newton's law of cooling, u' = r (cos t - u) with u(0) = 0: a body with a rate r of its
own follows the temperature around it. A network minimises the equation's residual, without data
(Raissi et al. 2019); its start is meta-learned, so that an equation that was not trained on takes
ten steps. The derivative u' is taken by `value_and_grad` inside the inner cost, which makes the
meta-gradient one of third order.
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import numpy as np

import metaframe
from metaframe import inner_loop, meta_value_and_grad, nn, ops, optim, tree, value_and_grad
from metaframe.backend import load_backend

POINTS, STEPS, RATE = 30, 10, 0.003
MODEL = nn.mlp([1, 16, 1], activation=ops.tanh)


class Found(NamedTuple):
    """What the example found."""

    params: Any
    grads: Any
    """The last meta-gradient."""
    errors: list[float]
    """RMS errors of the solutions on the test equations, before and after meta-training."""


def times() -> Any:
    """Where the equation has to hold, (POINTS, 1)."""
    return np.linspace(0, 2, POINTS)[:, None]


def exact(rate: Any, t: Any) -> Any:
    """The solution in closed form."""
    return rate * (rate * (np.cos(t) - np.exp(-rate * t)) + np.sin(t)) / (1 + rate**2)


def solution(params: Any, t: Any) -> Any:
    """The network's solution, right at the beginning by construction."""
    return t * MODEL.apply(params, t)


def residual(rate: Any, params: Any) -> Any:
    """The mean square of u' - r (cos t - u)."""
    t = ops.asarray(times())
    u = solution(params, t)
    slope = value_and_grad(lambda t: ops.sum(solution(params, t)))(t).grads
    return ops.mean(ops.square(slope - rate * (ops.cos(t) - u)))


def solved(params: Any, rate: Any) -> Any:
    """The parameters after the inner steps on one equation."""
    return inner_loop(residual, params, rate, steps=STEPS, lr=RATE, update=optim.momentum())


def task_cost(params: Any, rate: Any) -> tuple[Any, Any]:
    """The residual that is left, and the solution."""
    params = solved(params, rate)
    return residual(rate, params), solution(params, ops.asarray(times()))


def main(argv: list[str] | None = None) -> Found:
    """Run the example; returns what it printed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backend", default="jax", choices=["jax", "torch", "tensorflow"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="one meta-step on two equations")
    options = parser.parse_args(argv)
    backend = load_backend(options.backend)
    with backend.double_precision(), metaframe.use_backend(options.backend, dtype="float64"):
        return run(options.seed, *((1, 2) if options.quick else (500, 8)))


def run(seed: int, iterations: int, meta_batch_size: int) -> Found:
    """Meta-train by Adam, and solve equations that were not trained on."""
    rng, params = np.random.default_rng(seed), MODEL.init(seed)
    rule, gradient = optim.adam(3e-3), meta_value_and_grad(task_cost, has_aux=True)
    if metaframe.current_backend().name != "torch":  # which runs at once what is not compiled
        gradient = metaframe.compile(gradient)
    state, errors = rule.init(params), []
    test = np.linspace(0.6, 2.9, meta_batch_size)
    for iteration in range(iterations + 1):
        if iteration % 100 == 0 or iteration == iterations:
            found = ops.to_numpy(gradient(params, ops.asarray(test)).aux)
            error = found - exact(test[:, None, None], times())
            errors.append(float(np.sqrt(np.mean(error**2))))
            print(f"RMS error after {iteration} meta-steps: {errors[-1]:.6f}")
        if iteration < iterations:
            grads = gradient(params, ops.asarray(rng.uniform(0.5, 3, meta_batch_size))).grads
            updates, state = rule.update(grads, state, params)
            params = metaframe.apply_updates(params, updates)
    return Found(*tree.map(ops.to_numpy, (params, grads)), errors)


if __name__ == "__main__":
    main()
