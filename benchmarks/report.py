"""Where results go: a table on screen, JSON and a plot in `runs/benchmarks/`."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.harness import ROOT

OUT = ROOT / "runs" / "benchmarks"
Rows = Sequence[Mapping[str, Any]]


def publish(name: str, title: str, rows: Rows, notes: Sequence[str] = ()) -> Path:
    """Print `rows` as a table and write them, with the versions they were measured with."""
    console = Console(width=None if os.isatty(1) else 150)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(title=title, title_justify="left")
    for column in columns:
        numeric = any(isinstance(row.get(column), int | float) for row in rows)
        table.add_column(column, justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*(_shown(row.get(column)) for column in columns))
    console.print(table)
    for note in notes:
        console.print(note, highlight=False)
    OUT.mkdir(parents=True, exist_ok=True)
    path = OUT / f"{name}.json"
    record = {"title": title, "machine": _machine(), "rows": list(rows), "notes": list(notes)}
    path.write_text(json.dumps(record, indent=1, default=float) + "\n")
    console.print(f"written to {path.relative_to(ROOT)}", style="dim")
    return path


def bars(name: str, title: str, values: Mapping[str, float], unit: str) -> None:
    """A bar for each value, on a logarithmic axis."""
    figure, axes = _figure(title, height=1.2 + 0.3 * len(values))
    labels = list(values)[::-1]
    drawn = axes.barh(labels, [values[label] for label in labels])
    axes.bar_label(drawn, fmt="%.3g", padding=3)
    axes.set(xscale="log", xlabel=unit)
    axes.margins(x=0.15)
    figure.savefig(OUT / f"{name}.png", dpi=120)


def lines(
    name: str, title: str, series: Mapping[str, Mapping[float, float]], labels: tuple[str, str]
) -> None:
    """A line for each series of x to y, on logarithmic axes."""
    figure, axes = _figure(title, height=4.0)
    for label, points in series.items():
        axes.plot(list(points), list(points.values()), marker="o", label=label)
    axes.set(xscale="log", yscale="log", xlabel=labels[0], ylabel=labels[1])
    axes.legend()
    figure.savefig(OUT / f"{name}.png", dpi=120)


def _figure(title: str, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    OUT.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(8, height), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    return figure, axes


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.4g}"
    return str(value)


def _machine() -> dict[str, Any]:
    packages = ("jax", "numpy", "tensorflow-cpu", "tensorflow", "torch")
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        **versions,
    }
