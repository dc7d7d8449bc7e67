"""Measuring a learner on held-out tasks: a mean with its confidence interval, at every step.

What a figure means depends on what a prediction may look at. *Transductive*: all query examples of
a task go through the model in one batch, so that batch normalisation lets them help each other.
*Inductive*: every query example is classified on its own, next to the support set. For a model
without batch statistics the two are the same; for the usual convolutional ones they are not, and
published figures are of either kind. An `Evaluation` holds both and says which is which.

Source of the inductive form: Nichol et al. 2018, arXiv 1803.02999, section 6.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from metaframe import arguments, ops, tree
from metaframe.backend.model import Params
from metaframe.backend.selection import backend_of
from metaframe.backend.types import Array
from metaframe.core import checks as core_checks
from metaframe.core.compile import compile
from metaframe.core.meta_gradient import map_tasks
from metaframe.core.task_map import Strategy, strategy
from metaframe.errors import InputError, InputTypeError
from metaframe.learners.learner import LossFn
from metaframe.learners.meta_learner import MetaLearner
from metaframe.learners.objective import Meta, as_batch
from metaframe.learners.programs import Adaptation, Adapted
from metaframe.tasks import Estimate, IndexedSampler, Task, mean_and_ci95, stack_tasks
from metaframe.training import checks
from metaframe.training.step import StepSettings

TASKS_AT_ONCE = 50
"""Tasks in one batch of an evaluation."""
EXAMPLES_AT_ONCE = 256
"""Of one task, in the inductive form: support sets next to a query example each."""

Values = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The results of an evaluation, for every task and every number of steps.

    Attributes:
        losses: `(tasks, steps + 1)` query losses after 0, 1, ... steps, transductive.
        scores: `(tasks, steps + 1)` the metric likewise; None without a metric.
        inductive: `(tasks,)` the metric, or the loss without one, after the last step, every query
            example predicted on its own next to the support set; None if not asked for.

    >>> found = Evaluation(losses=np.array([[2.0, 1.0], [4.0, 2.0]]))
    >>> found.loss.mean, [point.mean for point in found.curve]
    (1.5, [3.0, 1.5])
    >>> print(found)
    steps  loss
    0      3.0000 ± 1.3859
    1      1.5000 ± 0.6930
    means over 2 tasks ± 95% CI
    """

    losses: Values
    scores: Values | None = None
    inductive: Values | None = None

    @property
    def loss(self) -> Estimate:
        """The query loss after the last step."""
        return mean_and_ci95(self.losses[:, -1])

    @property
    def transductive(self) -> Estimate:
        """The metric (without one: the loss) after the last step, query examples in one batch."""
        return self.curve[-1]

    @property
    def alone(self) -> Estimate | None:
        """The metric (without one: the loss) after the last step, each query example alone."""
        return None if self.inductive is None else mean_and_ci95(self.inductive)

    @property
    def curve(self) -> tuple[Estimate, ...]:
        """The metric (without one: the loss) after 0, 1, ... steps, transductive."""
        table = self.losses if self.scores is None else self.scores
        return tuple(mean_and_ci95(column) for column in table.T)

    def __str__(self) -> str:
        """A short table: loss and metric after each step, and the inductive figure."""
        columns = {"loss": self.losses} | ({} if self.scores is None else {"metric": self.scores})
        rows = [f"steps  {''.join(f'{name:<18}' for name in columns)}".rstrip()]
        for step in range(self.losses.shape[1]):
            points = [mean_and_ci95(table[:, step]) for table in columns.values()]
            cells = "".join(f"{f'{p.mean:.4f} ± {p.ci95:.4f}':<18}" for p in points)
            rows.append(f"{step:<7}{cells}".rstrip())
        if (alone := self.alone) is not None:
            rows.append(f"inductive, after the last step: {alone.mean:.4f} ± {alone.ci95:.4f}")
        count = len(self.losses)
        rows.append(f"means over {count} {'task' if count == 1 else 'tasks'} ± 95% CI")
        return "\n".join(rows)

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        inductive = self.alone
        return {
            "tasks": len(self.losses),
            "loss": _plain(self.loss),
            "transductive": _plain(self.transductive),
            "inductive": None if inductive is None else _plain(inductive),
            "curve": [_plain(point) for point in self.curve],
            "per_task": {
                "losses": self.losses[:, -1].tolist(),
                "scores": None if self.scores is None else self.scores[:, -1].tolist(),
                "inductive": None if self.inductive is None else self.inductive.tolist(),
            },
        }


def _plain(estimate: Estimate) -> dict[str, float]:
    return {"mean": estimate.mean, "ci95": estimate.ci95}


