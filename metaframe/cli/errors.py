"""The errors that end a command, each with its exit code."""

from __future__ import annotations

from collections.abc import Iterable

from metaframe.errors import MetaframeError, nearest

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


class UsageError(MetaframeError, ValueError):
    """The command line or a configuration file says something that does not exist or fit."""


def suggestion(name: str, known: Iterable[str]) -> str:
    """The nearest name to one that is unknown, and all names."""
    names = sorted(known)
    near = nearest(name, names)
    return near if near.startswith("Known") else f"{near} There are {', '.join(names)}."
