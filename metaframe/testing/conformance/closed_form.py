"""Meta-learning whose answers are matrix algebra, worked out in NumPy.

Task i has a quadratic support cost and a quadratic query cost over the same nine numbers theta,

    s_i(theta) = (theta - c_i)^T A_i (theta - c_i) / 2,
    q_i(theta) = (theta - d_i)^T B_i (theta - d_i) / 2 + e_i.

With D the diagonal of learning rates, zero where a variable does not adapt, the inner loop is
theta_k = c + M^k (theta - c) with M = I - D A, and d theta_k / d theta = M^k; every gradient
follows. Nothing here calls the code under test; `cost` is the same quadratic in portable ops.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from metaframe import ops
from metaframe.testing.conformance.clause import Values, equal

SHAPES = {"body/b": (2,), "body/w": (2, 2), "head": (3,)}
"""Key chain to shape, in the order in which theta holds them."""
SIZE = 9
RATE = 0.07


def unpacked(theta: Values) -> dict[str, Any]:
    """The nine numbers (on the last axis) as nested variables, leading axes kept."""
    lead = theta.shape[:-1]
    b, w, head = np.split(theta, [2, 6], axis=-1)
    return {"body": {"b": b, "w": w.reshape(*lead, 2, 2)}, "head": head}


def packed(v: Any) -> Values:
    """The inverse of `unpacked`, for one task's variables."""
    return np.concatenate([np.ravel(v["body"]["b"]), np.ravel(v["body"]["w"]), np.ravel(v["head"])])


def mask(*chains: str) -> Values:
    """Ones at the numbers that the key chains name."""
    parts = [np.full(np.prod(shape), float(chain in chains)) for chain, shape in SHAPES.items()]
    return np.concatenate(parts)


def cost(batch: Any, v: Any) -> Any:
    """The quadratic in portable ops; the mean over tasks wherever there is a task axis."""
    lead = tuple(v["head"].shape[:-1])
    leaves = (v["body"]["b"], v["body"]["w"], v["head"])
    theta = ops.concat([ops.reshape(leaf, (*lead, -1)) for leaf in leaves], axis=-1)
    off = theta - batch["centre"]
    product = ops.reshape(ops.matmul(batch["matrix"], off[..., None]), off.shape)
    return ops.mean(ops.sum(off * product, axis=-1) / 2 + batch["constant"])


def support(batch: Any) -> Any:
    """The inner data of a batch."""
    return batch["support"]


def query(batch: Any) -> Any:
    """The outer data of a batch."""
    return batch["query"]


def support_cost(batch: Any, v: Any) -> Any:
    """The inner cost on a whole batch."""
    return cost(batch["support"], v)


def query_cost(batch: Any, v: Any) -> Any:
    """The outer cost on a whole batch."""
    return cost(batch["query"], v)


@dataclass(frozen=True)
class Quadratics:
    """Costs of several tasks: `matrix` (tasks, 9, 9), `centre` (tasks, 9), `constant` (tasks,)."""

    matrix: Values
    centre: Values
    constant: Values

    @staticmethod
    def random(tasks: int, seed: int) -> Quadratics:
        """Positive definite matrices, and normal centres and constants."""
        rng = np.random.default_rng(seed)
        root = rng.normal(size=(tasks, SIZE, SIZE)) / 2
        return Quadratics(
            root @ root.transpose(0, 2, 1) + 0.1 * np.eye(SIZE),
            rng.normal(size=(tasks, SIZE)),
            rng.normal(size=tasks),
        )

    @property
    def batch(self) -> dict[str, Values]:
        """The batch that `cost` is called with."""
        return {"matrix": self.matrix, "centre": self.centre, "constant": self.constant}

    def value(self, task: int, theta: Values) -> float:
        """The cost of one task."""
        off = theta - self.centre[task]
        return float(off @ self.matrix[task] @ off / 2 + self.constant[task])

    def gradient(self, task: int, theta: Values) -> Values:
        """The gradient of `value`."""
        return np.asarray(self.matrix[task] @ (theta - self.centre[task]))


