"""The backend that a call runs on: inferred from its arrays, or selected.

With nothing selected the arrays decide. `set_backend` selects for the process,
`use_backend` for a block of code in the current thread or task; within it the later one counts. A
selected backend also converts neutral inputs: NumPy arrays and Python numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np

from metaframe.backend.contract import Backend
from metaframe.backend.neutral import at_most_64_bits, numbers
from metaframe.backend.registry import backends_in_use, known_backends, load_backend, owner
from metaframe.backend.types import Array, Arrays
from metaframe.errors import BackendError, InputError, InputTypeError
from metaframe.tree.foreign import PLAIN, Node, node_finders

FLOATING_DTYPES = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True)
class Selection:
    """A selected backend, and how neutral inputs become arrays of it."""

    backend: Backend
    device: str | None = None
    dtype: str = "float32"
    by: str = "metaframe"
    """The library whose `set_backend` selected it."""


_process_selection: Selection | None = None
_scoped_selection: ContextVar[Selection | None] = ContextVar("metaframe_backend", default=None)


def _node_of(x: object) -> Node | None:
    """`x` taken apart by a framework in use; None for a leaf."""
    if is_neutral(x) or owner(x) is not None:
        PLAIN.add(type(x))  # not asked again
        return None
    return next(filter(None, (backend.node(x) for backend in backends_in_use())), None)


node_finders.append(_node_of)


def is_neutral(x: object) -> bool:
    """NumPy arrays and Python or NumPy numbers belong to no framework."""
    return isinstance(x, (np.ndarray, np.generic, bool, int, float))


def is_array(x: object) -> bool:
    """True if `x` is a framework's array or becomes one; other leaves are constants."""
    return isinstance(x, np.ndarray) or owner(x) is not None


def backend_of(*arrays: object) -> Backend:
    """The backend that `arrays` belong to, or the selected one if they are neutral.

    Raises:
        InputTypeError: arrays of two frameworks, or of another one than selected.
        BackendError: only neutral inputs and no backend selected.
    """
    selection = current_selection()
    found = None if selection is None else selection.backend
    for x in arrays:
        own = owner(x)
        if own is None:
            if not is_neutral(x):
                raise InputTypeError(_not_an_array(x))
        elif found is None:
            found = own
        elif own is not found:
            raise InputTypeError(_mixed(found, own, selection))
    if found is None:
        raise BackendError(
            "these inputs belong to no framework and no backend is selected. Pass arrays of one "
            f"framework, or select one: metaframe.set_backend({min(known_backends())!r})."
        )
    return found


def refuse_mixed(*arrays: object) -> None:
    """Raise `InputTypeError` if `arrays` belong to two frameworks."""
    owners = [own for own in map(owner, arrays) if own is not None]
    for own in owners[1:]:
        if own is not owners[0]:
            raise InputTypeError(_mixed(owners[0], own))


def _not_an_array(x: object) -> str:
    kind = type(x)
    found = f"{kind.__module__}.{kind.__qualname__} is neither an array of a loaded framework"
    if any(backend.adapter(x) is not None for backend in backends_in_use()):
        return (
            f"{found} nor a number: it is a model. Pass its parameters, "
            "metaframe.named_params(model), and call it with metaframe.functional_forward; or wrap "
            "it, metaframe.MAML(model)."
        )
    if callable(x):
        return (
            f"{found} nor a number. Keep functions out of the variables: of an Equinox module, "
            "params, static = equinox.partition(module, equinox.is_inexact_array), and in the cost "
            "equinox.combine(params, static)."
        )
    if kind.__module__ == "builtins":
        return f"{found} nor a number: {x!r:.60}. Pass an array."
    return (
        f"{found} nor a number. Pass an array, or make the class a node: "
        "metaframe.tree.register_dataclass(cls)."
    )


def _mixed(found: Backend, other: Backend, selection: Selection | None = None) -> str:
    if selection is not None:
        return (
            f"backend {found.name!r} is selected, received an array of {other.name!r}. Convert "
            f'the array, or select {selection.by}.set_backend("{other.name}").'
        )
    return (
        f"arrays of two frameworks in one call: {found.name!r} and {other.name!r}. Convert one "
        "of them: metaframe never converts silently."
    )


def convert_neutral(
    arrays: Sequence[Any], backend: Backend, name: Callable[[int], str] | None = None
) -> Arrays:
    """`arrays` with neutral ones converted as the selection says, others untouched.

    Floating inputs become the selected dtype, "float32" unless chosen otherwise; integers and
    booleans keep theirs. Without a selection a neutral input is an error. `name(i)` says what the
    array at `i` is, for errors.
    """
    selection = current_selection()
    result = []
    for i, x in enumerate(arrays):
        if not is_neutral(x):
            result.append(x)
        elif selection is None:
            raise InputTypeError(
                f"received {type(x).__name__} next to arrays of {backend.name!r}. Convert it, or "
                f'select the backend, which then converts: metaframe.set_backend("{backend.name}").'
            )
        else:
            what = functools.partial(name, i) if name else str
            result.append(_converted(x, backend, selection, what))
    return tuple(result)


