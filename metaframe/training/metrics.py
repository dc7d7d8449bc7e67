"""Metrics of a run in files: JSON lines, CSV, and TensorBoard events where installed."""

from __future__ import annotations

import csv
import io
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from metaframe.errors import InputError, MissingDependencyError
from metaframe.files.read import contents, parsed, shown
from metaframe.files.schema import integer, number, optional, record
from metaframe.files.write import write_atomically
from metaframe.training.callbacks import Callback, Run

COLUMNS = ("step", "loss", "score", "grad_norm", "seconds", "eval_loss", "eval_score")

_RECORD = record({"step": integer}, {name: optional(number) for name in COLUMNS[1:]})
_LONGEST = 4096
"""Characters of a line."""


class MetricsLog(Callback):
    """Writes `metrics.jsonl` and `metrics.csv`, one record a step and one an evaluation.

    A run that goes on from a checkpoint goes on in the same files; what they hold of later steps is
    dropped, because those steps are taken again. A number that is not finite is null in the first.

    Args:
        folder: made if it does not exist.
        tensorboard: also write TensorBoard event files, into `folder`/tensorboard.

    Raises:
        MissingDependencyError: `tensorboard` without the package tensorboardX.
    """

    everywhere = False

    def __init__(self, folder: str | Path, *, tensorboard: bool = False) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._event_writer = _event_writer() if tensorboard else None

    def is_due(self, step: int) -> bool:
        """Never: it looks at reports alone."""
        del step
        return False

    def on_start(self, run: Run) -> None:
        """Open the files, after dropping records of steps that come again."""
        kept = [r for r in read_metrics(self.folder) if r["step"] <= run.trainer.step]
        lines, rows = self.folder / "metrics.jsonl", self.folder / "metrics.csv"
        # At once each: who is killed here loses nothing of what was measured before.
        write_atomically(lines, "".join(map(_line, kept)).encode())
        table = io.StringIO(newline="")
        csv.DictWriter(table, COLUMNS).writeheader()
        csv.DictWriter(table, COLUMNS).writerows(kept)
        write_atomically(rows, table.getvalue().encode())
        self._lines: IO[str] = lines.open("a", encoding="utf-8")
        self._csv: IO[str] = rows.open("a", encoding="utf-8", newline="")
        self._table = csv.DictWriter(self._csv, COLUMNS)
        self._events: Any = None
        if self._event_writer is not None:
            step = run.trainer.step
            # TensorBoard hides what other files have of later steps. Two files of one second would
            # have the same name.
            self._events = self._event_writer(
                str(self.folder / "tensorboard"), purge_step=step + 1, filename_suffix=f".{step}"
            )
        measured = [r["seconds"] for r in kept if math.isfinite(r.get("seconds", math.nan))]
        self._before = measured[-1] if measured else 0.0
        self._started = time.perf_counter()

    def on_step(self, run: Run) -> None:
        """Record the step's loss, metric and gradient norm."""
        report = run.report
        assert report is not None, "on_step comes after a step"
        record = {"step": run.trainer.step, "loss": report.loss, "grad_norm": report.grad_norm}
        if report.task_scores is not None:
            record["score"] = float(report.task_scores.mean())
        # Writing two files takes longer than a step of a small model. What was not written when a
        # process is killed are steps that it had not come back from.
        self._record(record, flushed=not run.in_block)

    def on_evaluation(self, run: Run) -> None:
        """Record the evaluation's loss and metric."""
        found = run.evaluation
        assert found is not None, "on_evaluation comes after an evaluation"
        record = {"step": run.trainer.step, "eval_loss": found.loss.mean}
        if found.scores is not None:
            record["eval_score"] = found.transductive.mean
        self._record(record)

    def on_end(self, run: Run) -> None:
        """Close the files."""
        self._lines.close()
        self._csv.close()
        if self._events is not None:
            self._events.close()

    def _record(self, record: dict[str, Any], *, flushed: bool = True) -> None:
        record["seconds"] = round(self._before + time.perf_counter() - self._started, 3)
        self._write(record)
        if flushed:
            self._lines.flush()
            self._csv.flush()
        if self._events is not None:
            for name in set(record) - {"step", "seconds"}:
                self._events.add_scalar(name, record[name], record["step"])

    def _write(self, record: dict[str, Any]) -> None:
        self._lines.write(_line(record))
        self._table.writerow(record)


def _line(record: dict[str, Any]) -> str:
    finite = {name: value if math.isfinite(value) else None for name, value in record.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The records in `folder`/metrics.jsonl; none if there is no such file.

    A last line that a killed process left unfinished is ignored. What is null becomes NaN.

    Raises:
        InputError: the file cannot be read, or a line in the middle is none that a run writes.
    """
    path = Path(folder) / "metrics.jsonl"
    if not path.exists():
        return []
    try:
        lines = contents(path).split(b"\n")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}.") from error
    if not lines[-1]:
        lines.pop()
    records = []
    for i, line in enumerate(lines):
        try:
            records.append(_parsed(line))
        except ValueError as error:
            if i < len(lines) - 1:
                raise InputError(
                    f"{path}, line {i + 1} is none that a run writes: {error}. Repair it, or move "
                    "the file away; the run goes on without the records in it."
                ) from error
    return records


def _parsed(line: bytes) -> dict[str, Any]:
    """A record, with its names, types and ranges checked.

    Raises:
        ValueError: it is none.
    """
    if len(line) > _LONGEST:
        raise ValueError(f"it has {len(line)} characters")
    found = parsed(line)
    _RECORD(found, "it")
    if unknown := sorted(set(found) - set(COLUMNS)):
        raise ValueError(f"it has the unknown names {shown(unknown)}")
    return {
        name: value if name == "step" else math.nan if value is None else float(value)
        for name, value in found.items()
    }


def _event_writer() -> Callable[..., Any]:
    try:
        from tensorboardX import SummaryWriter  # type: ignore[import-untyped]
    except ImportError:
        raise MissingDependencyError(
            "TensorBoard", "tensorboardX", "pip install tensorboardX"
        ) from None
    writer: Callable[..., Any] = SummaryWriter
    return writer
