"""What ends a command, and with which exit code."""

from __future__ import annotations

from metaframe.errors import MetaframeError

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


class UsageError(MetaframeError, ValueError):
    """The command line or a configuration file says something that does not exist or fit."""
