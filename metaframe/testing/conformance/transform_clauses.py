"""The transforms, alone and nested, against derivatives worked out by hand."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from metaframe.testing.conformance.clause import Bench, Chapter, close, equal, same

X = np.array([0.5, -1.25, 2.0])
MATRIX = np.array([[1.0, 2.0, -1.0], [0.5, 0.0, 3.0]])

GRADIENTS, PRODUCTS = Chapter("value_and_grad"), Chapter("products")


def _quartic(b: Bench, x: Any) -> Any:
    return b.backend.ops.sum(x**4)


def _quartic_by_rule(b: Bench, x: Any) -> Any:
    """The sum of x^4 again, the inner square with a derivative of its own."""

    def forward(xs: Any) -> Any:
        return (xs[0] * xs[0],)

    def backward(xs: Any, cotangents: Any) -> Any:
        return b.backend.vjp(forward, xs, cotangents)

    (square,) = b.backend.custom_vjp(forward, backward)((x,))
    return b.backend.ops.sum(square * square)


def _third_derivative(b: Bench, fn: Callable[[Bench, Any], Any], x: Any) -> Any:
    """The diagonal of the third derivative of a sum of functions of one element each."""

    def first(x: Any) -> Any:
        return b.gradient(lambda x: fn(b, x), x)[0]

    return b.gradient(lambda x: b.gradient(first, x)[0], x)[0]


def _three_derivatives(
    fn: Callable[[Bench, Any], Any], mapped: bool, compiled: bool, b: Bench
) -> None:
    def run(xs: Any) -> Any:
        return (_third_derivative(b, fn, xs[0]),)

    start = np.stack([X, 2 * X]) if mapped else X
    xs = (b.arr(start),)
    function = b.backend.vmap(run) if mapped else run
    if compiled:
        function = b.backend.compile(function, xs)
    close(b.to_np(function(xs)[0]), 24 * start, b.exact)


for _fn, _rule in ((_quartic, "plain"), (_quartic_by_rule, "custom_vjp")):
    for _mapped in (False, True):
        for _compiled in (False, True):
            _words = [_rule, *["vmap"] * _mapped, *["compiled"] * _compiled]
            GRADIENTS.add(
                f"third-derivative/{'-'.join(_words)}",
                "Gradients nest: the third derivative of the sum of x^4 is 24 x.",
                functools.partial(_three_derivatives, _fn, _mapped, _compiled),
                compiles=_compiled,
            )


@GRADIENTS.clause("parts")
def _parts(b: Bench) -> None:
    """The value, what the function returns besides, and one gradient an input."""
    ops = b.backend.ops

    def fn(xs: Any) -> Any:
        x, y = xs
        return ops.sum(x * x * y), (x + y, ops.sum(y))

    x, y = np.array([1.0, 2.0]), np.array([3.0, -1.0])
    value, aux, grads = b.to_np(b.backend.value_and_grad(fn)((b.arr(x), b.arr(y))))
    equal((type(aux), len(aux), type(grads), len(grads)), (tuple, 2, tuple, 2))
    for found, expected in zip(
        (value, *aux, *grads), (-1.0, x + y, 2.0, 2 * x * y, x * x), strict=True
    ):
        close(found, expected, b.exact)


@GRADIENTS.clause("no-aux")
def _no_aux(b: Bench) -> None:
    """Nothing returned besides is an empty tuple; a scalar has a scalar gradient."""
    run = b.backend.value_and_grad(lambda xs: (xs[0] * xs[0], ()))
    value, aux, grads = b.to_np(run((b.arr(3.0),)))
    equal(aux, ())
    close(value, 9.0, b.exact)
    close(grads[0], 6.0, b.exact)


@GRADIENTS.clause("unused")
def _unused(b: Bench) -> None:
    """An input that the scalar does not depend on gets zeros, of its own shape and dtype."""
    xs = (b.arr([1.0, 2.0]), b.arr([[3.0]]), b.arr([4.0], "float32"))
    _, _, grads = b.backend.value_and_grad(lambda xs: (b.backend.ops.sum(xs[0]), ()))(xs)
    for found, expected in zip(b.to_np(grads), ([1.0, 1.0], [[0.0]], [0.0]), strict=True):
        same(found, expected)
    equal(b.backend.dtype_name(grads[2]), "float32")


@GRADIENTS.clause("same-array-twice")
def _twice(b: Bench) -> None:
    """The same array given twice gets two gradients."""
    x = b.arr([2.0])
    for found, expected in zip(b.gradient(lambda a, c: a * a * c, x, x), (8.0, 4.0), strict=True):
        same(b.to_np(found), [expected])


@GRADIENTS.clause("disconnected")
def _disconnected(b: Bench) -> None:
    """`on_disconnected` is called when the scalar depends on no input, and not otherwise."""
    calls: list[str] = []

    def run(fn: Callable[[Any], Any]) -> Any:
        transformed = b.backend.value_and_grad(
            lambda xs: (b.backend.ops.sum(fn(xs[0])), ()), lambda: calls.append("called")
        )
        return transformed((b.arr([1.0, 2.0]),))[2][0]

    constant = b.arr([5.0])
    same(b.to_np(run(lambda x: constant)), [0.0, 0.0])
    same(b.to_np(run(b.backend.stop_gradient)), [0.0, 0.0])
    equal(calls, ["called"] * 2)
    run(lambda x: 0.0 * x)
    equal(calls, ["called"] * 2)


@GRADIENTS.clause("disconnected-inside")
def _disconnected_inside(b: Bench) -> None:
    """Inside another gradient, a value that depends on the outer inputs only is disconnected."""
    calls: list[str] = []

    def outer(x: Any) -> Any:
        inner = b.backend.value_and_grad(
            lambda ys: (b.backend.ops.sum(x * x), ()), lambda: calls.append("called")
        )
        value, _, _ = inner((b.arr([1.0]),))
        return value

    same(b.to_np(b.gradient(outer, b.arr([3.0]))), [[6.0]])
    equal(calls, ["called"])


@GRADIENTS.clause("levels")
def _levels(b: Bench) -> None:
    """Levels are kept apart: d/dx of x d/dy (x + y) is 1."""

    def outer(x: Any) -> Any:
        return x * b.gradient(lambda y: x + y, b.arr([2.0]))[0]

    same(b.to_np(b.gradient(outer, b.arr([1.5]))), [[1.0]])


@GRADIENTS.clause("through-aux")
def _through_aux(b: Bench) -> None:
    """The aux of a gradient can be differentiated by the level outside."""

    def outer(x: Any) -> Any:
        run = b.backend.value_and_grad(lambda ys: (b.backend.ops.sum(ys[0]), (x * x * ys[0],)))
        return run((b.arr([5.0]),))[1][0]

    same(b.to_np(b.gradient(outer, b.arr([3.0]))), [[30.0]])


@GRADIENTS.clause("stop_gradient")
def _stop(b: Bench) -> None:
    """A stopped array has its value and no gradient, in any order."""
    stop, x = b.backend.stop_gradient, b.arr([3.0])
    same(b.to_np(stop(x)), [3.0])
    same(b.to_np(b.gradient(lambda x: x * stop(x), x)), [[3.0]])
    same(b.to_np(b.gradient(lambda x: b.gradient(lambda y: x * stop(y) * y, x)[0], x)), [[3.0]])


@GRADIENTS.clause("loss_gradient")
def _loss(b: Bench) -> None:
    """The gradients of one inner step, which are constants if so asked."""

    def outer(x: Any, first_order: bool) -> Any:
        (found,) = b.backend.loss_gradient(
            lambda xs: b.backend.ops.sum(xs[0] ** 3), (x,), first_order=first_order
        )
        return x * found

    for first_order, expected in ((True, 12.0), (False, 36.0)):
        run = functools.partial(outer, first_order=first_order)
        close(b.to_np(b.gradient(run, b.arr([2.0]))), [[expected]], b.exact)


# -- products with the Jacobian ------------------------------------------------------------------


def _map(b: Bench) -> Callable[[Any], Any]:
    """(x, y) -> (M x^2, x y), whose Jacobian is known."""
    matrix = b.arr(MATRIX)
    return lambda xs: (b.backend.ops.matmul(matrix, xs[0] * xs[0]), xs[0] * xs[1])


@PRODUCTS.clause("vjp")
def _vjp(b: Bench) -> None:
    """The transposed Jacobian times cotangents."""
    y, u, w = np.array([1.0, -2.0, 3.0]), np.array([0.5, 2.0]), np.array([1.0, 1.0, -1.0])
    found = b.to_np(b.backend.vjp(_map(b), b.arr((X, y)), b.arr((u, w))))
    for a, expected in zip(found, (2 * X * (MATRIX.T @ u) + y * w, X * w), strict=True):
        close(a, expected, b.exact)


@PRODUCTS.clause("jvp")
def _jvp(b: Bench) -> None:
    """The Jacobian times tangents."""
    y, s, t = np.array([1.0, -2.0, 3.0]), np.array([0.5, 2.0, 1.0]), np.array([1.0, 1.0, -1.0])
    found = b.to_np(b.backend.jvp(_map(b), b.arr((X, y)), b.arr((s, t))))
    for a, expected in zip(found, (MATRIX @ (2 * X * s), s * y + X * t), strict=True):
        close(a, expected, b.exact)


@PRODUCTS.clause("unused")
def _unused_products(b: Bench) -> None:
    """Zeros for an input that no output depends on, and for an output that depends on none."""
    constant = b.arr([7.0])

    def fn(xs: Any) -> Any:
        return xs[0] * 2.0, constant

    xs = b.arr((np.array([1.0]), np.array([[2.0]])))
    vjp = b.backend.vjp(fn, xs, b.arr((np.array([1.0]), np.array([1.0]))))
    jvp = b.backend.jvp(fn, xs, b.arr((np.array([1.0]), np.array([[1.0]]))))
    for found, expected in zip(b.to_np((*vjp, *jvp)), ([2.0], [[0.0]], [2.0], [0.0]), strict=True):
        same(found, expected)


def _hessian_vector(b: Bench, xs: Any) -> Any:
    """Forward over reverse: of the sum of x^4, 12 x^2 v."""
    x, v = xs
    return b.backend.jvp(lambda ys: tuple(b.gradient(lambda y: y**4, *ys)), (x,), (v,))


@PRODUCTS.clause("forward-over-reverse")
def _forward_over_reverse(b: Bench) -> None:
    """The Jacobian of a gradient times tangents, also mapped."""
    v = np.array([1.0, 2.0, 0.5])
    run = functools.partial(_hessian_vector, b)
    close(b.to_np(run(b.arr((X, v)))[0]), 12 * X**2 * v, b.exact)
    rows = np.stack([X, 2 * X]), np.stack([v, v])
    close(b.to_np(b.backend.vmap(run)(b.arr(rows))[0]), 12 * rows[0] ** 2 * rows[1], b.exact)


@PRODUCTS.clause("vjp-differentiated")
def _pull_back(b: Bench) -> None:
    """A product with the transposed Jacobian can be differentiated, by its cotangents too."""

    def outer(x: Any, u: Any) -> Any:
        return b.backend.vjp(lambda ys: (ys[0] ** 3,), (x,), (u,))[0]

    found = b.to_np(b.gradient(outer, b.arr(X), b.arr(2 * X)))
    close(found[0], 6 * X * 2 * X, b.exact)
    close(found[1], 3 * X**2, b.exact)


# -- rules of one's own --------------------------------------------------------------------------


def _doubling(b: Bench) -> Callable[[Any], Any]:
    """The cube, with twice its derivative: so it shows whose derivative is taken."""
    return b.backend.custom_vjp(
        lambda xs: (xs[0] ** 3,), lambda xs, cotangents: (6.0 * xs[0] * xs[0] * cotangents[0],)
    )


@PRODUCTS.clause("custom_vjp")
def _custom(b: Bench) -> None:
    """The rule's own derivative is taken, and differentiated."""
    rule = _doubling(b)
    close(b.to_np(rule((b.arr(X),))[0]), X**3, b.exact)

    def first(x: Any) -> Any:
        return b.gradient(lambda x: rule((x,))[0], x)[0]

    close(b.to_np(first(b.arr(X))), 6 * X**2, b.exact)
    close(b.to_np(b.gradient(first, b.arr(X))[0]), 12 * X, b.exact)


