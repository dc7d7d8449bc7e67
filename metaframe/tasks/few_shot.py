"""Few-shot classification tasks over any labelled arrays.

Classes are divided, never examples: a `ClassSplit` cannot hold a class twice, so a class that
was trained on cannot be tested on. Which class is called 0, 1, 2, ... is random in every task,
and so is the order of the examples, so neither says anything before adaptation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from metaframe import arguments
from metaframe.errors import InputError, InputTypeError
from metaframe.tasks.lazy import LazyImages
from metaframe.tasks.sampling import (
    SPLITS,
    BatchedSampler,
    Numbers,
    Split,
    choices,
    division_rng,
    permutations,
)
from metaframe.tasks.task import Task

ROTATIONS = 4
"""Quarter turns, each a class of its own."""

_TURNED_BYTES = 2**27
"""Images are turned in advance if they take no more than this, four times as many."""

Label = Any
Rows = np.ndarray[Any, np.dtype[np.intp]]


@dataclass(frozen=True)
class ClassSplit:
    """The classes of each split.

    Args:
        train: class labels as they occur in `labels`; may be empty.
        validation: likewise.
        test: likewise.

    Raises:
        InputError: a class is named twice.

    >>> ClassSplit(train=(0, 1), test=(1, 2))
    Traceback (most recent call last):
    metaframe.errors.InputError: class 1 is in both 'train' and 'test'; splits must be disjoint.
    """

    train: tuple[Label, ...] = ()
    validation: tuple[Label, ...] = ()
    test: tuple[Label, ...] = ()

    def __post_init__(self) -> None:
        home: dict[Label, str] = {}
        for split in SPLITS:
            classes = tuple(_plain(label) for label in getattr(self, split))
            object.__setattr__(self, split, classes)
            for label in classes:
                if label in home:
                    raise InputError(
                        f"class {label!r} is in both {home[label]!r} and {split!r}; splits must "
                        "be disjoint."
                        if home[label] != split
                        else f"class {label!r} is twice in {split!r}."
                    )
                home[label] = split

    def __getitem__(self, split: Split) -> tuple[Label, ...]:
        classes: tuple[Label, ...] = getattr(self, split)
        return classes


def split_classes(
    labels: Iterable[Label],
    sizes: Sequence[float] = (0.6, 0.2, 0.2),
    *,
    seed: int = 0,
) -> ClassSplit:
    """Divide the classes among train, validation and test at random.

    Args:
        labels: the label of every example (or just the classes).
        sizes: three fractions with a sum of at most 1, or three numbers of classes. Fractions
            are rounded down, and with a sum of 1 the classes left over go to train.
        seed: decides the division; nothing else does. It is separate from the samplers' seeds,
            so that training and testing with two seeds cannot mix classes.

    Returns:
        Three disjoint groups of labels.

    Raises:
        InputError: sizes that do not fit the number of classes.

    >>> split_classes(range(10), (6, 2, 2))
    ClassSplit(train=(0, 4, 5, 6, 7, 9), validation=(1, 2), test=(3, 8))
    """
    classes = np.unique(_as_labels(labels))
    counts = _split_counts(sizes, len(classes))
    order = permutations(division_rng(seed).random(len(classes)))
    ends = np.cumsum(counts)
    parts = np.split(order[: ends[-1]], ends[:-1])
    return ClassSplit(*(tuple(classes[np.sort(part)].tolist()) for part in parts))


def _split_counts(sizes: Sequence[float], total: int) -> list[int]:
    if len(sizes) != len(SPLITS):
        raise InputError(
            f"sizes must be three numbers (train, validation, test), received {sizes!r}."
        )
    if all(isinstance(size, int | np.integer) for size in sizes):
        counts = [arguments.integer(size, "a split size", at_least=0) for size in sizes]
        if sum(counts) > total:
            raise InputError(
                f"sizes={tuple(counts)} needs {sum(counts)} classes, there are {total}."
            )
        return counts
    whole = sum(sizes)
    # Not `whole > 1`: decimal fractions such as 0.7 + 0.2 + 0.1 miss 1 by a rounding error.
    if not (all(0 <= size <= 1 for size in sizes) and whole <= 1 + 1e-9):
        raise InputError(
            f"sizes must be numbers of classes, or fractions with a sum of at most 1; received "
            f"{tuple(sizes)}."
        )
    counts = [int(size * total + 1e-9) for size in sizes]
    if whole >= 1 - 1e-9:
        counts[0] += total - sum(counts)
    return counts


class FewShotSampler(BatchedSampler):
    """Sample `ways`-way `shots`-shot classification tasks.

    A task takes `ways` classes in random order, which get the labels 0 to ways-1, and from each
    `shots + queries` distinct examples: the first `shots` for support, the others for query.
    Support rows are then shuffled, and query rows too.

    Tasks have support_x `(ways * shots, ...)`, support_y `(ways * shots,)`, query_x
    `(ways * queries, ...)` and query_y `(ways * queries,)`. Labels are int64, the type torch
    wants for class indices; on JAX they become its default integer, int32.

    Args:
        images: `(N, ...)`, for rotations `(N, S, S)` or `(N, S, S, C)`. uint8 becomes
            floating in [0, 1] (divided by 255), booleans 0 and 1; floats are taken as they are.
            `LazyImages` are read as tasks ask for them.
        labels: `(N,)` integers or strings.
        ways: classes a task.
        shots: support examples a class.
        queries: query examples a class.
        split: which classes are used, and which stream of tasks.
        classes: the classes of each split; default `split_classes(labels)`.
        rotations: count each class turned by 0, 90, 180 and 270 degrees as four classes, which
            stay in one split. One image may then occur in two classes of a task, turned.
        seed: as for `IndexedSampler`.
        device: as for `IndexedSampler`.
        dtype: as for `IndexedSampler`.

    Raises:
        InputError: too few classes or examples, saying how many there are and are needed.

    >>> import numpy as np
    >>> images, labels = np.zeros((200, 28, 28, 1), np.uint8), np.repeat(np.arange(10), 20)
    >>> sampler = FewShotSampler(images, labels, ways=5, shots=1, queries=15)
    >>> sampler.task(0)
    Task(support_x=(5, 28, 28, 1), support_y=(5,), query_x=(75, 28, 28, 1), query_y=(75,))
    >>> sorted(sampler.task(0).support_y.tolist())
    [0, 1, 2, 3, 4]

    Source: Vinyals et al., "Matching networks for one shot learning" (NeurIPS 2016).
    """

    def __init__(
        self,
        images: np.ndarray[Any, Any] | LazyImages,
        labels: Iterable[Label],
        *,
        ways: int = 5,
        shots: int = 1,
        queries: int = 15,
        split: Split = "train",
        classes: ClassSplit | None = None,
        rotations: bool = False,
        seed: int | None = 0,
        device: str | None = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(seed=seed, split=split, device=device, dtype=dtype)
        self.ways = arguments.integer(ways, "ways", at_least=1)
        self.shots = arguments.integer(shots, "shots", at_least=1)
        self.queries = arguments.integer(queries, "queries", at_least=1)
        self.rotations = bool(rotations)
        self._images, own_labels = _check_examples(images, labels, self.rotations)
        self._turned = _all_turns(self._images) if self.rotations else None
        chosen = split_classes(own_labels) if classes is None else classes
        self._members = _Members(_members(own_labels, chosen[self.split], self.split))
        self._check_enough()

    @property
    def num_classes(self) -> int:
        """The number of classes of this split, rotations included."""
        return len(self._members) * (ROTATIONS if self.rotations else 1)

    def _check_enough(self) -> None:
        if self.num_classes < self.ways:
            turned = f" ({len(self._members)} x {ROTATIONS} rotations)" if self.rotations else ""
            raise InputError(
                f"ways={self.ways} needs at least as many classes, split {self.split!r} has "
                f"{self.num_classes}{turned}. Lower ways, or give the split more classes."
            )
        needed = self.shots + self.queries
        for label, size in zip(self._members.labels, self._members.sizes, strict=True):
            if size < needed:
                raise InputError(
                    f"class {label!r} has {size} examples, a task needs {needed} "
                    f"(shots={self.shots} + queries={self.queries}). Lower them, or leave the "
                    "class out of the split."
                )

    @property
    def quick(self) -> bool:
        """False for images that have to be read."""
        return super().quick and not isinstance(self._images, LazyImages)

    @property
    def numbers(self) -> int:
        """One for every class that is chosen, and two for every example."""
        return self.ways * (1 + 2 * (self.shots + self.queries))

    def draw_batch(self, numbers: Numbers) -> Task:
        """Make the tasks of a batch; see the class for how they are made up."""
        tasks, ways, per_class = len(numbers), self.ways, self.shots + self.queries
        ends = np.cumsum([ways, ways * per_class, ways * self.shots])
        of_classes, of_rows, *of_orders = np.split(numbers, ends, axis=1)
        chosen = choices(of_classes, self.num_classes)
        group, turn = np.divmod(chosen, ROTATIONS if self.rotations else 1)
        sizes = self._members.sizes[group].reshape(-1)
        picks = choices(of_rows.reshape(tasks * ways, per_class), sizes)
        rows = self._members.rows_of(group, picks.reshape(tasks, ways, per_class))
        return Task(
            *self._examples(rows[:, :, : self.shots], turn, permutations(of_orders[0])),
            *self._examples(rows[:, :, self.shots :], turn, permutations(of_orders[1])),
        )

    def _examples(
        self, rows: Rows, turn: Rows, order: Rows
    ) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Shuffled inputs and labels, from rows `(tasks, ways, examples)` of the images."""
        labels = order // rows.shape[2]
        rows = np.take_along_axis(rows.reshape(order.shape), order, axis=1)
        turns = np.take_along_axis(turn, labels, axis=1).reshape(-1) if self.rotations else None
        pictures = _to_float(self._pictures(rows.reshape(-1), turns))
        return pictures.reshape(*order.shape, *pictures.shape[1:]), labels.astype(np.int64)

    def _pictures(self, rows: Rows, turns: Rows | None) -> np.ndarray[Any, Any]:
        """These images, each after so many quarter turns."""
        if turns is None:
            return self._images[rows]
        if self._turned is not None:
            return np.take(self._turned, turns * len(self._images) + rows, axis=0)
        found = np.empty((len(rows), *self._images.shape[1:]), self._images.dtype)
        for turn in range(ROTATIONS):
            places = np.flatnonzero(turns == turn)
            found[places] = np.rot90(self._images[rows[places]], turn, axes=(1, 2))
        return found


