"""Images that are read when they are first asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


class LazyImages:
    """What `FewShotSampler` asks of an array of images, without having them in memory.

    Args:
        read: `read(i)` is image number i, `shape` and of `dtype`. From any thread.
        shape: `(N, ...)`.
        dtype: as NumPy calls it; default uint8.
        keep: hold on to what was read. Without it every task reads its images again.

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
    ) -> None:
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
        for place, row in zip(found, chosen.tolist(), strict=True):
            place[...] = self._image(row)
        return found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        del copy  # it is always one
        return self[:] if dtype is None else self[:].astype(dtype)

    def verify(self) -> None:
        """Read every image once, so that a broken one is found before training, not within."""
        for row in range(len(self)):
            self._image(row)

    def _image(self, row: int) -> np.ndarray[Any, Any]:
        if self._kept is None:
            return self._read(row)
        # Two threads may both read an image; they read the same.
        if (image := self._kept.get(row)) is None:
            image = self._kept[row] = self._read(row)
        return image