@PRODUCTS.clause("custom_vjp-in-vmap")
def _custom_mapped(b: Bench) -> None:
    """The rule holds in a gradient inside vmap, where the core takes it."""
    rule, rows = _doubling(b), np.stack([X, 2 * X])
    run = b.backend.vmap(lambda xs: tuple(b.gradient(lambda x: rule((x,))[0], xs[0])))
    close(b.to_np(run((b.arr(rows),))[0]), 6 * rows**2, b.exact)


@PRODUCTS.clause("custom_vjp-of-vmap")
def _custom_of_mapped(b: Bench) -> None:
    """The rule holds in a gradient of vmap too, where users may take it."""
    rule, rows = _doubling(b), np.stack([X, 2 * X])
    (found,) = b.gradient(lambda x: b.backend.vmap(rule)((x,))[0], b.arr(rows))
    close(b.to_np(found), 6 * rows**2, b.exact)


@PRODUCTS.clause("custom_vjp-integers")
def _custom_integers(b: Bench) -> None:
    """The cotangent that a rule gives for an input that is not floating is None."""

    def forward(xs: Any) -> Any:
        return (b.backend.ops.take(xs[0], xs[1]),)

    def backward(xs: Any, cotangents: Any) -> Any:
        (of_x,) = b.backend.vjp(lambda ys: forward((ys[0], xs[1])), xs[:1], cotangents)
        return of_x, None

    rule, indices = b.backend.custom_vjp(forward, backward), b.arr(np.array([2, 0], "int32"))

    def run(x: Any, indices: Any) -> Any:
        return b.gradient(lambda x: rule((x, indices))[0] * b.arr([1.0, 3.0]), x)[0]

    same(b.to_np(run(b.arr(X), indices)), [3.0, 0.0, 1.0])
    rows = b.arr((np.stack([X, X]), np.array([[2, 0], [0, 1]], "int32")))
    (mapped,) = b.backend.vmap(lambda xs: (run(*xs),))(rows)
    same(b.to_np(mapped), [[3.0, 0.0, 1.0], [1.0, 3.0, 0.0]])


