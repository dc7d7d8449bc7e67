"""Does every setting have a use, and can the algorithm do the task?

A setting that is ignored is worse than one that is refused: the run looks as if it had been obeyed.
What has been set is what differs from the defaults of the data set and the algorithm, so that the
settings of a run folder, which holds all of them, are checked in the same way as flags.
"""

from __future__ import annotations

from collections.abc import Mapping

from metaframe.cli.algorithms import ALGORITHMS, algorithm
from metaframe.cli.config import RunConfig, known_keys
from metaframe.cli.errors import UsageError
from metaframe.cli.tables import DATASETS, dataset


def check_fit(config: RunConfig) -> None:
    """The algorithm can do the task, and every setting has a use.

    Raises:
        UsageError: otherwise.
    """
    data, chosen = dataset(config.dataset), algorithm(config.algorithm)
    if chosen.classifies and data.regression:
        raise UsageError(
            f"algorithm {config.algorithm} is for classification, received "
            f"dataset={config.dataset}, which is regression."
        )
    usual = RunConfig(**{**data.defaults, **chosen.defaults})
    given = {n: v for n in known_keys() if (v := getattr(config, n)) != getattr(usual, n)}
    _check_owned(
        given, "algorithm", config.algorithm, {n: a.settings for n, a in ALGORITHMS.items()}
    )
    _check_owned(given, "dataset", config.dataset, {n: d.settings for n, d in DATASETS.items()})
    for name in chosen.ignores:
        if name in given:
            raise UsageError(
                f"{name} has no effect on algorithm {config.algorithm}, received "
                f"{name}={given[name]}. Leave it out."
            )
    if config.patience and not config.eval_every:
        raise UsageError(
            f"patience counts validations, received patience={config.patience} with eval_every=0, "
            "which has none. Set eval_every too."
        )
    if config.protocol == "runs":
        _check_runs(config, given)


def warnings(config: RunConfig) -> list[str]:
    """What is allowed and hardly meant."""
    if config.algorithm == "reptile" and config.inner_steps == 1:
        return [
            "reptile with inner_steps=1 is ordinary training on all tasks at once: its direction "
            "is the gradient of the mean support loss. Give --inner-steps 2 or more."
        ]
    return []


def _check_owned(
    given: Mapping[str, object], kind: str, own: str, settings: Mapping[str, tuple[str, ...]]
) -> None:
    """What is given belongs to `own`, if it belongs to any one alone."""
    for name in given:
        owners = [owner for owner, names in settings.items() if name in names]
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
