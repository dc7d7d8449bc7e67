"""An adapter around another: the same model with something added or taken away."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from metaframe import ops
from metaframe.backend.model import BatchNorm, Inputs, ModelAdapter, Params
from metaframe.backend.types import Array

HEAD = ("prototypes/w", "prototypes/b")
"""Names of the weights `(features, ways)` and biases `(ways,)` that `WithHead` understands."""


class Around(ModelAdapter):
    """The model of another adapter, unchanged."""

    def __init__(self, inner: ModelAdapter) -> None:
        self.inner = inner
        self.backend = inner.backend
        self.output_first = inner.output_first
        self.switchable = inner.switchable

    @property
    def model(self) -> Any:
        """The user's model."""
        return self.inner.model

    def params(self) -> Params:
        """The model's."""
        return self.inner.params()

    def state(self) -> Params:
        """The model's."""
        return self.inner.state()

    def trainable(self) -> tuple[str, ...]:
        """The model's."""
        return self.inner.trainable()

    def adaptable(self) -> tuple[str, ...]:
        """The model's."""
        return self.inner.adaptable()

    def variables(self) -> dict[str, Any]:
        """The model's."""
        return self.inner.variables()

    def given(self) -> Mapping[str, Any]:
        """The model's."""
        return self.inner.given()

    def aliases(self) -> Mapping[str, str]:
        """The model's."""
        return self.inner.aliases()

    def read(self, value: Any) -> Any:
        """The model's."""
        return self.inner.read(value)

    def withholds(self, owner: Any, name: str) -> bool:
        """The model's."""
        return self.inner.withholds(owner, name)

    def signature(self) -> Hashable:
        """The model's."""
        return self.inner.signature()

    def call(self, params: Params, state: Params, inputs: Inputs) -> tuple[Any, Params]:
        """The model's output."""
        return self.inner.call(params, state, inputs)

    def batch_norms(self) -> tuple[BatchNorm, ...]:
        """The model's."""
        return self.inner.batch_norms()

    def write(self, params: Params) -> None:
        """Into the model."""
        self.inner.write(params)


class WithContext(Around):
    """A model some of whose parameters are zero and not trained, whatever the model holds."""

    def __init__(self, inner: ModelAdapter, context: Sequence[str]) -> None:
        super().__init__(inner)
        self._context = frozenset(context)

    def params(self) -> Params:
        """The model's, and zeros."""
        params = self.inner.params()
        return {n: _zeros(x) if n in self._context else x for n, x in params.items()}

    def trainable(self) -> tuple[str, ...]:
        """All but the context."""
        return tuple(n for n in self.inner.trainable() if n not in self._context)

    def adaptable(self) -> tuple[str, ...]:
        """The context."""
        return tuple(n for n in self.inner.params() if n in self._context)


def _zeros(x: Array) -> Array:
    """Zeros that torch records as it does `x`, and whatever that holds: 0 * NaN is NaN."""
    zeros = ops.zeros_like(x)
    return ops.where(zeros > 0, x, zeros)


class WithHead(Around):
    """A model under a linear head, where the parameters have one; else the model alone.

    The head is never among the model's own parameters: an algorithm makes it for each task.
    """

    def adaptable(self) -> tuple[str, ...]:
        """The model's, and the head."""
        return (*self.inner.adaptable(), *HEAD)

    def call(self, params: Params, state: Params, inputs: Inputs) -> tuple[Any, Params]:
        """`model(x) @ w + b`."""
        body = {name: params[name] for name in self.inner.params()}
        features, state = self.inner.call(body, state, inputs)
        if HEAD[0] not in params:
            return features, state
        weight, bias = (params[name] for name in HEAD)
        return ops.matmul(features, weight) + bias, state
