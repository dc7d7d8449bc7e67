"""Omniglot: handwritten characters of 50 alphabets, 20 drawings each, from the official files.

The files are read as they are downloaded from github.com/brendenlake/omniglot: a directory with
the zips, or with the folders extracted from them. Nothing is extracted, written or fetched.

Drawings are 105x105 pixels of black ink on white. They become ink = 1 on 0, reduced by the
average over each pixel's area, in whole numbers: the same bits on every machine.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from metaframe import arguments
from metaframe.errors import InputError, UnknownKeyError, nearest
from metaframe.tasks._files import locate, open_files, stamp
from metaframe.tasks._omniglot_files import DRAWERS, SIDE, SOURCE, read_drawings, read_runs
from metaframe.tasks.few_shot import ClassSplit, split_classes
from metaframe.tasks.task import Task

Images = np.ndarray[Any, np.dtype[np.uint8]]
Labels = np.ndarray[Any, np.dtype[np.int64]]

PARTS = {
    "small1": "images_background_small1",
    "small2": "images_background_small2",
    "background": "images_background",
    "evaluation": "images_evaluation",
}
"""Our name of each part, and the name of its official file."""

_OFFICIAL_CHARACTERS = 1623
_OFFICIAL_SIZES = (1100, 100, 423)


@dataclass(frozen=True, eq=False)
class Omniglot:
    """Characters of one or more parts of Omniglot.

    Args:
        images: `(N, size, size, 1)` uint8, 0 paper to 255 ink, read-only. `FewShotSampler`
            makes them floats in [0, 1].
        labels: `(N,)` int64, an index into `characters`, read-only.
        characters: the name of every character, such as "Greek/character01", sorted.

    >>> names = ("Greek/character01", "Latin/character01")
    >>> Omniglot(np.zeros((2, 28, 28, 1), np.uint8), np.arange(2), names).alphabets
    ('Greek', 'Latin')
    """

    images: Images
    labels: Labels
    characters: tuple[str, ...]

    @property
    def alphabets(self) -> tuple[str, ...]:
        """The alphabets there are, sorted."""
        return tuple(sorted({_alphabet(name) for name in self.characters}))

    def split_alphabets(self, test: Iterable[str], validation: Iterable[str] = ()) -> ClassSplit:
        """Hold out whole alphabets: the harder and more honest test of generalisation.

        Args:
            test: names of alphabets.
            validation: names of alphabets. All alphabets in neither are for training.

        Returns:
            Three disjoint groups of labels.

        Raises:
            UnknownKeyError: no such alphabet, with the nearest name.
            InputError: an alphabet in both.
        """
        test, validation = _names(test), _names(validation)
        for name in (*test, *validation):
            if name not in self.alphabets:
                raise UnknownKeyError(f"no alphabet {name!r}. {nearest(name, self.alphabets)}")
        train = [name for name in self.alphabets if name not in (*test, *validation)]
        return ClassSplit(
            self._labels_of(train), self._labels_of(validation), self._labels_of(test)
        )

    def split_characters(self, seed: int = 0) -> ClassSplit:
        """Divide characters at random, whatever their alphabet, as most papers do.

        The full set of 1623 gives 1100 + 100 for training and validation and 423 for test: the
        usual 1200 / 423. Any other set is divided 0.6 / 0.2 / 0.2.

        Args:
            seed: decides the division.

        Returns:
            Three disjoint groups of labels.
        """
        if len(self.characters) == _OFFICIAL_CHARACTERS:
            return split_classes(range(_OFFICIAL_CHARACTERS), _OFFICIAL_SIZES, seed=seed)
        return split_classes(range(len(self.characters)), seed=seed)

    def _labels_of(self, alphabets: Iterable[str]) -> tuple[int, ...]:
        return tuple(
            label
            for alphabet in alphabets
            for label, character in enumerate(self.characters)
            if _alphabet(character) == alphabet
        )


@dataclass(frozen=True, eq=False)
class OneShotRun:
    """One of the 20 official one-shot classification runs: 20 characters of one alphabet.

    Args:
        name: "run01" to "run20".
        train_images: `(20, size, size, 1)` uint8, one drawing of each character, in the order
            of their file names.
        test_images: `(20, size, size, 1)` uint8, another drawing of each, likewise.
        answers: `(20,)` int64, for each test image the index of its character's train image.

    >>> drawings = np.zeros((20, 28, 28, 1), np.uint8)
    >>> OneShotRun("run01", drawings, drawings, np.arange(20)).task().support_x.shape
    (20, 28, 28, 1)
    """

    name: str
    train_images: Images
    test_images: Images
    answers: Labels

    def task(self) -> Task:
        """The run as a task: images float32 in [0, 1], the class is the train image's index."""
        train, test = (
            images.astype(np.float32) / np.float32(255)
            for images in (self.train_images, self.test_images)
        )
        return Task(train, np.arange(len(train), dtype=np.int64), test, self.answers)


