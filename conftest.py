"""Settings made before any framework is imported, for tests and doctests alike."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Two workers share a machine's cores, and a sum over one thread is the same sum every time.
for variable in (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "TF_NUM_INTRAOP_THREADS",
    "TF_NUM_INTEROP_THREADS",
):
    os.environ.setdefault(variable, "1")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")

# On the CPU unless devices are named: results are compared to 1e-12, which a GPU cannot give.
if "CUDA_VISIBLE_DEVICES" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

os.environ.setdefault("JAX_ENABLE_X64", "1")
# Most of JAX's time here goes into compiling single operations, the same ones in every worker.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent / ".pytest_cache/jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out the doctests of a backend whose framework is not installed."""
    _, prefix, framework = collection_path.name.partition("metaframe_")
    if collection_path.parent.name == "backends" and prefix:
        return True if importlib.util.find_spec(framework) is None else None
    return None


@pytest.fixture(autouse=True)
def _what_the_examples_assume(
    request: pytest.FixtureRequest, doctest_namespace: dict[str, Any]
) -> Iterator[None]:
    """The examples of ops and nn have these names and a selected backend, whichever it is.

    tests/test_ops.py and tests/test_nn.py run them on every backend.
    """
    if not request.node.name.startswith(("metaframe.ops.", "metaframe.nn.")):
        yield
        return
    from metaframe import nn, ops, use_backend

    doctest_namespace.update(nn=nn, ops=ops)
    name = next(n for n in ("jax", "torch", "tensorflow") if importlib.util.find_spec(n))
    with use_backend(name):
        yield
