"""Tests that import ivy; tests/test_ivy.py runs them in a process and a directory of their own.

ivy changes TensorFlow's type promotion for the whole process when its backend is loaded, and
writes files where it is imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import ModuleType

import pytest

from metaframe.interop import import_ivy
from old_ivy import let_ivy_read_arrays


@pytest.fixture
def ivy(backend_name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The library with each backend set in turn, and nothing selected in metaframe."""
    let_ivy_read_arrays(backend_name, partial(monkeypatch.setattr, raising=False))
    ivy = import_ivy()
    ivy.set_backend(backend_name)
    yield ivy
    ivy.unset_backend()
