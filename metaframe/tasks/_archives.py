"""The guards of every archive that is read: sizes, ratios, counts, names, links and duplicates.

Archives are read in memory and never extracted, so no name in one can reach the file system. What
the directory of an archive says is checked as a whole before any member is read.
"""

from __future__ import annotations

import itertools
import re
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from metaframe.errors import InputError

MOST_MEMBERS = 1_000_000
"""The training images of tieredImageNet are 448,695."""
MOST_RATIO = 200
"""Of a member's size to what the archive holds of it, from `FREE` bytes on. Images have 1."""
FREE = 2**20

_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_OUTSIDE = re.compile(r"^/|\\|^[A-Za-z]:|[\x00-\x1f\x7f]")


@contextmanager
def opened(location: Path) -> Iterator[zipfile.ZipFile]:
    """A zip archive whose directory is checked.

    Raises:
        OSError, zipfile.BadZipFile, ...: it is no archive; see `metaframe.tasks._files.reporting`.
        ValueError: a directory that no official archive has.
        InputError: a name that points outside of the archive.
    """
    if not stat.S_ISREG(location.stat().st_mode):
        raise ValueError("it is no regular file")
    with zipfile.ZipFile(location) as archive:
        members = archive.infolist()
        if len(members) > MOST_MEMBERS:
            raise ValueError(f"it has {len(members)} members, expected at most {MOST_MEMBERS}")
        for member in members:
            _check_name(location, member.orig_filename)
            _check_kind(member)
        _check_once([member.filename for member in members])
        if sum(member.compress_size for member in members) > location.stat().st_size:
            raise ValueError("its members overlap: together they are larger than the archive")
        yield archive


def read_member(archive: zipfile.ZipFile, name: str, max_bytes: int) -> bytes:
    """The content of a member.

    Raises:
        ValueError: it is larger than `max_bytes`, before it is decompressed.
    """
    size = archive.getinfo(name).file_size
    if size > max_bytes:
        raise ValueError(f"{size} bytes, expected at most {max_bytes}")
    return archive.read(name)  # never more than the directory promises


def _check_name(location: Path, name: str) -> None:
    if _OUTSIDE.search(name) or ".." in PurePosixPath(name).parts:
        raise InputError(
            f"{location} has a member called {name!r}, which no official archive has and which "
            "points outside it. Do not extract this file; download it again from its authors."
        )


def _check_kind(member: zipfile.ZipInfo) -> None:
    kind = stat.S_IFMT(member.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise ValueError(f"its member {member.filename!r} is a link or a device, and no file")
    if member.compress_type not in _METHODS:
        raise ValueError(
            f"its member {member.filename!r} is compressed by method {member.compress_type}, "
            "expected stored or deflated"
        )
    if member.file_size > max(FREE, MOST_RATIO * member.compress_size):
        raise ValueError(
            f"its member {member.filename!r} has {member.file_size} bytes in "
            f"{member.compress_size}, a ratio of over {MOST_RATIO}"
        )


def _check_once(names: list[str]) -> None:
    """No name comes twice, in whatever spelling."""
    plain = sorted(str(PurePosixPath(name)) for name in names)
    for one, other in itertools.pairwise(plain):
        if one == other:
            raise ValueError(f"it has two members called {one!r}")
