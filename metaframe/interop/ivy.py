"""ivy's `Container` and `Array` as nodes: what comes in as ivy goes back out as ivy.

Functions of the core see the framework's own arrays, and cost functions see ivy's classes again,
so that they may be written with ivy's functions and Container methods. Gradients are taken by
metaframe's backend; ivy's own gradient functions are never called.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from metaframe import tree
from metaframe.backend.registry import known_backends, load_backend
from metaframe.backend.selection import Selection, follow
from metaframe.errors import BackendError


def import_ivy() -> ModuleType:
    """`import ivy`, without what ivy leaves in the working directory.

    ivy opens `ivy_logs.txt` in the working directory when it is imported, and a folder `.ivy` in it
    or above it. Imported this way, it does so in a temporary directory that goes with the process;
    the variable IVY_ROOT, where it is set, still says where the folder is.

    Returns:
        The module, as `import ivy` binds it; that is all this does where ivy is imported already.

    >>> ivy = import_ivy()  # doctest: +SKIP
    """
    if "ivy" not in sys.modules:
        with contextlib.chdir(_scratch()):
            importlib.import_module("ivy")
    return sys.modules["ivy"]


@functools.cache
def _scratch() -> str:
    directory = tempfile.TemporaryDirectory(prefix="metaframe-ivy-")
    _kept.append(directory)
    root = Path(directory.name) / ".ivy"
    root.mkdir()
    os.environ.setdefault("IVY_ROOT", str(root))
    return directory.name


_kept: list[tempfile.TemporaryDirectory[str]] = []
"""The objects that would be removed as soon as nothing refers to them."""


def adapt(ivy: ModuleType) -> Callable[[], None] | None:
    """Make the classes of `ivy`, which a user has imported, known. Another `ivy` has none.

    Returns:
        A function that does the same for the copies of itself that `ivy.with_backend` has made
        since, each of which has classes of its own.
    """
    if not hasattr(ivy, "Container") or not hasattr(ivy, "Array"):
        return None
    _adapt_classes(ivy)
    copies: dict[str, list[ModuleType]] = getattr(ivy, "compiled_backends", {})
    known: set[int] = set()

    def look_again() -> None:
        if sum(map(len, copies.values())) == len(known):
            return
        for copy in (copy for made in copies.values() for copy in made):
            if id(copy) not in known:
                known.add(id(copy))
                _adapt_classes(copy)

    look_again()
    return look_again


def _adapt_classes(ivy: ModuleType) -> None:
    tree.register(ivy.Container, _flatten, partial(_unflatten, ivy))
    tree.register_wrapper(ivy.Array, lambda array: array.data, partial(_wrap, ivy))
    selected: Callable[[], Selection | None] = partial(_selected, ivy)
    follow(ivy.Container, selected)
    follow(ivy.Array, selected)


def _flatten(container: Any) -> tuple[list[Any], tuple[str, ...], tuple[str, ...]]:
    # Past ivy's own `__getitem__`, which takes dots and slashes in a key for a path.
    keys = tuple(sorted(container))
    return [dict.__getitem__(container, key) for key in keys], keys, keys


def _unflatten(ivy: ModuleType, keys: tuple[str, ...], children: Iterable[Any]) -> Any:
    return ivy.Container(dict(zip(keys, children, strict=True)))


def _wrap(ivy: ModuleType, x: Any) -> Any:
    # Placeholders, and arrays that ivy's current backend does not know, stay what they are.
    return ivy.Array(x) if ivy.is_native_array(x) else x


def _selected(ivy: ModuleType) -> Selection | None:
    name = ivy.current_backend_str()
    if not name:
        return None
    if name not in known_backends():
        raise BackendError(
            f"ivy's backend is {name!r}, which metaframe has no gradients for. Select another: "
            f"ivy.set_backend({min(known_backends())!r})."
        )
    return Selection(load_backend(name), dtype=str(ivy.default_float_dtype()), by="ivy")
