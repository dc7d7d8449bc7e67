"""A progress bar of a run: loss, metric, tasks a second, time left."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from metaframe.training.callbacks import Callback, Run

if TYPE_CHECKING:
    from rich.console import Console

SMOOTHING = 0.95
"""Of the shown loss and metric: how much of the old value stays after a step."""
DRAW_S = 0.1
"""Seconds from one look of the bar to the next."""
LINES = 20
"""The number of lines that a whole run prints without a terminal."""


class ProgressBar(Callback):
    """Shows how a run is getting on: a bar in a terminal, a line now and then elsewhere.

    Args:
        console: where to; default: a new one on standard error.
    """

    everywhere = False

    def __init__(self, console: Console | None = None) -> None:
        from rich.console import Console

        self._console = console or Console(stderr=True)

    def is_due(self, step: int) -> bool:
        """Never: it looks at reports alone."""
        del step
        return False

    def on_start(self, run: Run) -> None:
        """Show the bar."""
        from rich import progress

        self._loss: float | None = None
        self._drawn = 0.0
        self._score: float | None = None
        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[shown]}"),
            progress.TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(
            "meta-training", total=run.num_iterations, shown="compiling"
        )
        self._bar.start()
        if not self._console.is_terminal:
            self._console.print("compiling the first step", highlight=False)

    def on_step(self, run: Run) -> None:
        """Move on."""
        report = run.report
        assert report is not None, "on_step comes after a step"
        self._loss = _smooth(self._loss, report.loss)
        if report.task_scores is not None:
            self._score = _smooth(self._score, float(report.task_scores.mean()))
        done = run.iteration + 1
        line = not self._console.is_terminal and done % max(1, run.num_iterations // LINES) == 0
        if not (line or done == run.num_iterations or time.perf_counter() - self._drawn > DRAW_S):
            return
        shown = self._shown(run)
        self._bar.update(self._task, completed=done, shown=shown)
        self._drawn = time.perf_counter()
        if line:
            self._console.print(f"step {run.trainer.step}: {shown}", highlight=False)

    def on_evaluation(self, run: Run) -> None:
        """Print what was found above the bar."""
        found = run.evaluation
        assert found is not None, "on_evaluation comes after an evaluation"
        text = f"step {run.trainer.step}: validation loss {found.loss.mean:.4f}"
        if found.scores is not None:
            text += f", score {found.transductive.mean:.4g}"
        self._bar.console.print(text, highlight=False)

    def on_end(self, run: Run) -> None:
        """Leave the bar as it is."""
        self._bar.stop()

    def _shown(self, run: Run) -> str:
        parts = [f"loss {self._loss:.4f}"]
        if self._score is not None:
            parts.append(f"score {self._score:.4g}")
        speed = self._bar.tasks[0].speed
        if speed:
            parts.append(f"{speed * run.tasks_per_step:.0f} tasks/s")
        return ", ".join(parts)


def _smooth(old: float | None, new: float) -> float:
    return new if old is None else SMOOTHING * old + (1 - SMOOTHING) * new
