"""`compile`: a whole function over structures, compiled by the arrays' own framework.

The function's arguments are flattened once; arrays become the inputs of the compiled program,
everything else (numbers, strings, functions, the structure itself) is part of it. A call whose
arrays differ in shape, dtype or device, whose constants differ (see `metaframe.constants`), under
another selection of backend and dtype, or in another state of the framework (`Backend.ambient`)
compiles another program; each is counted in `traces` and reported to the logger "metaframe.compile"
at debug level. The 64 programs used last are kept, and a warning names what keeps changing.

Under a transform or trace of the user's in which the framework cannot call a compiled program, the
function runs as it is.
"""

from __future__ import annotations

import functools
import logging
import traceback
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, ParamSpec, TypeVar

import numpy as np

from metaframe import arguments, tree
from metaframe.backend.attention import chosen_kernel
from metaframe.backend.contract import Backend
from metaframe.backend.registry import owner
from metaframe.backend.selection import (
    backend_of,
    convert_neutral,
    current_selection,
    is_array,
    is_neutral,
)
from metaframe.backend.types import Arrays
from metaframe.core.callers import is_library
from metaframe.core.constants import Same, Settled, arrays_in, constant
from metaframe.core.entrance import entrance
from metaframe.core.keras_settings import keras_settings
from metaframe.core.program_cache import ProgramCache, Signature, name_of
from metaframe.errors import CompileError, InputError, InputTypeError

P = ParamSpec("P")
R = TypeVar("R")

logger = logging.getLogger("metaframe.compile")


def compile(fn: Callable[P, R]) -> Compiled[P, R]:
    """Compile a whole step: `fn` over any structures, on whatever framework its arrays belong to.

    Args:
        fn: pure; it may call `maml_step`, `meta_value_and_grad` or anything else of metaframe or
            of the framework. Its arguments and results are structures of arrays and of constants.

    Returns:
        A function with the same signature, which may be used wherever `fn` may: under the
        framework's own transforms, in another compiled function, in another thread. Python
        numbers, functions and strings among the arguments are constants of the compiled program:
        pass an array for what changes from call to call, and the same function object for what
        does not. What a function closes over and its globals are read when it is traced, and
        taken to stay as they are. The results are as differentiable as those of `fn`; on torch,
        going back through them runs `fn` again.

    Raises:
        InputTypeError: `fn` cannot be called; an argument that is neither an array nor hashable.
        CompileError: `fn` cannot be traced, for instance because it reads the value of an array.

    >>> import torch
    >>> from metaframe import compile
    >>> double = compile(lambda v: {"w": 2 * v["w"]})
    >>> double({"w": torch.tensor([1.0, 2.0])}), double.traces
    ({'w': tensor([2., 4.])}, 1)
    """
    arguments.function(fn, "fn")
    return Compiled(fn)


