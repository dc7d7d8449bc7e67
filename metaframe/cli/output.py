"""The output of a command: results on standard output, everything else on standard error."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from metaframe.distributed import is_first


class Output:
    """Prints for people, or with `as_json` one JSON document for machines.

    Of several processes that run together only the first one prints.

    Args:
        as_json: print nothing but the result, as JSON.
        quiet: no progress and no remarks.
    """

    def __init__(self, *, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json = as_json
        self.quiet = quiet or as_json or not is_first()
        self._stdout = Console(highlight=False, soft_wrap=True)
        self.stderr = Console(stderr=True, highlight=False, soft_wrap=True)

    def remark(self, text: str) -> None:
        """Say what is going on."""
        if not self.quiet:
            self.stderr.print(text, markup=False)

    def result(self, data: Any, lines: Sequence[str]) -> None:
        """The outcome: `data` for machines, `lines` for people."""
        if not is_first():
            return
        if self.as_json:
            print(to_json(data))
            return
        for line in lines:
            self._stdout.print(line, markup=False)

    def table(self, data: Any, title: str, columns: Sequence[str], rows: Any) -> None:
        """A table: `data` for machines, `rows` of texts for people."""
        if self.as_json:
            print(to_json(data))
            return
        table = Table(*columns, title=title, title_justify="left")
        for row in rows:
            table.add_row(*row)
        self._stdout.print(table)


def finite(data: Any) -> Any:
    """`data` as plain values for JSON, with None for every number that is not finite."""
    if isinstance(data, Mapping):
        return {name: finite(value) for name, value in data.items()}
    if isinstance(data, list | tuple):
        return [finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def to_json(data: Any) -> str:
    """`data` as JSON that every reader takes: it knows neither NaN nor Infinity."""
    return json.dumps(finite(data), indent=1, allow_nan=False)


def described(evaluation: Mapping[str, Any], *, percent: bool) -> list[str]:
    """The lines of an evaluation, given as in result.json."""
    factor, unit, what = (100, "%", "accuracy") if percent else (1, "", "mean squared error")

    def figure(point: Mapping[str, float | None]) -> str:
        mean, margin = point["mean"], point["ci95"]
        if mean is None:
            return "not finite"
        shown = f"{factor * mean:.2f}{unit}"
        return shown if margin is None else f"{shown} ± {factor * margin:.2f}"

    curve = evaluation["curve"]
    steps = len(curve) - 1
    noun = "step" if steps == 1 else "steps"
    several = evaluation["tasks"] > 1  # a single task has no interval
    of = f"{evaluation['tasks']} tasks, 95% CI" if several else "1 task"
    lines = [
        *([f"{what} before adaptation: {figure(curve[0])}"] if steps else []),
        f"{what} after {steps} {noun}: {figure(evaluation['transductive'])} ({of})",
    ]
    alone = evaluation["inductive"]
    if alone is not None and percent:
        lines[-1] += ", transductive: query examples in one batch"
        lines.append(f"{what} after {steps} {noun}: {figure(alone)}, inductive: each query alone")
    return lines
