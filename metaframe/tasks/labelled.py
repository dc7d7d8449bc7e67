"""Labelled images of the user's own, read when a task first asks for them.

`FewShotSampler` needs the label of every image at once, and of the images the few that are in a
task. So labels are an array, and images something that is indexed like one.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex

import numpy as np

from metaframe.errors import InputError, UnknownKeyError, nearest
from metaframe.tasks.few_shot import ClassSplit, split_classes
from metaframe.tasks.lazy import LazyImages

Names = str | SupportsIndex | Iterable[str | int]
"""Classes or folders, one or several."""
_SPLIT_NAMES = {
    "train": "train",
    **dict.fromkeys(("val", "valid", "validation"), "validation"),
    "test": "test",
}
"""The names of the folders of splits."""


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """Images and their classes, as `FewShotSampler` takes them.

    Args:
        images: `(N, height, width, channels)`, uint8 or floating; `FewShotSampler` makes uint8
            floats in [0, 1].
        labels: `(N,)` int64, an index into `classes`, read-only.
        classes: the name of every class, sorted: of a folder with its path, such as
            "Greek/character01", or as a data set has it, a number or a text.

    >>> images = LazyImages(lambda i: np.zeros((8, 8, 1), np.uint8), (4, 8, 8, 1))
    >>> labels = np.array([0, 0, 1, 2])
    >>> data = LabelledImages(images, labels, ("Greek/alpha", "Greek/beta", "Latin/a"))
    >>> data.hold_out(["Latin"])
    ClassSplit(train=(0, 1), validation=(), test=(2,))
    """

    images: LazyImages
    labels: np.ndarray[Any, np.dtype[np.int64]]
    classes: tuple[str | int, ...]

    def split_classes(
        self, sizes: Sequence[float] = (0.6, 0.2, 0.2), *, seed: int = 0
    ) -> ClassSplit:
        """Divide the classes at random, as `metaframe.tasks.split_classes` does.

        Args:
            sizes: shares or numbers of classes for train, validation and test.
            seed: decides the division.

        Returns:
            Three disjoint groups of labels.

        Raises:
            InputError: sizes that do not fit the number of classes.
        """
        return split_classes(range(len(self.classes)), sizes, seed=seed)

    def hold_out(self, test: Names, validation: Names = ()) -> ClassSplit:
        """Hold out named classes, or all in a folder, such as an alphabet.

        Args:
            test: a name of a class or of a folder, or several.
            validation: the same. All classes in neither are for training.

        Returns:
            Three disjoint groups of labels.

        Raises:
            UnknownKeyError: no such class or folder, with the nearest name.
            InputError: a class in both.
        """
        parts = [self._labels_of(_names(names)) for names in (validation, test)]
        held = {label for part in parts for label in part}
        return ClassSplit(tuple(i for i in range(len(self.classes)) if i not in held), *parts)

    @property
    def own_split(self) -> ClassSplit | None:
        """The split that outermost folders called train, val and test make; None without them.

        Capitals do not matter; valid and validation are val.

        Raises:
            InputError: some classes are in other folders, or test is missing.
        """
        homes = [_split_of(_folder(name)) for name in self.classes]
        if not any(homes):
            return None
        self._check_homes(homes)
        return ClassSplit(
            *(
                tuple(i for i, home in enumerate(homes) if home == split)
                for split in ("train", "validation", "test")
            )
        )

    def _check_homes(self, homes: Sequence[str | None]) -> None:
        found = {_folder(name) for name, home in zip(self.classes, homes, strict=True) if home}
        beside = ", ".join(sorted(found))
        remedy = "Or name what to test on: hold_out(...), on the command line --held-out."
        for name, home in zip(self.classes, homes, strict=True):
            if home is None:
                raise InputError(
                    f"{_folder(name) or name!r} lies beside {beside}, and classes of such folders "
                    f"are divided by the folder they are in. Move it into one of them. {remedy}"
                )
        if "test" not in homes:
            raise InputError(
                f"there are folders {beside} and no test, so nothing to test on. Add it, or pass "
                f"one of the folders alone, whose classes are then divided at random. {remedy}"
            )

    def _labels_of(self, names: Sequence[str | int]) -> tuple[int, ...]:
        found: list[int] = []
        for name in names:
            of_name = [
                label
                for label, own in enumerate(self.classes)
                if own == name or (isinstance(own, str) and own.startswith(f"{name}/"))
            ]
            if not of_name:
                known = {*map(str, self.classes), *filter(None, map(_folder, self.classes))}
                raise UnknownKeyError(f"no class or folder {name!r}. {nearest(str(name), known)}")
            found += of_name
        return tuple(found)


def labelled(images: LazyImages, names: Sequence[str | int]) -> LabelledImages:
    """Images with the name of each one's class."""
    classes, labels = np.unique(np.array(names), return_inverse=True)
    labels = labels.astype(np.int64)
    labels.setflags(write=False)
    return LabelledImages(images, labels, tuple(classes.tolist()))


def check_folders(where: str, names: Iterable[str]) -> None:
    """No class is in two of the folders train, val and test.

    Raises:
        InputError: one is, as in data sets for ordinary classification; a random division would
            then train and test on the same class under two names.
    """
    home: dict[str, str] = {}
    for name in sorted(set(names)):
        folder, _, rest = name.partition("/")
        if _split_of(folder) and rest and home.setdefault(rest, folder) != folder:
            raise InputError(
                f"{where} has class {rest!r} in {home[rest]} and in {folder}; few-shot tasks are "
                f"tested on classes that were not trained on. Pass {where}/{folder} alone, and "
                "divide its classes."
            )


def _split_of(folder: str) -> str | None:
    """The split that a folder is called after, if it is."""
    return _SPLIT_NAMES.get(folder.lower())


def _folder(name: str | int) -> str:
    """The outermost folder of a class; "" if it is in none."""
    return name.partition("/")[0] if isinstance(name, str) and "/" in name else ""


def _names(names: Names) -> tuple[str | int, ...]:
    if isinstance(names, str):
        return (names,)
    return tuple(names) if isinstance(names, Iterable) else (operator.index(names),)
