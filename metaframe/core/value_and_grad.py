"""Gradients of functions that have no tasks, for bilevel problems of any kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from metaframe import arguments, tree
from metaframe.backend.contract import Backend
from metaframe.backend.selection import backend_of, convert_neutral, following, is_array
from metaframe.backend.types import Array, Arrays
from metaframe.core import checks
from metaframe.core.entrance import entrance
from metaframe.core.meta_gradient import MetaResult


def value_and_grad(
    fn: Callable[..., Any],
    *,
    outer_v: Any = None,
    keep_outer_v: bool = True,
    has_aux: bool = False,
) -> Callable[..., MetaResult]:
    """Turn a function of variables into its value with its gradient.

    The same as `meta_value_and_grad` for one problem without a task axis, such as a validation
    loss after an `unroll`, as a function of hyperparameters.

    Args:
        fn: `fn(v, *args) -> scalar`, or `(scalar, aux)` with `has_aux`.
        outer_v: which variables to differentiate, as for `maml_step`; all by default.
        keep_outer_v: False inverts `outer_v`.
        has_aux: `fn` returns something besides, a structure of arrays.

    Returns:
        A function `(v, *args) -> MetaResult`, with the cost, its gradient in the structure of the
        variables (or of the chosen part), and the aux. `args` are any structures.

    Raises:
        InputError, InputTypeError, UnknownKeyError: bad arguments, before any work.

    >>> import torch
    >>> def validation(hyper, train, valid):
    ...     def cost(batch, w):
    ...         return (w - batch) ** 2 + hyper["decay"] * w**2
    ...     w = inner_loop(cost, torch.tensor(0.0), train, steps=1, lr=hyper["lr"])
    ...     return (w - valid) ** 2
    >>> from metaframe import inner_loop
    >>> hyper = {"lr": torch.tensor(0.25), "decay": torch.tensor(0.0)}
    >>> found = value_and_grad(validation)(hyper, torch.tensor(2.0), torch.tensor(3.0))
    >>> found.cost, found.grads["lr"]
    (tensor(4.), tensor(-16.))
    """
    arguments.function(fn, "fn")

    @entrance
    def call(v: tree.Tree, *args: Any) -> MetaResult:
        at = _Arguments.of(v, args)
        part = tree.Part(at.spec, tree.flags(at.spec, outer_v, keep_outer_v, name="outer_v"))
        checks.variables(at.leaves, part, at.backend, "outer_v")
        wanted, held = part.divide(at.leaves)
        aux_of = tree.Returned()

        def objective(xs: Arrays) -> tuple[Array, Arrays]:
            result = at.call(fn, part.merge(xs, held))
            result, aux = checks.with_aux(result, "fn") if has_aux else (result, ())
            return checks.scalar(result, "fn", at.backend), aux_of.flatten(aux)

        cost, aux, grads = at.backend.value_and_grad(objective)(wanted)
        structure = part.structure(at.leaves)
        return MetaResult(
            tree.wrapped_as(at.spec, cost), tree.unflatten(structure, grads), aux_of.build(aux)
        )

    return call


@entrance
def hessian_vector_product(
    fn: Callable[..., Any], v: tree.Tree, direction: tree.Tree, *args: Any
) -> tree.Tree:
    """The Hessian of a function at `v`, times a direction.

        d/de grad fn(v + e * direction, *args) at e = 0

    Costs a few gradients of `fn` and never forms the Hessian (Pearlmutter 1994). Differentiable.

    Args:
        fn: `fn(v, *args) -> scalar`.
        v: variables, any structure of floating arrays.
        direction: arrays in the structure and the shapes of `v`.
        args: what else `fn` takes, any structures.

    Returns:
        The product, in the structure of `v`.

    Raises:
        InputError, InputTypeError: bad arguments, before any work.

    >>> import torch
    >>> def fn(v):
    ...     return v["a"] ** 2 * v["b"]
    >>> v = {"a": torch.tensor(3.0), "b": torch.tensor(1.0)}
    >>> hessian_vector_product(fn, v, {"a": torch.tensor(1.0), "b": torch.tensor(0.0)})
    {'a': tensor(2.), 'b': tensor(6.)}
    """
    arguments.function(fn, "fn")
    at = _Arguments.of(v, args)
    part = tree.Part(at.spec, [True] * len(at.leaves))
    checks.variables(at.leaves, part, at.backend, "v")
    along = convert_neutral(tree.same_structure(direction, at.spec, what="direction"), at.backend)
    checks.same_shapes(along, at.leaves, at.spec, "direction", "v")

    def objective(xs: Arrays) -> tuple[Array, Arrays]:
        return checks.scalar(at.call(fn, xs), "fn", at.backend), ()

    def gradient(xs: Arrays) -> Arrays:
        return at.backend.value_and_grad(objective)(xs)[2]

    # The Hessian is symmetric: its transpose in reverse mode is the product itself.
    product = at.backend.transpose(gradient, at.leaves, along)
    return tree.unflatten(at.spec, product)


class _Arguments(NamedTuple):
    """The variables and the other arguments of a function, taken apart and converted."""

    backend: Backend
    leaves: Arrays
    spec: tree.TreeSpec
    args: tree.Packed

    @staticmethod
    def of(v: tree.Tree, args: tuple[Any, ...]) -> _Arguments:
        variables = tree.Flat.of(v, "v")
        leaves, spec = variables
        packed = tree.Packed(args, is_array, "the arguments")
        with following(tree.node_types(spec, packed.spec)):
            backend = backend_of(*leaves, *packed.arrays)
            arrays = convert_neutral(
                packed.arrays,
                backend,
                lambda i: f"args[{tree.chains(packed.spec)[packed.places[i]]!r}]",
            )
            return _Arguments(
                backend,
                checks.converted(variables, backend, "v").arrays,
                spec,
                tree.Packed(packed.unpack(arrays), is_array),
            )

    def call(self, fn: Callable[..., Any], leaves: Arrays) -> Any:
        """`fn(v, *args)` with these leaves of `v`."""
        v = tree.unflatten(self.spec, leaves)
        return self.backend.user_function(fn)(v, *self.args.unpack(self.args.arrays))
