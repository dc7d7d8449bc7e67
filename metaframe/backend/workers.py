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

from metaframe.backend.types import Array, Arrays

AllSum = Callable[[Array], Array]
"""An array -> its sum over all workers, the same bits on each. One collective a call."""
Part = Callable[[Arrays, Any, AllSum], Arrays]
"""`(tasks of this worker, its index, all_sum) -> arrays`, the same ones on every worker."""


@dataclass(frozen=True)
class Place:
    """The place of this process among those that run together.

    Attributes:
        process: its number, from 0.
        processes: how many there are.
        local_process: its number among those on this machine.
        address: "host:port" at which process 0 brings them together.
        peers: "host:port" of every process, for an engine that wants to know them all; may be
            empty for the others.
        timeout: seconds after which a process that does not answer is given up.

    >>> Place(1, 2, 1, address="node0:29500", peers=(), timeout=300).processes
    2
    """

    process: int
    processes: int
    local_process: int
    address: str
    peers: tuple[str, ...]
    timeout: float


@dataclass(frozen=True)
class Share:
    """Says that a batch holds one process's part of the tasks, as `Workers.share` gives it.

    For `distributed=` where drawing or placing the whole batch in every process costs too much.

    Args:
        num_tasks: how many tasks the processes have in all.

    >>> Share(num_tasks=32).num_tasks
    32
    """

    num_tasks: int


class Workers(abc.ABC):
    """The processes and devices that share the work.

    Attributes:
        count: workers in all; a process has one or more of them.
        process: which process this is, from 0.
        processes: processes in all.
        agreed: digests of what the processes found equal.

    >>> from metaframe.distributed import session
    >>> with session("torch") as workers:
    ...     workers.processes, workers.is_first, workers.share(3)
    (1, True, [0, 1, 2])
    """

    def __init__(self, count: int = 1, process: int = 0, processes: int = 1) -> None:
        self.count = count
        self.process = process
        self.processes = processes
        self.agreed: set[str] = set()

    @property
    def is_first(self) -> bool:
        """True if this is the process that writes files and reports."""
        return self.process == 0

    def padded(self, num_tasks: int) -> int:
        """The number of places for tasks when every worker has the same number of them.

        Args:
            num_tasks: how many tasks there are in all.

        Returns:
            `num_tasks` rounded up to a multiple of the number of workers.
        """
        return -(-num_tasks // self.count) * self.count

    def share(self, num_tasks: int) -> list[int]:
        """The numbers of the tasks that this process runs.

        Args:
            num_tasks: how many tasks there are in all.

        Returns:
            Indices from 0, as many in every process. Places beyond the last task repeat it.
        """
        each = self.padded(num_tasks) // self.processes
        return [min(self.process * each + i, num_tasks - 1) for i in range(each)]

    @abc.abstractmethod
    def each(self, part: Part, tasks: Arrays, *, shared: bool) -> Arrays:
        """Run `part` on every worker and return what it returns, which is the same on all.

        Args:
            part: pure, but for its `all_sum`.
            tasks: arrays whose leading axis is divided evenly, in order.
            shared: they hold the tasks of this process alone. Otherwise those of all, and are the
                same in every process.

        Returns:
            What `part` returned.

        Raises:
            InputError: within a gradient or vmap, where the sum would be differentiated too.
        """

    @abc.abstractmethod
    def tell(self, text: str) -> list[str]:
        """Exchange texts with all processes; waits for all of them.

        Args:
            text: the text of this process.

        Returns:
            The texts of all processes, in their order.
        """

    def leave_word(self, text: str) -> None:
        """Leave a last message for the other processes, if the engine keeps any.

        Args:
            text: the message.
        """
        del text

    def last_word(self) -> str | None:
        """The last message that a process which failed has left.

        Returns:
            The message; None if there is none.
        """
        return None


class Alone(Workers):
    """No engine is active: this process and nobody else."""

    def each(self, part: Part, tasks: Arrays, *, shared: bool) -> Arrays:
        """Run `part` here."""
        del shared
        return part(tasks, 0, lambda x: x)

    def tell(self, text: str) -> list[str]:
        """The text of this process."""
        return [text]


ALONE = Alone()
