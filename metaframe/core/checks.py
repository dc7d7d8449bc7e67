"""Checks at the door: what every public function rejects before it does any work.

Each message names the argument, what came in, what was expected, and the way out. They live
together so that the same mistake reads the same everywhere.
"""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import numpy as np

from metaframe import arguments, tree
from metaframe.backend import neutral
from metaframe.backend.contract import Backend
from metaframe.backend.registry import owner
from metaframe.backend.selection import convert_neutral, is_neutral
from metaframe.backend.types import Array, Arrays
from metaframe.errors import InputError, InputTypeError, NonFiniteError


def learning_rate(lr: Any, name: str = "lr") -> Any:
    """Numbers are finite and not negative; arrays of a framework are real, and may be traced.

    Args:
        lr: a number, an array, or a structure of them.
        name: the argument that it is, for errors.

    Returns:
        The rates, those of NumPy without axes as Python numbers.
    """
    if lr is None or (type(lr) is float and 0 <= lr < math.inf):
        return lr  # the common cases, which eager steps ask for every time
    if callable(lr):
        raise InputTypeError(
            f"{name} must be a number or an array of numbers, received a function. Give a schedule "
            f"to the update rule, as in optim.sgd(schedule), and None for {name}."
        )
    if isinstance(lr, Mapping) and tree.is_leaf(lr):
        lr = dict(lr)
    for i, rate in enumerate(tree.leaves(lr)):
        if isinstance(rate, np.ndarray):
            neutral.numbers(rate, _rate_name(lr, i, name))
        if not _is_real(rate):
            kind = owner(rate)
            found = f"an array of {kind.dtype_name(rate)}" if kind else repr(rate)
            raise InputTypeError(
                f"{_rate_name(lr, i, name)} must be a number or an array of numbers, received "
                f"{found}."
            )
        if is_neutral(rate) and not np.all(np.isfinite(rate) & (np.asarray(rate) >= 0)):
            raise InputError(
                f"{_rate_name(lr, i, name)} must be finite and not negative, received {rate!r}."
            )
    return plain_numbers(lr)


def _is_real(x: Any) -> bool:
    """A real number, or an array of them; booleans are not numbers."""
    if (backend := owner(x)) is not None:
        return not backend.dtype_name(x).startswith(("bool", "complex"))
    kind = np.asarray(x).dtype
    return is_neutral(x) and (kind.kind in "iuf" or kind.name == "bfloat16")


def plain_numbers(lr: Any) -> Any:
    """NumPy's scalars as Python numbers: their dtype is not to decide that of variables."""
    if type(lr) is float:
        return lr

    def plain(rate: Any) -> Any:
        return rate.item() if isinstance(rate, np.generic | np.ndarray) and not rate.shape else rate

    return tree.map(plain, lr)


def _rate_name(lr: Any, leaf: int, name: str) -> str:
    chain = tree.key_chains(lr)[leaf]
    return f"{name}: " + (f"learning rate {chain!r}" if chain else "the learning rate")


def setting(name: str, value: Any, within: str = "[0, inf)") -> None:
    """A setting of an optimizer is in this interval; arrays are not looked at, they may be traced.

    Raises:
        InputTypeError: neither a number nor an array.
        InputError: out of the interval.
    """
    if owner(value) is not None:
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise InputTypeError(f"{name} must be a number, received {value!r}.")
    upper, closed = float(within[1:-1].partition(",")[2]), within.endswith("]")
    number = float(value)
    if not (0 <= number < upper or (closed and number == upper)):
        raise InputError(f"{name} has to be in {within}, received {value!r}.")


def variables(leaves: Arrays, part: tree.Part, backend: Backend, name: str) -> None:
    """At least one variable is chosen and every chosen one is floating.

    `name` is the argument that chose them.
    """
    if not leaves:
        raise InputError("variables holds no arrays.")
    backend.check_values(leaves)
    if not any(part.flags):
        known = list(tree.chains(part.spec))
        raise InputError(f"{name} chooses none of the variables {known}. Choose at least one.")
    for i, (leaf, flag) in enumerate(zip(leaves, part.flags, strict=True)):
        if arguments.axes(leaf) is None:
            raise InputError(
                f"variable {tree.chains(part.spec)[i]!r} has a shape of unknown rank. Give it the "
                "number of its axes, by tf.ensure_shape."
            )
        if flag and not is_learnable(leaf, backend):
            raise InputTypeError(
                f"variable {tree.chains(part.spec)[i]!r} is {backend.dtype_name(leaf)}; gradients "
                "need a float dtype of 16 bits or more. Convert it, or leave it out through "
                f"{name}."
            )


