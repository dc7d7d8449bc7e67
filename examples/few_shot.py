"""Meta-train a few-shot classifier and measure it: the part that all the examples share.

Everything here is written once and runs on the backend that is selected. The meta-step, one inner
step for the evaluation and its score are each compiled as a whole unless the settings say not to.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import metaframe
from metaframe import nn, ops, optim, tree
from metaframe.tasks import Estimate, Task, TaskSampler, mean_and_ci95, stack_tasks


@dataclass(frozen=True)
class Settings:
    """What a run depends on besides its data and its model."""

    iterations: int
    meta_batch_size: int
    inner_lr: float
    inner_steps: int
    outer_lr: float = 1e-3
    eval_steps: int = 10
    eval_tasks: int = 600
    eval_batch: int = 50
    task_map: str = "vmap"
    compiled: bool = True
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """What a run found out."""

    before: Estimate
    after: Estimate
    curve: list[float]
    """Mean query accuracy after 0, 1, ..., eval_steps inner steps."""
    costs: list[float]
    """The meta-training cost of every iteration."""
    seconds: float


def support(task: Task) -> Any:
    """What the inner loop sees."""
    return task.support_x, task.support_y


def query(task: Task) -> Any:
    """What the outer cost sees."""
    return task.query_x, task.query_y


class Learner:
    """A model with its meta-training step and its evaluation, both compiled."""

    def __init__(self, model: nn.Model, settings: Settings) -> None:
        self.model = model
        self.settings = settings
        self.optimizer = optim.adam(settings.outer_lr)
        compiled = metaframe.compile if settings.compiled else lambda fn: fn
        self.train_step = compiled(self._train_step)
        self.adapt = compiled(self._adapt)
        self.score = compiled(self._score)

    def cost(self, data: Any, params: Any) -> Any:
        """Cross-entropy of the model on (images, labels)."""
        x, y = data
        return nn.cross_entropy(self.model.apply(params, x), y)

    def _train_step(self, params: Any, state: Any, tasks: Task) -> Any:
        cost, grads, _ = metaframe.maml_step(
            tasks,
            self.cost,
            None,
            params,
            self.settings.inner_steps,
            self.settings.inner_lr,
            inner_batch_fn=support,
            outer_batch_fn=query,
            batched=self.settings.task_map,
        )
        updates, state = self.optimizer.update(grads, state, params)
        return metaframe.apply_updates(params, updates), state, cost

    def accuracies(self, params: Any, tasks: Task) -> Any:
        """(tasks, eval_steps + 1): query accuracy of each task before and after every step."""
        count = tasks.support_y.shape[0]
        adapted = tree.map(lambda p: ops.broadcast_to(p, (count, *p.shape)), params)
        columns = [ops.to_numpy(self.score(adapted, tasks))]
        for _ in range(self.settings.eval_steps):
            adapted = self.adapt(adapted, tasks)
            columns.append(ops.to_numpy(self.score(adapted, tasks)))
        return np.stack(columns, axis=1)

    def _adapt(self, adapted: Any, tasks: Task) -> Any:
        """One inner step of every task from its own variables."""

        def step(v: Any, task: Task) -> Any:
            return metaframe.inner_loop(
                self.cost, v, support(task), steps=1, lr=self.settings.inner_lr, order=1
            )

        return metaframe.map_tasks(step, task_map=self.settings.task_map)(adapted, tasks)

    def _score(self, adapted: Any, tasks: Task) -> Any:
        """Every task's accuracy on its query set."""

        def accuracy(v: Any, task: Task) -> Any:
            x, y = query(task)
            return nn.accuracy(self.model.apply(v, x), y)

        return metaframe.map_tasks(accuracy, task_map=self.settings.task_map)(adapted, tasks)


def run(
    model: nn.Model, train: TaskSampler, test: TaskSampler, settings: Settings, console: Console
) -> Result:
    """Meta-train `model` on `train`, then measure it on `test`."""
    started = time.perf_counter()
    learner = Learner(model, settings)
    params = model.init(settings.seed)
    state = learner.optimizer.init(params)
    costs = []
    with _progress(console) as progress:
        bar = progress.add_task("meta-training", total=settings.iterations, cost="compiling")
        for _ in range(settings.iterations):
            tasks = stack_tasks(train.sample(settings.meta_batch_size))
            params, state, cost = learner.train_step(params, state, tasks)
            costs.append(float(cost))
            progress.update(bar, advance=1, cost=f"cost {np.mean(costs[-50:]):.3f}")
        bar = progress.add_task("evaluating", total=settings.eval_tasks, cost="")
        rows = []
        for _ in range(0, settings.eval_tasks, settings.eval_batch):
            tasks = stack_tasks(test.sample(settings.eval_batch))
            rows.append(learner.accuracies(params, tasks))
            progress.update(bar, advance=settings.eval_batch)
    scores = np.concatenate(rows)
    return Result(
        before=mean_and_ci95(100 * scores[:, 0]),
        after=mean_and_ci95(100 * scores[:, -1]),
        curve=[float(x) for x in scores.mean(axis=0)],
        costs=costs,
        seconds=time.perf_counter() - started,
    )


def report(result: Result, settings: Settings, title: str, out: Path, console: Console) -> None:
    """Print the result and leave it, with a plot, in the folder `out`."""
    console.print(f"[bold]{title}[/bold]")
    console.print(f"accuracy before adaptation: {result.before}")
    console.print(f"accuracy after {settings.eval_steps} steps:  {result.after}")
    out.mkdir(parents=True, exist_ok=True)
    record = {"title": title, "settings": asdict(settings), **asdict(result)}
    (out / "result.json").write_text(json.dumps(record, indent=1))
    _plot(result, title, out / "result.png")
    console.print(f"{result.seconds:.0f} s; result and plot in {out}")


def _plot(result: Result, title: str, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    window = max(1, len(result.costs) // 50)
    smooth = np.convolve(result.costs, np.ones(window) / window, mode="valid")
    left.plot(np.arange(len(smooth)) + window, smooth)
    left.set(xlabel="meta-training iteration", ylabel="query cost after adaptation")
    steps = range(len(result.curve))
    right.plot(steps, [100 * x for x in result.curve], marker="o")
    right.set(xlabel="inner steps", ylabel="accuracy on held-out classes, %", ylim=(0, 100))
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:14}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[cost]}"),
        console=console,
    )
