"""The pytest plugin: a user's test on every backend.

pytest loads it in every environment that has metaframe (entry point group `pytest11`). It imports
no framework: a test does, when it is set up. The entry point is named after the module, so that
`-p metaframe.testing.plugin` and the entry point are one plugin to pytest and not two.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence

import pytest

from metaframe.backend.contract import Backend
from metaframe.backend.registry import known_backends
from metaframe.backend.selection import nothing_selected, use_backend
from metaframe.errors import nearest

REQUIRED = "METAFRAME_REQUIRED_BACKENDS"
"""The environment variable that names the backends which must be there, separated by commas."""

_OPTION = "--metaframe-backends"
_GAP = (
    "backend_gap(*backends, reason, raises=None): on these backends the test is known to fail, and "
    "it is an error once it passes there"
)


def required_backends() -> frozenset[str]:
    """The backends that METAFRAME_REQUIRED_BACKENDS names."""
    return frozenset(_names(os.environ.get(REQUIRED, "")))


def require(name: str, *, promised: bool = False) -> None:
    """Skip a test where the framework is missing; fail where it was promised, or is no backend.

    Args:
        name: the backend.
        promised: fail in any case. Otherwise only if METAFRAME_REQUIRED_BACKENDS names it.
    """
    if name not in known_backends():
        pytest.fail(f"no backend called {name!r}. {nearest(name, known_backends())}")
    if importlib.util.find_spec(name) is not None:
        return
    how = f" Run: {known_backends()[name].install}"
    if name in required_backends():
        pytest.fail(f"{name} is not installed, and {REQUIRED} names it.{how}")
    if promised:
        pytest.fail(f"{name} is not installed, and {_OPTION} names it.{how}")
    pytest.skip(f"{name} is not installed.{how}")


def pytest_addoption(parser: pytest.Parser) -> None:
    """The command line option."""
    parser.getgroup("metaframe").addoption(
        _OPTION,
        metavar="NAMES",
        help="backends for the `backend` fixture, such as jax,torch; default: all known. One that "
        "is missing is skipped, unless it is named here or in the environment variable "
        f"{REQUIRED}.",
    )


def pytest_configure(config: pytest.Config) -> None:
    """The marker, and the fixtures with a parameter for every backend that was asked for."""
    config.addinivalue_line("markers", _GAP)
    chosen = config.getoption(_OPTION)
    names = _names(chosen or "") or sorted(known_backends())
    _check_known(names, _OPTION)
    _check_known(sorted(required_backends()), REQUIRED)
    config.pluginmanager.register(_fixtures(names, promised=bool(chosen)), "metaframe-fixtures")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _check_known(names: Iterable[str], where: str) -> None:
    for name in names:
        if name not in known_backends():
            raise pytest.UsageError(
                f"{where}: no backend called {name!r}. {nearest(name, known_backends())}"
            )


def _fixtures(names: Sequence[str], *, promised: bool) -> object:
    # Ordinary fixtures with parameters, which a project may override as any other; only their
    # parameters are not known before the command line is.
    class Fixtures:
        @pytest.fixture(params=names)
        def backend_name(self, request: pytest.FixtureRequest) -> Iterator[str]:
            """The name of each backend in turn, with nothing selected.

            What the test selects ends with it.
            """
            name: str = request.param
            require(name, promised=promised)
            with nothing_selected():
                yield name

        @pytest.fixture
        def backend(self, backend_name: str) -> Iterator[Backend]:
            """Each backend in turn, selected for the test: it makes arrays of neutral inputs."""
            with use_backend(backend_name) as selected:
                yield selected

    return Fixtures()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Turn the gaps of a test into strict expected failures on the backends they name."""
    for item in items:
        callspec = getattr(item, "callspec", None)
        name = callspec.params.get("backend_name") if callspec else None
        for mark in item.iter_markers("backend_gap"):
            _check_gap(item, mark)
            if name in mark.args:
                item.add_marker(pytest.mark.xfail(strict=True, **mark.kwargs))


def _check_gap(item: pytest.Item, mark: pytest.Mark) -> None:
    if not mark.args or not mark.kwargs.get("reason") or mark.kwargs.keys() - {"reason", "raises"}:
        raise pytest.UsageError(
            f"{item.nodeid}: a gap names its backends and says why, received {mark.args} and "
            f'{mark.kwargs}. Write @pytest.mark.backend_gap("tensorflow", reason="...").'
        )
    for name in mark.args:
        if name not in known_backends():
            # A backend of a package that is not installed, or a mistake: then its test fails.
            warnings.warn(
                f"{item.nodeid}: backend_gap names no backend that is known here: {name!r}. "
                f"{nearest(name, known_backends())}",
                pytest.PytestWarning,
                stacklevel=2,
            )
