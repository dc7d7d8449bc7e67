"""Which frameworks the tests run on."""

from metaframe.testing.plugin import require as require
from metaframe.testing.plugin import required_backends

BACKENDS = ("torch", "jax", "tensorflow")
REQUIRED = required_backends()
