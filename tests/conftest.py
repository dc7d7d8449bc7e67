"""Fixtures: one test body runs on every backend, eagerly and compiled."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from frameworks import BACKENDS, require
from metaframe.backend import Backend, unset_backend, use_backend
from metaframe.testing.conformance.clause import Bench

ROOT = Path(__file__).resolve().parent.parent
collect_ignore = ["sample_project", "with_ivy"]  # run in a pytest of their own

_hypothesis_settings: dict[str, Any] = {
    "deadline": None,  # the first example of a test compiles
    "derandomize": "CI" in os.environ,
    "suppress_health_check": [
        hypothesis.HealthCheck.too_slow,
        # `backend` selects a backend and keeps nothing from one example to the next.
        hypothesis.HealthCheck.function_scoped_fixture,
    ],
}
hypothesis.settings.register_profile("default", max_examples=100, **_hypothesis_settings)
hypothesis.settings.register_profile("nightly", max_examples=2000, **_hypothesis_settings)
hypothesis.settings.load_profile("default")  # --hypothesis-profile chooses another

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell has its background jobs ignore Ctrl-C, and so would the processes that tests start.
    signal.signal(signal.SIGINT, signal.default_int_handler)


SLOW = frozenset((Path(__file__).with_name("slow.txt")).read_text().splitlines())


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what tests/slow.txt lists, before cases are chosen by their marks."""
    for item in items:
        if item.nodeid in SLOW:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(params=BACKENDS)
def backend_name(request: pytest.FixtureRequest) -> str:
    """The name of each backend in turn, its framework installed and nothing selected."""
    name: str = request.param
    require(name)
    return name


@pytest.fixture
def backend(backend_name: str) -> Iterator[Backend]:
    """Each backend in turn, selected for the test, with float64 for neutral inputs."""
    with use_backend(backend_name, dtype="float64") as selected:
        yield selected


@pytest.fixture
def arr(backend: Backend) -> Callable[..., Any]:
    """`arr(tree)`: its NumPy leaves, numbers and lists of numbers as arrays of the backend.

    Floating leaves become float64 unless `dtype` says otherwise; integers keep their dtype. A
    list is one array, as in `numpy.asarray`.
    """
    return Bench(backend).arr


@pytest.fixture
def to_np(backend: Backend) -> Callable[[Any], Any]:
    """`to_np(tree)`: the leaves that belong to the backend as NumPy arrays, others unchanged."""
    return Bench(backend).to_np


@pytest.fixture(params=("eager", "compiled"))
def execution(request: pytest.FixtureRequest) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`execution(fn)`: `fn` as it is, then `fn` compiled as a whole."""
    if request.param == "eager":
        return lambda fn: fn
    from metaframe import compile as compile_whole

    return compile_whole


@pytest.fixture(autouse=True)
def _nothing_selected() -> Iterator[None]:
    yield
    unset_backend()


@pytest.fixture(scope="session")
def omniglot_dir() -> Path:
    """The directory with Omniglot's zip files."""
    found = Path(os.environ.get("METAFRAME_OMNIGLOT", ROOT.parent / "shared/data/omniglot"))
    if not found.is_dir():
        pytest.skip(f"no Omniglot in {found}; METAFRAME_OMNIGLOT names the directory")
    return found
