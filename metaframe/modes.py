"""How one inner step is differentiated: recomputed in the backward pass, exactly.

Both modes put one custom rule around the whole inner step. It stores the step's inputs (the
variables, the optimizer's state, the task's data and the learning rate) and nothing else. They
differ in the backward pass, where a step theta' = U(theta, g(theta, c), s, c) with the cost's
gradient g gets a cotangent a of theta':

- "remat" runs the step again and transposes it in reverse mode;
- "mixed" transposes only U, which gives a cotangent b of g, and takes the product of b with the
  Jacobian of g forward over reverse: the cost's Hessian is symmetric, so
  b^T (dg/dtheta, dg/dc) = d/de grad_{theta, c} cost(theta + e b, c) at e = 0
  (Kemaev et al. 2025, arXiv 2505.00793, section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from metaframe.backend import Array, Arrays, Backend

Gradient = Callable[[Arrays, Arrays], Arrays]
"""`(params, context) -> gradient of the cost with respect to params`."""
Apply = Callable[[Arrays, Arrays, Arrays, Arrays], tuple[Arrays, Arrays]]
"""`(params, gradient, state, context) -> (new params, new state)`."""
Step = Callable[[Arrays, Arrays, Arrays], tuple[Arrays, Arrays]]
"""`(params, state, context) -> (new params, new state)`."""


def rematerialised(backend: Backend, gradient: Gradient, apply: Apply) -> Step:
    """The step, run again in the backward pass."""

    def transpose(groups: Sequence[Arrays], cotangents: Arrays) -> Sequence[Arrays]:
        def step(*groups: Arrays) -> tuple[Arrays, Arrays]:
            params, state, context = groups
            return apply(params, gradient(params, context), state, context)

        return vjp(backend, step, groups, cotangents)

    return _with_rule(backend, gradient, apply, transpose)


def mixed(
    backend: Backend, gradient: Gradient, apply: Apply, cost: Callable[[Arrays, Arrays], Array]
) -> Step:
    """The step with its Hessian-vector product taken forward over reverse."""

    def transpose(groups: Sequence[Arrays], cotangents: Arrays) -> Sequence[Arrays]:
        params, state, context = groups
        grads = gradient(params, context)
        params_bar, grads_bar, state_bar, context_bar = vjp(
            backend, apply, (params, grads, state, context), cotangents
        )
        floats = _floating(backend, context)
        held = tuple(context[i] for i in floats)

        def both(params: Arrays, held: Arrays) -> Arrays:
            def objective(xs: Arrays) -> tuple[Array, Arrays]:
                inputs = _merge(context, floats, xs[len(params) :])
                return cost(xs[: len(params)], inputs), ()

            return backend.value_and_grad(objective)((*params, *held))[2]

        if backend.forward_needs_tangents:
            zeros = map(backend.ops.zeros_like, held)
            products = backend.jvp(
                lambda xs: both(xs[: len(params)], xs[len(params) :]),
                (*params, *held),
                (*grads_bar, *zeros),
            )
        else:
            products = backend.jvp(lambda xs: both(xs, held), params, grads_bar)
        curvature, cross = products[: len(params)], iter(products[len(params) :])
        return (
            tuple(a + h for a, h in zip(params_bar, curvature, strict=True)),
            state_bar,
            tuple(bar + next(cross) if i in floats else None for i, bar in enumerate(context_bar)),
        )

    return _with_rule(backend, gradient, apply, transpose)


def _with_rule(
    backend: Backend,
    gradient: Gradient,
    apply: Apply,
    transpose: Callable[[Sequence[Arrays], Arrays], Sequence[Arrays]],
) -> Step:
    def step(params: Arrays, state: Arrays, context: Arrays) -> tuple[Arrays, Arrays]:
        sizes = (len(params), len(state), len(context))

        def forward(xs: Arrays) -> Arrays:
            params, state, context, _ = split(xs, sizes)
            after, state = apply(params, gradient(params, context), state, context)
            return (*after, *state)

        def backward(xs: Arrays, cotangents: Arrays) -> Arrays:
            return _join(transpose(split(xs, sizes)[:-1], cotangents))

        out = backend.custom_vjp(forward, backward)((*params, *state, *context))
        return out[: len(params)], out[len(params) :]

    return step


def vjp(
    backend: Backend,
    fn: Callable[..., Sequence[Arrays]],
    groups: Sequence[Arrays],
    cotangents: Arrays,
) -> Sequence[Arrays]:
    """Cotangents of `groups`, None at the places of arrays that are not floating."""
    flat = _join(groups)
    sizes = tuple(map(len, groups))
    floats = _floating(backend, flat)

    def of_floats(xs: Arrays) -> Arrays:
        return _join(fn(*split(_merge(flat, floats, xs), sizes)[:-1]))

    found = iter(backend.vjp(of_floats, tuple(flat[i] for i in floats), cotangents))
    return split(tuple(next(found) if i in floats else None for i in range(len(flat))), sizes)[:-1]


def _floating(backend: Backend, xs: Arrays) -> tuple[int, ...]:
    return tuple(i for i, x in enumerate(xs) if backend.is_floating(x))


def _merge(xs: Arrays, at: Sequence[int], values: Arrays) -> Arrays:
    replaced = dict(zip(at, values, strict=True))
    return tuple(replaced.get(i, x) for i, x in enumerate(xs))


def _join(groups: Sequence[Arrays]) -> Arrays:
    return tuple(x for group in groups for x in group)


def split(xs: Arrays, sizes: Sequence[int]) -> list[Arrays]:
    """`xs` cut into groups of the given sizes, and one more with what is left."""
    groups, start = [], 0
    for size in sizes:
        groups.append(xs[start : start + size])
        start += size
    return [*groups, xs[start:]]
