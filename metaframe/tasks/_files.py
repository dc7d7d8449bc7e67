"""Reading a data set's files, trusting nothing in them.

Sizes are checked before anything is read, decompressed or decoded, and nothing is ever unpickled.
`metaframe.tasks._archives` has what holds of archives.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from metaframe.errors import InputError, MetaframeError
from metaframe.files.read import contents, reason
from metaframe.tasks import _archives


@dataclass(frozen=True)
class Source:
    """The source of a data set's official files, and the largest size of each.

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
            digest.update(os.fsencode(name))
            digest.update(f"\0{state.st_size}\0{state.st_mtime_ns}\n".encode())
    return digest.hexdigest()


@contextmanager
def open_files(location: Path, source: Source) -> Iterator[Files]:
    """The files of a folder or a zip archive."""
    if location.is_dir():
        names = tuple(sorted(p.relative_to(location).as_posix() for p in location.rglob("*.*")))
        yield Files(str(location), names, lambda name: read_file(location / name, source))
        return
    with ExitStack() as stack:
        with reporting(str(location), source):
            archive = stack.enter_context(_archives.opened(location))

        def read(name: str) -> bytes:
            with reporting(f"{location}, member {name}", source):
                return _archives.read_member(archive, name, source.max_bytes)

        yield Files(str(location), tuple(sorted(archive.namelist())), read)


def read_file(file: Path, source: Source) -> bytes:
    """The content of a file."""
    with reporting(str(file), source):
        return contents(file, source.max_bytes)


@contextmanager
def reporting(where: str, source: Source) -> Iterator[None]:
    """Turn whatever a damaged file makes a decoder raise into an error that names the file."""
    try:
        yield
    except MetaframeError:
        raise
    except Exception as error:
        raise InputError(f"{where} cannot be read: {reason(error)}. {source.again}") from error
