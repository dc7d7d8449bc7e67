"""Which frameworks the tests run on."""

import functools

import pytest

from metaframe.testing.conformance import CLAUSES
from metaframe.testing.plugin import require as require
from metaframe.testing.plugin import required_backends

BACKENDS = ("torch", "jax", "tensorflow")
REQUIRED = required_backends()

slow = functools.partial(pytest.param, marks=pytest.mark.slow)

compiles_on_torch = pytest.mark.parametrize(
    "backend_name", ["jax", "tensorflow", slow("torch")], indirect=True
)
"""All backends, by default those that compile quickly."""

hardly_depends_on_the_backend = pytest.mark.parametrize(
    "backend_name", ["torch", slow("jax"), slow("tensorflow")], indirect=True
)
"""All backends, by default the one that compiles nothing: for neutral code that takes a while."""


def checked_functions(chapter: str) -> set[str]:
    """The functions of "ops" or "nn" that the conformance suite has clauses about."""
    ids = [clause.id.split("/") for clause in CLAUSES if clause.id.startswith(f"{chapter}/")]
    return {name.partition("-")[0] for _, name, *_ in ids} - {"compiled"}
