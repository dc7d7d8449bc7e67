"""The `metaframe` command. Its parts are imported when it runs, not before."""

from __future__ import annotations

import os
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments after the command's name, such as `["demo", "--seed", "0"]`. Default:
            those of the process.

    Returns:
        The exit code, see `metaframe --help`.
    """
    from metaframe.cli.app import run

    # Most of what TensorFlow notes about the processor and XLA would stand between the lines of
    # the command. Its warnings still do.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
    return run(argv)
