"""Code written for ivy runs on metaframe's steps: tests/with_ivy, in processes of their own."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from nested_pytest import ROOT, outcomes, run_pytest

WITH_IVY = ROOT / "tests" / "with_ivy"

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ivy") is None, reason="ivy is not installed"
)


def passed(directory: Path, backend_name: str, file: str) -> set[str]:
    """The tests of a file that passed on a backend, after checking that all did."""
    code, output = run_pytest(
        directory,
        str(WITH_IVY / file),
        f"--metaframe-backends={backend_name}",
        JAX_ENABLE_X64="1",
        TF_CPP_MIN_LOG_LEVEL="3",
    )
    assert code == 0, output
    found = outcomes(output)
    assert set(found.values()) == {"PASSED"}, output
    return set(found)


def test_documented_examples(backend_name: str, tmp_path: Path) -> None:
    found = passed(tmp_path, backend_name, "test_documented.py")
    assert len(found) == 2
    assert list(tmp_path.iterdir()) == []  # ivy would leave a log and a cache here
