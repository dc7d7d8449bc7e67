"""A run folder: what is in it, made and read.

config.toml     the resolved settings
classes.json    the classes of each split, of a data set that has files
metrics.jsonl   one record a step and one an evaluation; metrics.csv holds the same
checkpoints/    the last few, and the best by validation
result.json     what the evaluation on held-out tasks found
*.png           plots, where matplotlib is installed
tensorboard/    the metrics once more, if asked for
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from metaframe.cli.classes import CLASSES, record_classes
from metaframe.cli.errors import UsageError
from metaframe.cli.experiment import resolve
from metaframe.cli.output import to_json
from metaframe.cli.run_config import RunConfig, read_toml
from metaframe.errors import InputError
from metaframe.files.lock import locked
from metaframe.files.read import contents, parsed, reason, shown
from metaframe.files.schema import integer, many, number, optional, record, refused, text
from metaframe.files.write import clear_unfinished, write_atomically
from metaframe.training.checkpoint import checkpoint_files

CONFIG, RESULT = "config.toml", "result.json"
CHECKPOINTS, TENSORBOARD = "checkpoints", "tensorboard"
FILES = (RESULT, "metrics.jsonl", "metrics.csv")
"""The numbers that a run measures."""
_MOST = 2**26
"""Bytes of result.json, which holds three numbers for each task of the evaluation."""


def _margin(value: Any, where: str) -> None:
    number(value, where)
    if value < 0:
        raise refused(value, where, "at least 0")


_ESTIMATE = record({"mean": optional(number), "ci95": optional(_margin)})
_SCHEMA = record(
    {
        "metric": text,
        "evaluation": record(
            {
                "tasks": integer,
                "transductive": _ESTIMATE,
                "inductive": optional(_ESTIMATE),
                "curve": many(_ESTIMATE, at_least=1),
            }
        ),
    }
)
PICTURES = ("learning_curve.png", "adaptation.png", "predictions.png")


def default_folder(config: RunConfig) -> Path:
    """A folder named after what the run is."""
    shape = "" if config.dataset == "sinusoid" else f"-{config.ways}w{config.shots}s"
    name = f"{config.dataset}{shape}-{config.algorithm}-{config.backend}-seed{config.seed}"
    return Path("runs") / name


def quoted(folder: Path) -> str:
    """The folder as one writes it on a command line."""
    return shlex.quote(str(folder))


def check_free(folder: Path, *, overwrite: bool) -> None:
    """There is no run in `folder`, or it may go.

    Raises:
        UsageError: there is one, or the folder has a name that cannot be printed.
    """
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        raise UsageError(
            f"--out is {shown(str(folder))}, which is no Unicode text. Choose another name."
        ) from None
    if overwrite:
        return
    if (folder / CONFIG).exists():
        raise UsageError(
            f"{folder} has a run already. Continue it with `metaframe resume {quoted(folder)}`, "
            "choose another folder with --out, or start anew with --overwrite."
        )
    left = [folder / name for name in FILES if (folder / name).exists()]
    if found := left + checkpoint_files(folder / CHECKPOINTS):
        raise UsageError(
            f"{found[0]} is of another run, which has no {CONFIG}. Choose another folder with "
            "--out, or start anew with --overwrite."
        )


@contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Hold the lock on a run folder, which is made if there is none.

    Raises:
        InputError: another process holds it.
        OSError: the folder cannot be made or written.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with locked(folder):
            clear_unfinished(folder)
            yield
    finally:
        if made:
            with suppress(OSError):  # which holds something by now
                folder.rmdir()


def begin(config: RunConfig, folder: Path, *, overwrite: bool) -> None:
    """Make a run folder, without anything of a run that was in it before.

    Raises:
        UsageError: there is a run in it already.
        OSError: something of it cannot be removed, or the folder cannot be made.
    """
    check_free(folder, overwrite=overwrite)
    if overwrite:
        # The settings first: what is left if this fails is then not taken for the old run.
        for name in (CONFIG, CLASSES, *FILES, *PICTURES, CHECKPOINTS, TENSORBOARD):
            _remove(folder / name)
    folder.mkdir(parents=True, exist_ok=True)
    record_classes(config, folder)
    write_atomically(folder / CONFIG, config.to_toml().encode())


def _remove(path: Path) -> None:
    """Whatever is there; of a link, the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def opened(folder: Path, changes: Mapping[str, Any]) -> RunConfig:
    """The settings of the run in `folder`, with `changes`.

    Raises:
        UsageError: there is no run.
    """
    if not (folder / CONFIG).is_file():
        raise UsageError(f"{folder} is no run folder: it has no {CONFIG}.")
    return resolve(changes, None, read_toml(folder / CONFIG))


def is_of(config: RunConfig, folder: Path) -> bool:
    """True if the run in `folder` is the one that `config` describes."""
    return (folder / CONFIG).is_file() and opened(folder, {}) == config


def check_same(config: RunConfig, folder: Path) -> None:
    """The run in `folder` is the one that `config` describes.

    Raises:
        UsageError: it is not, with the first difference.
    """
    there, here = opened(folder, {}).as_dict(), config.as_dict()
    for name, value in here.items():
        if value != there[name]:
            raise UsageError(
                f"{folder} has a run already, with {name}={there[name]}; received {name}={value}. "
                "Choose another folder with --out, or start anew with --overwrite."
            )


def write_result(folder: Path, result: Mapping[str, Any]) -> None:
    """Write what the evaluation found."""
    write_atomically(folder / RESULT, to_json(result).encode())


def read_result(folder: Path) -> dict[str, Any] | None:
    """The content of result.json; None if there is none yet.

    Raises:
        InputError: it is damaged.
    """
    path = folder / RESULT
    if not path.exists():
        return None
    try:
        result = parsed(contents(path, _MOST))
        _SCHEMA(result, "it")
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} is damaged: {reason(error)}. Remove it, and `metaframe resume "
            f"{quoted(folder)}` writes it again."
        ) from error
    found: dict[str, Any] = result
    return found