@PRODUCTS.clause("custom_vjp-several")
def _custom_several(b: Bench) -> None:
    """A rule has any number of inputs and outputs, and only those in use have a cotangent."""

    def forward(xs: Any) -> Any:
        return xs[0] * xs[1], xs[0] + xs[1], xs[1] ** 3

    def backward(xs: Any, cotangents: Any) -> Any:
        return b.backend.vjp(forward, xs, cotangents)

    rule = b.backend.custom_vjp(forward, backward)
    found = b.gradient(lambda x, y: rule((x, y))[0] + rule((x, y))[2], b.arr(X), b.arr(2 * X))
    close(b.to_np(found[0]), 2 * X, b.exact)
    close(b.to_np(found[1]), X + 3 * (2 * X) ** 2, b.exact)


@PRODUCTS.clause("custom_vjp-complex")
def _custom_complex(b: Bench) -> None:
    """A complex input of a rule is differentiable, and its cotangent may be given."""

    def backward(xs: Any, cotangents: Any) -> Any:
        return 2.0 * cotangents[0], 0.0 * xs[1]

    rule = b.backend.custom_vjp(lambda xs: (2.0 * xs[0],), backward)
    z = b.backend.asarray(np.array([1.0 + 2.0j], "complex64"))
    equal((b.backend.is_differentiable(z), b.backend.is_floating(z)), (True, False))
    same(b.to_np(b.gradient(lambda x: rule((x, z))[0], b.arr(X))[0]), [2.0, 2.0, 2.0])


