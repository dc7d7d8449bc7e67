"""MAML for a policy, with trajectories drawn between the inner steps (Finn et al. 2017).

    python examples/policy.py --backend torch

A point in the plane walks to a goal that it is not told, and only rewards tell goals apart. The
simulator is plain NumPy. First the policy of each task adapts and draws new trajectories after each
step; then `unroll` goes the same way again over these trajectories, one batch a step, and the
meta-gradient goes back through it.
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import numpy as np

import metaframe
from metaframe import meta_value_and_grad, nn, ops, optim, per_step, tree, unroll
from metaframe.backend import load_backend

SCALE, HORIZON, PATHS, INNER_STEPS, INNER_RATE = 0.3, 10, 20, 2, 0.3
POLICY = nn.mlp([2, 16, 2], activation=ops.tanh)


class Trajectories(NamedTuple):
    """Observations and actions of shape (paths, horizon, 2), advantages (paths, horizon)."""

    observed: Any
    actions: Any
    advantages: Any


class Found(NamedTuple):
    """What the example found."""

    params: Any
    grads: Any
    """The last meta-gradient."""
    returns: list[Any]
    """Mean returns of each outer iteration, before and after each inner step."""


def goals(rng: np.random.Generator, count: int) -> Any:
    """Goals on the unit circle, (count, 2)."""
    angles = rng.uniform(0, 2 * np.pi, count)
    return np.stack([np.cos(angles), np.sin(angles)], -1)


def mean_action(params: Any, observed: Any) -> Any:
    """The mean of the Gaussian policy, with NumPy in and out."""
    return ops.to_numpy(POLICY.apply(params, ops.asarray(observed)))


def drawn(params: Any, goal: Any, rng: np.random.Generator) -> tuple[Trajectories, float]:
    """Trajectories of the policy, and their mean return."""
    at, observed, actions, rewards = np.zeros((PATHS, 2)), [], [], []
    for _ in range(HORIZON):
        action = mean_action(params, at) + SCALE * rng.normal(size=at.shape)
        observed.append(at)
        actions.append(action)
        at = at + np.clip(action, -0.3, 0.3)
        rewards.append(-np.linalg.norm(at - goal, axis=-1))
    to_go = np.cumsum(np.stack(rewards, 1)[:, ::-1], 1)[:, ::-1]
    advantages = (to_go - to_go.mean(0)) / (to_go.std(0) + 1e-8)
    paths = Trajectories(np.stack(observed, 1), np.stack(actions, 1), advantages)
    return paths, float(to_go[:, 0].mean())


def surrogate(paths: Any, params: Any) -> Any:
    """The cost whose gradient is the policy gradient: -log pi(action) * advantage."""
    off = (paths["actions"] - POLICY.apply(params, paths["observed"])) / SCALE
    return ops.mean(ops.sum(ops.square(off), -1) / 2 * paths["advantages"])


def task_cost(params: Any, task: Any) -> Any:
    """The surrogate on the last trajectories, after a step on each of the earlier ones."""
    adapted = unroll(surrogate, params, per_step(task["inner"]), lr=INNER_RATE).variables
    return surrogate(task["outer"], adapted)


def one_step(params: Any, paths: Any) -> Any:
    """A single inner step."""
    return unroll(surrogate, params, paths, steps=1, lr=INNER_RATE).variables


def collected(
    adapt: Any, params: Any, goal: Any, rng: np.random.Generator
) -> tuple[Any, list[float]]:
    """Adapt to a goal, with new trajectories for every step; all of them, and their returns."""
    batches, returns = [], []
    for step in range(INNER_STEPS + 1):
        paths, value = drawn(params, goal, rng)
        batches.append(paths._asdict())
        returns.append(value)
        if step < INNER_STEPS:
            params = adapt(params, batches[-1])
    inner = tree.map(lambda *rows: np.stack(rows), *batches[:-1])
    return {"inner": inner, "outer": batches[-1]}, returns


def main(argv: list[str] | None = None) -> Found:
    """Run the example; returns what it printed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backend", default="jax", choices=["jax", "torch", "tensorflow"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a single meta-step on two goals")
    options = parser.parse_args(argv)
    backend = load_backend(options.backend)
    with backend.double_precision(), metaframe.use_backend(options.backend, dtype="float64"):
        return run(options.seed, *((1, 2) if options.quick else (60, 20)))


def run(seed: int, iterations: int, meta_batch_size: int) -> Found:
    """Meta-train the policy by Adam."""
    rng, params = np.random.default_rng(seed), POLICY.init(seed)
    rule, adapt, gradient = optim.adam(0.01), one_step, meta_value_and_grad(task_cost)
    if metaframe.current_backend().name != "torch":  # which runs at once what is not compiled
        adapt, gradient = metaframe.compile(adapt), metaframe.compile(gradient)
    state, means = rule.init(params), []
    for iteration in range(iterations):
        found = [collected(adapt, params, goal, rng) for goal in goals(rng, meta_batch_size)]
        tasks = tree.map(lambda *rows: np.stack(rows), *(task for task, _ in found))
        means.append(np.mean([returns for _, returns in found], 0))
        grads = gradient(params, tasks).grads
        updates, state = rule.update(grads, state, params)
        params = metaframe.apply_updates(params, updates)
        if iteration % 10 == 0 or iteration == iterations - 1:
            shown = ", ".join(f"{value:.4f}" for value in means[-1])
            print(f"meta-step {iteration}: mean return after 0, 1, ... inner steps {shown}")
    return Found(*tree.map(ops.to_numpy, (params, grads)), means)


if __name__ == "__main__":
    main()
