"""Batches of tasks, made ahead of time in one background thread.

Prefetching changes nothing but the time: batches come in the order in which they were sampled, and
each carries the sampler's state right after it, so that whoever stops early can put the sampler
back to where the training is.
"""

from __future__ import annotations

import contextvars
import queue
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from metaframe.tasks import IndexedSampler, Task, TaskSampler, stack_tasks

AHEAD = 2
"""Batches kept ready."""


class Batch(NamedTuple):
    """A stacked batch, and the sampler's state after it (None if it does not tell)."""

    tasks: Task
    position: Mapping[str, Any] | None


def sample_batch(sampler: TaskSampler, count: int, share: Sequence[int] | None = None) -> Task:
    """The sampler's next `count` tasks, stacked; with `share`, those of them with these numbers."""
    at_once = getattr(sampler, "sample_batch", None)
    if share is None:
        return stack_tasks(sampler.sample(count)) if at_once is None else at_once(count)
    if isinstance(sampler, IndexedSampler):
        return sampler.sample_batch(count, share)
    tasks = sampler.sample(count)
    return stack_tasks([tasks[i] for i in share])


def is_restorable(sampler: object) -> bool:
    """True if the sampler can say where it is and go back there."""
    return hasattr(sampler, "state") and hasattr(sampler, "restore")


def warn_of_position(step: int, sampler: TaskSampler) -> None:
    """That a resumed run may come to other tasks; `sampler` is the one that it goes on with."""
    lacking = "this sampler" if not is_restorable(sampler) else "the sampler that it was saved with"
    warnings.warn(
        f"the checkpoint was taken after {step} steps, and the task sampler "
        f"({type(sampler).__qualname__}) cannot be put back to where it was then: {lacking} has no "
        "state() and restore(). Training goes on with whatever tasks it gives next, perhaps those "
        "of the first steps again. Give it both, see TaskSampler.",
        stacklevel=3,
    )


@contextmanager
def batches(
    sampler: TaskSampler,
    size: int,
    count: int,
    *,
    prefetch: bool = True,
    share: Sequence[int] | None = None,
) -> Iterator[Iterator[Batch]]:
    """`count` batches of `size` tasks; with `share`, of those of them with these numbers.

    On leaving, a sampler that can is back at the last batch that was taken. One that cannot is
    never sampled ahead.
    """
    restorable = is_restorable(sampler)

    def make() -> Batch:
        tasks = sample_batch(sampler, size, share)
        return Batch(tasks, dict(sampler.state()) if restorable else None)  # type: ignore[attr-defined]

    if not (prefetch and restorable and count > 1):
        yield (make() for _ in range(count))
        return
    taken: Mapping[str, Any] = dict(sampler.state())  # type: ignore[attr-defined]
    ahead = _Ahead(make, count)

    def take() -> Iterator[Batch]:
        nonlocal taken
        for batch in ahead:
            taken = batch.position or taken
            yield batch

    try:
        yield take()
    finally:
        ahead.stop()
        sampler.restore(taken)  # type: ignore[attr-defined]


class _Ahead:
    """Runs `make` up to `count` times in a thread and hands the results over in order."""

    def __init__(self, make: Any, count: int) -> None:
        self._ready: queue.Queue[Any] = queue.Queue(AHEAD)
        self._stopped = threading.Event()
        self._count = count
        # The selected backend is a context variable; a new thread would not see it.
        context = contextvars.copy_context()
        self._thread = threading.Thread(
            target=lambda: context.run(self._run, make), name="metaframe-batches", daemon=True
        )
        self._thread.start()

    def _run(self, make: Any) -> None:
        for _ in range(self._count):
            try:
                item = make()
            except BaseException as error:  # noqa: BLE001  handed to the thread that waits
                item = _Failed(error)
            if not self._put(item) or isinstance(item, _Failed):
                return

    def _put(self, item: Any) -> bool:
        while not self._stopped.is_set():
            try:
                self._ready.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self._count):
            item = self._ready.get()
            if isinstance(item, _Failed):
                raise item.error
            yield item

    def stop(self) -> None:
        """End the thread and wait for it: nothing samples after this."""
        self._stopped.set()
        self._thread.join()


class _Failed(NamedTuple):
    error: BaseException