class _Members:
    """The rows of the images of each class of a split."""

    def __init__(self, rows: Mapping[Label, Rows]) -> None:
        self.labels = tuple(rows)
        self.sizes = np.array([len(own) for own in rows.values()], np.intp)
        self._rows = np.concatenate(list(rows.values())) if rows else np.empty(0, np.intp)
        self._starts = np.cumsum(self.sizes) - self.sizes

    def __len__(self) -> int:
        return len(self.labels)

    def rows_of(self, group: Rows, numbers: Rows) -> Rows:
        """The rows of members number `numbers`, `(..., n)`, of the classes `group`, `(...)`."""
        found: Rows = self._rows[self._starts[group][..., None] + numbers]
        return found


def _check_examples(
    images: Any, labels: Iterable[Label], rotations: bool
) -> tuple[np.ndarray[Any, Any] | LazyImages, np.ndarray[Any, Any]]:
    pictures = images if isinstance(images, LazyImages) else np.asarray(images)
    names = _as_labels(labels)
    if pictures.dtype.kind not in "fb" and pictures.dtype != np.uint8:
        raise InputTypeError(
            f"images must be floating, uint8 or boolean, received dtype {pictures.dtype}. Scale "
            "them to floats first."
        )
    if pictures.ndim < 1 or len(pictures) != len(names):
        raise InputError(
            f"images and labels must be as many, received images of shape {pictures.shape} and "
            f"{len(names)} labels."
        )
    if rotations and (pictures.ndim not in (3, 4) or pictures.shape[1] != pictures.shape[2]):
        raise InputError(
            "rotations needs square images (N, S, S) or (N, S, S, C), received shape "
            f"{pictures.shape}."
        )
    return pictures, names


