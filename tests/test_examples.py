"""Every example runs on every backend in its quick form, and prints what it found."""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

import metaframe
from frameworks import BACKENDS, require

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


Load = Callable[[str], ModuleType]


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """`example("digits")`: the module of an example, loaded as Python runs a script."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield load
    sys.modules.pop("few_shot", None)
    metaframe.unset_backend()


def test_digits(
    example: Load, backend_name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = example("digits").main(["--backend", backend_name, "--quick", "--out", str(tmp_path)])
    # Labels are permuted in every task, so that nothing can be known before adaptation.
    assert abs(result.before.mean - 20) < 1
    assert result.after.mean - result.after.ci95 > 35
    assert str(result.after) in capsys.readouterr().out
    assert json.loads((tmp_path / "result.json").read_text())["after"]["n"] == result.after.n
    assert (tmp_path / "result.png").stat().st_size > 10_000


@pytest.mark.slow
def test_digits_end_alike_on_every_backend(example: Load, tmp_path: Path) -> None:
    """The same tasks, the same start: accuracies within each other's confidence intervals."""
    for name in BACKENDS:
        require(name)
    digits = example("digits")
    found = [
        digits.main(["--backend", name, "--quick", "--out", str(tmp_path / name)]).after
        for name in BACKENDS
    ]
    for one, other in itertools.combinations(found, 2):
        assert abs(one.mean - other.mean) < one.ci95 + other.ci95


@pytest.mark.slow
def test_omniglot(example: Load, backend_name: str, omniglot_dir: Path, tmp_path: Path) -> None:
    options = ["--quick", "--channels", "8", "--out", str(tmp_path)]
    result = example("omniglot").main(
        ["--data", str(omniglot_dir), "--backend", backend_name, *options]
    )
    assert abs(result.before.mean - 20) < 2
    assert result.after.mean - result.after.ci95 > 22
