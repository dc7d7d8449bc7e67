"""Flags of a command, made from the fields of RunConfig."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import Field, fields
from typing import Any, Literal

import rich_click as click

from metaframe.cli.datasets import DATASETS
from metaframe.cli.run_config import RunConfig
from metaframe.learners.registry import algorithms

Command = Callable[..., Any]

GROUPS = {
    "Task": (
        *("dataset", "data", "parts", "held_out", "protocol"),
        *("ways", "shots", "queries"),
    ),
    "Algorithm": (
        *("algorithm", "norm", "width", "inner_lr", "inner_steps"),
        *("multi_step_epochs", "learn_norms", "second_order_from", "steps_per_epoch"),
        *("context", "proximal", "cg_steps", "features"),
    ),
    "Outer loop": (
        *("outer_lr", "schedule", "warmup_steps", "clip_norm", "clip_value"),
        *("meta_batch_size", "iterations", "seed"),
    ),
    "Evaluation": (
        *("eval_every", "validation_tasks", "patience", "eval_steps", "eval_tasks", "eval_seed"),
    ),
    "Execution": (
        *("backend", "device", "precision", "task_map", "chunk_size", "mode", "compiled"),
        *("timeout", "checkpoint_every", "keep"),
    ),
}
"""The groups of settings on the help page."""


def setting_flags(names: Iterable[str] | None = None) -> Callable[[Command], Command]:
    """A decorator that adds one flag for each of these settings, by default for all."""
    wanted = None if names is None else set(names)
    entries = [e for e in fields(RunConfig) if wanted is None or e.name in wanted]

    def decorate(command: Command) -> Command:
        for entry in reversed(entries):
            command = _flag(entry)(command)
        return command

    return decorate


def given(flags: dict[str, Any]) -> dict[str, Any]:
    """The settings among the values of flags that were used."""
    names = {entry.name for entry in fields(RunConfig)}
    return {n: v for n, v in flags.items() if n in names and v is not None}


def _shown_default(entry: Field[Any]) -> str:
    """The general default, and what else decides on it: `metaframe list` shows the names."""
    by_dataset = any(entry.name in dataset.defaults for dataset in DATASETS.values())
    by_algorithm = any(entry.name in known.defaults for known in algorithms().values())
    others = [*(["data set"] if by_dataset else []), *(["algorithm"] if by_algorithm else [])]
    return f"{entry.default}, or by {' and '.join(others)}" if others else str(entry.default)


def _flag(entry: Field[Any]) -> Callable[[Command], Command]:
    kind = typing.get_type_hints(RunConfig)[entry.name]
    dashed = entry.name.replace("_", "-")
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    base = next(option for option in options if option is not types.NoneType)
    text = entry.metadata["help"]
    if entry.default not in (None, ()):
        text += f" [dim]\\[default: {_shown_default(entry)}][/dim]"
    if base is bool:
        return click.option(f"--{dashed}/--no-{dashed}", entry.name, default=None, help=text)
    if typing.get_origin(base) is Literal:
        choice = click.Choice(typing.get_args(base))
        return click.option(f"--{dashed}", entry.name, type=choice, help=text)
    as_text = base == tuple[str, ...]
    metavar = "A,B,..." if as_text else None
    parameter_type = str if as_text else base
    return click.option(f"--{dashed}", entry.name, type=parameter_type, metavar=metavar, help=text)
