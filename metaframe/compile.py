"""`compile`: a whole function over structures, compiled by the arrays' own framework.

The function's arguments are flattened once; arrays become the inputs of the compiled program,
everything else (numbers, strings, functions, the structure itself) is part of it. A call whose
arrays differ in shape, dtype or device, whose other arguments differ, or under another selection of
backend and dtype, compiles another program; every one is kept, counted in `traces`, and reported to
the logger "metaframe.compile" at debug level.
"""

from __future__ import annotations

import functools
import itertools
import logging
import traceback
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, Generic, ParamSpec, TypeVar

import numpy as np

from metaframe import tree
from metaframe.backend import (
    Arrays,
    backend_of,
    convert_neutral,
    current_selection,
    is_neutral,
    owner,
)
from metaframe.errors import CompileError, InputTypeError

P = ParamSpec("P")
R = TypeVar("R")

logger = logging.getLogger(__name__)


def compile(fn: Callable[P, R]) -> Compiled[P, R]:
    """Compile a whole step: `fn` over any structures, on whatever framework its arrays belong to.

    Args:
        fn: pure; it may call `maml_step`, `meta_value_and_grad` or anything else of metaframe or
            of the framework. Its arguments and results are structures of arrays and of constants.

    Returns:
        A function with the same signature. Python numbers, functions and strings among the
        arguments are constants of the compiled program: pass an array for what changes from call
        to call, and the same function object for what does not. The results are as differentiable
        as those of `fn`; on torch, going back through them runs `fn` again.

    Raises:
        InputTypeError: an argument that is neither an array nor hashable.
        CompileError: `fn` cannot be traced, for instance because it branches on a value.

    >>> import torch
    >>> from metaframe import compile
    >>> double = compile(lambda v: {"w": 2 * v["w"]})
    >>> double({"w": torch.tensor([1.0, 2.0])}), double.traces
    ({'w': tensor([2., 4.])}, 1)
    """
    return Compiled(fn)


class Compiled(Generic[P, R]):
    """A compiled function; `traces` counts the programs made so far."""

    def __init__(self, fn: Callable[P, R]) -> None:
        functools.update_wrapper(self, fn)
        self._fn = fn
        self._programs: dict[Hashable, _Program] = {}

    @property
    def traces(self) -> int:
        """How many programs have been traced and compiled."""
        return len(self._programs)

    @property
    def signatures(self) -> tuple[Any, ...]:
        """What each program was made for: structure of the arguments, selection, every leaf."""
        return tuple(self._programs)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the program for arguments like these, compiling it first if there is none."""
        leaves, spec = tree.flatten((args, kwargs))
        key = (spec, current_selection(), *map(_kind, leaves))
        try:
            program = self._programs.get(key)
        except TypeError:
            raise InputTypeError(_unhashable(leaves)) from None
        if program is None:
            program = _Program(self._fn, args, kwargs)
            self._programs[key] = program
            name = getattr(self._fn, "__name__", repr(self._fn))
            logger.debug("program %d of %s: %s", self.traces, name, key)
        result: R = program(leaves)
        return result


class _Program:
    """One compiled program, and the structures of what it takes and returns."""

    def __init__(self, fn: Callable[..., Any], args: Any, kwargs: Any) -> None:
        inputs = tree.Packed((args, kwargs), _is_array)
        self._places = inputs.places
        self._neutral = any(map(is_neutral, inputs.arrays))
        self._outputs: tree.Packed | None = None
        backend = backend_of(*inputs.arrays)
        arguments = inputs.template()  # a program outlives what it was first called with

        def flat(xs: Arrays) -> Arrays:
            args, kwargs = arguments.unpack(xs)
            results = tree.Packed(fn(*args, **kwargs), backend.owns)
            self._outputs = results.template()
            return results.arrays

        try:
            self._run = backend.compile(flat, convert_neutral(inputs.arrays, backend))
        except Exception as error:
            if not backend.needed_a_value(error):
                raise
            raise CompileError(_untraceable(fn, error)) from error

    def __call__(self, leaves: Arrays) -> Any:
        all_arrays = len(self._places) == len(leaves)
        arrays = leaves if all_arrays else tuple(leaves[i] for i in self._places)
        if self._neutral:
            arrays = convert_neutral(arrays, backend_of(*arrays))
        results = self._run(arrays)
        assert self._outputs is not None, "the first run traces the function"
        return self._outputs.unpack(results)


def _kind(leaf: Any) -> Hashable:
    """What a program depends on. Every call asks it of every leaf."""
    backend = owner(leaf)
    if backend is not None:
        return backend.signature(leaf)
    if isinstance(leaf, np.ndarray):
        return np.ndarray, leaf.shape, leaf.dtype
    # With its type: True, 1 and 1.0 are equal and compile to different programs.
    return type(leaf), leaf


def _is_array(x: object) -> bool:
    return isinstance(x, np.ndarray) or owner(x) is not None


def _untraceable(fn: Callable[..., Any], error: Exception) -> str:
    name = getattr(fn, "__name__", repr(fn))
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if not _is_library(frame.filename)] or list(frames)
    return (
        f"{name} cannot be compiled: {ours[-1].filename}:{ours[-1].lineno} needs the value of an "
        f"array, which a compiled function does not know yet: `{ours[-1].line}`. Compute both "
        "sides and choose with ops.where, pass the value as a Python number, or call the function "
        "without compile."
    )


def _is_library(filename: str) -> bool:
    here = Path(__file__).parent
    libraries = (str(here), str(here.parent / "backends"), "<frozen")
    return filename.startswith(libraries) or "site-packages" in filename


def _unhashable(leaves: tuple[Any, ...]) -> str:
    for constant in itertools.filterfalse(_is_array, leaves):
        try:
            hash(constant)
        except TypeError:
            return (
                f"a compiled function received {type(constant).__qualname__}, which is neither an "
                "array nor hashable. Pass arrays, numbers, strings or functions."
            )
    return "a compiled function received an argument that is not hashable."
