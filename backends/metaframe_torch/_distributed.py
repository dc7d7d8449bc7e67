"""torch.distributed: one worker a process, over the default process group."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any
from weakref import ref

import torch
import torch.distributed as dist

from metaframe.backend.types import Array, Arrays
from metaframe.backend.workers import Part, Place, Workers
from metaframe.errors import InputError
from metaframe_torch import _private
from metaframe_torch._ambient import outside

LAST_WORD = "metaframe/last_word"

_WORDS_OF_GLOO = (
    "gloo",
    "Connection closed by peer",
    "Connection reset by peer",
    "Timed out",
    "pair closure",
)

_DIFFERENTIATED = (
    "a distributed step within {}: the sum over processes would be differentiated too, and wrong. "
    "Differentiate the cost, and leave the step outside."
)


class _Sum(torch.autograd.Function):
    """The sum over processes, with no derivative.

    Autograd does not see torch's own sum: each process would take its part's derivative for the
    whole.
    """

    @staticmethod
    def forward(ctx: Any, x: Array) -> Array:
        ctx.mark_dirty(x)
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, *cotangents: Array) -> Any:
        raise InputError(_DIFFERENTIATED.format("a gradient"))


class TorchWorkers(Workers):
    """The processes of the default process group.

    They hold no reference to the group: its threads end with the last one, and a thread of gloo
    that is still alive when the interpreter ends can abort the process.
    """

    def __init__(self) -> None:
        super().__init__(dist.get_world_size(), dist.get_rank(), dist.get_world_size())

    def each(self, part: Part, tasks: Arrays, *, shared: bool) -> Arrays:
        if _private.transforming():
            raise InputError(_DIFFERENTIATED.format("torch.func.grad or vmap"))
        if not shared:
            length = tasks[0].shape[0] // self.count
            mine = slice(self.process * length, (self.process + 1) * length)
            tasks = tuple(x[mine] for x in tasks)
        return part(tasks, self.process, self._all_sum)

    def _all_sum(self, x: Array) -> Array:
        if _private.tracing():
            # The form that a graph can hold; it returns a new tensor.
            return _private.COLLECTIVES.required(x, "sum", _world())
        apply: Any = _Sum.apply
        return apply(x)

    def tell(self, text: str) -> list[str]:
        # The current device is that of a thread.
        device = f"cuda:{torch.cuda.current_device()}" if dist.get_backend() == "nccl" else "cpu"
        # In another thread, where a trace that goes on in this one does not see it.
        told = functools.partial(self._told, text, device)
        return outside(told) if _private.tracing() else told()

    def _told(self, text: str, device: str) -> list[str]:
        with torch.no_grad():
            data = torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)
            sizes = self._gathered(torch.tensor([data.numel()], device=device))
            longest = max(int(size) for size in sizes)
            padded = torch.nn.functional.pad(data, (0, longest - data.numel()))
            rows = self._gathered(padded)
        return [
            bytes(row[: int(size)].tolist()).decode() for row, size in zip(rows, sizes, strict=True)
        ]

    def _gathered(self, x: Array) -> list[Array]:
        rows = [torch.empty_like(x) for _ in range(self.processes)]
        dist.all_gather(rows, x)
        return rows

    def leave_word(self, text: str) -> None:
        if _private.DEFAULT_STORE.found is not None:
            with suppress(RuntimeError):  # it may be the store's own process that is gone
                _private.DEFAULT_STORE.found().set(LAST_WORD, text)

    def last_word(self) -> str | None:
        if _private.DEFAULT_STORE.found is None:
            return None
        try:
            store = _private.DEFAULT_STORE.found()
            store.set_timeout(timedelta(seconds=1))
            return store.get(LAST_WORD).decode() if store.check([LAST_WORD]) else None
        except RuntimeError:
            return None


def _world() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None, "an initialised group"
    return group


_known: list[tuple[ref[dist.ProcessGroup], TorchWorkers]] = []
"""The workers of the current group; they remember what was agreed on."""


def workers() -> Workers:
    """Those of the default process group."""
    group = _world()
    if not _known or _known[0][0]() is not group:
        _known[:] = [(ref(group), TorchWorkers())]
    return _known[0][1]


@contextmanager
def join(place: Place) -> Iterator[None]:
    """The default process group for a block of code."""
    engine = "gloo"
    if torch.cuda.is_available() and torch.cuda.device_count() > place.local_process:
        engine = "nccl"
        torch.cuda.set_device(place.local_process)
    dist.init_process_group(
        engine,
        timeout=timedelta(seconds=place.timeout),
        rank=place.process,
        world_size=place.processes,
    )
    try:
        yield
    finally:
        _known.clear()
        dist.destroy_process_group()


def lost_others(error: Exception) -> bool:
    """True if a collective failed because of another process."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(w in str(error) for w in _WORDS_OF_GLOO)
