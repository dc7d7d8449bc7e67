"""The reference libraries' own tests pass against metaframe. They come from the package index."""

from __future__ import annotations

import importlib.util

import pytest

import reference_suites
from frameworks import require

EVERY = 11
"""One in so many of ivy's 1800 cases; prime to the numbers of values of the arguments, so that each
value meets each of the others. `python tests/reference_suites.py` runs them all."""


@pytest.mark.slow
def test_iteryne() -> None:
    require("torch")
    found = reference_suites.iteryne()
    assert (found.passed, found.failed) == (42, 0), found.report


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a minute or two each where nothing else runs; ivy is slow
@pytest.mark.skipif(importlib.util.find_spec("ivy") is None, reason="ivy is not installed")
def test_ivy(backend_name: str) -> None:
    found = reference_suites.ivy(backend_name, EVERY)
    assert (found.passed, found.failed) == (-(-1800 // EVERY), 0), found.report