# -- functions that run again --------------------------------------------------------------------


def _cube(xs: Any) -> Any:
    """(x^3 y, and a count), of two floating arrays and an integer one."""
    x, y, count = xs
    return x**3 * y, count + 1


@PRODUCTS.clause("transpose")
def _transpose(b: Bench) -> None:
    """Cotangents of the differentiable inputs, and None for the others."""
    xs = (b.arr(X), b.arr(2 * X), b.arr(np.array(3, "int32")))
    found = b.backend.transpose(lambda xs: _cube(xs)[:1], xs, (b.arr(np.ones(3)),))
    equal(found[2], None)
    for a, expected in zip(b.to_np(found[:2]), (6 * X**3, X**3), strict=True):
        close(a, expected, b.exact)


def _checkpoint(compiled: bool, b: Bench) -> None:
    run, count = b.backend.checkpoint(_cube), b.arr(np.array(3, "int32"))

    def first(x: Any, y: Any) -> Any:
        return b.gradient(lambda x: run((x, y, count))[0], x)[0]

    def derivatives(xs: Any) -> Any:
        x, y = xs
        return (first(x, y), *b.gradient(first, x, y), *run((x, y, count)))

    def both(xs: Any) -> Any:
        mapped = b.backend.vmap(derivatives)(tuple(b.backend.ops.stack([x, x]) for x in xs))
        return (*derivatives(xs), *(x[1] for x in mapped))

    xs = b.arr((X, 2 * X))
    found = b.to_np(tuple((b.backend.compile(both, xs) if compiled else both)(xs)))
    expected = (6 * X**3, 12 * X**2, 3 * X**2, 2 * X**4, 4)
    for a, wanted in zip(found, expected + expected, strict=True):
        close(a, wanted, b.exact)


for _compiled in (False, True):
    PRODUCTS.add(
        "checkpoint" + "-compiled" * _compiled,
        "A function that runs again has its value and two derivatives, also mapped.",
        functools.partial(_checkpoint, _compiled),
        compiles=_compiled,
    )


@PRODUCTS.clause("lift")
def _lift(b: Bench) -> None:
    """A lifted function takes its closure as arguments; it has the same value and gradient."""

    def outer(k: Any, x: Any) -> Any:
        lifted, closed = b.backend.lift(lambda xs: (k * xs[0] ** 2,), (x,))
        return lifted((x, *closed))[0]

    for a, expected in zip(
        b.to_np(b.gradient(outer, b.arr(3 * X), b.arr(X))), (X**2, 6 * X**2), strict=True
    ):
        close(a, expected, b.exact)
