"""Which frameworks the tests run on, and what a missing one means."""

from __future__ import annotations

import importlib.util
import os

import pytest

BACKENDS = ("torch", "jax", "tensorflow")
REQUIRED = frozenset(filter(None, os.environ.get("METAFRAME_REQUIRED_BACKENDS", "").split(",")))

hardly_depends_on_the_backend = pytest.mark.parametrize(
    "backend_name",
    ["torch", *(pytest.param(name, marks=pytest.mark.slow) for name in ("jax", "tensorflow"))],
    indirect=True,
)
"""All backends, by default the one that compiles nothing: for neutral code that takes a while."""


def require(name: str) -> None:
    """Skip where the framework is missing; fail where it was promised."""
    if importlib.util.find_spec(name) is not None:
        return
    if name in REQUIRED:
        pytest.fail(f"{name} is not installed, and METAFRAME_REQUIRED_BACKENDS names it")
    pytest.skip(f"{name} is not installed")
