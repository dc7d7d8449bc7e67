"""Every example runs on every backend in its quick form, and prints what it found."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import metaframe

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture
def digits(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    spec = importlib.util.spec_from_file_location("digits", EXAMPLES / "digits.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("few_shot", None)
    metaframe.unset_backend()


def test_digits(
    digits: ModuleType, backend_name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = digits.main(["--backend", backend_name, "--quick", "--out", str(tmp_path)])
    # Labels are permuted in every task, so that nothing can be known before adaptation.
    assert abs(result.before.mean - 20) < 1
    assert result.after.mean - result.after.ci95 > 35
    assert str(result.after) in capsys.readouterr().out
    assert json.loads((tmp_path / "result.json").read_text())["after"]["n"] == result.after.n
    assert (tmp_path / "result.png").stat().st_size > 10_000
