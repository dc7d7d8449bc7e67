"""Processes that share a run stop after the same step.

Ctrl-C reaches one process a step before another, and a callback that runs in the first process
alone stops that one alone. Whoever left would be waited for in the next step's sum. So a wish to
stop is carried out at steps that all processes know of, where they exchange two numbers: before the
first and then not at every step, which would have a second exchange.
"""

from __future__ import annotations

import numpy as np

from metaframe.backend.types import Array
from metaframe.backend.workers import AllSum
from metaframe.core.compile import compile
from metaframe.learners.functions import array_like
from metaframe.learners.meta_learner import MetaLearner
from metaframe.training.callbacks import Run
from metaframe.training.interrupt import Interrupt

AGREE_EVERY = 10
"""Iterations from one exchange to the next, from 0; there is one after every evaluation too."""
ELSEWHERE = "stopped by another process"


def ends_alone(run: Run, interrupt: Interrupt, *, evaluated: bool) -> bool:
    """As `Ending`, of a run in one process."""
    del interrupt, evaluated
    return run.history.stopped is not None


class Ending:
    """True if a run ends now, as all processes that share it decide."""

    def __init__(self, maml: MetaLearner) -> None:
        backend = maml.backend
        self._maml = maml

        def sums(flags: Array) -> Array:
            def part(mine: tuple[Array, ...], index: Array, all_sum: AllSum) -> tuple[Array, ...]:
                del index
                return (all_sum(backend.ops.sum(mine[0], axis=0)),)

            (total,) = backend.workers().each(part, (flags,), shared=True)
            return total

        self._sums = compile(sums) if backend.compiles_quickly else sums

    def __call__(self, run: Run, interrupt: Interrupt, *, evaluated: bool) -> bool:
        """Called by all processes after the same iterations."""
        backend = self._maml.backend
        workers = backend.workers()
        if workers.processes == 1:
            return run.history.stopped is not None
        done = run.iteration + 1
        if not (evaluated or done % AGREE_EVERY == 0 or done == run.num_iterations):
            return False
        wishes = [run.history.stopped is not None, interrupt.held]
        flags = np.tile(np.array(wishes, np.float32), (workers.count // workers.processes, 1))
        total = self._sums(array_like(flags, self._maml.meta_parameters(), backend))
        stopped, interrupted = backend.to_numpy(total) > 0
        if stopped:
            run.stop(ELSEWHERE)  # unless this one has a reason of its own
        interrupt.held = bool(interrupted)
        return bool(stopped)