class Compiled(Settled, Generic[P, R]):
    """A compiled function; `traces` counts the programs made so far."""

    def __init__(self, fn: Callable[P, R]) -> None:
        functools.update_wrapper(self, fn)
        self._fn = fn
        self._programs: ProgramCache[_Program] = ProgramCache(fn)
        self._unnamed: set[tree.TreeSpec] = set()
        self._changing: dict[int, object] = {}

    @property
    def traces(self) -> int:
        """The number of programs that have been traced and compiled."""
        return self._programs.traces

    @property
    def signatures(self) -> tuple[Signature, ...]:
        """The signature of each program that is kept."""
        return self._programs.signatures

    @entrance
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the program for arguments like these, compiling it first if there is none."""
        leaves, spec = tree.flatten((args, kwargs))
        owners = tuple(map(owner, leaves))
        backend = next(filter(None, owners), None) or backend_of()
        result: R
        if backend.runs_inline([x for x, own in zip(leaves, owners, strict=True) if own]):
            result = _inlined(self._fn, args, kwargs)
        else:
            result = self._program(args, kwargs, leaves, spec, backend)(leaves)
        return result

    def prepared(self, *args: P.args, **kwargs: P.kwargs) -> Callable[[Arrays], Arrays] | None:
        """The program for arguments like these, from their arrays in order to those of the results.

        For many calls with the same structure, whose arguments are then looked at once. All arrays
        are the framework's own. None where there is no program because the function runs inline.
        """
        leaves, spec = tree.flatten((args, kwargs))
        arrays = [x for x in leaves if is_array(x)]
        backend = backend_of(*arrays)
        if backend.runs_inline(arrays):
            return None
        return self._program(args, kwargs, leaves, spec, backend).flat

    def _program(
        self, args: Any, kwargs: Any, leaves: Arrays, spec: tree.TreeSpec, backend: Backend
    ) -> _Program:
        signature = self._signature(leaves, spec, backend)
        found = self._programs.get(signature)
        if found is not None:
            return found
        _check_constants(leaves)
        if spec not in self._unnamed and not tree.keyed_by_names(spec):
            self._unnamed.add(spec)
            return self._program(args, kwargs, leaves, spec, backend)
        made = _Program(self._fn, args, kwargs)
        if made.serves_again:
            self._changing.update({id(x): x for x in made.changed})
            known = (signature, self._signature(leaves, spec, backend))
            self._programs.add(made, known, leaves)
            self._forget()
            logger.debug("program %d of %s: %s", self.traces, name_of(self._fn), tuple(signature))
        return made

    def _forget(self) -> None:
        """Let go of what only programs need that are not kept any more."""
        kept = self._programs
        self._changing = {id(x): x for program in kept.programs for x in program.changed}
        self._unnamed &= {signature.structure for signature in kept.signatures}

    def _signature(self, leaves: Arrays, spec: tree.TreeSpec, backend: Backend) -> Signature:
        keys = repr(spec) if spec in self._unnamed else ""
        kinds = tuple(map(self._kind, leaves))
        ambient = (backend.ambient(), keras_settings(), Same(chosen_kernel()))
        return Signature(spec, current_selection(), ambient, kinds, keys)

    def _kind(self, leaf: Any) -> Hashable:
        """The key of a program. Every call asks it of every leaf."""
        backend = owner(leaf)
        if backend is not None:
            return backend.signature(leaf)
        if isinstance(leaf, np.ndarray):
            return np.ndarray, leaf.shape, leaf.dtype
        # The function itself changes it, such as a count of its calls, and a program does not.
        return Same(leaf) if id(leaf) in self._changing else constant(leaf)


class _Program:
    """One compiled program, and the structures of what it takes and returns.

    Attributes:
        serves_again: may it be kept? Not with constants that hold what an outer transform traces.
        changed: the constants that the function changed when it was traced.
    """

    def __init__(self, fn: Callable[..., Any], args: Any, kwargs: Any) -> None:
        inputs = tree.Packed((args, kwargs), is_array)
        self._places = inputs.places
        self._neutral = any(map(is_neutral, inputs.arrays))
        backend = backend_of(*inputs.arrays)
        self._outputs = tree.Returned(backend.owns)
        arguments = inputs.template()  # a program outlives what it was first called with
        before = tuple(map(constant, arguments.others))
        traced = [x for other in arguments.others for x in arrays_in(other)]
        self.serves_again = not any(backend.is_traced(x) for x in traced if backend.owns(x))
        self.changed: tuple[object, ...] = ()

        def flat(xs: Arrays) -> Arrays:
            args, kwargs = arguments.unpack(xs)
            if self._outputs.known:
                _check_unchanged(fn, arguments.others, before, self.changed)
            return self._outputs.flatten(fn(*args, **kwargs))

        with _naming_the_line(fn, backend):
            self._run = backend.compile(flat, convert_neutral(inputs.arrays, backend))
        pairs = zip(arguments.others, before, strict=True)
        self.changed = tuple(x for x, was in pairs if constant(x) != was)

    @property
    def flat(self) -> Callable[[Arrays], Arrays]:
        """The program as a function of arrays alone."""
        return self._run

    def __call__(self, leaves: Arrays) -> Any:
        all_arrays = len(self._places) == len(leaves)
        arrays = leaves if all_arrays else tuple(leaves[i] for i in self._places)
        if self._neutral:
            arrays = convert_neutral(arrays, backend_of(*arrays))
        return self._outputs.build(self._run(arrays))


def _inlined(fn: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    inputs = tree.Packed((args, kwargs), is_array)
    backend = backend_of(*inputs.arrays)
    args, kwargs = inputs.unpack(convert_neutral(inputs.arrays, backend))
    with _naming_the_line(fn, backend):
        return fn(*args, **kwargs)


@contextmanager
def _naming_the_line(fn: Callable[..., Any], backend: Backend) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not backend.needed_a_value(error):
            raise
        raise CompileError(_untraceable(fn, error)) from error


def _untraceable(fn: Callable[..., Any], error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if not is_library(frame.filename)] or list(frames)
    return (
        f"{name_of(fn)} cannot be compiled: {ours[-1].filename}:{ours[-1].lineno} needs the value "
        f"of an array, which a compiled function does not know yet: `{ours[-1].line}`. Compute "
        "both sides and choose with ops.where, pass the value as a Python number, or call the "
        "function without compile."
    )


def _check_constants(leaves: Arrays) -> None:
    for x in leaves:
        if not is_array(x) and type(x).__hash__ is None:
            raise InputTypeError(
                f"a compiled function received {type(x).__qualname__}, which is neither an array "
                "nor hashable. Pass arrays, numbers, strings or functions."
            )


def _check_unchanged(
    fn: Callable[..., Any],
    constants: Iterable[Any],
    before: Iterable[Hashable],
    changing: Iterable[object],
) -> None:
    """Check that the function runs again, to be differentiated, on what it was called with."""
    for x, was in zip(constants, before, strict=True):
        if not any(x is other for other in changing) and constant(x) != was:
            raise InputError(
                f"{name_of(fn)} is differentiated after an argument of it, a "
                f"{type(x).__qualname__}, was changed. Change it after the backward pass, or make "
                "another one."
            )
