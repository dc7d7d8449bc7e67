"""The `metaframe` command. Its parts are imported when it runs, not before."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 ok, 1 failed, 2 usage, 130 interrupted."""
    from metaframe.cli.app import run

    return run(argv)
