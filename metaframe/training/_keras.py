"""Keras optimizers behind the neutral interface, whichever framework Keras computes with."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from metaframe.backend.contract import NativeOptimizer
from metaframe.backend.types import Array
from metaframe.errors import CheckpointError

Arrays = dict[str, np.ndarray[Any, Any]]


class KerasOptimizer:
    """A Keras optimizer; it builds its state at the first step, or when that is restored."""

    def __init__(self, optimizer: Any, variables: dict[str, Any]) -> None:
        self._optimizer = optimizer
        self._variables = variables

    def step(self, variables: dict[str, Any], grads: dict[str, Array]) -> None:
        """Update `variables` by `grads`."""
        self._optimizer.apply_gradients([(grads[n], v) for n, v in variables.items()])

    def state(self) -> tuple[Arrays, Any]:
        """Its variables by position: their names differ between two models in one process."""
        self._build()
        held = enumerate(self._optimizer.variables)
        arrays = {str(i): _to_numpy(variable) for i, variable in held}
        return arrays, {"class": self._name()}

    def restore(self, arrays: Arrays, plain: Any) -> None:
        """Assign its variables."""
        written = plain.get("class", self._name())  # which older checkpoints lack
        if written != self._name():
            raise CheckpointError(
                f"the checkpoint is of another optimizer: of {written}, and this one is a "
                f"{self._name()}."
            )
        self._build()
        held = {str(i): variable for i, variable in enumerate(self._optimizer.variables)}
        if set(held) != set(arrays):
            raise CheckpointError(
                f"the checkpoint has {len(arrays)} arrays of a Keras optimizer, this one has "
                f"{len(held)}. Make it with the settings it had."
            )
        for name, variable in held.items():
            found, own = arrays[name], _to_numpy(variable)
            # Which integers Keras counts in depends on the framework below it.
            alike = found.dtype == own.dtype or (found.dtype.kind, own.dtype.kind) == ("i", "i")
            if not alike or found.shape != own.shape:
                raise CheckpointError(
                    f"variable {variable.path!r} of the Keras optimizer has shape {own.shape} and "
                    f"dtype {own.dtype}, the checkpoint {found.shape} and {found.dtype}. Make it "
                    "with the settings it had."
                )
        for name, variable in held.items():
            variable.assign(arrays[name])

    def _name(self) -> str:
        return type(self._optimizer).__name__

    def _build(self) -> None:
        if not self._optimizer.built:
            self._optimizer.build(list(self._variables.values()))


def _to_numpy(variable: Any) -> np.ndarray[Any, Any]:
    """Bfloat16, which NumPy lacks, as float32; assigned, it becomes what the variable is."""
    if variable.dtype != "bfloat16":
        return np.asarray(variable.numpy())
    ops: Any = sys.modules["keras"].ops
    return np.asarray(ops.convert_to_numpy(ops.cast(variable, "float32")))


def keras_optimizer(optimizer: object, variables: dict[str, Any]) -> NativeOptimizer | None:
    """`optimizer` if it is one of Keras, None otherwise. Imports nothing."""
    keras = sys.modules.get("keras")
    base = getattr(getattr(keras, "optimizers", None), "Optimizer", None)
    if base is None or not isinstance(optimizer, base):
        return None
    return KerasOptimizer(optimizer, variables)
