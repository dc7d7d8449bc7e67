"""Checks that every setting has a use and that the algorithm can do the task.

A setting that is ignored is worse than one that is refused: the run looks as if it had been obeyed.
What has been set is what flags and files say and what differs from the defaults of the data set and
the algorithm, so that a file that holds all settings, as that of a run folder, is taken too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from metaframe.cli.datasets import DATASETS, dataset
from metaframe.cli.errors import UsageError, suggestion
from metaframe.cli.run_config import RunConfig
from metaframe.learners import Algorithm, algorithms

_DATASETS = {name: entry.settings for name, entry in DATASETS.items()}


def algorithm(name: str) -> Algorithm:
    """The algorithm called `name`.

    Raises:
        UsageError: there is none.
    """
    known = algorithms()
    if name not in known:
        raise UsageError(f"no algorithm called {name!r}. {suggestion(name, known)}")
    return known[name]


def _own_settings() -> dict[str, tuple[str, ...]]:
    """The settings of each algorithm that not all have a use for."""
    return {name: entry.settings for name, entry in algorithms().items()}


def defaults(data: str, algorithm_name: str) -> dict[str, Any]:
    """The settings that differ from the general ones for this data set and algorithm."""
    return {**dataset(data).defaults, **algorithm(algorithm_name).defaults}


def has_use(name: str, data: str, algorithm_name: str) -> bool:
    """True if this data set and this algorithm have a use for a setting."""
    if name in algorithm(algorithm_name).ignores:
        return False
    both = (algorithm_name, _own_settings()), (data, _DATASETS)
    return all(own in (_owners(name, settings) or [own]) for own, settings in both)


def in_words(config: RunConfig) -> str:
    """The settings that have a use in this run and say something, in a line."""
    said = {n: v for n, v in config.as_dict().items() if v not in (None, [], 0, False)}
    used = (n for n in said if has_use(n, config.dataset, config.algorithm))
    return ", ".join(f"{n} {said[n]}" for n in used)


def check_fit(config: RunConfig, own: Iterable[str]) -> None:
    """The algorithm can do the task, and every setting in `own` has a use.

    Raises:
        UsageError: otherwise.
    """
    data, chosen = dataset(config.dataset), algorithm(config.algorithm)
    if chosen.classifies and data.regression:
        raise UsageError(
            f"algorithm {config.algorithm} is for classification, received "
            f"dataset={config.dataset}, which is regression."
        )
    usual = RunConfig(**defaults(config.dataset, config.algorithm))
    given = {n: v for n in own if (v := getattr(config, n)) != getattr(usual, n)}
    _check_owned(given, "algorithm", config.algorithm, _own_settings())
    _check_owned(given, "dataset", config.dataset, _DATASETS)
    for name in chosen.ignores:
        if name in given:
            raise UsageError(
                f"{name} has no effect on algorithm {config.algorithm}, received "
                f"{name}={given[name]}. Leave it out."
            )
    _check_counts(config, given)
    if config.protocol == "runs":
        _check_runs(config, given)


def _check_counts(config: RunConfig, given: Mapping[str, object]) -> None:
    """Check that settings which count or measure something have something to count."""
    if config.patience and not config.eval_every:
        raise UsageError(
            f"patience counts validations, received patience={config.patience} with eval_every=0, "
            "which has none. Set eval_every too."
        )
    if "validation_tasks" in given and not config.eval_every:
        raise UsageError(
            "validation_tasks is for validations, received validation_tasks="
            f"{config.validation_tasks} with eval_every=0, which has none. Set eval_every too."
        )
    if "steps_per_epoch" in given and not (config.multi_step_epochs or config.second_order_from):
        raise UsageError(
            "steps_per_epoch is for what counts epochs, received steps_per_epoch="
            f"{config.steps_per_epoch} with multi_step_epochs=0 and second_order_from=0. Set one "
            "of them too."
        )


def warnings(config: RunConfig) -> list[str]:
    """Warnings of settings that are allowed and hardly meant."""
    if config.algorithm == "reptile" and config.inner_steps == 1:
        return [
            "reptile with inner_steps=1 is ordinary training on all tasks at once: its direction "
            "is the gradient of the mean support loss. Give --inner-steps 2 or more."
        ]
    return []


def _owners(name: str, settings: Mapping[str, tuple[str, ...]]) -> list[str]:
    """The algorithms or data sets that have a use for a setting that not all have a use for."""
    return [owner for owner, names in settings.items() if name in names]


def _check_owned(
    given: Mapping[str, object], kind: str, own: str, settings: Mapping[str, tuple[str, ...]]
) -> None:
    """Check that settings given belong to `own`, if they belong to any one alone."""
    for name in given:
        owners = _owners(name, settings)
        if owners and own not in owners:
            raise UsageError(f"{name} is a setting of {', '.join(owners)}, received {kind}={own}.")


def _check_runs(config: RunConfig, given: Mapping[str, object]) -> None:
    if "evaluation" in config.parts:
        raise UsageError(
            "the official runs are drawn from the alphabets of part evaluation, received "
            f"parts={','.join(config.parts)} to train on. Train on background, small1 or small2."
        )
    for name, instead in (
        ("held_out", "no alphabet of the runs is in the parts to train on"),
        ("eval_tasks", "there are 20 of them"),
    ):
        if name in given:
            raise UsageError(
                f"{name} has no effect with protocol=runs: {instead}. Leave one of them out."
            )
