"""The gradient doctor on a function named on the command line."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from metaframe.backend.registry import load_backend
from metaframe.backend.selection import use_backend
from metaframe.cli.errors import UsageError
from metaframe.errors import nearest
from metaframe.testing import Report, check_meta_gradient


def examine(target: str, backend: str | None, others: Sequence[str]) -> Report:
    """The report on `module:function`, whose result is the arguments of `check_meta_gradient`.

    Args:
        target: the function takes no arguments and returns a mapping.
        backend: selected while it runs; default: its arrays decide.
        others: further backends to compare with.
    """
    case = _loaded(target)
    selected = use_backend(backend, dtype="float64") if backend else nullcontext()
    precise = load_backend(backend).double_precision() if backend else nullcontext()
    with precise, selected:
        arguments = case()
        _check(target, arguments)
        return check_meta_gradient(**{"backends": others, **arguments})


def _loaded(target: str) -> Any:
    name, _, attribute = target.partition(":")
    if not all(name.split(".")) or not attribute:
        raise UsageError(f"expected module:function, such as cases:sinusoid, received {target!r}.")
    # As with `python -m`, modules of the working directory can be named.
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise UsageError(f"there is no module {name!r} here or among what is installed.") from None
    if not hasattr(module, attribute):
        own = [n for n, x in vars(module).items() if callable(x) and not n.startswith("_")]
        raise UsageError(f"{name} has no {attribute!r}. {nearest(attribute, own)}")
    found = getattr(module, attribute)
    if not callable(found):
        raise UsageError(f"{target} is no function, but of type {type(found).__name__}.")
    return found


def _check(target: str, arguments: Any) -> None:
    parameters = inspect.signature(check_meta_gradient).parameters
    required = [n for n, p in parameters.items() if p.default is p.empty]
    if not isinstance(arguments, Mapping):
        raise UsageError(
            f"{target} returned a {type(arguments).__name__}, expected a dict with "
            f"{', '.join(map(repr, required))}: the arguments of check_meta_gradient."
        )
    missing = [n for n in required if n not in arguments]
    unknown = [str(n) for n in arguments if n not in parameters]
    if missing:
        raise UsageError(f"{target} returned no {', '.join(map(repr, missing))}.")
    if unknown:
        raise UsageError(f"{target} returned {unknown[0]!r}. {nearest(unknown[0], parameters)}")
