"""The contents of the files of mini-ImageNet and tieredImageNet, in their layouts."""

from __future__ import annotations

import csv
import hashlib
import io
import math
import os
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from metaframe.errors import InputError
from metaframe.tasks._archives import opened
from metaframe.tasks._files import Files, Source, read_file, reporting
from metaframe.tasks._pictures import Pixels, decoder

CHECKSUMS = "SHA256SUMS"
KEYS = ("images", "labels")
"""The arrays of tieredImageNet."""
MINI = Source(
    "https://github.com/twitter/meta-learning-lstm/tree/master/data/miniImagenet (the lists; the "
    "images are ImageNet's)",
    32 * 2**20,
)
TIERED = Source("https://github.com/renmengye/few-shot-ssl-public", 32 * 2**20)

_LARGEST_ARRAY = 20 * 2**30
"""Bytes; the 448,695 training images of tieredImageNet have half of that."""
_FILENAME = re.compile(r"[\w-][\w.-]*\.(?:jpe?g|png)", re.IGNORECASE)
_IN_CLASS = re.compile(r"(?:^|/)(n\d{8})/[^/.][^/]*\.(?:jpe?g|png)$", re.IGNORECASE)
_CHECKSUM_LINE = re.compile(r"([0-9a-f]{64}) [ *](\S.*)")


class Checksums:
    """Checks what is read against a folder's SHA256SUMS, and sums it all up."""

    def __init__(self, root: Path, source: Source) -> None:
        self._root = root
        self._source = source
        self._expected = _listed(root / CHECKSUMS, source)
        self._seen: dict[str, str] = {}

    def take(self, name: str, data: bytes) -> bytes:
        """`data`, which was read from the file called `name` in the folder."""
        self._check(name, hashlib.sha256(data).hexdigest())
        return data

    def take_file(self, file: Path) -> None:
        """A file that is too large to be read at once."""
        with reporting(str(file), self._source), file.open("rb") as stream:
            self._check(file.name, hashlib.file_digest(stream, "sha256").hexdigest())

    def _check(self, name: str, digest: str) -> None:
        expected = self._expected.get(name, digest)
        if digest != expected:
            raise InputError(
                f"{self._root / name} has the SHA-256 {digest}, {CHECKSUMS} says {expected}. "
                f"{self._source.again}"
            )
        self._seen[name] = digest

    @property
    def whole(self) -> str:
        """One SHA-256 of the names and contents of all that was read."""
        lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(self._seen.items()))
        return hashlib.sha256(os.fsencode(lines)).hexdigest()


def _listed(file: Path, source: Source) -> Mapping[str, str]:
    if not file.exists():
        return {}
    text = read_file(file, source).decode("utf-8", "replace")
    lines = [line for line in text.splitlines() if line.strip()]
    matches = [_CHECKSUM_LINE.fullmatch(line) for line in lines]
    for line, match in zip(lines, matches, strict=True):
        if match is None:
            raise InputError(
                f"{file} has the line {line!r}, expected 64 hexadecimal digits, two spaces and a "
                "name, as sha256sum writes them."
            )
    return {m[2].removeprefix("./"): m[1] for m in matches if m is not None}


class Listed(NamedTuple):
    """An image's file name and its class."""

    filename: str
    label: str


def read_list(file: Path, checksums: Checksums) -> list[Listed]:
    """The rows of a list of Ravi and Larochelle: a header "filename,label", then one an image."""
    data = checksums.take(file.name, read_file(file, MINI))
    with reporting(str(file), MINI):
        rows = list(csv.reader(io.StringIO(data.decode("ascii")), strict=True))
    if not rows or rows[0] != ["filename", "label"]:
        raise InputError(
            f"{file} begins with {rows[0] if rows else 'nothing'}, expected the header "
            f"filename,label. {MINI.again}"
        )
    for number, row in enumerate(rows[1:], 2):
        if len(row) != 2 or not _FILENAME.fullmatch(row[0]) or not row[1]:
            raise InputError(
                f"{file}, line {number}: {','.join(row)!r} is no plain file name and a class. "
                f"{MINI.again}"
            )
    found = [Listed(*row) for row in rows[1:]]
    if len({item.filename for item in found}) != len(found):
        raise InputError(f"{file} names an image twice. {MINI.again}")
    return found


@dataclass(frozen=True)
class Labelled:
    """Images `(N, size, size, 3)`, and for each the name of its class."""

    images: Pixels
    names: tuple[str, ...]


