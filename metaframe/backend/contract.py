"""The backend contract: what a framework has to provide.

A backend is transforms and hardly any operations. It sees flat tuples of arrays and never a
nested structure; core code never asks which backend it has.
"""

from __future__ import annotations

import abc
import operator
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

import numpy as np

from metaframe.backend.model import ModelAdapter, NamedParameters
from metaframe.backend.required import Required
from metaframe.backend.tables import NNTable, OpsTable
from metaframe.backend.types import (
    Array,
    Arrays,
    ArraysFn,
    MappedGradient,
    ObjectiveFn,
    RowFn,
    ScalarFn,
    TaskCost,
)
from metaframe.backend.workers import ALONE, Place, Workers
from metaframe.errors import BackendError, InputTypeError
from metaframe.tree.foreign import Node

T = TypeVar("T")


class NativeOptimizer(Protocol):
    """An optimizer that holds its own state and changes variables in place."""

    def step(self, variables: dict[str, Any], grads: dict[str, Array]) -> None:
        """Update variables in place.

        Args:
            variables: the framework's variables by name.
            grads: their gradients by name.
        """

    def state(self) -> tuple[dict[str, np.ndarray[Any, Any]], Any]:
        """The state for a checkpoint: arrays by name, and plain values."""

    def restore(self, arrays: dict[str, np.ndarray[Any, Any]], plain: Any) -> None:
        """Go on from what `state` returned: all of it, or nothing.

        Args:
            arrays: the arrays by name that `state` returned.
            plain: the plain values that `state` returned.

        Raises:
            CheckpointError: values that do not fit this optimizer; nothing is changed then.
        """


