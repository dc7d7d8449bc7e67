"""From a checkpoint's arrays to a learner's parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from metaframe.backend.contract import Backend
from metaframe.errors import CheckpointError
from metaframe.learners.meta_learner import MetaLearner

Arrays = Mapping[str, np.ndarray[Any, Any]]


def checked_parameters(
    maml: MetaLearner, arrays: Arrays, dtypes: Mapping[str, str]
) -> Callable[[], None]:
    """The function that assigns the meta-parameters in `arrays`, named as in `MetaTrainer.state`.

    Raises:
        CheckpointError: other names, shapes or dtypes than the learner's.
    """
    found, own, backend = group(arrays, "params/"), maml.meta_parameters(), maml.backend
    if set(found) != set(own):
        raise CheckpointError(
            "the checkpoint is of another model or algorithm: "
            f"missing {sorted(set(own) - set(found))}, unexpected {sorted(set(found) - set(own))}."
        )
    for name, value in own.items():
        there = (found[name].shape, dtypes.get(name))
        here = (tuple(value.shape), backend.dtype_name(value))
        if there != here:
            raise CheckpointError(
                f"parameter {name!r} is {there[1]} of shape {there[0]} in the checkpoint and "
                f"{here[1]} of shape {here[0]} in the model. Build the model with the settings it "
                "was trained with."
            )
    statistics, averages = group(arrays, "statistics/"), maml.statistics
    if set(statistics) != set(averages):
        raise CheckpointError(
            "the checkpoint is of another normalisation policy: it has statistics for "
            f"{sorted(statistics)}, the learner for {sorted(averages)}."
        )

    def assign() -> None:
        # Where the learner is: its own arrays say.
        maml.assign({n: _like(own[n], x, backend) for n, x in found.items()})
        maml.assign_statistics({n: _like(averages[n], x, backend) for n, x in statistics.items()})

    return assign


def _like(old: Any, x: np.ndarray[Any, Any], backend: Backend) -> Any:
    return backend.asarray(x, backend.dtype_name(old), backend.device_of(old))


def group(arrays: Arrays, prefix: str) -> dict[str, np.ndarray[Any, Any]]:
    """The arrays whose names begin with `prefix`, without it."""
    return {n.removeprefix(prefix): x for n, x in arrays.items() if n.startswith(prefix)}
