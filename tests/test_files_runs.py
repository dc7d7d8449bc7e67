"""The files of a run folder: settings, metrics, results and classes, right, odd and damaged."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from metaframe.cli import main, plots
from metaframe.cli.classes import CLASSES, check_classes, record_classes
from metaframe.cli.errors import UsageError
from metaframe.cli.experiment import resolve
from metaframe.cli.presets import PRESETS, judge
from metaframe.cli.run_config import RunConfig, read_toml
from metaframe.cli.run_folder import check_free, opened, read_result
from metaframe.errors import InputError
from metaframe.training.metrics import MetricsLog, read_metrics
from mutations import nested

CONTROLS = [*(chr(i) for i in range(1, 32)), "\x7f", "\x85", "\u2028", "\ufeff", "\U0001f600"]


@pytest.mark.parametrize("character", [*CONTROLS, '"', "'", "\\", "#", " = [", "\r\n"], ids=ascii)
def test_any_text_survives_the_settings_of_a_run(character: str, tmp_path: Path) -> None:
    """A path with a tab, a line break or an escape character trains, and can be resumed."""
    text = f"a{character}b{character}"
    config = resolve(
        {"backend": "torch", "dataset": "folder", "data": f"/{text}", "held_out": [text, "z"]}
    )
    (tmp_path / "config.toml").write_bytes(config.to_toml().encode())
    assert opened(tmp_path, {}) == config


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("data", "a\0b", "holds a NUL character"),
        ("data", "a\udcffb", "is no Unicode text"),
        ("held_out", ["a\udcff"], "is no Unicode text"),
        ("seed", 2**63, "must be below 2"),
        ("iterations", 10**5000, "must be below 2"),
        ("inner_lr", math.inf, "must be finite"),
        ("timeout", math.inf, "must be finite"),
        ("ways", nested(5000), "must be a whole number, received"),
        ("mode", nested(5000), "mode must be one of"),
        ("mode", {"x": 1}, "mode must be one of"),
        ("parts", nested(5000), "must be a list of texts"),
    ],
    ids=lambda x: None if isinstance(x, str) and len(x) > 9 else "-",
)
def test_settings_that_cannot_be_kept_are_refused_at_the_start(
    name: str, value: Any, says: str
) -> None:
    with pytest.raises(UsageError, match=f"{name} .*{says}|^{says}") as caught:
        RunConfig(**{name: value})
    str(caught.value).encode()
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "text",
    [
        b"iterations = " + b"[" * 100_000,
        b"iterations = 0x" + b"f" * 100_000,
        b"iterations = " + b"9" * 100_000,
        b"iterations" + b".a" * 50_000 + b" = 1",
        b"iterations = 1979-05-27",
        b"iterations = {}",
        b"\xff\xfe",
        b"iterations = 5\niterations = 5",
        b"# " + b"x" * 2**20,
    ],
    ids=lambda text: text[:18].decode(errors="replace"),
)
def test_damaged_settings_are_one_message(
    text: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.toml").write_bytes(text)
    for command in ("resume", "evaluate", "plot"):
        assert main([command, str(tmp_path)]) == 2
        assert "Traceback" not in (said := capsys.readouterr().err)
        assert len(said) < 2000


def test_a_home_that_nobody_has_is_a_folder_that_is_not_there() -> None:
    data = "~nobody-here/x"
    found = resolve({"backend": "torch", "dataset": "folder", "data": data}).data
    assert found == os.path.abspath(data)


def test_a_run_folder_has_a_name_that_can_be_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match="is no Unicode text"):
        check_free(tmp_path / "a\udcff", overwrite=True)
    assert list(tmp_path.iterdir()) == []


POINT = {"mean": 0.5, "ci95": 0.1}
RESULT: dict[str, Any] = {
    "metric": "accuracy",
    "evaluation": {"tasks": 5, "curve": [POINT] * 2, "transductive": POINT, "inductive": POINT},
}


def result(**changes: Any) -> dict[str, Any]:
    return {**RESULT, "evaluation": {**RESULT["evaluation"], **changes}}


@pytest.mark.parametrize(
    "content",
    [
        *(None, [], 3, {}, {"metric": "mse"}, {**RESULT, "metric": 3}, nested(900)),
        *({**RESULT, "evaluation": x} for x in (None, [], 3, {})),
        *(result(curve=x) for x in (None, [], {}, [None], [{}], [[]], [{"mean": 1.0}])),
        *(result(curve=[{**POINT, "mean": x}]) for x in ("1", True, [], 10**400)),
        *(result(curve=[{**POINT, "ci95": x}]) for x in ("1", -1, -0.5)),
        *(result(inductive=x) for x in (3, [], {"mean": 0.5})),
        *(result(tasks=x) for x in (None, -1, 0.5, "5")),
    ],
    ids=lambda content: str(content)[:40],
)
def test_a_damaged_result_is_named(content: Any, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"result\.json is damaged: .*writes it again"):
        read_result(tmp_path)


@pytest.mark.parametrize(
    "text", [b"\xff", b'{"metric": 1, "metric": 1}', b"[" * 10**5, b"9" * 5000]
)
def test_a_result_that_is_no_json_is_named(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_bytes(text)
    with pytest.raises(InputError, match=r"result\.json is damaged"):
        read_result(tmp_path)


def test_a_result_that_lacks_what_a_preset_looks_at(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for changes, name in (
        ({"curve": [POINT]}, "sinusoid-maml"),
        ({"inductive": None}, "omniglot-oneshot-runs"),
    ):
        (tmp_path / "result.json").write_text(json.dumps(result(**changes)))
        with pytest.raises(InputError, match="without the figure"):
            judge(PRESETS[name], tmp_path)
        assert plots.adaptation(read_result(tmp_path)) is not None


@pytest.mark.parametrize(
    "text", ["[]", "3", '{"train": 3}', '{"train": {}}', '{"train": [1]}', "[" * 10**5, '{"train'],
    ids=lambda text: text[:20],
)  # fmt: skip
def test_damaged_classes_are_named(text: str, tmp_path: Path) -> None:
    (tmp_path / CLASSES).write_text(text)
    with pytest.raises(InputError, match=r"classes\.json is damaged"):
        check_classes(RunConfig(), tmp_path)


def test_metrics_after_a_time_that_is_not_known(tmp_path: Path) -> None:
    lines = ('{"step": 1, "seconds": 2.5}', '{"step": 2, "seconds": null}', '{"step": 3}')
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))

    class Run:
        class trainer:
            step = 3

    log = MetricsLog(tmp_path)
    log.on_start(Run)  # type: ignore[arg-type]
    log._record({"step": 4})
    log.on_end(Run)  # type: ignore[arg-type]
    assert read_metrics(tmp_path)[-1]["seconds"] >= 2.5


def test_a_line_of_metrics_too_long_or_with_a_name_twice(tmp_path: Path) -> None:
    for line in ('{"step": 1, "step": 1}', f'{{"step": 1, "loss": 1.{"0" * 5000}}}'):
        (tmp_path / "metrics.jsonl").write_text(f'{line}\n{{"step": 2}}\n')
        with pytest.raises(InputError, match="line 1 is none that a run writes"):
            read_metrics(tmp_path)


@pytest.mark.parametrize("name", ["config.toml", "metrics.jsonl", "result.json", CLASSES])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    readers: dict[str, Any] = {
        "config.toml": lambda: read_toml(tmp_path / name),
        "metrics.jsonl": lambda: read_metrics(tmp_path),
        "result.json": lambda: read_result(tmp_path),
        CLASSES: lambda: check_classes(RunConfig(), tmp_path),
    }
    with pytest.raises((InputError, UsageError), match="Not a regular file"):
        readers[name]()


def test_classes_whose_folders_have_names_that_are_no_unicode(tmp_path: Path) -> None:
    pytest.importorskip("PIL.Image")
    from PIL import Image

    for name in (b"a", b"b", b"c", b"d", b"e", b"\xff"):
        home = tmp_path / "data" / os.fsdecode(name)
        home.mkdir(parents=True)
        Image.new("L", (8, 8)).save(home / "1.png")
    config = RunConfig(dataset="folder", data=str(tmp_path / "data"), eval_every=0)
    record_classes(config, tmp_path)
    assert "\\udcff" in (tmp_path / CLASSES).read_text()
    check_classes(config, tmp_path)


LARGE = (1e308, -1e308, math.inf, -math.inf, math.nan)


@pytest.mark.parametrize("value", LARGE, ids=str)
def test_figures_that_no_axis_reaches_leave_a_gap(value: float, tmp_path: Path) -> None:
    """As a run that diverges has them: near the largest float Matplotlib fails."""
    pytest.importorskip("matplotlib")
    records = [{"step": i, "loss": value if i % 2 else -value} for i in range(120)]
    lines = [*records, {"step": 120, "eval_loss": value}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    curve = [{"mean": value, "ci95": abs(value)}, POINT]
    for metric in ("accuracy", "mse"):
        found = {**result(curve=curve, inductive=curve[0]), "metric": metric}
        (tmp_path / "result.json").write_text(json.dumps(found))
        figures = (
            plots.learning_curve(read_metrics(tmp_path)),
            plots.adaptation(read_result(tmp_path)),
        )
        for figure in figures:
            assert figure is not None
            figure.savefig(tmp_path / "x.png")
