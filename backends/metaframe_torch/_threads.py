"""The threads of torch's operations, in a training loop of small programs.

Two threads that share a kernel of microseconds wait for each other at its end, busily; where
something else runs on a core, each kernel takes as long as that does. One thread is as quick for
small programs, and leaves the other cores to the sampling of tasks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

SMALL = 2**19
"""Elements of a step's tasks and copies of the variables: up to here one thread is enough."""
AT_IMPORT = torch.get_num_threads()


@contextmanager
def threads_for(elements: int) -> Iterator[None]:
    """One thread for a small program, unless the user has chosen a number."""
    before = torch.get_num_threads()
    if elements > SMALL or before == 1 or is_chosen(before):
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        if torch.get_num_threads() == 1:  # and nobody has set it meanwhile
            torch.set_num_threads(before)


def is_chosen(threads: int) -> bool:
    """True if this number of threads is not the one that torch takes by itself."""
    if any(os.environ.get(name) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")):
        return True
    return threads != AT_IMPORT or threads not in (cores(), cores() // 2)


def cores() -> int:
    """The logical cores that this process may use; torch takes as many, or one of each pair."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
