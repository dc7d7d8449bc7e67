"""The hidden random streams a function may draw from, and how to play them again."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from metaframe.backend.contract import Backend


class Streams:
    """The global streams of Python, NumPy and the framework as they are now."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._start = self._now()

    def _now(self) -> tuple[object, ...]:
        # The global stream of NumPy is the one that users' code draws from by accident.
        return random.getstate(), np.random.get_state(), self._backend.random_state()  # noqa: NPY002

    def _set(self, state: tuple[object, ...]) -> None:
        python, numpy, framework = state
        random.setstate(python)  # type: ignore[arg-type]
        np.random.set_state(numpy)  # type: ignore[arg-type]  # noqa: NPY002
        self._backend.restore_random_state(framework)  # type: ignore[arg-type]

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """A block that draws from the streams as they were at first; they are put back after."""
        before = self._now()
        self._set(self._start)
        try:
            yield
        finally:
            self._set(before)
