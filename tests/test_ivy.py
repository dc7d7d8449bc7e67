"""Code written for ivy runs on metaframe's steps: tests/with_ivy, in processes of their own."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from frameworks import BACKENDS, require
from nested_pytest import ROOT, outcomes, run_pytest

WITH_IVY = ROOT / "tests" / "with_ivy"

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ivy") is None, reason="ivy is not installed"
)


def outcomes_of(directory: Path, backends: str, file: str) -> dict[str, str]:
    """The outcomes of the tests of a file on these backends, after checking that all passed."""
    code, output = run_pytest(
        directory,
        str(WITH_IVY / file),
        f"--metaframe-backends={backends}",
        JAX_ENABLE_X64="1",
        TF_CPP_MIN_LOG_LEVEL="3",
    )
    assert code == 0, output
    found = outcomes(output)
    assert set(found.values()) == {"PASSED"}, output
    return found


def test_documented_examples(tmp_path: Path) -> None:
    """On all backends in one process: importing ivy takes longer than the examples."""
    for name in BACKENDS:
        require(name)
    found = outcomes_of(tmp_path, ",".join(BACKENDS), "test_documented.py")
    assert set(found) == {
        f"test_documented_example[{name}-{example}]"
        for name in BACKENDS
        for example in ("maml", "reptile")
    }
    assert list(tmp_path.iterdir()) == []  # ivy would leave a log and a cache here


@pytest.mark.slow
@pytest.mark.parametrize("file", ["test_steps.py", "test_porting_page.py"])
def test_with_ivy(backend_name: str, file: str, tmp_path: Path) -> None:
    assert outcomes_of(tmp_path, backend_name, file)
