"""The classes that a run trains and is tested on, recorded when it begins.

A data set of files is divided by what its folder holds: one class more, or one less, may divide the
others anew, and what is held out then was trained on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from metaframe.cli import datasets
from metaframe.cli.errors import UsageError
from metaframe.cli.run_config import RunConfig
from metaframe.errors import InputError
from metaframe.files.read import contents, parsed, reason
from metaframe.files.schema import many, table, text
from metaframe.files.write import write_atomically
from metaframe.tasks.sampling import Split

CLASSES = "classes.json"

_MOST = 2**26
_SCHEMA = table(many(text))

Names = Mapping[str, Sequence[str]]
"""The classes of each split."""


def record_classes(config: RunConfig, folder: Path) -> None:
    """Write the classes of each split into the run folder, if the data set has files."""
    if names := _names(config, _splits(config)):
        write_atomically(folder / CLASSES, (json.dumps(names, indent=1) + "\n").encode())


def check_classes(config: RunConfig, folder: Path, splits: Sequence[Split] | None = None) -> None:
    """The classes of these splits, by default of all, are those that the run began with.

    Raises:
        UsageError: they are not, with the first difference.
        InputError: the record is damaged.
    """
    began = _recorded(folder / CLASSES)
    if began is None:
        return
    now = _names(config, splits or _splits(config))
    for split, names in now.items():
        if changed := sorted(set(names) ^ set(began.get(split, ()))):
            name, here = changed[0], "in" if changed[0] in names else "not in"
            raise UsageError(
                f"{config.data} does not divide into the classes that the run began with: "
                f"{name!r} was {_place(began, name)}, and is {here} {split} now. What is held out "
                "now may have been trained on. Give the data as it was, or train anew."
            )


def _recorded(path: Path) -> Names | None:
    """None of a data set without files, and of a run from before there was a record."""
    if not path.exists():
        return None
    try:
        found: Names = parsed(contents(path, _MOST))
        _SCHEMA(found, "it")
        return found
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} is damaged: {reason(error)}. Remove it if the data is as it was."
        ) from error


def _splits(config: RunConfig) -> tuple[Split, ...]:
    return ("train", "validation", "test") if config.eval_every else ("train", "test")


def _names(config: RunConfig, splits: Sequence[Split]) -> Names:
    classes = datasets.dataset(config.dataset).classes
    return {} if classes is None else {split: classes(config, split) for split in splits}


def _place(home: Names, name: str) -> str:
    return next((f"in {split}" for split, names in home.items() if name in names), "not there")
