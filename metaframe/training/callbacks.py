"""Callbacks, which watch a training run and may end it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from metaframe import arguments
from metaframe.errors import InputTypeError
from metaframe.learners.meta_learner import MetaLearner
from metaframe.training.evaluation import Evaluation
from metaframe.training.parameters import Arrays
from metaframe.training.step import StepReport


@dataclass
class History:
    """Records produced by `MetaTrainer.fit`.

    Attributes:
        meta_loss: the mean query loss of every iteration.
        eval_loss: `(iteration, loss)` of every evaluation; iterations count from 0, and -1 is for
            one that a failed run left to this one.
        eval_score: `(iteration, metric)` likewise, if the trainer has a metric.
        stopped: why the run ended before its last iteration; None if it did not.

    >>> history = History(meta_loss=[4.5, 3.0])
    >>> history.meta_loss[-1], history.stopped
    (3.0, None)
    """

    meta_loss: list[float] = field(default_factory=list)
    eval_loss: list[tuple[int, float]] = field(default_factory=list)
    eval_score: list[tuple[int, float]] = field(default_factory=list)
    stopped: str | None = None


class Trainer(Protocol):
    """A trainer as callbacks and checkpoints use it; `MetaTrainer` is one."""

    step: int
    """The outer steps taken in all."""

    @property
    def maml(self) -> MetaLearner:
        """The learner."""
        ...

    def state(self) -> tuple[Arrays, dict[str, Any]]:
        """The state of the training: arrays by name, and plain values."""
        ...

    def restore(self, arrays: Arrays, plain: Mapping[str, Any]) -> None:
        """Go on from what `state` returned."""
        ...


@dataclass
class Run:
    """One call of `fit`, as callbacks see it.

    Attributes:
        trainer: who runs it; `trainer.step` counts the outer steps taken in all.
        num_iterations: outer steps of this call.
        tasks_per_step: the meta-batch size.
        history: what was recorded so far.
        iteration: the current iteration of this call, from 0.
        report: what the last outer step found.
        in_block: True if further steps were taken together with that one, whose reports come next.
        evaluation: what the last evaluation found.
        merits: the metric, or without one minus the loss, of every evaluation within `fit` since
            the trainer was made; those before this call too, and before a checkpoint that it was
            loaded from.

    >>> run = Run(trainer=None, num_iterations=10, tasks_per_step=4)
    >>> run.stop("good enough")
    >>> run.history.stopped
    'good enough'
    """

    trainer: Trainer
    num_iterations: int
    tasks_per_step: int
    history: History = field(default_factory=History)
    iteration: int = -1
    report: StepReport | None = None
    in_block: bool = False
    evaluation: Evaluation | None = None
    merits: list[float] = field(default_factory=list)

    def stop(self, reason: str) -> None:
        """End the run after this iteration; called in `on_start`, before the first.

        Of several processes that share a run one is enough, and all of them end after the next
        iteration in which they agree on it: every tenth, and every one with an evaluation.

        Args:
            reason: why, for `history.stopped`; the first reason is kept.
        """
        self.history.stopped = self.history.stopped or reason


class Callback:
    """Base of callbacks, which does nothing: override the methods of interest.

    Attributes:
        everywhere: in a run of several processes, True for a callback that is called in all of
            them, False for one that is called in the first alone, as suits what writes files.

    >>> class StopAt(Callback):
    ...     def __init__(self, loss):
    ...         self.loss = loss
    ...
    ...     def on_step(self, run):
    ...         if run.report.loss < self.loss:
    ...             run.stop(f"loss below {self.loss}")
    >>> StopAt(0.5).loss
    0.5
    """

    everywhere: bool = True

    def is_due(self, step: int) -> bool:
        """True if the callback may look at the learner after outer step number `step`.

        Between two such steps `fit` takes several without waiting for their losses, and then calls
        `on_step` and `on_iteration` for each of them with its report and `trainer.step`, but with
        the learner as it was before all of them. Default: after every step, for a callback with
        one of these two methods.

        Args:
            step: the number of outer steps taken in all, from 1.

        Returns:
            Whether the losses of the steps so far are waited for.
        """
        del step
        mine = type(self)
        return (mine.on_step, mine.on_iteration) != (Callback.on_step, Callback.on_iteration)

    def on_start(self, run: Run) -> None:
        """Called before the first iteration.

        Args:
            run: the call of `fit`; `run.stop(reason)` ends it.
        """

    def on_step(self, run: Run) -> None:
        """Called after every outer step.

        Args:
            run: the call of `fit`, with `run.report` of this step.
        """

    def on_evaluation(self, run: Run) -> None:
        """Called after every evaluation, which comes after the step's `on_step`.

        Args:
            run: the call of `fit`, with `run.evaluation` as measured now.
        """

    def on_iteration(self, run: Run) -> None:
        """Called at the end of every iteration: after its step, and its evaluation if one was due.

        Args:
            run: the call of `fit`.
        """

    def on_end(self, run: Run) -> None:
        """Called after the last iteration, also of a run that was stopped, interrupted or failed.

        It is called if `on_start` returned, whatever other callbacks raise.

        Args:
            run: the call of `fit`.
        """


class EachStep(Callback):
    """Calls a function of iteration and loss after every step."""

    def __init__(self, function: Callable[[int, float], None]) -> None:
        arguments.function(function, "callback")
        self._function = function

    def on_step(self, run: Run) -> None:
        """Hand over the iteration, counted from 0, and its loss."""
        self._function(run.iteration, run.history.meta_loss[-1])


class EarlyStopping(Callback):
    """Stops when evaluations no longer improve.

    What improves is the metric, which rises, or without one the loss, which falls. All evaluations
    within `fit` of the same trainer count, also before it was saved and loaded: a run in parts
    stops where one in a single piece does, and does not go on once it has. More patience lets it.

    Args:
        patience: evaluations without an improvement before the run stops, at least 1.
        min_delta: what counts as an improvement, in the unit of the metric or the loss.

    >>> import numpy as np
    >>> from metaframe.training import Evaluation
    >>> run, watch = Run(None, num_iterations=9, tasks_per_step=4), EarlyStopping(patience=2)
    >>> for loss in (1.0, 1.5, 1.25):
    ...     run.evaluation = Evaluation(np.array([[loss], [loss]]))
    ...     watch.on_evaluation(run)
    >>> run.history.stopped
    'no improvement in 2 evaluations'
    """

    def __init__(self, patience: int, min_delta: float = 0.0) -> None:
        arguments.integer(patience, "patience", at_least=1)
        self._patience = patience
        self._min_delta = min_delta
        self._best = -math.inf
        self._waited = 0

    def on_start(self, run: Run) -> None:
        """Take in what the trainer has measured before."""
        self._best, self._waited = -math.inf, 0
        for value in run.merits:
            self._compare(value)
        self._stop_if_enough(run)

    def on_evaluation(self, run: Run) -> None:
        """Compare with the best so far."""
        self._compare(merit(run.evaluation))
        self._stop_if_enough(run)

    def _compare(self, value: float) -> None:
        improved = value > self._best + self._min_delta
        self._best = value if improved else self._best
        self._waited = 0 if improved else self._waited + 1

    def _stop_if_enough(self, run: Run) -> None:
        if self._waited >= self._patience:
            run.stop(f"no improvement in {self._waited} evaluations")


def merit(evaluation: Evaluation | None) -> float:
    """The score to maximise: the metric, or without one minus the loss."""
    if evaluation is None:
        return -math.inf
    if evaluation.scores is None:
        return -evaluation.loss.mean
    return evaluation.transductive.mean


def watchers_of(callbacks: Any, callback: Callable[[int, float], None] | None) -> list[Callback]:
    """All callbacks of a run, in one list.

    Raises:
        InputTypeError: something that is no callback.
    """
    if not isinstance(callbacks, Iterable):
        raise InputTypeError(
            f"callbacks must be a list of Callback, received {type(callbacks).__qualname__}."
        )
    found = list(callbacks)
    for i, watcher in enumerate(found):
        if not isinstance(watcher, Callback):
            raise InputTypeError(
                f"callbacks[{i}] is a {type(watcher).__qualname__}, expected an instance of "
                "Callback. A function of iteration and loss is callback=."
            )
    return found if callback is None else [*found, EachStep(callback)]


@contextmanager
def watched(run: Run, watchers: Sequence[Callback]) -> Iterator[None]:
    """Every callback that has started ends, in the same order, whatever others raise."""
    started: list[Callback] = []
    try:
        for watcher in watchers:
            watcher.on_start(run)
            started.append(watcher)
        yield
    finally:
        with ExitStack() as ends:
            for watcher in reversed(started):
                ends.callback(watcher.on_end, run)
