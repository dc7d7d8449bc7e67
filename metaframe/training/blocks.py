"""Blocks: outer steps that `MetaTrainer.fit` takes without anyone looking at the learner.

A block is several outer steps that are started before the first one's loss is looked at. It ends
where someone looks at the learner: before an evaluation, a checkpoint, a callback that may read the
weights, another epoch. What was found is looked at after the block, step by step in order, as if
each had just been taken; where that ends the run, or finds a number that is not finite, the block
is taken again from its start up to that step, which gives the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from metaframe import tree
from metaframe.tasks import IndexedSampler, Task
from metaframe.training.callbacks import Callback, Run
from metaframe.training.finite import is_finite
from metaframe.training.pure import At, PureStep, Steps
from metaframe.training.report import StepReport

if TYPE_CHECKING:
    from metaframe.training.fitting import Validation
    from metaframe.training.trainer import MetaTrainer

STEPS_AT_MOST = 32
"""Steps in a block, unless the user says otherwise."""
BYTES_AT_MOST = 2**25
"""Of the tasks of a block."""
SECONDS = 0.1
"""How long a block may take: so long Ctrl-C and a progress bar wait."""
WORTH_A_LOOP = 4 * STEPS_AT_MOST
"""Iterations from which on a program of several steps is made, unless the user says otherwise."""


class Blocks:
    """How long blocks are, and their tasks.

    Args:
        trainer: whose steps they are.
        run: the run that they are a part of.
        validation: what is evaluated within it.
        watchers: who looks at the learner.
    """

    def __init__(
        self, trainer: MetaTrainer, run: Run, validation: Validation, watchers: Sequence[Callback]
    ) -> None:
        self._trainer, self._run = trainer, run
        self._validation, self._watchers = validation, watchers
        wanted = trainer.settings.steps_per_call
        sampler: Any = trainer.task_sampler
        size = tree.leaves(tree.map(lambda x: x.nbytes, sampler._drawn([sampler.position])))
        fitting = max(1, BYTES_AT_MOST // (sum(size) * run.tasks_per_step))
        self.longest = wanted or min(STEPS_AT_MOST, fitting)
        looped = isinstance(trainer.outer, PureStep) and trainer.outer.looped
        worth = wanted is not None or run.num_iterations >= WORTH_A_LOOP
        self.together = looped and worth and self._gap() == self.longest > 1
        # The first is the one that is compiled, and says nothing of the others' time.
        self._length = wanted or 1
        self._adapts = wanted is None

    def next(self) -> int:
        """How many steps the next block has."""
        left = self._run.num_iterations - self._run.iteration - 1
        return min(left, self._length, self._gap())

    def took(self, steps: int, seconds: float) -> None:
        """Let the next block be as long as the time allows."""
        if self._adapts:
            fitting = int(SECONDS * steps / max(seconds, 1e-9))
            self._length = max(1, min(2 * self._length, fitting, self.longest))

    def _gap(self) -> int:
        """Steps until someone looks at the learner."""
        trainer = self._trainer
        epoch = trainer.steps_per_epoch - trainer.step % trainer.steps_per_epoch
        for steps in range(1, min(self.longest, epoch)):
            at = trainer.step + steps
            if self._validation.is_due(at) or any(w.is_due(at) for w in self._watchers):
                return steps
        return min(self.longest, epoch)

    def draw(self, count: int) -> tuple[Task, list[Mapping[str, Any]]]:
        """The batches of the next `count` steps, and where the sampler is after each."""
        sampler: Any = self._trainer.task_sampler
        size, state = self._run.tasks_per_step, sampler.state()
        after = [{**state, "position": state["position"] + (i + 1) * size} for i in range(count)]
        rows = self.longest if self.together else count
        batches = sampler.sample_batches(rows, size)
        sampler.restore(after[-1])
        return batches, after


def serve(trainer: MetaTrainer) -> bool:
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


class Block:
    """Steps that were started together.

    Args:
        trainer: whose steps they are.
        batches: their tasks.
        count: how many steps.
        together: in one program.
    """

    def __init__(self, trainer: MetaTrainer, batches: Task, count: int, *, together: bool) -> None:
        assert isinstance(trainer.outer, PureStep), "other steps are taken one by one"
        self._outer, self._trainer = trainer.outer, trainer
        self._batches, self._count = batches, count
        self._start: At = self._outer.at()
        self._random = trainer.maml.backend.random_state()
        self._rates = [trainer.rate(trainer.step + i) for i in range(count)]
        self._together = together
        self._rows = len(tree.leaves(batches)[0])
        self._steps = self._several(count)

    def reports(self) -> tuple[list[StepReport], StepReport | None]:
        """What the steps found, and the first report that is not finite, with which they end."""
        found = self._steps.reports()
        bad = next((i for i, report in enumerate(found) if not is_finite(report)), None)
        return (found, None) if bad is None else (found[:bad], found[bad])

    def settle(self, taken: int) -> None:
        """Have the learner be as it is after `taken` of the steps."""
        backend = self._trainer.maml.backend
        if taken == self._count:
            self._outer.assign(self._steps.end)
            return
        backend.restore_random_state(self._random)
        if taken:
            self._outer.assign(self._several(taken).end)

    def batch(self, step: int) -> Task:
        """The tasks of one of the steps."""
        one: Task = tree.map(lambda x: x[step], self._batches)
        return one

    def _several(self, count: int) -> Steps:
        rates = [*self._rates, *self._rates[-1:] * (self._rows - len(self._rates))]
        return self._outer.several(
            self._start, self._batches, rates, count, together=self._together
        )