def read_listed(
    files: Files, listed: list[Listed], size: int, checksums: Checksums, root: Path
) -> Labelled:
    """The images that a list names."""
    by_name: dict[str, list[str]] = {}
    for name in files.names:
        by_name.setdefault(name.rpartition("/")[2], []).append(name)
    for item in listed:
        if item.filename not in by_name:
            raise InputError(
                f"{files.where} has no {item.filename}, which the list names. {MINI.again}"
            )
        _check_one(files.where, by_name[item.filename], MINI)
    names = [by_name[item.filename][0] for item in listed]
    images = _load(files, names, size, checksums, root, MINI)
    return Labelled(images, tuple(item.label for item in listed))


def read_folders(files: Files, size: int, checksums: Checksums, root: Path) -> Labelled:
    """The images in folders called after their classes, such as n01530575."""
    matches = {name: match for name in files.names if (match := _IN_CLASS.search(name))}
    if not matches:
        raise InputError(
            f"{files.where} has no images in folders called after their classes, such as "
            f"n01530575/name.jpg. {TIERED.again}"
        )
    same: dict[tuple[str, str], list[str]] = {}
    for name, match in matches.items():
        same.setdefault((match[1], name.rpartition("/")[2]), []).append(name)
    for names in same.values():
        _check_one(files.where, names, TIERED)
    images = _load(files, list(matches), size, checksums, root, TIERED)
    return Labelled(images, tuple(match[1] for match in matches.values()))


def _check_one(where: str, names: list[str], source: Source) -> None:
    if len(names) > 1:
        raise InputError(
            f"{where}: {names[0]!r} and {names[1]!r} are the same image. {source.again}"
        )


def _load(
    files: Files, names: list[str], size: int, checksums: Checksums, root: Path, source: Source
) -> Pixels:
    decode = decoder("ImageNet", size)
    images = np.empty((len(names), size, size, 3), np.uint8)
    folder = Path(files.where)
    for image, name in zip(images, names, strict=True):
        data = files.read(name)
        if folder.is_dir():  # of an archive it is the whole that has a checksum
            checksums.take((folder / name).relative_to(root).as_posix(), data)
        with reporting(f"{files.where}, {name}", source):
            image[...] = decode(data)
    return images


def read_arrays(folder: Path, stem: str, checksums: Checksums) -> Labelled:
    """`stem`_images.npz and `stem`_labels.npz, arrays "images" and "labels"."""
    files = [folder / f"{stem}_{key}.npz" for key in KEYS]
    if not files[1].exists():
        raise InputError(
            f"{folder} has {files[0].name} and no {files[1].name}. Labels that come as a pickle, "
            f"{stem}_labels.pkl, are not read: a pickle can run any code when it is loaded. If you "
            f"trust yours, convert it once: numpy.savez({files[1].name!r}, "
            f"labels=pickle.load(open('{stem}_labels.pkl', 'rb'))['labels'])."
        )
    images, labels = (_array(file, key) for file, key in zip(files, KEYS, strict=True))
    for file in files:
        checksums.take_file(file)
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8:
        raise InputError(
            f"{files[0]} has images of shape {images.shape} and dtype {images.dtype}, expected "
            f"(N, height, width, 3) and uint8. {TIERED.again}"
        )
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise InputError(
            f"{files[1]} has labels of shape {labels.shape} and dtype {labels.dtype}, expected "
            f"{len(images)} integers. {TIERED.again}"
        )
    return Labelled(images, tuple(map(str, labels.tolist())))


def _array(file: Path, key: str) -> np.ndarray[Any, Any]:
    form: Any = np.lib.format
    with reporting(str(file), TIERED), opened(file) as archive:
        _check_promise(archive, f"{key}.npy")
        with archive.open(f"{key}.npy") as stream:
            array: np.ndarray[Any, Any] = form.read_array(stream, allow_pickle=False)
            stream.read()  # to the end, where zipfile compares checksums
    return array


def _check_promise(archive: zipfile.ZipFile, name: str) -> None:
    """The array is as large as its header says, before the memory for it is asked for."""
    header: Any = np.lib.format
    member = archive.getinfo(name)
    with archive.open(member) as stream:
        version = header.read_magic(stream)
        reader = {(1, 0): header.read_array_header_1_0, (2, 0): header.read_array_header_2_0}
        shape, _, dtype = reader[version](stream)
        if dtype.hasobject:
            raise ValueError("the array holds pickled objects, which are not loaded")
        promised = stream.tell() + math.prod(shape) * dtype.itemsize
    if promised != member.file_size or promised > _LARGEST_ARRAY:
        raise ValueError(f"{member.file_size} bytes where the header promises {promised}")
