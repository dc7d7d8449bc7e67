"""One call of `MetaTrainer.fit`: steps, and after each those who watch, evaluations and the end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from metaframe.tasks import Task
from metaframe.training import blocks
from metaframe.training.batches import batches
from metaframe.training.blocks import Validation
from metaframe.training.callbacks import Callback, Run, merit
from metaframe.training.evaluation import Evaluation
from metaframe.training.finite import check_finite
from metaframe.training.interrupt import Interrupt
from metaframe.training.report import StepReport


class Fitted(blocks.Stepping, Protocol):
    """A trainer as one call of its `fit` sees it."""

    owes_validation: bool
    position: Mapping[str, Any] | None
    merits: list[float]
    ending: Callable[..., bool]

    def advance(self, batch: Task, num_tasks: int | None = None) -> StepReport:
        """Take one step on a stacked batch."""
        ...

    def blame(self, batch: Task, task: int | None = None) -> tuple[int | None, str]:
        """The task of the batch that is not finite, by its gradient if not known, and a remedy."""
        ...

    def evaluated(self, tasks: Any) -> Evaluation:
        """The results of the learner on these tasks."""
        ...


class Fitting:
    """One call of `fit` once its arguments are checked.

    Args:
        trainer: whose steps it takes.
        run: as callbacks see it.
        validation: what is evaluated.
        watchers: the callbacks, which have started.
        interrupt: Ctrl-C.
    """

    def __init__(
        self,
        trainer: Fitted,
        run: Run,
        validation: Validation,
        watchers: Sequence[Callback],
        interrupt: Interrupt,
    ) -> None:
        self._trainer, self._run = trainer, run
        self._validation, self._watchers = validation, watchers
        self._interrupt = interrupt

    def is_over_before(self) -> bool:
        """Validate if an earlier run left that to this one; return whether the run is over."""
        owed = self._trainer.owes_validation and self._validation.is_due(self._trainer.step)
        if owed:
            self._end_iteration()
        # A callback may have found that the run was over before this call.
        return self._ends(evaluated=owed)

    def go(
        self, *, prefetch: bool, share: Sequence[int] | None = None, num_tasks: int | None = None
    ) -> None:
        """Take the steps, in blocks or one by one."""
        with self._threads():
            if blocks.serve(self._trainer):
                self._by_blocks()
            else:
                self._one_by_one(prefetch, share, num_tasks)

    def _threads(self) -> AbstractContextManager[object]:
        """Threads by the size of a step; a convolution, on images, keeps those that there are."""
        trainer = self._trainer
        backend, variables = trainer.maml.backend, list(trainer.maml.meta_arrays().values())
        if any(len(x.shape) >= 4 for x in variables) or not backend.on_cpu(variables[0]):
            return nullcontext()
        each = sum(math.prod(x.shape) for x in variables) + blocks.elements(trainer.task_sampler)
        return backend.threads_for(self._run.tasks_per_step * each)

    def _one_by_one(
        self, prefetch: bool, share: Sequence[int] | None, num_tasks: int | None
    ) -> None:
        trainer, run = self._trainer, self._run
        source = batches(
            trainer.task_sampler,
            run.tasks_per_step,
            run.num_iterations,
            prefetch=prefetch,
            share=share,
        )
        with source as ahead:
            for batch in ahead:
                report = trainer.advance(batch.tasks, num_tasks)
                if self._follow(report, batch.position):
                    return

    def _by_blocks(self) -> None:
        plan = blocks.Blocks(self._trainer, self._run, self._validation, self._watchers)
        over, started = False, time.perf_counter()
        while not over and (block := plan.next()):
            over = self._looked_at(block)
            now = time.perf_counter()
            plan.took(block.count, now - started)
            started = now

    def _looked_at(self, block: blocks.Block) -> bool:
        """Tell who watches of each step of a started block; return whether the run is over."""
        trainer, taken = self._trainer, 0
        try:
            found, failed = block.reports()
            for report in found:
                taken += 1
                if taken == block.count:
                    block.settle(taken)
                trainer.step += 1
                self._run.in_block = taken < block.count
                if self._follow(report, block.position(taken)):
                    return True
        finally:
            if taken < block.count:
                block.settle(taken)
        if failed is not None:
            batch = block.batch(taken)
            check_finite(failed, trainer.step, lambda task: trainer.blame(batch, task))
        return False

    def _follow(self, report: StepReport, position: Mapping[str, Any] | None) -> bool:
        """Tell who watches of a step, and validate if due; return whether the run is over."""
        trainer, run = self._trainer, self._run
        run.iteration += 1
        run.report = report
        trainer.owes_validation = self._validation.is_due(trainer.step)
        trainer.position = position
        run.history.meta_loss.append(report.loss)
        for watcher in self._watchers:
            watcher.on_step(run)
        return self._ends(evaluated=self._end_iteration())

    def _end_iteration(self) -> bool:
        """Validate if that is due; return whether it was."""
        due = self._trainer.owes_validation
        if due:
            self._evaluate()
        for watcher in self._watchers:
            watcher.on_iteration(self._run)
        return due

    def _evaluate(self) -> None:
        trainer, run = self._trainer, self._run
        found = run.evaluation = trainer.evaluated(self._validation.tasks)
        trainer.owes_validation = False
        trainer.merits.append(merit(found))
        run.history.eval_loss.append((run.iteration, found.loss.mean))
        if found.scores is not None:
            run.history.eval_score.append((run.iteration, found.transductive.mean))
        for watcher in self._watchers:
            watcher.on_evaluation(run)

    def _ends(self, *, evaluated: bool) -> bool:
        return self._trainer.ending(self._run, self._interrupt, evaluated=evaluated)
