"""Second-order terms that are lost in part.

A gradient that equals the one with a leaf cut off on purpose has that leaf cut off. A function
whose gradient is right and whose products with the Hessian are not has no second derivative.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from metaframe import tree
from metaframe.core.value_and_grad import hessian_vector_product, value_and_grad
from metaframe.testing.differences import scale
from metaframe.testing.report import Finding
from metaframe.testing.subject import Gradient, Subject, distance

SAME = 1e-9
SECONDS = 10.0
"""The seconds to go on looking for the leaf that is cut off."""
STEP = 1e-5
PLACES = ("new value", "variable", "inner gradient")
"""The largest cut first: what is cut off already is not changed by a smaller one."""


def without_second_derivative(error: Exception) -> Finding:
    """The finding for a cost that can be differentiated once, and raises the second time."""
    first = (str(error).strip().splitlines() or [""])[0]
    return _finding(f"the first-order gradient is there, the second-order one: {first}", "")


def _finding(found: str, where: str) -> Finding:
    return Finding(
        "no second derivative",
        where,
        found,
        "Write the backward pass of the custom function in operations that can be differentiated "
        "themselves: no once_differentiable, detach, stop_gradient or NumPy in it. Or adapt to "
        "first order.",
    )


def no_second_derivative(subject: Subject) -> Finding | None:
    """A finding if the Hessian of the inner cost is not the derivative of its gradient."""
    if not subject.adaptation.steps:
        return None
    adaptation = subject.adaptation
    task = subject.task(0)
    task = adaptation.inner_batch_fn(task) if adaptation.inner_batch_fn else task
    start = subject.numbers(subject.variables)

    def cost(v: tree.Tree) -> Any:
        return subject.inner_cost(task, v)

    def gradient(values: list[Any]) -> list[Any]:
        return subject.numbers(value_and_grad(cost)(subject.filled(values)).grads)

    rng = np.random.default_rng(4)
    wrong, slope = [], 0.0
    try:
        for i, name in enumerate(subject.names):
            along, h = [np.zeros(x.shape) for x in start], STEP * scale(start[i])
            drawn = rng.normal(size=start[i].shape)
            along[i] = np.asarray(drawn / max(float(np.linalg.norm(drawn)), 1e-300))
            ahead, behind = (
                gradient([x + sign * h * d for x, d in zip(start, along, strict=True)])
                for sign in (1, -1)
            )
            right = [(a - b) / (2 * h) for a, b in zip(ahead, behind, strict=True)]
            direction = subject.filled(along)
            product = hessian_vector_product(cost, subject.variables, direction)
            claimed = subject.numbers(product)
            apart = _norm([a - b for a, b in zip(right, claimed, strict=True)])
            if apart > 1e-4 * max(_norm(right), _norm(claimed)) > 1e-4 * 1e-8:
                wrong.append(name)
                slope = max(slope, apart)
    except Exception as error:  # noqa: BLE001  whatever it is, it is the finding
        return without_second_derivative(error)
    if not wrong:
        return None
    return _finding(
        "the gradient of the inner cost is right to first order, and its product with the Hessian "
        f"is off by {slope:.3g} from differences of the gradient",
        ", ".join(map(repr, wrong)),
    )


def _norm(leaves: list[Any]) -> float:
    return float(np.sqrt(sum(float(np.sum(x**2)) for x in leaves)))


def detached_leaf(subject: Subject, found: Gradient) -> Finding | None:
    """A finding if the gradient equals that with one leaf detached in the update."""
    update = subject.adaptation.update
    if not subject.adaptation.steps or not callable(update) or hasattr(update, "init"):
        return None
    ends = time.monotonic() + SECONDS
    for leaves, place in _suspects(len(subject.names)):
        if time.monotonic() > ends:
            return None
        cut = dataclasses.replace(
            subject.adaptation, update=_cutting(subject, update, leaves, place)
        )
        try:
            other = subject.with_adaptation(cut).reference()
        except Exception:  # noqa: BLE001  then it is not this one
            continue
        if distance(found, other) <= SAME:
            return Finding(
                "detached leaf",
                ", ".join(repr(subject.names[i]) for i in leaves),
                f"it equals the gradient with the {place} of this leaf detached in the update",
                "Differentiate through the update in every leaf: no detach, stop_gradient, .data "
                "or conversion to NumPy of a part.",
            )
    return None


def _suspects(count: int) -> Iterator[tuple[tuple[int, ...], str]]:
    """One leaf, then all but one, then some from the front."""
    singles = [(i,) for i in range(count)]
    others = [tuple(j for j in range(count) if j != i) for i in range(count) if count > 2]
    front = [tuple(range(n)) for n in range(2, count - 1)]
    for leaves in (*singles, *others, *front):
        for place in PLACES:
            yield leaves, place


def _cutting(
    subject: Subject, update: Callable[..., Any], leaves: tuple[int, ...], place: str
) -> Callable[..., Any]:
    """`update` with some leaves detached at one place."""
    stop = subject.backend.stop_gradient

    def cut(structure: tree.Tree, here: str) -> tree.Tree:
        if place != here:
            return structure
        arrays, spec = tree.flatten(structure)
        return tree.unflatten(spec, [stop(x) if i in leaves else x for i, x in enumerate(arrays)])

    def call(v: Any, grads: Any, lr: Any, stop_gradients: bool = False) -> Any:
        given = cut(v, "variable"), cut(grads, "inner gradient")
        return cut(update(*given, lr, stop_gradients=stop_gradients), "new value")

    return call