def is_learnable(x: Array, backend: Backend) -> bool:
    """True if gradients can update `x`: no complex numbers, integers, or floats of 8 bits."""
    narrow = ("float8_", "float6_", "float4_")  # no framework computes in them
    return backend.is_floating(x) and not backend.dtype_name(x).startswith(narrow)


def learnable(params: Mapping[str, Array], names: Iterable[str], backend: Backend) -> None:
    """Every one of these parameters, which are to be learned, can be."""
    for name in names:
        if not is_learnable(params[name], backend):
            raise InputTypeError(
                f"parameter {name!r} is {backend.dtype_name(params[name])}; gradients need a float "
                "dtype of 16 bits or more. Make it one, such as the real and the imaginary part of "
                "a complex number, or freeze it: requires_grad_(False) on torch, trainable=False "
                "on TensorFlow, on JAX another kind of variable than a parameter, or outside the "
                "parameters."
            )


def converted(
    given: tree.Flat, backend: Backend, name: str, which: Callable[[Any], bool] | None = None
) -> tree.Flat:
    """The argument `name` with its neutral arrays as the backend's.

    With `which`, those alone that it says.
    """
    if not any(map(is_neutral, given.arrays)):
        return given
    places = [i for i, x in enumerate(given.arrays) if which is None or which(x)]
    arrays = [given.arrays[i] for i in places]

    def label(i: int) -> str:
        return str(_Label(name, given.spec, places[i]))

    found = dict(zip(places, convert_neutral(arrays, backend, label), strict=True))
    return given._replace(arrays=tuple(found.get(i, x) for i, x in enumerate(given.arrays)))


class _Label(NamedTuple):
    """A leaf of an argument, as an error names it."""

    argument: str
    spec: tree.TreeSpec
    leaf: int

    def __str__(self) -> str:
        chain = tree.chains(self.spec)[self.leaf]
        return f"{self.argument}[{chain!r}]" if chain else self.argument


def tasks(batch: tree.Flat, num_tasks: int | None) -> int:
    """The number of tasks to use, after checking that all leaves of `batch` have that many."""
    leaves = batch.arrays
    if not leaves:
        raise InputError("batch holds no arrays, so no tasks.")
    sizes = []
    for i, leaf in enumerate(leaves):
        size = arguments.leading_axis(leaf, _Label("batch", batch.spec, i), "task")
        if size is None:
            raise InputError(
                f"{_Label('batch', batch.spec, i)} is a scalar; every leaf needs a leading task "
                "axis. A list is a structure: for an array of its numbers write numpy.array(...)."
            )
        sizes.append(size)
    size = sizes[0]
    for i, other in enumerate(sizes):
        if other != size:
            raise InputError(
                f"task axis differs: {_Label('batch', batch.spec, 0)} has {size}, "
                f"{_Label('batch', batch.spec, i)} has {other}."
            )
    if size == 0:
        raise InputError("batch holds no tasks: its leading axis has length 0.")
    if num_tasks is None:
        return size
    arguments.integer(num_tasks, "num_tasks", at_least=1)
    if num_tasks > size:
        raise InputError(f"num_tasks={num_tasks} but batch has {size} tasks.")
    return int(num_tasks)


def tiled(v: tree.Flat, num_tasks: int) -> None:
    """With batched=True the variables carry the task axis."""
    for i, leaf in enumerate(v.arrays):
        shape = tuple(leaf.shape)
        if not shape or shape[0] != num_tasks:
            raise InputError(
                f"batched=True needs a leading task axis of {num_tasks} on every variable, "
                f"received {tree.chains(v.spec)[i]!r} with shape {shape}. Tile the variables, or "
                'share one copy with batched="vmap", "scan" or False.'
            )


