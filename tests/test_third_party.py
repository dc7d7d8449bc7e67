"""A backend in a package of its own, known to metaframe by its entry point only."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from documents import blocks
from frameworks import slow
from nested_pytest import ROOT, run_pytest

PACKAGE = ROOT / "examples/third_party/metaframe_mlx"
PROJECT = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="MLX is not made for Windows")


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """The package as if installed: on the path, with the metadata of its project file."""
    info = tmp_path / f"metaframe_mlx-{PROJECT['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {PROJECT['name']}\nVersion: {PROJECT['version']}\n"
    )
    ((group, entries),) = PROJECT["entry-points"].items()
    lines = [f"{name} = {target}" for name, target in entries.items()]
    (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines, ""]))
    parts = (tmp_path, PACKAGE, ROOT, ROOT / "backends")
    return {"PYTHONPATH": os.pathsep.join(map(str, parts)), "METAFRAME_REQUIRED_BACKENDS": "mlx"}


@pytest.mark.parametrize("chosen", ["not slow", slow("slow")])
def test_the_backend_on_mlx_keeps_the_contract(environment: dict[str, str], chosen: str) -> None:
    exit_code, output = run_pytest(PACKAGE, "-m", chosen, **environment)
    assert exit_code == 0, output[-5000:]
    assert " skipped" not in output.splitlines()[-1]


def test_its_readme(environment: dict[str, str]) -> None:
    (code,) = blocks("examples/third_party/metaframe_mlx/README.md")
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"{code}\nprint(float(loss), grads['w'].shape)"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    loss, shape = run.stdout.split(maxsplit=1)
    assert 0 < float(loss) < 1
    assert shape.strip() == "()"


def test_its_readme_lists_its_gaps(environment: dict[str, str]) -> None:
    text = (PACKAGE / "README.md").read_text()
    table = set(re.findall(r"`((?:ops|nn|inner_loop)/[^`]*)`", text))
    code = "from metaframe_mlx import MLXBackend as B; print(*B.conformance_gaps)"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    assert {name.rpartition("/")[0] for name in run.stdout.split()} == table
