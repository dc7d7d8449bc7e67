"""The pictures of a run folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from metaframe import tree
from metaframe.backend.selection import backend_of
from metaframe.cli import datasets, run_folder
from metaframe.cli.experiment import Experiment
from metaframe.learners.objective import as_batch
from metaframe.tasks import Task
from metaframe.training.metrics import read_metrics

Values = np.ndarray[Any, Any]
_LARGEST = 1e100
"""The largest number that is drawn; near the largest float its own sums are infinite."""
COLOURS = {"right": "#2b8a3e", "wrong": "#c92a2a"}


def draw_all(experiment: Experiment, folder: Path) -> list[str]:
    """Draw what there is data for; returns the files."""
    pictures: tuple[Callable[[], Figure | None], ...] = (
        lambda: learning_curve(read_metrics(folder)),
        lambda: adaptation(run_folder.read_result(folder)),
        lambda: predictions(experiment),
    )
    written = []
    for name, draw in zip(run_folder.PICTURES, pictures, strict=True):
        figure = draw()
        if figure is not None:
            figure.savefig(folder / name, dpi=120)
            written.append(str(folder / name))
    return written


def learning_curve(records: list[dict[str, Any]]) -> Figure | None:
    """Meta-training loss over outer steps, smoothed, and the validations."""
    steps = [r for r in records if "loss" in r]
    if not steps:
        return None
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    losses = np.array([_number(r["loss"]) for r in steps])
    window = max(1, len(losses) // 50)
    smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
    axes.plot([r["step"] for r in steps][window - 1 :], smooth, label="meta-training")
    held = [r for r in records if "eval_loss" in r]
    if held:
        points = [r["step"] for r in held], [_number(r["eval_loss"]) for r in held]
        axes.plot(*points, "o-", label="validation")
    axes.set(xlabel="outer step", ylabel="query loss after adaptation")
    axes.legend()
    return figure


def adaptation(result: dict[str, Any] | None) -> Figure | None:
    """The metric on held-out tasks after every inner step, with its 95% confidence interval."""
    if result is None:
        return None
    percent = result["metric"] == "accuracy"
    factor = 100 if percent else 1
    curve = result["evaluation"]["curve"]
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.errorbar(
        range(len(curve)),
        [_number(point["mean"], factor) for point in curve],
        [_number(point["ci95"], factor) for point in curve],
        marker="o",
        capsize=3,
        label="query examples in one batch (transductive)",
    )
    alone = result["evaluation"]["inductive"]
    if percent and alone is not None:
        axes.errorbar(
            [len(curve) - 1],
            [_number(alone["mean"], factor)],
            [_number(alone["ci95"], factor)],
            marker="s",
            capsize=3,
            label="each query alone (inductive)",
        )
    what = "accuracy, %" if percent else "mean squared error"
    axes.set(xlabel="inner steps", ylabel=what, ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
    return figure


def _number(value: float | None, factor: float = 1) -> float:
    """A number to draw; NaN, which leaves a gap, where JSON has null or no axis can reach."""
    return np.nan if value is None or not abs(value) < _LARGEST else factor * value


def predictions(experiment: Experiment) -> Figure:
    """Predictions for held-out tasks: curves before and after, or pictures."""
    source = datasets.test_tasks(experiment.config)
    first = [source[i] if isinstance(source, list) else source.task(i) for i in range(4)]
    if experiment.dataset.regression:
        return _fits(experiment, first)
    return _pictures(experiment, first[0])


def _fits(experiment: Experiment, tasks: list[Task]) -> Figure:
    figure = Figure(figsize=(9, 5), layout="constrained")
    x = np.linspace(-5, 5, 200, dtype=np.float32)[:, None]
    for axes, task in zip(figure.subplots(2, 2).flat, tasks, strict=True):
        before, after = (predict(experiment, task, x, k) for k in (0, experiment.eval_steps))
        axes.plot(x[:, 0], before[:, 0], "--", label="before adaptation")
        axes.plot(x[:, 0], after[:, 0], label=f"after {experiment.eval_steps} steps")
        axes.plot(_host(task.query_x)[:, 0], _host(task.query_y)[:, 0], ".", label="query")
        axes.plot(_host(task.support_x)[:, 0], _host(task.support_y)[:, 0], "k^", label="support")
    figure.axes[0].legend(fontsize="small")
    return figure


def _pictures(experiment: Experiment, task: Task, most: int = 20) -> Figure:
    config = experiment.config
    output = predict(experiment, task, _host(task.query_x), experiment.eval_steps)
    said, truth = output.argmax(axis=1), _host(task.query_y)
    order = np.argsort(_host(task.support_y), kind="stable")
    columns = min(config.ways * config.shots, 10)
    support = [(_host(task.support_x)[i], f"{_host(task.support_y)[i]}", "black") for i in order]
    query = [
        (_host(task.query_x)[i], f"{said[i]}", COLOURS["right" if said[i] == truth[i] else "wrong"])
        for i in _class_by_class(truth)[:most]
    ]
    heights = [-(-len(items) // columns) for items in (support, query)]
    figure = Figure(figsize=(columns, 0.6 + 1.2 * sum(heights)))
    parts: Any = figure.subfigures(2, 1, height_ratios=heights)
    titles = ("support", "query, with predicted classes")
    for part, items, rows, title in zip(parts, (support, query), heights, titles, strict=True):
        part.suptitle(title, fontsize="small")
        grid = part.subplots(rows, columns, squeeze=False)
        for axes in grid.flat:
            axes.axis("off")
        for axes, (image, label, colour) in zip(grid.flat, items, strict=False):
            # Ink on paper, or a photograph.
            axes.imshow(image[..., 0] if image.shape[-1] == 1 else image, cmap="gray_r")
            axes.set_title(label, color=colour, fontsize="small")
    return figure


def _class_by_class(labels: Values) -> Values:
    """An order in which the classes take turns."""
    turn = np.array([np.sum(labels[:i] == label) for i, label in enumerate(labels)])
    return np.lexsort((labels, turn))


def predict(experiment: Experiment, task: Task, x: Values, steps: int) -> Values:
    """The learner's output for `x` after `steps` inner steps on `task`."""
    learner = experiment.learner
    meta, constants = learner.meta_arrays(), learner.constants()
    adapting = learner.adaptation(experiment.loss_fn)
    support = _host(task.support_x), _host(task.support_y)
    batch = as_batch([Task(*support, x, _filler(task, len(x)))], meta, learner.backend)
    one = tree.map(lambda leaf: leaf[0], batch)
    at = adapting.start(meta, constants, one)
    for _ in range(steps):
        at = adapting.step(at, meta, constants, one)
    return _host(adapting.predict(at, meta, constants, one, one.query_x))


def _filler(task: Task, count: int) -> Values:
    """Targets of the right kind, which a prediction never looks at."""
    like = _host(task.query_y)
    return np.zeros((count, *like.shape[1:]), like.dtype)


def _host(x: Any) -> Values:
    return x if isinstance(x, np.ndarray) else backend_of(x).to_numpy(x)
