"""RunConfig: one frozen dataclass that says what a run is.

Everything that names a setting comes from here: the flags of the commands, the keys of a TOML file,
what is checked and how, and what checkpoints and result files record. A setting is the first of
these that names it: a flag, the configuration file, the preset, the algorithm's own defaults, the
data set's, the default below.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from metaframe.cli.errors import UsageError
from metaframe.core.inner_loop import Mode
from metaframe.core.task_map import TaskMap
from metaframe.errors import nearest
from metaframe.files.read import contents, shown
from metaframe.files.schema import LARGEST
from metaframe.learners.norms import Norm

Schedule = Literal["constant", "cosine"]
Precision = Literal["float32", "float64", "bfloat16"]
Protocol = Literal["random", "runs"]

_MOST = 2**20
"""Bytes of a file of settings."""
_QUOTES = "'"
_PARTS = re.compile(r"[\n=,/\[\]{}#]")
_MOST_DOTS = 100
"""In what may be a dotted key: with their square grows the time that tomllib takes."""


def setting(
    default: Any, text: str, *, at_least: float | None = None, above: float | None = None
) -> Any:
    """A field with its help text and the least value it may have, or the bound it is above."""
    return field(default=default, metadata={"help": text, "at_least": at_least, "above": above})


@dataclass(frozen=True)
class RunConfig:
    """The settings of one training run. Checked when made."""

    dataset: str = setting("sinusoid", "Data set; `metaframe list` shows them.")
    data: str | None = setting(None, "Folder with the data set's files.")
    parts: tuple[str, ...] = setting((), "Parts of the data set to train and test on.")
    held_out: tuple[str, ...] = setting(
        (), "omniglot, folder: alphabets or folders to test on; default: a random split."
    )
    protocol: Protocol = setting(
        "random", "Omniglot: test on random tasks, or on the 20 official one-shot runs."
    )
    ways: int = setting(5, "Classes in a task.", at_least=2)
    shots: int = setting(1, "Support examples of each class; for regression: points.", at_least=1)
    queries: int = setting(15, "Query examples of each class; for regression: points.", at_least=1)
    algorithm: str = setting("maml", "Algorithm; `metaframe list` shows them.")
    norm: Norm = setting("batch", "Statistics of batch normalisation, of models that have it.")
    width: int = setting(64, "Filters of a convolutional model, units of a dense one.", at_least=1)
    inner_lr: float = setting(0.01, "Step size of the inner loop.", at_least=0)
    inner_steps: int = setting(1, "Inner steps in training.", at_least=1)
    multi_step_epochs: int = setting(
        0, "maml++: epochs until the last step alone counts.", at_least=0
    )
    learn_norms: bool = setting(
        False, "maml++: a scale and shift for every inner step, of models with batch normalisation."
    )
    second_order_from: int = setting(0, "maml++: first order before this epoch.", at_least=0)
    steps_per_epoch: int = setting(500, "maml++: outer steps in an epoch.", at_least=1)
    context: int = setting(0, "cavia: context parameters of the model.", at_least=0)
    proximal: float = setting(2.0, "imaml: weight of the distance from the start.", at_least=0)
    cg_steps: int = setting(5, "imaml: steps of conjugate gradient.", at_least=1)
    features: int = setting(
        0, "protonet, protomaml: outputs of the model; 0 for as many as classes.", at_least=0
    )
    outer_lr: float = setting(1e-3, "Learning rate of the outer optimizer, Adam.", at_least=0)
    schedule: Schedule = setting("constant", "How the outer learning rate changes.")
    warmup_steps: int = setting(0, "Outer steps over which the rate rises.", at_least=0)
    clip_norm: float | None = setting(None, "Limit of the meta-gradient's norm.", above=0)
    clip_value: float | None = setting(None, "Limit of its elements.", above=0)
    meta_batch_size: int = setting(16, "Tasks in an outer step.", at_least=1)
    iterations: int = setting(1000, "Outer steps.", at_least=1)
    eval_every: int = setting(250, "Outer steps between validations; 0 for none.", at_least=0)
    validation_tasks: int = setting(100, "Tasks of a validation.", at_least=1)
    patience: int = setting(0, "Validations without gain before stopping; 0 for never.", at_least=0)
    eval_steps: int = setting(10, "Inner steps in the evaluation.", at_least=0)
    eval_tasks: int = setting(600, "Tasks of the evaluation.", at_least=1)
    eval_seed: int = setting(0, "Seed of the validation's and evaluation's tasks.", at_least=0)
    seed: int = setting(0, "Seed of the model and of the training tasks.", at_least=0)
    backend: str | None = setting(None, "jax, torch or tensorflow; default: the first installed.")
    device: str | None = setting(None, "Device, by the backend's name for it.")
    precision: Precision = setting("float32", "What the model computes in.")
    task_map: TaskMap = setting(
        "auto", "Tasks all at once or in turn; auto: convolutions on a CPU in turn."
    )
    chunk_size: int | None = setting(None, "With vmap, tasks at once.", at_least=1)
    mode: Mode = setting("reverse", "How the inner loop is differentiated.")
    compiled: bool | None = setting(None, "Compile whole steps; default: where that pays.")
    timeout: float = setting(300.0, "With several: seconds to wait for a silent one.", at_least=1)
    checkpoint_every: int = setting(500, "Outer steps between checkpoints.", at_least=1)
    keep: int = setting(3, "Checkpoints kept, besides the best.", at_least=1)

    def __post_init__(self) -> None:
        kinds = typing.get_type_hints(RunConfig)
        for entry in fields(self):
            value = _converted(entry.name, getattr(self, entry.name), kinds[entry.name])
            least = entry.metadata["at_least"]
            if least is not None and value is not None and not value >= least:
                raise UsageError(f"{entry.name} must be at least {least}, received {value}.")
            bound = entry.metadata["above"]
            if bound is not None and value is not None and not value > bound:
                raise UsageError(f"{entry.name} must be above {bound}, received {value}.")
            object.__setattr__(self, entry.name, value)

    def as_dict(self) -> dict[str, Any]:
        """Every setting, as plain values."""
        plain = dataclasses.asdict(self)
        return {n: list(v) if isinstance(v, tuple) else v for n, v in plain.items()}

    def to_toml(self) -> str:
        """The settings as a TOML file that `read_toml` reads; TOML leaves out what is None."""
        lines = [f"{n} = {_toml(v)}" for n, v in self.as_dict().items() if v is not None]
        return "\n".join([*lines, ""])


def _converted(name: str, value: Any, kind: Any) -> Any:
    """`value` as `kind`, the annotation of a field."""
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if value is None and types.NoneType in options:
        return None
    for item in value if isinstance(value, list | tuple) else [value]:
        _check_plain(name, item)
    base = next(option for option in options if option is not types.NoneType)
    if typing.get_origin(base) is Literal:
        choices = typing.get_args(base)
        if isinstance(value, str) and value in choices:
            return value
        raise UsageError(
            f"{name} must be one of {', '.join(choices)}, received {shown(value)}. "
            f"{nearest(shown(value).strip(_QUOTES), choices)}"
        )
    if base == tuple[str, ...]:
        items = value.split(",") if isinstance(value, str) else value
        if isinstance(items, Sequence) and all(isinstance(item, str) for item in items):
            return tuple(item.strip() for item in items if item.strip())
        raise UsageError(f"{name} must be a list of texts, received {shown(value)}.")
    if base is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, base) and not (base is int and isinstance(value, bool)):
        return value
    raise UsageError(f"{name} must be {_NAMES[base]}, received {shown(value)}.")


def _check_plain(name: str, value: Any) -> None:
    """A text can be written into a file and name one; a number is one that machines count with.

    Raises:
        UsageError: it is not.
    """
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise UsageError(
                f"{name} is {shown(value)}, which is no Unicode text. Rename it."
            ) from None
        if "\0" in value:
            raise UsageError(f"{name} is {shown(value)}, which holds a NUL character.")
    if isinstance(value, int) and abs(value) > LARGEST:
        raise UsageError(f"{name} must be below 2**63, received {shown(value)}.")
    if isinstance(value, float) and math.isinf(value):
        raise UsageError(f"{name} must be finite, received {value}.")


_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def known_keys() -> tuple[str, ...]:
    """The names of all settings."""
    return tuple(entry.name for entry in fields(RunConfig))


def check_keys(values: Mapping[str, Any], where: str) -> None:
    """Every key is a setting.

    Raises:
        UsageError: one is not, with the nearest one that is.
    """
    for key in values:
        if key not in known_keys():
            raise UsageError(
                f"{where} has {key!r}, which is no setting. {nearest(key, known_keys())}"
            )


def read_toml(path: str | Path) -> dict[str, Any]:
    """The settings in a flat TOML file.

    Raises:
        UsageError: no such file, no TOML, a table, or an unknown key.
    """
    try:
        text = contents(path, _MOST).decode()
        if any(part.count(".") > _MOST_DOTS for part in _PARTS.split(text)):
            raise ValueError(f"it has over {_MOST_DOTS} dots in a row of names")
        values = tomllib.loads(text)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is no TOML file: {error}.") from error
    check_keys(values, str(path))
    return values


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, str):
        # JSON's escapes are TOML's, except that it leaves this character as it is.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