def _converted(x: Any, backend: Backend, selection: Selection, name: Callable[[], str]) -> Array:
    if type(x) is int and not -(2**63) <= x < 2**64:
        what = f"{name()} is" if name() else "received"
        raise InputError(f"{what} {x}, which no integer type of {backend.name} can hold.")
    try:
        values = numbers(x)
    except InputTypeError:
        values = numbers(x, name())  # which says what it is
    values = at_most_64_bits(values)
    if isinstance(x, np.ndarray):
        x = values
    if values.dtype.kind == "f":
        return backend.asarray(x, selection.dtype, selection.device)
    return _kept(values, backend.asarray(x, None, selection.device), backend)


def _kept(values: np.ndarray[Any, Any], array: Array, backend: Backend) -> Array:
    dtype = backend.dtype_name(array)
    if dtype != values.dtype.name and not np.array_equal(values.astype(dtype), values):
        raise InputError(
            f"received {values.dtype} with values that {backend.name}'s {dtype} cannot hold."
        )
    return array


def current_selection() -> Selection | None:
    """The selection here: within a `use_backend` the latest, else that of `set_backend`."""
    return _scoped_selection.get() or _process_selection


_followed: dict[type, Callable[[], Selection | None]] = {}


def follow(cls: type, selected: Callable[[], Selection | None]) -> None:
    """Let `selected()` decide where nothing is selected and a call has a `cls` in its arguments."""
    _followed[cls] = selected


@contextmanager
def following(types: Iterable[type]) -> Iterator[None]:
    """A block of code that runs with the selection of the library that `types` belong to."""
    selection = None
    if _followed and current_selection() is None:
        selection = next((_followed[cls]() for cls in types if cls in _followed), None)
    with selected(selection):
        yield


@contextmanager
def selected(selection: Selection | None) -> Iterator[None]:
    """A block of code that runs with `selection`; with None, as it is."""
    if selection is None:
        yield
        return
    token = _scoped_selection.set(selection)
    try:
        yield
    finally:
        _scoped_selection.reset(token)


def _select(name: str, device: str | None, dtype: str | None) -> Selection:
    backend = load_backend(name)
    if dtype is not None and dtype not in FLOATING_DTYPES:
        raise InputError(
            f"dtype is the name of a floating type, one of {', '.join(FLOATING_DTYPES)}; "
            f"received {dtype!r}."
        )
    selection = Selection(backend, device, dtype or "float32")
    # Fails here, not in the middle of training, if the device or the dtype cannot be had. The
    # defaults always can; asking would start the framework, and too early for a distributed run.
    if device is not None or selection.dtype != "float32":
        backend.asarray(0.0, selection.dtype, selection.device)
    return selection


def set_backend(name: str, *, device: str | None = None, dtype: str | None = None) -> None:
    """Select a backend for the whole process, and for the rest of the `use_backend` around it.

    Args:
        name: "torch", "jax", "tensorflow", or a backend registered by another package.
        device: where neutral inputs are placed, as listed by `available_backends`; default: the
            framework's own default.
        dtype: floating dtype of converted neutral inputs, default "float32". JAX needs
            `jax.config.update("jax_enable_x64", True)` for "float64".

    Raises:
        UnknownKeyError, BackendNotInstalledError: see `load_backend`.
        InputError: an unknown dtype.
        BackendError: an unknown device, or a dtype that is switched off.

    >>> set_backend("torch", dtype="float64")
    >>> current_backend().name
    'torch'
    >>> unset_backend()
    """
    _set_selection(_select(name, device, dtype))


def unset_backend() -> None:
    """Return to inference from the arrays.

    >>> set_backend("torch")
    >>> unset_backend()
    """
    _set_selection(None)


def _set_selection(selection: Selection | None) -> None:
    global _process_selection
    _process_selection = selection
    if _scoped_selection.get() is not None:
        _scoped_selection.set(selection)


@contextmanager
def nothing_selected() -> Iterator[None]:
    """A block of code that starts without a selection; what it selects ends with it."""
    global _process_selection
    before, token = _process_selection, _scoped_selection.set(None)
    _process_selection = None
    try:
        yield
    finally:
        _scoped_selection.reset(token)
        _process_selection = before


@contextmanager
def use_backend(
    name: str, *, device: str | None = None, dtype: str | None = None
) -> Iterator[Backend]:
    """`set_backend` for a block of code, in this thread or async task only.

    Args:
        name: as for `set_backend`.
        device: as for `set_backend`.
        dtype: as for `set_backend`.

    Yields:
        The backend.

    Raises:
        UnknownKeyError, BackendNotInstalledError: see `load_backend`.
        InputError: an unknown dtype.
        BackendError: an unknown device, or a dtype that is switched off.

    >>> with use_backend("jax") as backend:
    ...     current_backend().name
    'jax'
    """
    selection = _select(name, device, dtype)
    with selected(selection):
        yield selection.backend


def current_backend(*arrays: object) -> Backend:
    """The backend a call with `arrays` would run on; without arrays, the selected one.

    Args:
        arrays: arrays of one framework; NumPy arrays and numbers belong to none.

    Returns:
        The backend.

    Raises:
        InputTypeError: arrays of two frameworks, or of another one than selected.
        BackendError: only neutral inputs and no backend selected.

    >>> import torch
    >>> current_backend(torch.ones(2)).name
    'torch'
    """
    return backend_of(*arrays)