@dataclass(frozen=True)
class Problem:
    """Tasks and starting variables, and the exact answers of an inner loop of `steps` steps."""

    steps: int = 2
    tasks: int = 3
    rate: float | Values = RATE
    adapted: Values = field(default_factory=lambda: np.ones(SIZE))
    average_across_steps: bool = False
    same_cost: bool = False
    """The outer cost is the inner one."""
    seed: int = 0

    @cached_property
    def support(self) -> Quadratics:
        """The inner costs."""
        return Quadratics.random(5, self.seed + 1)

    @cached_property
    def query(self) -> Quadratics:
        """The outer costs."""
        return self.support if self.same_cost else Quadratics.random(5, self.seed + 2)

    @cached_property
    def theta(self) -> Values:
        """The starting point."""
        return np.random.default_rng(self.seed + 3).normal(size=SIZE)

    @property
    def variables(self) -> dict[str, Any]:
        """The starting point as nested variables."""
        return unpacked(self.theta)

    @property
    def tiled(self) -> dict[str, Any]:
        """The variables with a leading task axis, for `batched=True`."""
        return unpacked(np.tile(self.theta, (self.tasks, 1)))

    @property
    def batch(self) -> dict[str, dict[str, Values]]:
        """The first `tasks` of five tasks."""
        return {
            "support": {name: x[: self.tasks] for name, x in self.support.batch.items()},
            "query": {name: x[: self.tasks] for name, x in self.query.batch.items()},
        }

    def points(self, task: int) -> list[tuple[Values, Values]]:
        """(theta_k, d theta_k / d theta) for k = 0 .. steps."""
        step = np.eye(SIZE) - np.diag(self.rate * self.adapted) @ self.support.matrix[task]
        # Where a variable does not adapt, the others still see it: the fixed point is that of
        # the map theta -> step theta + shift.
        shift = self.rate * self.adapted * (self.support.matrix[task] @ self.support.centre[task])
        found = [(self.theta, np.eye(SIZE))]
        for _ in range(self.steps):
            theta, jacobian = found[-1]
            found.append((step @ theta + shift, step @ jacobian))
        return found

    def _judged(self, task: int) -> list[tuple[Values, Values]]:
        points = self.points(task)
        return points if self.average_across_steps else points[-1:]

    def _mean_over_tasks(self, values: Iterator[Any]) -> Any:
        return np.mean(list(values), axis=0)

    @property
    def cost(self) -> float:
        """The mean outer cost."""
        each = (
            np.mean([self.query.value(i, theta) for theta, _ in self._judged(i)])
            for i in range(self.tasks)
        )
        return float(self._mean_over_tasks(each))

    @property
    def maml(self) -> Values:
        """Its gradient by the starting point."""
        each = (
            np.mean([j.T @ self.query.gradient(i, theta) for theta, j in self._judged(i)], axis=0)
            for i in range(self.tasks)
        )
        return np.asarray(self._mean_over_tasks(each))

    @property
    def fomaml(self) -> Values:
        """Its first-order gradient: the Jacobians left out."""
        each = (
            np.mean([self.query.gradient(i, theta) for theta, _ in self._judged(i)], axis=0)
            for i in range(self.tasks)
        )
        return np.asarray(self._mean_over_tasks(each))

    @property
    def reptile_cost(self) -> float:
        """The mean inner cost of all points."""
        each = (
            np.mean([self.support.value(i, theta) for theta, _ in self.points(i)])
            for i in range(self.tasks)
        )
        return float(self._mean_over_tasks(each))

    def reptile(self, direction: str) -> Values:
        """Reptile's gradient, for either `direction` of `reptile_step`."""

        def of_task(i: int) -> Values:
            points = [theta for theta, _ in self.points(i)]
            if direction == "displacement":
                return (points[0] - points[-1]) / self.rate
            inner = np.mean([self.support.gradient(i, theta) for theta in points], axis=0)
            return np.asarray(inner / self.rate)

        return np.asarray(self._mean_over_tasks(map(of_task, range(self.tasks))))

    @property
    def adapted_variables(self) -> dict[str, Any]:
        """theta_K of every task, with a leading task axis."""
        return unpacked(np.stack([self.points(i)[-1][0] for i in range(self.tasks)]))


def assert_close(found: Any, expected: Any, tolerance: float = 1e-12) -> None:
    """Same keys and shapes; the difference is at most `tolerance` of the norm of `expected`."""
    found_leaves, expected_leaves = dict(_leaves(found)), dict(_leaves(expected))
    equal(_shapes(found_leaves), _shapes(expected_leaves))
    norm = _norm(expected_leaves.values())
    off = _norm([found_leaves[chain] - x for chain, x in expected_leaves.items()])
    if not off <= tolerance * norm:  # NaN is not
        raise AssertionError(f"off by {off / norm if norm else off:.3g} of the norm")


def _shapes(leaves: dict[str, Values]) -> dict[str, tuple[int, ...]]:
    return {chain: values.shape for chain, values in leaves.items()}


def _leaves(node: Any, chain: str = "") -> Iterator[tuple[str, Values]]:
    children: Sequence[tuple[Any, Any]]
    if hasattr(node, "keys"):
        children = [(key, node[key]) for key in sorted(node.keys())]
    elif isinstance(node, (list, tuple)):
        children = list(enumerate(node))
    else:
        yield chain, np.asarray(node)
        return
    for key, child in children:
        yield from _leaves(child, f"{chain}/{key}")


def _norm(arrays: Any) -> float:
    # hypot, so that NaN and infinity show up as such and nothing overflows on the way.
    return float(np.linalg.norm([np.linalg.norm(x) for x in arrays]))
