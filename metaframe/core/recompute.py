"""The derivative of an inner step that is recomputed in the backward pass, exactly.

Two modes store the inputs of an inner step (the variables, the optimizer's state, the task's data
and the learning rate) and nothing else, and run the step again in the backward pass. They differ in
how the gradient g inside a step theta' = U(theta, g(theta, c), s, c) is transposed:

- "remat" transposes it in reverse mode, like everything else;
- "mixed" takes the product of a cotangent b of g with the Jacobian of g forward over reverse,
  since the cost's Hessian is symmetric:
  b^T (dg/dtheta, dg/dc) = d/de grad_{theta, c} cost(theta + e b, c) at e = 0
  (Kemaev et al. 2025, arXiv 2505.00793, section 3).

A loop that is "replayed" stores the inputs of a few steps only, and runs from there again.
"""

from __future__ import annotations

import math
import pickle
import random
from collections.abc import Callable, Sequence

import numpy as np

from metaframe.backend.contract import Backend
from metaframe.backend.types import Array, Arrays
from metaframe.core import checks
from metaframe.errors import InputError

Gradient = Callable[[Arrays, Arrays], Arrays]
"""`(params, context) -> gradient of the cost with respect to params`."""
Step = Callable[[Arrays, Arrays, Arrays], tuple[Arrays, Arrays, Arrays]]
"""`(params, state, context) -> (new params, new state, what else is returned of the step)`."""
Body = Callable[[Arrays, Arrays, Arrays], tuple[Arrays, Arrays]]
"""`(carry, context, row) -> (carry, what is returned of the step)`: one step of a loop."""


def rematerialised(backend: Backend, step: Step) -> Step:
    """`step`, run again in the backward pass."""
    sizes: tuple[int, int, int] = (0, 0, 0)

    def flat(xs: Arrays) -> Arrays:
        return _join(step(*split(xs, sizes)[:-1]))

    # One function for all steps of a loop, so that a backend looks into it once.
    checkpointed = backend.checkpoint(flat)

    def recomputed(params: Arrays, state: Arrays, context: Arrays) -> tuple[Arrays, Arrays, Arrays]:
        nonlocal sizes
        sizes = (len(params), len(state), len(context))
        after, state, seen = split(checkpointed((*params, *state, *context)), sizes[:2])
        return after, state, seen

    return recomputed


STATES_AT_MOST = 80
"""The number of states of the loop that "replay" holds before it adds a level."""


def replayed(
    backend: Backend, body: Body, carry: Arrays, context: Arrays, steps: int, rows: Arrays
) -> tuple[Arrays, Arrays]:
    """`body` over all steps, by segments that are run again when the backward pass reaches them.

    A loop of K steps is cut into segments, and these again, L levels deep. Held are the carry at
    the start of each segment of the levels that are open, about L * K^(1/L) of them, and each step
    is run up to L + 1 times. This is checkpointing at several levels with segments of equal length
    (Griewank & Walther 2000, algorithm 799, choose them unequal; REPLAY, arXiv 2503.13751, uses a
    tree as here). The segments of a level are alike, so that a compiled program has one of each.

    Returns:
        The carry after the last step, and what the steps returned, stacked.
    """
    size = segment(steps)
    if size == 1:
        return backend.repeat(
            lambda carry, row: body(carry, context, row), carry, steps, rows=rows, rolled=True
        )
    count = steps // size
    folded = tuple(
        backend.ops.reshape(x[: count * size], (count, size, *x.shape[1:])) for x in rows
    )
    run = _segment_of(backend, body, size, len(carry), len(context))
    carry, found = backend.repeat(
        lambda carry, rows: run(carry, context, rows), carry, count, rows=folded, rolled=True
    )
    found = tuple(backend.ops.reshape(x, (count * size, *x.shape[2:])) for x in found)
    rest = steps - count * size
    if rest == 0:
        return carry, found
    # Another name: the segments before are run again, by theirs, in the backward pass.
    run_rest = _segment_of(backend, body, rest, len(carry), len(context))
    carry, last = run_rest(carry, context, tuple(x[count * size :] for x in rows))
    return carry, tuple(map(backend.ops.concat, zip(found, last, strict=True)))


def segment(steps: int) -> int:
    """The length of the segments into which `replayed` cuts a loop; 1 for a short one.

    >>> segment(50), segment(1000), segment(10_000)
    (1, 32, 465)
    """
    levels = 1
    while levels * math.pow(steps, 1 / levels) > STATES_AT_MOST and levels < math.log2(steps):
        levels += 1
    return math.ceil(math.pow(steps, 1 - 1 / levels))


