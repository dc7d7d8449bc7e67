"""From a checkpoint's arrays to a learner's parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from metaframe.backend.contract import Backend
from metaframe.errors import CheckpointError
from metaframe.files.schema import (
    Check,
    anything,
    boolean,
    integer,
    many,
    number,
    optional,
    record,
    table,
    text,
)
from metaframe.learners.meta_learner import MetaLearner

Arrays = Mapping[str, np.ndarray[Any, Any]]

_DTYPES = record({"dtypes": table(text)})
STATE = record(
    {
        "step": integer,
        "dtypes": table(text),
        "optimizer": table(anything),
        "sampler": optional(table(anything)),
    },
    {"owes_validation": boolean, "merits": many(number)},  # which older checkpoints lack
)
"""The plain values of `MetaTrainer.state`."""


def checked_parameters(
    maml: MetaLearner, arrays: Arrays, plain: Mapping[str, Any]
) -> Callable[[], None]:
    """The function that assigns the meta-parameters of a checkpoint, as of `MetaTrainer.state`.

    Raises:
        CheckpointError: other names, shapes or dtypes than the learner's.
    """
    checked(_DTYPES, plain)
    dtypes = plain["dtypes"]
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
        check_array(found[name], value, f"parameter {name!r}", backend)
    statistics, averages = group(arrays, "statistics/"), maml.statistics
    if set(statistics) != set(averages):
        raise CheckpointError(
            "the checkpoint is of another normalisation policy: it has statistics for "
            f"{sorted(statistics)}, the learner for {sorted(averages)}."
        )
    for name, value in averages.items():
        check_array(statistics[name], value, f"the statistics {name!r}", backend)

    def assign() -> None:
        # Where the learner is: its own arrays say.
        maml.assign({n: _like(own[n], x, backend) for n, x in found.items()})
        maml.assign_statistics({n: _like(averages[n], x, backend) for n, x in statistics.items()})

    return assign


def checked(schema: Check, plain: Any) -> None:
    """Check the plain values of a checkpoint.

    Raises:
        CheckpointError: they are not as the schema has them.
    """
    try:
        schema(plain, "what the checkpoint says of the trainer")
    except ValueError as error:
        raise CheckpointError(f"the checkpoint cannot be used: {error}.") from None


def check_array(found: np.ndarray[Any, Any], own: Any, what: str, backend: Backend) -> None:
    """`found` has the shape of `own` and the dtype in which that is saved.

    Raises:
        CheckpointError: it has others.
    """
    dtype = backend.dtype_name(own)
    there = (found.dtype.name, found.shape)
    here = ("float32" if dtype == "bfloat16" else dtype, tuple(own.shape))
    if there != here:
        raise CheckpointError(
            f"{what} is stored as {there[0]} of shape {there[1]} in the checkpoint, expected "
            f"{here[0]} of shape {here[1]}."
        )


def streams(arrays: Arrays, backend: Backend) -> dict[str, np.ndarray[Any, Any]]:
    """The random streams in `arrays` that this process has too.

    Raises:
        CheckpointError: one of another form.
    """
    own = backend.random_state()
    found = {n: x for n, x in group(arrays, f"rng.{backend.name}/").items() if n in own}
    for name, x in found.items():
        if (x.dtype, x.shape) != (own[name].dtype, own[name].shape):
            raise CheckpointError(
                f"the random stream {name!r} is {x.dtype} of shape {x.shape} in the checkpoint, "
                f"expected {own[name].dtype} of shape {own[name].shape}."
            )
    return found


def _like(old: Any, x: np.ndarray[Any, Any], backend: Backend) -> Any:
    return backend.asarray(x, backend.dtype_name(old), backend.device_of(old))


def group(arrays: Arrays, prefix: str) -> dict[str, np.ndarray[Any, Any]]:
    """The arrays whose names begin with `prefix`, without it."""
    return {n.removeprefix(prefix): x for n, x in arrays.items() if n.startswith(prefix)}
