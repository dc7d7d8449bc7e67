"""Which frameworks the tests run on."""

import pytest

from metaframe.testing.plugin import require as require
from metaframe.testing.plugin import required_backends

BACKENDS = ("torch", "jax", "tensorflow")
REQUIRED = required_backends()

hardly_depends_on_the_backend = pytest.mark.parametrize(
    "backend_name",
    ["torch", *(pytest.param(name, marks=pytest.mark.slow) for name in ("jax", "tensorflow"))],
    indirect=True,
)
"""All backends, by default the one that compiles nothing: for neutral code that takes a while."""
