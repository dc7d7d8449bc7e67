"""The pytest plugin, in runs of pytest of their own."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from frameworks import BACKENDS, require
from metaframe.testing import plugin
from nested_pytest import PLUGIN, ROOT, outcomes, run_pytest

SAMPLE = ROOT / "tests" / "sample_project"

WITHOUT_TENSORFLOW = "import sys; sys.modules['tensorflow'] = None\n"
MATRIX = """
import pytest

def test_matrix(backend_name):
    pass

@pytest.mark.backend_gap("jax", reason="not there yet")
def test_gap(backend_name):
    assert backend_name != "jax"
"""


SELECTING = """
import metaframe
from metaframe.backend.selection import current_selection

def test_first(backend_name):
    metaframe.set_backend(backend_name)

def test_second(backend_name):
    assert current_selection() is None

def test_third(backend):
    metaframe.set_backend("torch" if backend.name == "jax" else "jax")

def test_last():
    assert current_selection() is None
"""
SUITES = """
from metaframe.testing.conformance import ConformanceSuite

class TestMistyped(ConformanceSuite):
    backend = "jxa"
    patterns = ("dtype/float32*",)

class TestNone(ConformanceSuite):
    patterns = ("dtype/float32*",)
"""


def test_the_entry_point_is_the_module() -> None:
    """One name for both, or pytest would refuse to load the plugin twice."""
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["pytest11"] == {PLUGIN: PLUGIN}


@pytest.mark.slow
def test_a_sample_project() -> None:
    """Another project's tests, over the backend matrix."""
    for name in BACKENDS:
        require(name)
    code, output = run_pytest(SAMPLE, "--metaframe-backends", ",".join(BACKENDS))
    assert code == 0, output
    expected = {
        f"{test}[{name}]": "PASSED"
        for name in BACKENDS
        for test in ("test_meta_gradient", "test_own_step")
    }
    assert outcomes(output) == {
        **expected,
        "test_backends_agree": "PASSED",
        "test_samplers": "PASSED",
        "test_a_known_gap[torch]": "PASSED",
        **{f"test_a_known_gap[{name}]": "XFAIL" for name in ("jax", "tensorflow")},
    }
    assert "arrays cannot be changed" in output


@pytest.fixture
def matrix(tmp_path: Path) -> Path:
    (tmp_path / "conftest.py").write_text(WITHOUT_TENSORFLOW)
    (tmp_path / "test_it.py").write_text(MATRIX)
    return tmp_path


def test_a_missing_framework_is_skipped(matrix: Path) -> None:
    code, output = run_pytest(matrix)
    assert code == 0, output
    found = outcomes(output)
    assert found["test_matrix[jax]"] == found["test_matrix[torch]"] == "PASSED"
    assert found["test_gap[jax]"] == "XFAIL"
    assert "test_matrix[tensorflow]" not in found
    assert "tensorflow is not installed. Run: pip install tensorflow" in output


def test_a_required_framework_fails(matrix: Path) -> None:
    code, output = run_pytest(matrix, METAFRAME_REQUIRED_BACKENDS="jax,tensorflow")
    assert code == 1
    assert outcomes(output)["test_matrix[tensorflow]"] == "ERROR"
    assert "METAFRAME_REQUIRED_BACKENDS names it" in output


def test_a_framework_asked_for_by_name_fails(matrix: Path) -> None:
    code, output = run_pytest(matrix, "--metaframe-backends=tensorflow, jax", "-k", "matrix")
    assert code == 1
    assert outcomes(output) == {
        "test_matrix[tensorflow]": "ERROR",
        "test_matrix[jax]": "PASSED",
    }
    assert "--metaframe-backends names it" in output


def test_an_unknown_name(matrix: Path) -> None:
    for args, environment in (
        (["--metaframe-backends=jxa"], {}),
        ([], {"METAFRAME_REQUIRED_BACKENDS": "torch,jxa"}),
    ):
        code, output = run_pytest(matrix, *args, **environment)
        assert code == pytest.ExitCode.USAGE_ERROR
        assert "no backend called 'jxa'. Did you mean 'jax'?" in output


@pytest.mark.parametrize(
    ("gap", "message"),
    [
        (pytest.mark.backend_gap("jax"), "says why"),
        (pytest.mark.backend_gap(reason="x"), "names its backends"),
        (pytest.mark.backend_gap("jax", reason="x", strict=False), "says why"),
    ],
)
def test_a_gap_without_a_reason(
    request: pytest.FixtureRequest, gap: pytest.MarkDecorator, message: str
) -> None:
    request.node.add_marker(gap)
    with pytest.raises(pytest.UsageError, match=message):
        plugin.pytest_collection_modifyitems([request.node])


def test_a_gap_of_a_backend_that_is_not_there(tmp_path: Path) -> None:
    source = 'import pytest\n@pytest.mark.backend_gap("jxa", reason="x")\n'
    (tmp_path / "test_it.py").write_text(source + "def test_it(backend_name):\n    pass\n")
    code, output = run_pytest(tmp_path, "--metaframe-backends=jax")
    assert code == 0, output
    assert "test_it[jax]: backend_gap names no backend that is known here: 'jxa'" in output


def test_selections_end_with_their_test(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(SELECTING)
    code, output = run_pytest(tmp_path, "--metaframe-backends=torch,jax")
    assert code == 0, output


def test_a_conformance_suite_of_no_backend(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(SUITES)
    code, output = run_pytest(tmp_path)
    assert code == 1
    assert set(outcomes(output).values()) == {"FAILED"}
    assert "no backend called 'jxa'. Did you mean 'jax'?" in output
    assert 'TestNone names no backend: write backend = "..."' in output


def test_a_gap_that_has_closed(tmp_path: Path) -> None:
    source = 'import pytest\n@pytest.mark.backend_gap("jax", reason="x")\n'
    (tmp_path / "test_it.py").write_text(source + "def test_it(backend_name):\n    pass\n")
    code, output = run_pytest(tmp_path, "--metaframe-backends=jax,torch")
    assert code == 1
    assert outcomes(output) == {"test_it[jax]": "FAILED", "test_it[torch]": "PASSED"}
    assert "XPASS(strict)" in output


def test_a_project_may_have_a_backend_fixture_of_its_own(tmp_path: Path) -> None:
    source = "import pytest\n@pytest.fixture\ndef backend():\n    return 'mine'\n"
    (tmp_path / "test_it.py").write_text(
        source + "def test_it(backend):\n    assert backend == 'mine'\n"
    )
    code, output = run_pytest(tmp_path)
    assert code == 0, output
    assert outcomes(output) == {"test_it": "PASSED"}


def test_starting_pytest_imports_no_framework(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("def test_it(backend):\n    pass\n")
    (tmp_path / "conftest.py").write_text(
        "import sys\n"
        "def pytest_collection_finish(session):\n"
        "    print('loaded:', sorted({'torch', 'jax', 'tensorflow'} & set(sys.modules)))\n"
    )
    code, output = run_pytest(tmp_path, "--collect-only", "-q")
    assert code == 0, output
    assert "loaded: []" in output
    assert [line for line in output.splitlines() if "::" in line] == [
        f"test_it.py::test_it[{name}]" for name in sorted(BACKENDS)
    ]
