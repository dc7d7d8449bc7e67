"""Workers: the processes and devices that share the tasks of a meta-batch.

A framework's own engine starts them and carries what they exchange: torch.distributed,
jax.distributed with a mesh, tf.distribute. Through this interface a backend says who they are, runs
one function on each of them, and adds up arrays over all of them.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Array = Any
Arrays = tuple[Array, ...]
AllSum = Callable[[Array], Array]
"""An array -> its sum over all workers, the same bits on each. One collective a call."""
Part = Callable[[Arrays, Any, AllSum], Arrays]
"""`(tasks of this worker, its index, all_sum) -> arrays`, the same ones on every worker."""


@dataclass(frozen=True)
class Place:
    """Where this process stands among those that run together.

    Attributes:
        process: its number, from 0.
        processes: how many there are.
        local_process: its number among those on this machine.
        address: "host:port" at which process 0 brings them together.
        peers: "host:port" of every process, for an engine that wants to know them all; may be
            empty for the others.
        timeout: seconds after which a process that does not answer is given up.
    """

    process: int
    processes: int
    local_process: int
    address: str
    peers: tuple[str, ...]
    timeout: float


class Workers(abc.ABC):
    """Who shares the work.

    Attributes:
        count: workers in all; a process has one or more of them.
        process: which process this is, from 0.
        processes: processes in all.
        agreed: digests of what the processes found equal.
    """

    def __init__(self, count: int = 1, process: int = 0, processes: int = 1) -> None:
        self.count = count
        self.process = process
        self.processes = processes
        self.agreed: set[str] = set()

    @property
    def is_first(self) -> bool:
        """Is this the process that writes files and reports?"""
        return self.process == 0

    @abc.abstractmethod
    def each(self, part: Part, tasks: Arrays) -> Arrays:
        """Run `part` on every worker and return what it returns, which is the same on all.

        Args:
            part: pure, but for its `all_sum`.
            tasks: the same arrays in every process. The length of their leading axis is a multiple
                of `count`; every worker gets an equal, contiguous part of them.

        Raises:
            InputError: within a gradient or vmap, where the sum would be differentiated too.
        """

    @abc.abstractmethod
    def tell(self, text: str) -> list[str]:
        """What every process tells here, in their order. Waits for all of them."""

    def leave_word(self, text: str) -> None:
        """Leave a last word for the others, if the engine keeps any."""
        del text

    def last_word(self) -> str | None:
        """What one that failed left."""
        return None


class Alone(Workers):
    """No engine is active: this process and nobody else."""

    def each(self, part: Part, tasks: Arrays) -> Arrays:
        """Run `part` here."""
        return part(tasks, 0, lambda x: x)

    def tell(self, text: str) -> list[str]:
        """What this process tells."""
        return [text]


ALONE = Alone()
