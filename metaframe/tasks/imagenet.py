"""mini-ImageNet and tieredImageNet, from local copies.

ImageNet's licence lets nobody pass its images on, so nothing is fetched: both are read as their
authors lay them out. Pickles, in which both also go around, are refused and never loaded: a pickle
can run any code. What is read is checked against a SHA256SUMS file in the folder (as `sha256sum`
writes it), if there is one.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from metaframe.errors import InputError
from metaframe.tasks._files import locate, open_files, stamp
from metaframe.tasks._imagenet_files import (
    CHECKSUMS,
    MINI,
    TIERED,
    Checksums,
    Labelled,
    read_arrays,
    read_folders,
    read_list,
    read_listed,
)
from metaframe.tasks._pictures import check_size
from metaframe.tasks.few_shot import ClassSplit
from metaframe.tasks.sampling import Split, check_split

STEMS = {"train": "train", "validation": "val", "test": "test"}
"""The names of our splits in the files."""


@dataclass(frozen=True, eq=False)
class ImageClasses:
    """The images of one split.

    Args:
        images: `(N, size, size, 3)` uint8, read-only. `FewShotSampler` makes them floats in
            [0, 1].
        labels: `(N,)` int64, an index into `classes`, read-only.
        classes: the name of every class, sorted; WordNet's, such as "n01532829", where the files
            have them.
        split: which split it is.
        sha256: of the names and contents of all files that were read, in hexadecimal digits.

    >>> images, labels = np.zeros((2, 84, 84, 3), "uint8"), np.array([0, 1])
    >>> ImageClasses(images, labels, ("cat", "dog"), "test", sha256="").class_split.test
    (0, 1)
    """

    images: np.ndarray[Any, np.dtype[np.uint8]]
    labels: np.ndarray[Any, np.dtype[np.int64]]
    classes: tuple[str, ...]
    split: Split
    sha256: str

    @property
    def class_split(self) -> ClassSplit:
        """All classes in this one split, as `FewShotSampler` wants to be told."""
        return ClassSplit(**{self.split: tuple(range(len(self.classes)))})


def load_mini_imagenet(path: str | Path, split: Split = "train", *, size: int = 84) -> ImageClasses:
    """Read one split of mini-ImageNet: 100 classes of 600 images, 64 / 16 / 20.

    The folder holds the lists of Ravi and Larochelle, train.csv, val.csv and test.csv, and the
    images that they name, in a folder images or an archive images.zip, of any size: they become
    `size` by `size`. Decoding the 38,400 training images takes a few minutes; they stay in memory,
    and a second call only looks whether a file has changed.

    Args:
        path: the folder.
        split: "train", "validation" or "test".
        size: side of the images in pixels, at most 512.

    Returns:
        The images and labels of the split, with the names of the classes.

    Raises:
        InputError: a missing, damaged or unexpected file, one with another checksum, or a folder
            of pickles; says which and what to do.
        MissingDependencyError: Pillow is not installed.

    >>> load_mini_imagenet("/nowhere")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    metaframe.errors.InputError: /nowhere has no train.csv. Get it from https://github.com/...

    Sources: Vinyals et al. 2016, arXiv 1606.04080; the split: Ravi and Larochelle, ICLR 2017.
    """
    root, size = Path(path).resolve(), check_size(size)
    stem = STEMS[check_split(split)]
    file = root / f"{stem}.csv"
    if not file.is_file():
        raise InputError(f"{root} has no {file.name}. {_pickles(root)}Get it from {MINI.url}.")
    images = (root / "images", root / "images.zip")
    return _mini(root, split, size, stamp(file, root / CHECKSUMS, *images))


@functools.lru_cache(maxsize=3)
def _mini(root: Path, split: Split, size: int, state: str) -> ImageClasses:
    del state  # in the signature, a file that was replaced is read again
    checksums = Checksums(root, MINI)
    listed = read_list(root / f"{STEMS[split]}.csv", checksums)
    location = locate(root, "images", MINI)
    if location.is_file():
        checksums.take_file(location)
    with open_files(location, MINI) as files:
        found = read_listed(files, listed, size, checksums, root)
    return _classes(found, split, checksums)


def load_tiered_imagenet(
    path: str | Path, split: Split = "train", *, size: int = 84
) -> ImageClasses:
    """Read one split of tieredImageNet: 608 classes, 351 / 97 / 160, apart in WordNet's tree.

    The folder holds either arrays, train_images.npz with "images" `(N, 84, 84, 3)` uint8 and
    train_labels.npz with "labels" `(N,)` integers; or images in folders, or zip archives of them,
    train/n01530575/name.jpg and so on. The splits are called train, val and test. A whole split
    has to fit in memory: the training images are 9.5 GB at size 84.

    Args:
        path: the folder.
        split: "train", "validation" or "test".
        size: side of the images in pixels, at most 512; arrays have to be of this size already.

    Returns:
        The images and labels of the split, with the names of the classes.

    Raises:
        InputError: a missing, damaged or unexpected file, one with another checksum, or a folder
            of pickles; says which and what to do.
        MissingDependencyError: Pillow is not installed, which images in folders need.

    >>> load_tiered_imagenet("/nowhere", "test")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    metaframe.errors.InputError: /nowhere has none of test_images.npz, test, test.zip. See https...

    Source: Ren et al. 2018, arXiv 1803.00676.
    """
    root, size = Path(path).resolve(), check_size(size)
    stem = STEMS[check_split(split)]
    candidates = [root / f"{stem}_images.npz", root / stem, root / f"{stem}.zip"]
    location = next((c for c in candidates if c.exists()), None)
    if location is None:
        names = ", ".join(candidate.name for candidate in candidates)
        raise InputError(f"{root} has none of {names}. {_pickles(root)}See {TIERED.url}.")
    labels = root / f"{stem}_labels.npz"
    return _tiered(root, location, split, size, stamp(location, labels, root / CHECKSUMS))


@functools.lru_cache(maxsize=3)
def _tiered(root: Path, location: Path, split: Split, size: int, state: str) -> ImageClasses:
    del state
    checksums = Checksums(root, TIERED)
    if location.suffix == ".npz":
        found = read_arrays(root, STEMS[split], checksums)
        if found.images.shape[1:3] != (size, size):
            raise InputError(
                f"{location} has images of {found.images.shape[1:3]} pixels, received size={size}."
            )
        return _classes(found, split, checksums)
    if location.is_file():
        checksums.take_file(location)
    with open_files(location, TIERED) as files:
        found = read_folders(files, size, checksums, root)
    return _classes(found, split, checksums)


def _classes(found: Labelled, split: Split, checksums: Checksums) -> ImageClasses:
    classes, labels = np.unique(np.array(found.names), return_inverse=True)
    labels = labels.astype(np.int64)
    for array in (found.images, labels):
        array.setflags(write=False)
    return ImageClasses(found.images, labels, tuple(classes.tolist()), split, checksums.whole)


def _pickles(root: Path) -> str:
    """A sentence about pickles, if that is what there is."""
    found = sorted(p.name for suffix in ("pkl", "pickle") for p in root.glob(f"*.{suffix}"))
    if not found:
        return ""
    return (
        f"{found[0]} is a pickle, which can run any code when it is loaded; metaframe unpickles "
        "nothing. "
    )