def evaluate(
    maml: MetaLearner,
    loss_fn: LossFn,
    tasks: Any,
    num_tasks: int = 600,
    *,
    steps: int | None = None,
    metric: LossFn | None = None,
    inductive: bool = True,
    settings: StepSettings | None = None,
) -> Evaluation:
    """Adapt to each of many tasks and measure the query set after every step.

    The learner is not changed and no meta-gradient is computed. Every call compiles anew; to
    evaluate a learner again and again, keep an `Evaluator`.

    Args:
        maml: the learner.
        loss_fn: `loss_fn(prediction, target) -> scalar`, what adaptation minimises.
        tasks: a sampler with `task(index)`, of which tasks 0 to `num_tasks - 1` are taken,
            wherever it stands; a list of tasks; or a stacked Task.
        num_tasks: how many, for a sampler.
        steps: inner steps, 0 or more; default: the learner's `inner_steps`.
        metric: `metric(prediction, target) -> scalar`, such as `nn.accuracy`.
        inductive: also score every query example on its own.
        settings: how it runs.

    Returns:
        Losses and scores by task and step, and their means with confidence intervals.

    Raises:
        InputError, InputTypeError: bad arguments, before any work.

    >>> import torch
    >>> from metaframe.learners import MAML
    >>> from metaframe.tasks import SinusoidTaskSampler
    >>> maml = MAML(torch.nn.Linear(1, 1), inner_lr=0.01)
    >>> sampler = SinusoidTaskSampler(seed=0, split="test")
    >>> found = evaluate(maml, torch.nn.functional.mse_loss, sampler, 20, steps=3)
    >>> found.losses.shape, len(found.curve)
    ((20, 4), 4)
    """
    evaluator = Evaluator(maml, loss_fn, metric=metric, settings=settings)
    return evaluator(tasks, num_tasks, steps=steps, inductive=inductive)