def _all_turns(images: np.ndarray[Any, Any] | LazyImages) -> np.ndarray[Any, Any] | None:
    """The images after 0, 1, 2 and 3 quarter turns; None if that takes too much memory."""
    if isinstance(images, LazyImages) or images.nbytes * ROTATIONS > _TURNED_BYTES:
        return None
    return np.concatenate([np.rot90(images, turn, axes=(1, 2)) for turn in range(ROTATIONS)])


def _as_labels(labels: Iterable[Label]) -> np.ndarray[Any, Any]:
    names = np.asarray(labels if isinstance(labels, np.ndarray | Sequence) else list(labels))
    if names.ndim != 1 or names.dtype.kind not in "iuUS":
        raise InputTypeError(
            "labels must be one axis of integers or strings, received "
            f"shape {names.shape} and dtype {names.dtype}."
        )
    return names


def _members(
    labels: np.ndarray[Any, Any], classes: Sequence[Label], split: str
) -> dict[Label, np.ndarray[Any, Any]]:
    """The rows of every class in `classes`."""
    order = np.argsort(labels, kind="stable")
    found, starts = np.unique(labels[order], return_index=True)
    rows = dict(zip(found.tolist(), np.split(order, starts[1:]), strict=True))
    for label in classes:
        if label not in rows:
            raise InputError(
                f"split {split!r} names class {label!r}, which no example has. There are "
                f"{len(rows)} classes, {found[:3].tolist()} and so on."
            )
    return {label: rows[label] for label in classes}


def _to_float(images: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if images.dtype == np.uint8:
        return images.astype(np.float32) / np.float32(255)
    return images.astype(np.float32) if images.dtype == np.bool_ else images


def _plain(label: Label) -> Label:
    """A NumPy scalar as the Python value that looks the same."""
    return label.item() if isinstance(label, np.generic) else label
