"""Blocks: outer steps that `MetaTrainer.fit` takes without anyone looking at the learner.

A block is several outer steps that are started before the first one's loss is looked at. It ends
where someone looks at the learner: before an evaluation, a checkpoint, a callback that may read the
weights, another epoch. What was found is looked at after the block, step by step in order, as if
each had just been taken; where that ends the run, or finds a number that is not finite, the block
is taken again from its start up to that step, which gives the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, cast

from metaframe import tree
from metaframe.tasks import IndexedSampler, Task, TaskSampler
from metaframe.training.callbacks import Callback, Run, Trainer
from metaframe.training.finite import is_finite
from metaframe.training.pure_step import At, PureStep, Steps
from metaframe.training.report import StepReport
from metaframe.training.step import OuterStep, StepSettings

FEW = 8
"""Fewer steps than these between two looks are not worth a program of several."""
STEPS_AT_MOST = 32
"""Steps in a block, unless the user says otherwise."""
BYTES_AT_MOST = 2**25
"""Of the tasks of a block."""
SECONDS = 0.1
"""The longest time of a block, in seconds: so long Ctrl-C and a progress bar wait."""
WORTH_A_LOOP = 4 * STEPS_AT_MOST
"""Iterations from which on a program of several steps is made, unless the user says otherwise."""


class Stepping(Trainer, Protocol):
    """A trainer as what takes its steps sees it."""

    task_sampler: TaskSampler
    settings: StepSettings
    steps_per_epoch: int
    outer: OuterStep

    def rate(self, step: int) -> float | None:
        """The outer learning rate after `step` steps; None without a schedule."""
        ...


class Validation(NamedTuple):
    """The tasks of an evaluation in a run, and how often it comes."""

    tasks: Any
    every: int | None

    def is_due(self, step: int) -> bool:
        """True if an evaluation comes after outer step number `step`."""
        return self.every is not None and step % self.every == 0


class Blocks:
    """The length of blocks, and their tasks.

    Args:
        trainer: whose steps they are.
        run: the run that they are a part of.
        validation: what is evaluated within it.
        watchers: who looks at the learner.
    """

    def __init__(
        self, trainer: Stepping, run: Run, validation: Validation, watchers: Sequence[Callback]
    ) -> None:
        self._trainer, self._run = trainer, run
        self._validation, self._watchers = validation, watchers
        wanted = trainer.settings.steps_per_call
        size = sum(x.nbytes for x in _next_task(cast(IndexedSampler, trainer.task_sampler)))
        fitting = max(1, BYTES_AT_MOST // (size * run.tasks_per_step))
        self._longest = wanted or min(STEPS_AT_MOST, fitting)
        # Someone may look soon and then seldom: the second gap is a whole one.
        gap = self._gap(trainer.step)
        self._longest = max(gap, self._gap(trainer.step + gap)) if wanted is None else wanted
        looped = isinstance(trainer.outer, PureStep) and trainer.outer.looped
        worth = run.num_iterations >= WORTH_A_LOOP and self._longest >= FEW
        self._together = looped and (worth if wanted is None else wanted > 1)
        # The first is the one that is compiled, and says nothing of the others' time.
        self._length = wanted or 1
        self._adapts = wanted is None
        self._rows: Rows | None = None

    def next(self) -> Block | None:
        """Start the next block; None if there are no steps left."""
        trainer, sampler = self._trainer, cast(IndexedSampler, self._trainer.task_sampler)
        left = self._run.num_iterations - self._run.iteration - 1
        count = min(left, self._length, self._gap(trainer.step))
        if not count:
            return None
        rows = self._rows
        if rows is None or not rows.go_on(sampler):
            drawn = self._longest if self._together else count
            rows = self._rows = Rows(sampler, self._run.tasks_per_step, drawn)
        trainer.maml.epoch = trainer.step // trainer.steps_per_epoch
        return Block(trainer, rows, min(count, rows.left), together=self._together)

    def took(self, steps: int, seconds: float) -> None:
        """Let the next block be as long as the time allows."""
        if self._adapts:
            fitting = int(SECONDS * steps / max(seconds, 1e-9))
            self._length = max(1, min(2 * self._length, fitting, self._longest))

    def _gap(self, step: int) -> int:
        """Steps from there until someone looks at the learner."""
        every = self._trainer.steps_per_epoch
        epoch = every - step % every
        for steps in range(1, min(self._longest, epoch)):
            at = step + steps
            if self._validation.is_due(at) or any(w.is_due(at) for w in self._watchers):
                return steps
        return min(self._longest, epoch)


class Rows:
    """Batches that were drawn together, of which each block takes some.

    Args:
        sampler: whose next batches they are. It stays where it is.
        size: tasks in a batch.
        count: how many batches.
    """

    def __init__(self, sampler: IndexedSampler, size: int, count: int) -> None:
        self._size, self._count = size, count
        self._state = sampler.state()
        self.tasks = sampler.sample_batches(count, size)
        sampler.restore(self._state)
        self.taken = 0

    def __len__(self) -> int:
        return self._count

    @property
    def left(self) -> int:
        """Batches that no block took."""
        return self._count - self.taken

    def go_on(self, sampler: IndexedSampler) -> bool:
        """True if the sampler's next batch is the next of these."""
        return self.left > 0 and sampler.state() == self.position(self.taken)

    def position(self, taken: int) -> dict[str, Any]:
        """The sampler's position after so many of the batches."""
        return {**self._state, "position": int(self._state["position"]) + taken * self._size}