def scalar_cost(cost: Callable[..., Any], name: str, backend: Backend) -> Callable[..., Array]:
    """`cost` as `(batch, v) -> scalar`, with its result checked on every call."""
    by_keyword = takes_v_by_keyword(cost, name)

    def call(batch: tree.Tree, v: tree.Tree) -> Array:
        run = backend.user_function(cost)
        return scalar(run(batch, v=v) if by_keyword else run(batch, v), name, backend)

    return call


def scalar(value: Any, name: str, backend: Backend) -> Array:
    """`value`, what `name` returned, as a scalar array of `backend`; one of shape (1,) counts."""
    value = tree.unwrapped(value)
    if not backend.owns(value):
        other = owner(value)
        kind = f"an array of {other.name!r}" if other else type(value).__name__
        raise InputTypeError(f"{name} returned {kind}, need a scalar array of {backend.name!r}.")
    shape = tuple(value.shape)
    if shape == (1,):
        return backend.ops.reshape(value, ())
    if shape:
        raise InputError(f"{name} returned shape {shape}, need a scalar; did you forget a mean?")
    return value


def with_aux(result: Any, name: str) -> tuple[Any, Any]:
    """The cost and the aux that a function with has_aux=True returned.

    Raises:
        InputTypeError: it is no pair.
    """
    if not isinstance(result, tuple) or len(result) != 2:
        raise InputTypeError(
            f"{name} with has_aux=True returns (cost, aux), received {type(result).__name__}."
        )
    return result


def same_shapes(arrays: Arrays, like: Arrays, spec: tree.TreeSpec, name: str, whose: str) -> None:
    """Every array of the argument `name` has the shape of that of `whose`.

    Raises:
        InputError: naming the first that has not.
    """
    for chain, x, y in zip(tree.chains(spec), arrays, like, strict=True):
        if tuple(x.shape) != tuple(y.shape):
            where = f"[{chain!r}]" if chain else ""
            raise InputError(
                f"{name}{where} has shape {tuple(x.shape)}, {whose}{where} has {tuple(y.shape)}."
            )


def takes_v_by_keyword(cost: Callable[..., Any], name: str) -> bool:
    """True if `cost(batch, v)` has a keyword-only `v`, after checking that it is a function."""
    arguments.function(cost, name)
    function = cost.__func__ if isinstance(cost, MethodType) else cost
    elsewhere = hasattr(function, "__wrapped__") or hasattr(function, "__signature__")
    if isinstance(function, FunctionType) and not elsewhere:
        # The common case, without the cost of a signature.
        code = function.__code__
        first = code.co_argcount
        return "v" in code.co_varnames[first : first + code.co_kwonlyargcount]
    try:
        parameters = inspect.signature(cost).parameters
    except (TypeError, ValueError):  # builtins and some extension types have no signature
        return False
    return "v" in parameters and parameters["v"].kind is inspect.Parameter.KEYWORD_ONLY


def cost_ignores_variables() -> None:
    """Called by a backend when a cost turns out to depend on none of its variables."""
    raise InputError(
        "cost does not depend on any inner variable, so there is nothing to adapt. Compute it from "
        "the variables it is given; check for values detached or converted to NumPy on the way."
    )


def finite(costs: Array, backend: Backend, *, tiled: bool = False) -> None:
    """Every task's cost is finite; the error names the first task whose cost is not.

    With `tiled`, `costs` is the mean over all tasks, which only their cost function has seen.
    """
    if backend.is_traced(costs):
        raise InputError(
            "check_finite looks at values, which do not exist yet inside a compiled or transformed "
            "function. Check the returned cost and gradients outside."
        )
    values = backend.to_numpy(costs).reshape(-1)
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        index = int(bad[0])
        whose = "the mean cost of all tasks" if tiled else f"the cost of task {index}"
        raise NonFiniteError(f"{whose} is {values[index]}.")


def finite_leaves(grads: tree.Flat, backend: Backend) -> None:
    """Every gradient is finite; the error names the first leaf that is not."""
    for chain, leaf in zip(tree.chains(grads.spec), grads.arrays, strict=True):
        values = backend.to_numpy(leaf)
        if not np.all(np.isfinite(values)):
            count = int(math.prod(values.shape)) - int(np.isfinite(values).sum())
            raise NonFiniteError(
                f"the gradient of {chain!r} has {count} values that are not finite."
            )
