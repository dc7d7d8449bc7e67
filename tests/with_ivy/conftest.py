"""Tests that import ivy; tests/test_ivy.py runs them in a process and a directory of their own.

ivy changes TensorFlow's type promotion for the whole process when its backend is loaded, and
writes files where it is imported.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import ModuleType

import pytest

from metaframe.interop import import_ivy


@pytest.fixture
def ivy(backend_name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The library with each backend set in turn, and nothing selected in metaframe."""
    _let_ivy_print(backend_name, monkeypatch)
    ivy = import_ivy()
    ivy.set_backend(backend_name)
    yield ivy
    ivy.unset_backend()


def _let_ivy_print(backend_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Printing an array of ivy 1.0.0.5 needs JAX < 0.10 or NumPy < 2.4; nothing of ours does."""
    if backend_name == "jax":
        public, private = (
            importlib.import_module(f"jax.{name}")
            for name in ("interpreters.batching", "_src.interpreters.batching")
        )
        # It asks whether an array is one of these, by a name that JAX no longer exports.
        monkeypatch.setattr(public, "BatchTracer", private.BatchTracer, raising=False)
    elif backend_name == "tensorflow":
        import tensorflow

        # It takes the int of a one-element vector, which NumPy made an error.
        eager = type(tensorflow.constant(0))
        monkeypatch.setattr(eager, "__int__", lambda x: int(x.numpy().item()))
