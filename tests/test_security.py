"""SECURITY.md names tests that exist, and the figures of the code."""

from __future__ import annotations

import re
from pathlib import Path

from metaframe.cli import run_config
from metaframe.files import read, schema
from metaframe.tasks import _archives, _pictures

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "SECURITY.md").read_text(encoding="utf-8")


def test_every_promise_has_a_test_that_exists() -> None:
    rows = [line for line in TEXT.splitlines() if line.startswith("| ") and "---" not in line]
    promises = [row for row in rows if not row.startswith("| promise")]
    assert len(promises) > 15
    for row in promises:
        tests = re.findall(r"`(tests/\w+\.py)::(\w+)`", row)
        assert tests, row
        for file, name in tests:
            assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), (file, name)


def test_the_figures_are_those_of_the_code() -> None:
    fuzz = (ROOT / "tests/test_files_fuzz.py").read_text(encoding="utf-8")
    by_default, many = map(int, re.search(r"BY_DEFAULT, SLOW = (\d+), (\d+)", fuzz).groups())  # type: ignore[union-attr]
    for figure in (
        f"{16 * many + many // 10:,} inputs of 17 kinds, from a seed; {16 * by_default + 5} of",
        f"a depth of {read.DEPTH}",
        f"2^{schema.LARGEST.bit_length()} - 1",
        f"up to {run_config._MOST // 2**20} MiB",
        f"a ratio of {_archives.MOST_RATIO} from {_archives.FREE // 2**20} MiB on",
        f"{_archives.MOST_MEMBERS:,} members",
        f"{_pictures._MOST_PIXELS:,} pixels, of WebP half",
    ):
        assert figure in TEXT, figure