def load_omniglot(
    path: str | Path, parts: str | Iterable[str] = "small1", *, size: int = 28
) -> Omniglot:
    """Read one or more parts of Omniglot.

    A character that is in several parts (Greek and Latin are in both small ones) counts once.
    Decoded drawings are kept in memory; a second call only looks whether a file has changed.

    Args:
        path: directory with the official zips, or with the folders extracted from them.
        parts: "small1" (136 characters), "small2" (156), "background" (964), "evaluation"
            (659), or several of them. All of Omniglot is ("background", "evaluation").
        size: side of the images in pixels, 1 to 105.

    Returns:
        The drawings (N, size, size, 1), their labels (N,) and the names of the characters.

    Raises:
        InputError: a missing, damaged or unexpected file, naming it and what to do.
        UnknownKeyError: no such part.
        MissingDependencyError: Pillow is not installed.

    >>> load_omniglot("/nowhere", "small3")
    Traceback (most recent call last):
    metaframe.errors.UnknownKeyError: no part 'small3' of Omniglot. Did you mean 'small2'?

    Source: Lake et al., "Human-level concept learning through probabilistic program induction"
    (Science 350, 2015). MIT licence.
    """
    size = _check_size(size)
    names = _names(parts)
    for name in names:
        if name not in PARTS:
            raise UnknownKeyError(f"no part {name!r} of Omniglot. {nearest(name, PARTS)}")
    if not names:
        raise InputError(f"parts must name at least one of {', '.join(sorted(PARTS))}.")
    drawings: dict[str, Images] = {}
    for name in names:
        location = locate(path, PARTS[name], SOURCE).resolve()
        drawings |= _drawings(location, stamp(location), size)
    characters = tuple(sorted(drawings))
    images = np.concatenate([drawings[character] for character in characters])
    labels = np.repeat(np.arange(len(characters), dtype=np.int64), DRAWERS)
    return Omniglot(_read_only(images[..., None]), _read_only(labels), characters)


@functools.lru_cache(maxsize=8)
def _drawings(location: Path, state: str, size: int) -> dict[str, Images]:
    del state  # in the signature, a file that was replaced is read again
    with open_files(location, SOURCE) as files:
        return read_drawings(files, size)


def one_shot_runs(path: str | Path, *, size: int = 28) -> tuple[OneShotRun, ...]:
    """The 20 official within-alphabet runs, 400 trials in all, from all_runs.zip.

    Published error rates: people 4.5%, modified Hausdorff distance 38.8%, chance 95%. Train on
    "small1", "small2" or "background" only. Each query is to be decided on its own: using that
    the 20 queries show 20 different characters is another, transductive, protocol.

    Args:
        path: directory with all_runs.zip, or with the folder extracted from it.
        size: side of the images in pixels, 1 to 105.

    Returns:
        The runs, with (20, size, size, 1) drawings each for training and for test.

    Raises:
        InputError: a missing, damaged or unexpected file, naming it and what to do.
        MissingDependencyError: Pillow is not installed.

    >>> one_shot_runs("omniglot", size=0)
    Traceback (most recent call last):
    metaframe.errors.InputError: size must be at least 1, received 0.

    Source: Lake et al. (Science 350, 2015).
    """
    size = _check_size(size)
    with open_files(locate(path, "all_runs", SOURCE), SOURCE) as files:
        runs = read_runs(files, size)
    return tuple(
        OneShotRun(
            run.name,
            _read_only(run.train[..., None]),
            _read_only(run.test[..., None]),
            _read_only(np.array(run.answers, dtype=np.int64)),
        )
        for run in runs
    )


def _check_size(size: int) -> int:
    size = arguments.integer(size, "size", at_least=1)
    if size > SIDE:
        raise InputError(f"size must be at most {SIDE}, the drawings' own, received size={size}.")
    return size


def _names(names: str | Iterable[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _alphabet(character: str) -> str:
    return character.partition("/")[0]


def _read_only(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    array.setflags(write=False)
    return array
