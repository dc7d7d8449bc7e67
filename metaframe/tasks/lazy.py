"""Images that are read when they are first asked for, several at once.

Reading a file and decoding it release Python's lock, so that threads do it in parallel. `fit`
samples ahead of the steps, and waits for an image only where all cores together read them more
slowly than the steps use them.
"""

from __future__ import annotations

import contextvars
import functools
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from metaframe import arguments

WORKERS_AT_MOST = 8
"""Threads, unless the user says otherwise."""


class LazyImages:
    """Images that are read when `FewShotSampler` asks for them, and not before.

    Args:
        read: `read(i)` is image number i, `shape` and of `dtype`. From any thread.
        shape: `(N, ...)`.
        dtype: as NumPy calls it; default uint8.
        keep: hold on to what was read. Without it every task reads its images again.
        workers: how many images are read at once, each in a thread; default: one for each core, at
            most 8. 1 reads them in order in the thread that asks.

    Raises:
        InputError, InputTypeError: `workers` is no integer of at least 1.

    >>> images = LazyImages(lambda i: np.full((2, 2, 1), i, np.uint8), (10, 2, 2, 1))
    >>> images[np.array([7, 3])][:, 0, 0, 0].tolist()
    [7, 3]
    """

    def __init__(
        self,
        read: Callable[[int], np.ndarray[Any, Any]],
        shape: tuple[int, ...],
        dtype: Any = np.uint8,
        *,
        keep: bool = True,
        workers: int | None = None,
    ) -> None:
        self.workers = min(os.cpu_count() or 1, WORKERS_AT_MOST)
        if workers is not None:
            self.workers = arguments.integer(workers, "workers", at_least=1)
        self.shape = shape
        self.dtype: np.dtype[Any] = np.dtype(dtype)
        self._read = read
        self._kept: dict[int, np.ndarray[Any, Any]] | None = {} if keep else None

    @property
    def ndim(self) -> int:
        """Axes, that of images included."""
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> np.ndarray[Any, Any]:
        """The images of these rows: one number, a slice, or an array of numbers."""
        chosen = np.arange(len(self))[rows]
        if chosen.ndim == 0:
            image = self._image(int(chosen)).view()
            image.setflags(write=False)  # what is kept may not be changed
            return image
        found = np.empty((len(chosen), *self.shape[1:]), self.dtype)
        for place, image in zip(found, self._images(chosen.tolist()), strict=True):
            place[...] = image
        return found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        del copy  # it is always one
        return self[:] if dtype is None else self[:].astype(dtype)

    def verify(self) -> None:
        """Read every image once, so that a broken one is found before training, not within."""
        for _ in self._images(range(len(self))):
            pass

    def _images(self, rows: Iterable[int]) -> Iterator[np.ndarray[Any, Any]]:
        """These images, in order."""
        rows, kept = list(rows), self._kept
        missing = [*dict.fromkeys(r for r in rows if r not in kept)] if kept is not None else rows
        # A reader that waited for other readers might wait for ever.
        if self.workers == 1 or len(missing) < 2 or getattr(_reader, "busy", False):
            return map(self._image, rows)
        context = contextvars.copy_context()
        jobs = [functools.partial(context.copy().run, self._image, row) for row in missing]
        read = _pool(self.workers).map(_as_reader, jobs)
        return read if kept is None else self._all_kept(read, rows)

    def _all_kept(self, read: Iterator[Any], rows: Iterable[int]) -> Iterator[Any]:
        """The images of these rows, once those that were missing have been `read`."""
        for _ in read:
            pass
        yield from map(self._image, rows)

    def _image(self, row: int) -> np.ndarray[Any, Any]:
        if self._kept is None:
            return self._read(row)
        # Two threads may both read an image; they read the same.
        if (image := self._kept.get(row)) is None:
            image = self._kept[row] = self._read(row)
        return image


_reader = threading.local()


def _as_reader(job: Callable[[], np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    _reader.busy = True
    return job()


@functools.cache
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="metaframe-images")


if hasattr(os, "register_at_fork"):  # a forked process has the pools and none of their threads
    os.register_at_fork(after_in_child=_pool.cache_clear)
