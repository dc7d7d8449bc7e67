"""Compiling without a trace in torch's own tables, so that a program that is dropped is freed.

torch keeps the source of each graph and the Python module of each program for as long as the
process lives. Nothing of ours looks there again. The kernels, which are shared libraries, stay
loaded.
"""

from __future__ import annotations

import linecache
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from metaframe_torch import _private


@contextmanager
def leaving_nothing() -> Iterator[None]:
    """A block that compiles, after which torch's tables are as they were before it."""
    sources: dict[str, str] = _private.GRAPH_SOURCES.found or {}
    modules: list[Any] = _private.PROGRAM_MODULES.found or []
    shared: dict[str, Any] = _private.SHARED_MODULES.found or {}
    known, count = set(sources), len(modules)
    try:
        yield
    finally:
        for name in set(sources) - known:
            sources.pop(name, None)
            linecache.cache.pop(name, None)
        kept = set(map(id, shared.values()))  # found again by the path of their source
        for module in [m for m in modules[count:] if id(m) not in kept]:
            modules.remove(module)
            if sys.modules.get(name := str(module.__name__)) is module:
                del sys.modules[name]