def _segment_of(backend: Backend, body: Body, steps: int, carried: int, given: int) -> Body:
    def flat(xs: Arrays) -> Arrays:
        carry, context, rows = split(xs, (carried, given))
        return _join(replayed(backend, body, carry, context, steps, rows))

    checkpointed = backend.checkpoint(flat)

    def run(carry: Arrays, context: Arrays, rows: Arrays) -> tuple[Arrays, Arrays]:
        after, found = split(checkpointed((*carry, *context, *rows)), (carried,))
        return after, found

    return run


def check_repeatable(
    backend: Backend, step: Callable[..., Sequence[Arrays]], inputs: Sequence[Arrays], what: str
) -> None:
    """Check that what is run again in the backward pass depends on its inputs alone.

    Args:
        backend: the backend of the arrays.
        step: the function that is run again, of groups of arrays.
        inputs: the groups.
        what: what runs it again, for errors: "mode='remat' runs an inner step again ...".

    Raises:
        InputError: it depends on something else, and the framework would not say so.
    """
    sizes = tuple(map(len, inputs))
    before = _global_streams()
    try:
        found = backend.hidden_inputs(lambda xs: _join(step(*split(xs, sizes)[:-1])), _join(inputs))
    except Exception as error:
        if not backend.needed_a_value(error):
            raise
        raise InputError(
            f"{what}. For that it is traced, and the inner cost or the update rule needs the value "
            'of an array, which is not known then. Choose with ops.where, or use mode="reverse".'
        ) from error
    if not found and _global_streams() != before:
        found = "draws random numbers, of which there would be others"
    if found:
        raise InputError(
            f"{what}, and the inner cost or the update rule {found}. Make it an argument, in the "
            'variables or the batch, or use inner_loop with mode="reverse".'
        )


def _global_streams() -> bytes:
    """The random streams that no framework knows of: Python's and NumPy's."""
    numpy = np.random.get_state(legacy=False)  # noqa: NPY002  users' code draws from it
    return pickle.dumps((random.getstate(), numpy))


def forward_over_reverse(backend: Backend, cost: Callable[[Arrays, Arrays], Array]) -> Gradient:
    """The gradient of `cost`, with Hessian-vector products taken forward over reverse."""

    def gradient(params: Arrays, context: Arrays) -> Arrays:
        count = len(params)
        lifted, closed = backend.lift(
            lambda xs: (cost(xs[:count], xs[count:]),), (*params, *context)
        )

        def forward(xs: Arrays) -> Arrays:
            return _gradient_at(backend, lifted, xs, range(count))(xs[:count])

        def backward(xs: Arrays, cotangents: Arrays) -> Arrays:
            return _curvature_products(backend, lifted, xs, cotangents)

        return backend.custom_vjp(forward, backward)((*params, *context, *closed))

    return gradient


def _gradient_at(
    backend: Backend, cost: Callable[[Arrays], Arrays], xs: Arrays, places: Sequence[int]
) -> Callable[[Arrays], Arrays]:
    """The gradient of `cost` with respect to the inputs at `places`, as a function of them."""

    def objective(values: Arrays) -> tuple[Array, Arrays]:
        replaced = dict(zip(places, values, strict=True))
        (value,) = cost(tuple(replaced.get(i, x) for i, x in enumerate(xs)))
        return value, ()

    run = backend.value_and_grad(objective, checks.cost_ignores_variables)
    return lambda values: run(values)[2]


def _curvature_products(
    backend: Backend, cost: Callable[[Arrays], Arrays], xs: Arrays, directions: Arrays
) -> Arrays:
    """The Hessian of `cost` times `directions` in the first inputs, None where there is none."""
    count = len(directions)
    moved = tuple(range(count))
    held = tuple(i for i in range(count, len(xs)) if backend.is_differentiable(xs[i]))
    gradient = _gradient_at(backend, cost, xs, moved + held)
    params, others = xs[:count], tuple(xs[i] for i in held)
    if backend.forward_needs_tangents:
        zeros = tuple(map(backend.ops.zeros_like, others))
        products = backend.jvp(gradient, (*params, *others), (*directions, *zeros))
    else:
        products = backend.jvp(lambda params: gradient((*params, *others)), params, directions)
    found = dict(zip(moved + held, products, strict=True))
    return tuple(found.get(i) for i in range(len(xs)))


def _join(groups: Sequence[Arrays]) -> Arrays:
    return tuple(x for group in groups for x in group)


def split(xs: Arrays, sizes: Sequence[int]) -> list[Arrays]:
    """`xs` cut into groups of the given sizes, and one more with what is left."""
    groups, start = [], 0
    for size in sizes:
        groups.append(xs[start : start + size])
        start += size
    return [*groups, xs[start:]]
