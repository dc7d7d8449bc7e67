"""Known backends: the built-in table, entry points of other packages, and what is loaded.

Built-in backends sit in a static table, others register under the entry point group
`metaframe.backends`; an entry's name is its framework's import name, so that a framework nobody
imported is never imported by us.
"""

from __future__ import annotations

import importlib
import importlib.util
import operator
import sys
import warnings
from dataclasses import dataclass
from types import FunctionType
from typing import Any

from metaframe.backend.contract import Backend
from metaframe.errors import BackendError, BackendNotInstalledError, UnknownKeyError, nearest

ENTRY_POINT_GROUP = "metaframe.backends"


@dataclass(frozen=True)
class _Source:
    """The package that a backend comes from."""

    target: str  # "module:class"
    install: str


_BUILT_IN = {
    "jax": _Source("metaframe_jax:JaxBackend", "pip install jax"),
    "tensorflow": _Source("metaframe_tensorflow:TensorFlowBackend", "pip install tensorflow"),
    "torch": _Source("metaframe_torch:TorchBackend", "pip install torch"),
}

_loaded: dict[str, Backend] = {}
_by_type: dict[type, Backend] = {}
_NEVER_ARRAYS = frozenset({bool, int, float, complex, str, bytes, type(None), FunctionType})
"""Types that need no question to every backend."""


def _sources() -> dict[str, _Source]:
    import importlib.metadata  # slow to import, and needed when the first array is seen

    found = {
        entry.name: _Source(entry.value, f"pip install {entry.dist.name if entry.dist else ''}")
        for entry in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
    }
    return {**found, **_BUILT_IN}


_known: dict[str, _Source] | None = None


def known_backends() -> dict[str, _Source]:
    """Name to source of every backend, built in or registered by an installed package."""
    global _known
    if _known is None:
        _known = _sources()
    return _known


def load_backend(name: str) -> Backend:
    """The backend called `name`, importing its framework.

    Args:
        name: "torch", "jax", "tensorflow", or a backend registered by another package.

    Returns:
        The backend, one object for each name.

    Raises:
        UnknownKeyError: no such backend, with the nearest name.
        BackendNotInstalledError: its framework is missing, with the command that installs it.
        BackendError: its module cannot be imported, or it lacks a required method, which is named.
    """
    if name in _loaded:
        return _loaded[name]
    sources = known_backends()
    if name not in sources:
        raise UnknownKeyError(f"no backend called {name!r}. {nearest(name, sources)}")
    if importlib.util.find_spec(name) is None:
        raise BackendNotInstalledError(
            f"backend {name!r} needs {name}, which is not installed. Run: {sources[name].install}"
        )
    module, _, attribute = sources[name].target.partition(":")
    try:
        backend: Backend = getattr(importlib.import_module(module), attribute)()
    except (ImportError, AttributeError) as error:
        raise BackendError(
            f"backend {name!r} cannot be loaded from {sources[name].target}: {error}. Bring it up "
            f"to date, or remove it. It is installed by: {sources[name].install}"
        ) from error
    _by_type.clear()
    _in_use.clear()
    return _loaded.setdefault(name, backend)


_broken: set[str] = set()


def backends_in_use() -> tuple[Backend, ...]:
    """Backends of the frameworks that are imported already.

    One that cannot be loaded is left out, with a warning: those who work on another framework need
    not suffer from it.
    """
    # None in sys.modules marks a module that must not be imported.
    imported = tuple(name for name in known_backends() if sys.modules.get(name) is not None)
    if imported not in _in_use:
        found = map(_unless_broken, sorted(imported))
        _in_use[imported] = tuple(backend for backend in found if backend is not None)
    return _in_use[imported]


_in_use: dict[tuple[str, ...], tuple[Backend, ...]] = {}


def _unless_broken(name: str) -> Backend | None:
    if name in _broken:
        return None
    try:
        return load_backend(name)
    except BackendError as error:
        _broken.add(name)
        warnings.warn(str(error), stacklevel=2)
        return None


_registered: set[tuple[str, type]] = set()


def register_with_frameworks(cls: type, flatten: Any, unflatten: Any) -> None:
    """Let a user's own `jax.jit` or `torch.func.vmap` take instances of `cls` apart.

    Called when one is made, and only for frameworks the user has imported: importing metaframe
    imports none.
    """
    for backend in backends_in_use():
        if (backend.name, cls) not in _registered:
            _registered.add((backend.name, cls))
            backend.register_node(cls, flatten, unflatten)


def owner(x: object) -> Backend | None:
    """The backend whose array `x` is, or None. Imports no framework."""
    hit = _by_type.get(type(x))  # no assignment expression, which AutoGraph cannot read
    if hit is not None:
        return hit
    if type(x) in _NEVER_ARRAYS:
        return None
    # Called from C: AutoGraph may be reading this, and would go on to what is imported and loaded.
    for backend in operator.call(backends_in_use):
        # isinstance on the value: a JAX tracer's class is no subclass of jax.Array.
        if backend.owns(x):
            _by_type[type(x)] = backend
            return backend
    return None


@dataclass(frozen=True)
class BackendInfo:
    """One row of `available_backends`.

    >>> info = next(info for info in available_backends() if info.name == "torch")
    >>> "cpu" in info.devices, info.install
    (True, 'pip install torch')
    """

    name: str
    """The name to select the backend by."""
    version: str | None
    """The version of the framework; None if it is not installed."""
    devices: tuple[str, ...]
    """The names that `device=` accepts; empty if the backend cannot be loaded, with a warning."""
    install: str
    """The command that installs the framework."""


def available_backends() -> tuple[BackendInfo, ...]:
    """Every known backend with version and devices. Imports the installed frameworks.

    Returns:
        One row for each backend, sorted by name.

    >>> [info.name for info in available_backends() if info.version is None]
    []
    """
    return tuple(_info(name, source) for name, source in sorted(known_backends().items()))


def _info(name: str, source: _Source) -> BackendInfo:
    if importlib.util.find_spec(name) is None:
        return BackendInfo(name, None, (), source.install)
    backend = _unless_broken(name)
    return BackendInfo(name, version_of(name), backend.devices() if backend else (), source.install)


def version_of(name: str) -> str:
    """The version of a package, "unknown" if it does not say."""
    import importlib.metadata

    if (version := getattr(sys.modules.get(name), "__version__", None)) is not None:
        return str(version)
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
