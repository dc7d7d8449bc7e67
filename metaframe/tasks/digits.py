"""Few-shot tasks from scikit-learn's handwritten digits: real images, offline, in a second.

1797 images of 8x8 pixels, ten digits. Turned by quarters they make 40 classes. The digits of the
three splits are fixed, with a reason: 6 and 9 are each other's half turn and 0, 1 and 8 their
own, so these train together, where an ambiguous class costs nothing; the test digits 4 and 7
look different in every rotation.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from metaframe.errors import MissingDependencyError
from metaframe.tasks.few_shot import ClassSplit, FewShotSampler
from metaframe.tasks.sampling import Split

DIGITS_SPLIT = ClassSplit(train=(0, 1, 3, 6, 8, 9), validation=(2, 5), test=(4, 7))
"""With rotations: 24, 8 and 8 classes."""

_FULL_INK = 16.0


@functools.cache
def load_digits() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The digits as `(images, labels)`, read-only arrays.

    Returns:
        images `(1797, 8, 8, 1)` float32 in [0, 1], ink is 1; labels `(1797,)` int64, 0 to 9.

    Raises:
        MissingDependencyError: scikit-learn is not installed; names the command that installs it.

    >>> images, labels = load_digits()
    >>> images.shape, labels.shape
    ((1797, 8, 8, 1), (1797,))

    Source: E. Alpaydin, C. Kaynak, "Optical recognition of handwritten digits", UCI (1998), the
    test part, as shipped with scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits as load  # type: ignore[import-untyped]
    except ImportError:
        raise MissingDependencyError(
            "load_digits", "scikit-learn", "pip install scikit-learn"
        ) from None
    pixels, targets = load(return_X_y=True)
    images = (pixels / _FULL_INK).astype(np.float32).reshape(-1, 8, 8, 1)
    labels = targets.astype(np.int64)
    for array in (images, labels):
        array.setflags(write=False)
    return images, labels


def digits_sampler(
    *,
    ways: int = 5,
    shots: int = 1,
    queries: int = 15,
    split: Split = "train",
    rotations: bool = True,
    seed: int | None = 0,
    device: str | None = None,
    dtype: Any = None,
) -> FewShotSampler:
    """A `FewShotSampler` over the digits, with `DIGITS_SPLIT`.

    Args:
        ways: classes a task.
        shots: support examples a class.
        queries: query examples a class.
        split: which classes are used, and which stream of tasks.
        rotations: count quarter turns as classes. Without them train has 6 classes, and
            validation and test have 2.
        seed: as for `IndexedSampler`.
        device: as for `IndexedSampler`.
        dtype: as for `IndexedSampler`.

    Returns:
        A sampler of 8x8 images with one channel.

    >>> digits_sampler(split="test").task(0)
    Task(support_x=(5, 8, 8, 1), support_y=(5,), query_x=(75, 8, 8, 1), query_y=(75,))
    """
    images, labels = load_digits()
    return FewShotSampler(
        images,
        labels,
        ways=ways,
        shots=shots,
        queries=queries,
        split=split,
        classes=DIGITS_SPLIT,
        rotations=rotations,
        seed=seed,
        device=device,
        dtype=dtype,
    )