class Backend(Required):
    """The contract of a framework: all that metaframe needs of it.

    A method without a body is required. The others have a correct default, which a backend
    overrides only to be faster or to use less memory.

    In every method `x` is an array of the framework and `xs` a flat tuple of arrays; `tangents`
    has one for each of `xs`, and `cotangents` one for each output. `fn` is a pure function from a
    tuple of arrays to a tuple of arrays, unless its type says otherwise. `carry` is the tuple that
    a loop hands from one turn to the next, and `values` holds arrays by name.

    >>> from metaframe.backend.registry import load_backend
    >>> backend = load_backend("torch")
    >>> square = backend.value_and_grad(lambda xs: (xs[0] ** 2, ()))
    >>> value, aux, grads = square((backend.asarray(3.0),))
    >>> value, grads
    (tensor(9.), (tensor(6.),))
    """

    name: str
    """The framework's import name; also the name users select it by."""
    ops: OpsTable
    """The portable array functions, in native calls."""
    nn: NNTable
    """The portable layers, in native calls."""
    module_base: type | None = None
    """The class that a wrapper of this framework's models derives from, if it needs one."""
    compiles_quickly: bool = True
    """True if compiling is so cheap that a repeated step is compiled by default."""
    loops_in_programs: bool = False
    """True if a compiled program that loops over outer steps beats calling a program for each."""
    chunk_elements: int | None = None
    """On a CPU, how many elements tasks may have to be vectorised at once: their data, and a copy
    of the variables for each. More go in chunks of half of it. None if many cost no more each."""
    forward_needs_tangents: bool = False
    """True if `jvp` needs explicit zero tangents for constants, which costs memory."""
    signature: Callable[[Array], Hashable] = operator.attrgetter("shape", "dtype", "device")
    """The properties of an array that a compiled program depends on; asked in every call."""
    conformance_gaps: Mapping[str, str] = MappingProxyType({})
    """Promises that the framework cannot keep: patterns of clauses of the conformance suite
    (`metaframe.testing.conformance`), each with its reason."""

    @classmethod
    def described(cls) -> str:
        """The backend, as an error names it."""
        return f"backend {cls.name!r}"

    # -- arrays --------------------------------------------------------------------------

    @abc.abstractmethod
    def owns(self, x: object) -> bool:
        """True if `x` is an array of this framework; a tracer or a variable counts."""

    @abc.abstractmethod
    def asarray(self, x: Any, dtype: str | None = None, device: str | None = None) -> Array:
        """`x` (own or neutral) as an array; `None` keeps the dtype and the device.

        Args:
            x: an array of the framework, a NumPy array, a number or nested lists of numbers.
            dtype: a NumPy name.
            device: one of `devices`.

        Returns:
            An array of the framework.

        Raises:
            BackendError: an unknown device.
        """

    @abc.abstractmethod
    def to_numpy(self, x: Array) -> np.ndarray[Any, Any]:
        """`x` as a NumPy array, detached and on the host."""

    @abc.abstractmethod
    def dtype_name(self, x: Array) -> str:
        """The NumPy name of the dtype of `x`, such as "float32"."""

    @abc.abstractmethod
    def is_floating(self, x: Array) -> bool:
        """True if `x` is of a real floating dtype, as a variable has to be."""

    def is_differentiable(self, x: Array) -> bool:
        """True if `x` can carry a gradient. Floating arrays can, and complex data."""
        return self.is_floating(x) or self.dtype_name(x).startswith("complex")

    @abc.abstractmethod
    def is_traced(self, x: Array) -> bool:
        """True if `x` is inside a transform or a compilation, and so has no value to look at."""

    def check_values(self, xs: Arrays) -> None:
        """Raise `BackendError` if an array of `xs` is one that never has values."""

    @abc.abstractmethod
    def devices(self) -> tuple[str, ...]:
        """The names `device=` accepts here."""

    def device_of(self, x: Array) -> str:
        """The device of `x`, by its name among `devices`."""
        return str(x.device)

    @abc.abstractmethod
    def on_cpu(self, x: Array) -> bool:
        """True if work on `x` runs on a CPU. For a traced array: unless it is told otherwise."""

    def to_dlpack(self, x: Array) -> Any:
        """`x` as a constant with `__dlpack__`, through which others take its memory."""
        return self.stop_gradient(x)

    def from_dlpack(self, x: Any) -> Array | None:
        """The memory of `x`, of another backend's `to_dlpack`; None if it cannot be shared.

        The dtype may come out narrower; the caller looks.
        """
        del x
        return None

    def seed_from(self, generator: object) -> int | None:
        """A seed below 2**63 drawn from `generator`; None for generators of others."""
        del generator
        return None

    def double_precision(self) -> AbstractContextManager[object]:
        """A block of code in which float64 is float64, if that has to be switched on."""
        return nullcontext()

    # -- transforms ----------------------------------------------------------------------

    @abc.abstractmethod
    def stop_gradient(self, x: Array) -> Array:
        """`x` as a constant."""

    def alias(self, x: Array) -> Array:
        """`x` as a value that is differentiated into `x` and has flags of its own.

        Freezing it must not freeze `x`. Default: `x`, for a framework whose arrays have no flags.
        """
        return x

    @abc.abstractmethod
    def value_and_grad(
        self, fn: ScalarFn, on_disconnected: Callable[[], None] | None = None
    ) -> Callable[[Arrays], tuple[Array, Arrays, Arrays]]:
        """`xs -> (scalar, aux, gradients)`, nestable to any depth.

        Args:
            fn: `xs -> (scalar, aux)`; the aux is a tuple of arrays.
            on_disconnected: called when the scalar depends on none of `xs`; it raises the caller's
                error. Default: the gradients are zeros.

        Returns:
            The function. An input that the scalar does not depend on gets a gradient of zeros.
        """

    @abc.abstractmethod
    def vjp(self, fn: ArraysFn, xs: Arrays, cotangents: Arrays) -> Arrays:
        """Cotangents of `xs`: the transposed Jacobian of `fn` at `xs` times `cotangents`."""

    @abc.abstractmethod
    def jvp(self, fn: ArraysFn, xs: Arrays, tangents: Arrays) -> Arrays:
        """Tangents of the outputs: the Jacobian of `fn` at `xs` times `tangents`."""

    @abc.abstractmethod
    def custom_vjp(
        self, forward: ArraysFn, backward: Callable[[Arrays, Arrays], Arrays]
    ) -> ArraysFn:
        """`forward`, differentiated by `backward(xs, cotangents)` and storing only `xs`.

        What `forward` closes over may be differentiated too: a backend either adds its cotangent,
        or names it in `hidden_inputs`, or raises an error.

        Args:
            forward: a function from arrays to arrays.
            backward: `backward(xs, cotangents) -> cotangents of xs`, with None for an input that is
                not differentiable.

        Returns:
            A function with the values of `forward` and the derivative `backward`.
        """

    def checkpoint(self, fn: ArraysFn) -> ArraysFn:
        """`fn`, which stores only its inputs and runs again in the backward pass."""
        return self.custom_vjp(fn, lambda xs, cotangents: self.transpose(fn, xs, cotangents))

    def recompute(self, fn: ArraysFn) -> ArraysFn:
        """`checkpoint` at every order: its backward pass stores only its inputs too, and so on.

        `fn` closes over nothing that is differentiated.
        """

        def backward(xs: Arrays, cotangents: Arrays) -> Arrays:
            places = [i for i, x in enumerate(xs) if self.is_differentiable(x)]

            def transposed(arrays: Arrays) -> Arrays:
                found = self.transpose(fn, arrays[: len(xs)], arrays[len(xs) :])
                return tuple(found[i] for i in places)

            found = dict(zip(places, self.recompute(transposed)((*xs, *cotangents)), strict=True))
            return tuple(found.get(i) for i in range(len(xs)))

        return self.custom_vjp(fn, backward)

    def transpose(self, fn: ArraysFn, xs: Arrays, cotangents: Arrays) -> Arrays:
        """`vjp`, with None for every input that is not differentiable."""
        places = tuple(i for i, x in enumerate(xs) if self.is_differentiable(x))

        def of_differentiable(values: Arrays) -> Arrays:
            replaced = dict(zip(places, values, strict=True))
            return fn(tuple(replaced.get(i, x) for i, x in enumerate(xs)))

        found = self.vjp(of_differentiable, tuple(xs[i] for i in places), cotangents)
        by_place = dict(zip(places, found, strict=True))
        return tuple(by_place.get(i) for i in range(len(xs)))

    def lift(self, fn: ArraysFn, xs: Arrays) -> tuple[ArraysFn, Arrays]:
        """`fn` as a function of `(*xs, *closed)`, and the arrays `closed` that it closes over.

        Called with arrays like `xs`. The default leaves closures where they are.
        """
        return lambda arrays: fn(arrays[: len(xs)]), ()

    def loses_closures(self, fn: ArraysFn, xs: Arrays) -> str:
        """A name for what `fn` closes over and `lift` leaves there, if someone differentiates it.

        For a rule whose derivative is not that of its forward function. Empty if there is nothing;
        the default, for a framework where `lift` finds everything or `hidden_inputs` names it.
        """
        del fn, xs
        return ""

    def hidden_inputs(self, fn: ArraysFn, xs: Arrays) -> str:
        """The dependencies of `fn` besides `xs` that running it again would get wrong.

        Returns:
            The end of a sentence, such as "draws random numbers"; empty if there are none. A
            closure is named here if `custom_vjp` would silently drop its gradient.

        Runs `fn`, so that the caller can see what it does to the random streams of Python and
        NumPy.
        """
        fn(xs)
        return ""

    def with_finite_roots(self, fn: ArraysFn) -> ArraysFn:
        """`fn`, with derivatives of zero at roots, logarithms and reciprocals of zero.

        For code of others, such as an update rule that divides by the root of a second moment;
        `ops.safe_sqrt` does the same. Values stay the same. Default: `fn` as it is, whose
        derivative is NaN there.
        """
        return fn

    @abc.abstractmethod
    def vmap(self, fn: ArraysFn) -> ArraysFn:
        """`fn` over the leading axis of every input and output.

        An output that depends on no input is repeated.
        """

    @abc.abstractmethod
    def compile(self, fn: ArraysFn, examples: Arrays) -> ArraysFn:
        """`fn` compiled as a whole for arrays like `examples`.

        It is traced before this returns, so that an error in it is raised here.

        Args:
            fn: a function from arrays to arrays.
            examples: arrays with the shapes, dtypes and devices of the arguments; their values do
                not matter.

        Returns:
            The compiled function.
        """

    def ambient(self) -> Hashable:
        """The state of the framework that `compile` builds into a program, as far as it may change.

        Such as a default dtype, autocast, or whether operations are recorded. Every call of a
        compiled function asks for it. The default says that there is none.
        """
        return None

    def threads_for(self, elements: int) -> AbstractContextManager[object]:
        """A training loop on a CPU, whose steps have `elements` numbers in tasks and variables.

        For a framework whose threads would wait for each other in small programs. A number of
        threads that the user chose stays as it is.
        """
        del elements
        return nullcontext()

    def runs_inline(self, xs: Sequence[Array]) -> bool:
        """True where a compiled function of `xs` has to run as it is.

        That is, where a transform or a trace from outside is active that a compiled program would
        not be part of. False if programs can be transformed like other functions.
        """
        del xs
        return False

    def opaque(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """`fn`, a function of ours, for a framework that translates Python code: to be left alone.

        Every call of a public function asks for it.
        """
        return fn

    def user_function(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """`fn`, a function of the user's, to be called here and now.

        For a framework that translates Python code: our own code around it is not translated,
        which must not keep the user's from being so. Every call of one asks for it.
        """
        return fn

    @abc.abstractmethod
    def needed_a_value(self, error: Exception) -> bool:
        """True if `error` was raised because traced code asked an array for its value."""

    def scan(self, fn: RowFn, carry: Arrays, xs: Arrays) -> tuple[Arrays, Arrays]:
        """Run `carry, y = fn(carry, x)` over the leading axis of `xs`.

        The default is a Python loop: right everywhere, and for a framework without a compiled
        loop the only form there is.

        Args:
            fn: one turn: a carry and a row of every array of `xs` to the next carry and a tuple of
                ys.
            carry: what the first turn gets.
            xs: arrays with the same leading axis, of at least one row.

        Returns:
            The last carry, and the ys stacked along a leading axis.
        """
        rows = []
        for i in range(xs[0].shape[0]):
            carry, y = fn(carry, tuple(x[i] for x in xs))
            rows.append(y)
        return carry, tuple(self.ops.stack(column) for column in zip(*rows, strict=True))

    def scan_rows(
        self,
        fn: RowFn,
        carry: Arrays,
        xs: Arrays,
        first: Array,
        count: Array,
    ) -> tuple[Arrays, Arrays]:
        """`scan` over some rows alone.

        With `loops_in_programs`, `fn` computes the same bits whatever `count` and the number of
        rows are. The default implementation needs to know the values of `first` and `count`.

        Args:
            fn: one turn, as for `scan`.
            carry: what the first turn gets.
            xs: arrays with the same leading axis.
            first: the first row, an integer array without axes.
            count: how many rows, an integer array without axes.

        Returns:
            The last carry, and ys with a leading axis as long as that of `xs`; those of other rows
            are undefined.
        """
        start, number = int(self.to_numpy(first)), int(self.to_numpy(count))
        carry, ys = self.scan(fn, carry, tuple(x[start : start + number] for x in xs))
        rest = xs[0].shape[0] - start - number

        def framed(y: Array) -> Array:
            blank = self.ops.zeros_like(y[:1])
            return self.ops.concat([*[blank] * start, y, *[blank] * rest])

        return carry, tuple(map(framed, ys))

    def mapped_value_and_grad(self, fn: TaskCost) -> MappedGradient:
        """`(xs, held, tasks) -> (scalars, aux, gradients with respect to xs)`.

        The default takes one gradient a task. The gradient of the sum over a `vmap` is the same
        number for less work, for a framework where that is safe.

        Args:
            fn: `fn(xs, held, task) -> (scalar, aux)` of one task. What is `held` may be
                differentiated from outside.

        Returns:
            The function. Tasks are mapped over the leading axis; scalars and aux come stacked, and
            gradients are summed.
        """

        def of_tasks(xs: Arrays, held: Arrays, tasks: Arrays) -> tuple[Array, Arrays, Arrays]:
            def one(task: Arrays) -> Arrays:
                value, aux, grads = self.value_and_grad(partial(fn, held=held, task=task))(xs)
                return (*grads, value, *aux)

            out = self.vmap(one)(tasks)
            grads, (values, *aux) = out[: len(xs)], out[len(xs) :]
            return values, tuple(aux), tuple(self.ops.sum(g, axis=0) for g in grads)

        return of_tasks

    def repeat(
        self, fn: RowFn, carry: Arrays, times: int, *, rows: Arrays = (), rolled: bool = False
    ) -> tuple[Arrays, Arrays]:
        """Run `carry, y = fn(carry, row)` `times` times; return the last carry and the stacked ys.

        Args:
            fn: one application.
            carry: what the first one gets.
            times: how many there are, known when a program is traced.
            rows: arrays with a leading axis of `times`; application k gets their k-th rows.
            rolled: in the memory and the program of one application, wherever the framework can.

        Returns:
            The carry, and the ys with a leading axis of `times`; without any for `times=0`.

        The default is a Python loop, which is unrolled when it is traced.
        """
        del rolled
        columns = [self.unstack(x) for x in rows]
        found = []
        for k in range(times):
            carry, y = fn(carry, tuple(column[k] for column in columns))
            found.append(y)
        return carry, tuple(self.ops.stack(column) for column in zip(*found, strict=True))

    def unstack(self, x: Array) -> Sequence[Array]:
        """The rows of `x`, in a form whose gradient costs no more than the array."""
        return [x[k] for k in range(x.shape[0])]

    def register_node(
        self,
        cls: type,
        flatten: Callable[[Any], tuple[list[Any], tuple[str, ...], tuple[str, ...]]],
        unflatten: Callable[[Any, Iterable[Any]], Any],
    ) -> None:
        """Let the framework's own transforms take a class apart, if it has such a registry.

        Args:
            cls: the class.
            flatten: `flatten(node) -> (children, metadata, keys)`.
            unflatten: `unflatten(metadata, children) -> node`.
        """
        del cls, flatten, unflatten

    def node(self, x: object) -> Node | None:
        """The way the framework's own transforms take `x` apart; None for a leaf."""
        del x
        return None

    def random_state(self) -> dict[str, np.ndarray[Any, Any]]:
        """The state of the framework's hidden random streams, for a checkpoint."""
        return {}

    def restore_random_state(self, state: dict[str, np.ndarray[Any, Any]]) -> None:
        """Put the framework's hidden random streams back.

        Args:
            state: what `random_state` returned on this backend.
        """
        del state

    # -- many processes or devices ---------------------------------------------------------

    def workers(self) -> Workers:
        """The workers that share the tasks of a step, by the active group, mesh or strategy."""
        return ALONE

    def join(self, place: Place) -> AbstractContextManager[object]:
        """Start the framework's engine in this process, for a block of code.

        Args:
            place: where this process stands among the others.

        Returns:
            A context manager; at its end the engine stops.

        Raises:
            BackendError: the framework has no engine.
        """
        raise BackendError(f"backend {self.name!r} has no engine for several processes.")

    def lost_others(self, error: Exception) -> bool:
        """True if `error` was raised because another process is gone or does not answer."""
        del error
        return False

    # -- models --------------------------------------------------------------------------

    def adapter(self, model: object) -> ModelAdapter | None:
        """`model` behind the neutral interface; None if it is no model of this framework."""
        del model
        return None

    def run_foreign(self, run: Callable[[], T], *, twice: bool) -> tuple[T, Sequence[Any]]:
        """Call a model of another library that computes with this framework.

        Args:
            run: a function without arguments that calls the model.
            twice: whether its result has to be differentiable twice.

        Returns:
            `(result, variables)`: what `run` returned, and the framework's own trainable variables
            that were read meanwhile; none for a framework whose parameters are arrays like others.
        """
        del twice
        return run(), ()

    def live(self, values: dict[str, Array]) -> NamedParameters | None:
        """`values` as parameters that the framework's own optimizers can update, if it has such."""
        del values
        return None

    def kept(self, values: dict[str, Array]) -> NamedParameters | None:
        """`values` as what the framework saves with a model and does not train, if it has such."""
        del values
        return None

    def native_optimizer(self, optimizer: object) -> NativeOptimizer | None:
        """`optimizer` behind the neutral interface; None if it is none of this framework."""
        del optimizer
        return None

    def differentiable(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """`fn` by operations with a second derivative and a batching rule, as far as there are any.

        For a framework some of whose own operations have none. What it returns is equal to another
        for the same function.
        """
        return fn

    def loss_gradient(
        self, loss: Array | ObjectiveFn, xs: Arrays, *, first_order: bool
    ) -> tuple[Array | None, ...]:
        """Gradients of one inner step.

        Args:
            loss: a function `xs -> scalar`; where operations are recorded on a tape, also a scalar
                computed from `xs`.
            xs: the arrays to differentiate by.
            first_order: whether the gradients are constants.

        Returns:
            One gradient for each of `xs`. For an unused input it is None, or zeros if another one
            is used.

        Raises:
            InputTypeError: `loss` is an array, and the framework keeps no tape.
        """
        if not callable(loss):
            raise InputTypeError(
                f"{self.name} keeps no record of how a loss was computed, so adapt cannot "
                "differentiate an array. Pass a function of the learner: "
                "learner.adapt(lambda learner: loss_fn(learner(x), y))."
            )
        function = loss
        unused: list[bool] = []
        taken = self.value_and_grad(lambda xs: (function(xs), ()), lambda: unused.append(True))
        _, _, grads = taken(xs)
        if unused:
            return (None,) * len(xs)
        return tuple(map(self.stop_gradient, grads)) if first_order else grads