class Evaluator:
    """`evaluate` with its programs kept from one call to the next.

    Args:
        maml: as for `evaluate`. Each call measures the learner as it is then.
        loss_fn: as for `evaluate`.
        metric: as for `evaluate`.
        settings: as for `evaluate`.

    Raises:
        InputTypeError: no learner, or what should be a function is none.

    >>> import torch
    >>> from metaframe.learners import MAML
    >>> from metaframe.tasks import SinusoidTaskSampler
    >>> maml = MAML(torch.nn.Linear(1, 1), inner_lr=0.01)
    >>> measure = Evaluator(maml, torch.nn.functional.mse_loss)
    >>> sampler = SinusoidTaskSampler(seed=0, split="test")
    >>> before = measure(sampler, 20, steps=3)
    >>> with torch.no_grad():
    ...     _ = maml.module.weight.zero_()
    >>> before.loss == measure(sampler, 20, steps=3).loss
    False
    """

    def __init__(
        self,
        maml: MetaLearner,
        loss_fn: LossFn,
        *,
        metric: LossFn | None = None,
        settings: StepSettings | None = None,
    ) -> None:
        settings = settings or StepSettings()
        checks.learner(maml, loss_fn, metric)
        self._maml = maml
        self._loss_fn = loss_fn
        self._metric = metric
        self._settings = settings.for_learner(maml)
        self._task_map = strategy(settings.task_map, tuple(maml.meta_parameters().values()))
        wrap: Any = compile if self._settings.compiled else lambda fn: fn
        self._start = wrap(self._mapped(_start))
        self._step = wrap(self._mapped(_step))
        self._score = wrap(self._mapped(self._score_together))
        self._score_alone = wrap(self._mapped(self._score_one_by_one))

    def __call__(
        self,
        tasks: Any,
        num_tasks: int = 600,
        *,
        steps: int | None = None,
        inductive: bool = True,
        whole_curve: bool = True,
    ) -> Evaluation:
        """Evaluate as `evaluate` does.

        Args:
            tasks: as for `evaluate`.
            num_tasks: as for `evaluate`.
            steps: as for `evaluate`.
            inductive: as for `evaluate`.
            whole_curve: measure after every step; otherwise once, after the last step.

        Returns:
            Losses and scores by task and step, and their means with confidence intervals.
        """
        steps = self._maml.config.steps(steps, at_least=0)
        rows = [
            self._batch(chunk, count, steps, inductive, whole_curve)
            for chunk, count in _chunks(tasks, num_tasks)
        ]
        losses, scores, alone = (
            None if column[0] is None else np.concatenate(column)
            for column in zip(*rows, strict=True)
        )
        assert losses is not None, "every task has a loss"
        return Evaluation(losses, scores, alone)

    def _batch(
        self, tasks: Task, count: int, steps: int, inductive: bool, whole_curve: bool
    ) -> tuple[Values, Values | None, Values | None]:
        maml = self._maml
        shared = (maml.adaptation(self._loss_fn), maml.meta_arrays(), maml.constants())
        batch = as_batch(tasks, shared[1], maml.backend)
        at = self._start(None, batch, *shared)
        points = []
        for k in range(steps + 1):
            if k:
                at = self._step(at, batch, *shared)
            if whole_curve or k == steps:
                points.append(self._score(at, batch, *shared))
        losses = _columns([p["loss"] for p in points], count)
        scores = _columns([p["score"] for p in points], count) if self._metric else None
        if not inductive:
            return losses, scores, None
        alone = _columns([self._score_alone(at, batch, *shared)], count)[:, 0]
        return losses, scores, alone

    def _mapped(self, of_task: Callable[..., Any]) -> Callable[..., Any]:
        def run(at: Any, batch: Task, adaptation: Adaptation, meta: Params, constants: Meta) -> Any:
            mapped = map_tasks(
                lambda at, task: of_task(_View(adaptation, meta, constants, task), at),
                task_map=self._task_map,
                chunk_size=self._settings.chunk_size,
            )
            return mapped(at, batch)

        return run

    def _score_together(self, view: _View, at: Adapted) -> dict[str, Array]:
        task = view.task
        output = view.predict(at, task.query_x)
        found = {"loss": self._scalar(self._loss_fn, "loss_fn", output, task)}
        if self._metric is not None:
            found["score"] = self._scalar(self._metric, "metric", output, task)
        return found

    def _scalar(self, fn: LossFn, name: str, output: Any, task: Task) -> Array:
        return core_checks.scalar(fn(output, task.query_y), name, self._maml.backend)

    def _score_one_by_one(self, view: _View, at: Adapted) -> Array:
        task = view.task

        def alone(x: Array) -> Array:
            together = tree.map(lambda s, q: ops.concat([s, q[None]]), task.support_x, x)
            output = view.predict(at, together)
            return tree.map(lambda y: y[-1], output)

        # The weights are the same for all of them, so that vectorising pays even where it does
        # not over tasks. But each comes with the whole support set.
        how: Strategy = "loop" if self._task_map == "loop" else "vmap"
        at_once = max(1, EXAMPLES_AT_ONCE // (1 + tree.leaves(task.support_x)[0].shape[0]))
        chunk_size = min(at_once, self._settings.chunk_size or at_once)
        output = map_tasks(alone, task_map=how, chunk_size=chunk_size)(task.query_x)
        name = "loss_fn" if self._metric is None else "metric"
        return self._scalar(self._metric or self._loss_fn, name, output, task)


class _View(NamedTuple):
    """One task as the learner sees it."""

    adaptation: Adaptation
    meta: Params
    constants: Meta
    task: Task

    def predict(self, at: Adapted, x: Any) -> Any:
        """All of `x` in one batch."""
        return self.adaptation.predict(at, self.meta, self.constants, self.task, x)


def _start(view: _View, at: None) -> Adapted:
    del at
    return view.adaptation.start(view.meta, view.constants, view.task)


def _step(view: _View, at: Adapted) -> Adapted:
    return view.adaptation.step(at, view.meta, view.constants, view.task)


def _columns(values: Sequence[Array], count: int) -> Values:
    table: Values = np.stack([ops.to_numpy(x)[:count] for x in values], axis=1).astype(np.float64)
    return table


def _chunks(tasks: Any, num_tasks: int) -> Iterator[tuple[Task, int]]:
    """Stacked tasks in batches of one size, each with how many of its tasks count.

    The last batch is filled up with tasks it has already, so that it needs no other program.
    """
    get, total = source(tasks, num_tasks)
    size = min(TASKS_AT_ONCE, total)
    for start in range(0, total, size):
        rows = [min(i, total - 1) for i in range(start, start + size)]
        yield get(rows), min(size, total - start)


def source(tasks: Any, num_tasks: int = 600) -> tuple[Callable[[list[int]], Task], int]:
    """A function from numbers to their tasks as one batch, and the count of all tasks.

    Raises:
        InputError, InputTypeError: `tasks` is nothing that `evaluate` takes.
    """
    if isinstance(tasks, Task):
        total = core_checks.tasks(tree.Flat.of(tasks), None)
        return lambda rows: tree.map(lambda x: rows_of(x, rows), tasks), total
    if hasattr(tasks, "task"):
        arguments.integer(num_tasks, "num_tasks", at_least=1)
        if isinstance(tasks, IndexedSampler):
            return lambda rows: stack_tasks(tasks.tasks(rows)), num_tasks
        return lambda rows: stack_tasks([tasks.task(i) for i in rows]), num_tasks
    if not isinstance(tasks, Sequence):
        raise InputTypeError(
            f"tasks must be a sampler with task(index), a list of tasks or a stacked Task, "
            f"received {type(tasks).__qualname__}."
        )
    if not tasks:
        raise InputError("there are no tasks to evaluate on: the list is empty.")
    for i, task in enumerate(tasks):
        if not isinstance(task, Task):
            raise InputTypeError(f"task {i} is a {type(task).__qualname__}, expected a Task.")
    return lambda rows: stack_tasks([tasks[i] for i in rows]), len(tasks)


def rows_of(x: Any, rows: list[int]) -> Any:
    """These rows of an array, NumPy's or a framework's."""
    return x[rows] if isinstance(x, np.ndarray) else backend_of(x).ops.stack([x[i] for i in rows])