def serve(trainer: Stepping) -> bool:
    """True if blocks are of use: nobody has to look at every step, and tasks are drawn in no time.

    Statistics and the steps of several processes, or of an optimizer that changes variables in
    place, are one at a time; and so are those of a sampler that is sampled ahead in a thread.
    """
    sampler, settings = trainer.task_sampler, trainer.settings
    return (
        isinstance(trainer.outer, PureStep)
        and not (settings.distributed or trainer.maml.statistics or settings.steps_per_call == 1)
        and isinstance(sampler, IndexedSampler)
        and sampler.quick
        and type(sampler).sample_batch is IndexedSampler.sample_batch
    )


def elements(sampler: TaskSampler) -> int:
    """The elements of a task; 0 for a sampler that would take its time to tell."""
    if not (isinstance(sampler, IndexedSampler) and sampler.quick):
        return 0
    return sum(math.prod(x.shape) for x in _next_task(sampler))


def _next_task(sampler: Any) -> Sequence[Any]:
    """The arrays of the sampler's next task, which stays where it is."""
    return tree.leaves(sampler._drawn([sampler.position]))


class Block:
    """Steps that were started together.

    Args:
        trainer: whose steps they are.
        rows: their batches, from the next one on.
        count: how many steps.
        together: in one program.
    """

    def __init__(self, trainer: Stepping, rows: Rows, count: int, *, together: bool) -> None:
        assert isinstance(trainer.outer, PureStep), "other steps are taken one by one"
        self.count = count
        self._outer, self._trainer, self._rows = trainer.outer, trainer, rows
        self._first = rows.taken
        self._start: At = self._outer.at()
        self._random = trainer.maml.backend.random_state()
        rates = [trainer.rate(trainer.step + i) for i in range(count)]
        rest = len(rows) - self._first - count  # of which nobody may have thought
        self._rates = [*rates[:1] * self._first, *rates, *rates[-1:] * rest]
        self._together = together
        self._steps = self._several(count)

    def reports(self) -> tuple[list[StepReport], StepReport | None]:
        """The reports of the steps, and the first one that is not finite, with which they end."""
        found = self._steps.reports()
        bad = next((i for i, report in enumerate(found) if not is_finite(report)), None)
        return (found, None) if bad is None else (found[:bad], found[bad])

    def position(self, steps: int) -> dict[str, Any]:
        """The sampler's position after so many of the steps."""
        return self._rows.position(self._first + steps)

    def settle(self, taken: int) -> None:
        """Have the learner be as it is after `taken` of the steps."""
        backend, sampler = self._trainer.maml.backend, self._trainer.task_sampler
        if taken == self.count:
            self._outer.assign(self._steps.end)
        else:
            backend.restore_random_state(self._random)
            if taken:
                self._outer.assign(self._several(taken).end)
        cast(IndexedSampler, sampler).restore(self.position(taken))
        self._rows.taken = self._first + taken

    def batch(self, step: int) -> Task:
        """The tasks of one of the steps."""
        one: Task = tree.map(lambda x: x[self._first + step], self._rows.tasks)
        return one

    def _several(self, count: int) -> Steps:
        tasks, start = self._rows.tasks, self._start
        if self._together:
            return self._outer.several(start, tasks, self._rates, self._first, count)
        return self._outer.in_calls(start, tasks, self._rates, count)
