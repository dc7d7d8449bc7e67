"""The contents of Omniglot's files."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from metaframe.errors import InputError
from metaframe.tasks._files import Files, Source, reporting
from metaframe.tasks._pictures import opened, pillow

SIDE = 105
"""Pixels along a side of a drawing."""
DRAWERS = 20
"""Drawings of every character."""
RUNS = 20
"""One-shot runs, of as many characters each."""

Pixels = np.ndarray[Any, np.dtype[np.uint8]]

# The largest official file has 1 KiB.
SOURCE = Source("https://github.com/brendenlake/omniglot/tree/master/python", 64 * 1024)

_DRAWING = re.compile(r"(?:^|/)([^/.][^/]*/character\d+)/\d+_(\d\d)\.png$")
_RUN_FILE = re.compile(
    r"(?:^|/)(run\d\d)/((?:training/class|test/item)\d\d\.png|class_labels\.txt)$"
)


def read_drawings(files: Files, size: int) -> dict[str, Pixels]:
    """Every character's drawings, `(20, size, size)`, by "Alphabet/characterNN"."""
    found: dict[str, dict[str, str]] = {}
    for name in files.names:
        if match := _DRAWING.search(name):
            character, drawer = match.groups()
            _put(found.setdefault(character, {}), drawer, name, files)
    if not found:
        raise InputError(
            f"{files.where} has no files called <alphabet>/characterNN/NNNN_NN.png. {SOURCE.again}"
        )
    decode = _decoder()
    result = {}
    for character, names in found.items():
        if len(names) != DRAWERS:
            raise InputError(
                f"{files.where}: {character} has {len(names)} drawings, expected {DRAWERS}. "
                f"{SOURCE.again}"
            )
        result[character] = _load(files, [names[drawer] for drawer in sorted(names)], size, decode)
    return result


@dataclass(frozen=True)
class RunFiles:
    """One official run: images `(20, size, size)`, and the answer to each test image."""

    name: str
    train: Pixels
    test: Pixels
    answers: list[int]


def read_runs(files: Files, size: int) -> list[RunFiles]:
    """The 20 official runs, in order."""
    found: dict[str, dict[str, str]] = {}
    for name in files.names:
        if match := _RUN_FILE.search(name):
            run, item = match.groups()
            _put(found.setdefault(run, {}), item, name, files)
    expected = [f"run{i:02d}" for i in range(1, RUNS + 1)]
    if sorted(found) != expected:
        raise InputError(
            f"{files.where} has the runs {sorted(found)}, expected run01 to run{RUNS}. "
            f"{SOURCE.again}"
        )
    decode = _decoder()
    return [_read_run(files, run, found[run], size, decode) for run in expected]


def _read_run(
    files: Files, run: str, items: Mapping[str, str], size: int, decode: Decode
) -> RunFiles:
    groups = {
        group: sorted(item for item in items if item.startswith(f"{group}/"))
        for group in ("training", "test")
    }
    for group, members in groups.items():
        if len(members) != RUNS:
            raise InputError(
                f"{files.where}: {run}/{group} has {len(members)} images, expected {RUNS}. "
                f"{SOURCE.again}"
            )
    if "class_labels.txt" not in items:
        raise InputError(f"{files.where}: {run} has no class_labels.txt. {SOURCE.again}")
    answers = _answers(files, run, items["class_labels.txt"], groups["training"], groups["test"])
    train, test = (
        _load(files, [items[item] for item in groups[group]], size, decode)
        for group in ("training", "test")
    )
    return RunFiles(run, train, test, answers)


def _answers(
    files: Files, run: str, label_file: str, train: list[str], test: list[str]
) -> list[int]:
    """For each test image the position of its character among the train images."""
    where = f"{files.where}, {label_file}"
    with reporting(where, SOURCE):
        lines = files.read(label_file).decode("ascii").split("\n")
    true: dict[str, str] = {}
    for line in filter(None, map(str.strip, lines)):
        pair = [name.removeprefix(f"{run}/") for name in line.split()]
        if len(pair) != 2 or pair[0] not in test or pair[1] not in train or pair[0] in true:
            raise InputError(
                f"{where}: line {line!r} does not pair one test image of {run} with one training "
                f"image. {SOURCE.again}"
            )
        true[pair[0]] = pair[1]
    if len(true) != len(test):
        raise InputError(f"{where}: {len(true)} answers, expected {len(test)}. {SOURCE.again}")
    return [train.index(true[item]) for item in test]


def _put(table: dict[str, str], key: str, name: str, files: Files) -> None:
    if key in table:
        raise InputError(
            f"{files.where}: {table[key]!r} and {name!r} are the same item. {SOURCE.again}"
        )
    table[key] = name


Decode = Callable[[bytes], "np.ndarray[Any, np.dtype[np.bool_]]"]


def _load(files: Files, names: Iterable[str], size: int, decode: Decode) -> Pixels:
    drawings = []
    for name in names:
        data = files.read(name)
        with reporting(f"{files.where}, {name}", SOURCE):
            drawings.append(decode(data))
    return reduce_ink(np.stack(drawings), size)


def _decoder() -> Decode:
    """PNG bytes to `(105, 105)` booleans, True where there is ink."""
    pillow("omniglot")  # is it there?

    def decode(data: bytes) -> np.ndarray[Any, np.dtype[np.bool_]]:
        with opened(data, "omniglot", ("PNG",), SIDE) as picture:
            ink: np.ndarray[Any, np.dtype[np.bool_]] = np.asarray(picture.convert("L")) < 128
        return ink

    return decode


def reduce_ink(ink: np.ndarray[Any, np.dtype[np.bool_]], size: int) -> Pixels:
    """The share of ink in each pixel's area: 0 none, 255 all; `(N, 105, 105) -> (N, size, size)`.

    Computed in whole numbers, so that no library's rounding enters: float32 holds every sum.
    """
    if size == SIDE:
        return ink * np.uint8(255)
    # Old and new pixel edges both lie on a grid of size * 105 steps; count shared steps.
    old, new = np.arange(SIDE), np.arange(size)[:, None]
    shared = np.minimum((old + 1) * size, (new + 1) * SIDE) - np.maximum(old * size, new * SIDE)
    weights = shared.clip(0).astype(np.float32)
    total = (weights @ ink.astype(np.float32) @ weights.T).astype(np.int64)
    whole = SIDE * SIDE
    share: Pixels = ((total * 255 + whole // 2) // whole).astype(np.uint8)
    return share
