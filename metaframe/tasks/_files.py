"""Reading a data set's files, trusting nothing in them.

Archives are read in memory and never extracted, so no name in one can reach the file system;
names that try are reported. Sizes are checked before anything is decompressed or decoded, and
nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from metaframe.errors import InputError


@dataclass(frozen=True)
class Source:
    """Where a data set's official files come from, and how large they get.

    Attributes:
        url: named by every error.
        max_bytes: of one file, so that a small archive cannot fill the memory.
        remedy: what to do about a bad file; default: download it again.
    """

    url: str
    max_bytes: int
    remedy: str = ""

    @property
    def again(self) -> str:
        """Advice about a bad file."""
        return (
            self.remedy or f"The file is damaged or incomplete; download it again from {self.url}."
        )


@dataclass(frozen=True)
class Files:
    """Named files of one archive or folder."""

    where: str
    names: tuple[str, ...]
    read: Callable[[str], bytes]


def locate(path: str | Path, stem: str, source: Source) -> Path:
    """The folder `stem` or the archive `stem`.zip in the directory `path`, or `path` itself."""
    here = Path(path)
    root = here.parent if here.name in (stem, f"{stem}.zip") else here
    for candidate in (root / stem, root / f"{stem}.zip"):
        if candidate.exists():
            return candidate
    raise InputError(
        f"{root} has neither {stem}.zip nor a folder {stem}. Download the file from {source.url} "
        "and pass the directory it is in."
    )


def stamp(*paths: Path) -> str:
    """Another text when one of these files changed, or anything within one of these folders.

    Decided by names, sizes and times, without reading the files.
    """
    found = [str(path) for path in paths if path.exists()]
    for folder in tuple(found):
        for here, folders, files in os.walk(folder):
            found += [os.path.join(here, name) for name in (*folders, *files)]
    digest = hashlib.sha256()
    for name in sorted(found):
        with suppress(OSError):  # a link to nowhere, which reading will report if it is needed
            state = os.stat(name)
            digest.update(f"{name}\0{state.st_size}\0{state.st_mtime_ns}\n".encode())
    return digest.hexdigest()


@contextmanager
def open_files(location: Path, source: Source) -> Iterator[Files]:
    """The files of a folder or a zip archive."""
    if location.is_dir():
        names = tuple(sorted(p.relative_to(location).as_posix() for p in location.rglob("*.*")))
        yield Files(str(location), names, lambda name: read_file(location / name, source))
        return
    with reporting(str(location), source):
        archive = zipfile.ZipFile(location)
    with archive:
        names = tuple(sorted(archive.namelist()))
        for name in names:
            _check_name(location, name, source)
        if len(set(names)) < len(names):
            twice = next(a for a, b in itertools.pairwise(names) if a == b)
            raise InputError(f"{location} has two members called {twice!r}. {source.again}")
        yield Files(
            str(location), names, lambda name: _read_member(archive, location, name, source)
        )


def _check_name(location: Path, name: str, source: Source) -> None:
    if name.startswith("/") or "\\" in name or ".." in PurePosixPath(name).parts:
        raise InputError(
            f"{location} has a member called {name!r}, which no official archive has and which "
            f"points outside it. Do not extract this file; download it from {source.url}."
        )


def read_file(file: Path, source: Source) -> bytes:
    """The content of a file."""
    with reporting(str(file), source):
        _check_bytes(str(file), file.stat().st_size, source)
        return file.read_bytes()


def _read_member(archive: zipfile.ZipFile, location: Path, name: str, source: Source) -> bytes:
    where = f"{location}, member {name}"
    with reporting(where, source):
        # zipfile never returns more than the directory entry promises.
        _check_bytes(where, archive.getinfo(name).file_size, source)
        return archive.read(name)


def _check_bytes(where: str, size: int, source: Source) -> None:
    if size > source.max_bytes:
        raise InputError(
            f"{where}: {size} bytes, expected at most {source.max_bytes}. {source.again}"
        )


@contextmanager
def reporting(where: str, source: Source) -> Iterator[None]:
    """Turn whatever a damaged file makes a decoder raise into an error that names the file."""
    try:
        yield
    except InputError:
        raise
    except (
        OSError,
        EOFError,
        SyntaxError,  # Pillow, for a broken PNG chunk
        ValueError,
        KeyError,
        RuntimeError,  # zipfile, for an encrypted member or an unknown compression
        struct.error,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise InputError(f"{where} cannot be read: {error}. {source.again}") from error
