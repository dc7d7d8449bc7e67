"""Runs of pytest of their own, with our plugin."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = "metaframe.testing.plugin"
SHORT = ("-rA", "--show-capture=no", "--tb=short")


def run_pytest(directory: Path, *args: str, **environment: str) -> tuple[int, str]:
    """Exit code and output of pytest with the plugin, whether or not it is installed."""
    source = os.pathsep.join(map(str, (ROOT, ROOT / "backends", ROOT / "tests" / "support")))
    cleared = {k: v for k, v in os.environ.items() if k != "METAFRAME_REQUIRED_BACKENDS"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", PLUGIN, "-p", "no:cacheprovider", *SHORT, *args],
        cwd=directory,
        env={**cleared, "PYTHONPATH": source, "COLUMNS": "200", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def outcomes(output: str) -> dict[str, str]:
    """Outcome by name and id of a test."""
    found = re.findall(r"^(PASSED|FAILED|ERROR|XFAIL|XPASS) \S+::(\S+)", output, re.MULTILINE)
    return {test: outcome for outcome, test in found}
