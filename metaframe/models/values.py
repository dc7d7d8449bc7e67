"""Learned values that belong to no model, such as inner learning rates."""

from __future__ import annotations

from typing import Any, NoReturn

from metaframe.backend import Backend
from metaframe.models.adapter import Forward, ModelAdapter, Params


class LearnedValues(ModelAdapter):
    """Named values without a forward pass: the base of every framework's own kind."""

    def call(
        self,
        params: Params,
        state: Params,
        forward: Forward,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> NoReturn:
        """Not possible."""
        raise NotImplementedError("learned values are not a model")


class ValuesAdapter(LearnedValues):
    """Named arrays, for frameworks without parameter objects."""

    def __init__(self, values: Params, backend: Backend) -> None:
        self.model = dict(values)
        self.backend = backend

    def params(self) -> Params:
        """The values."""
        return dict(self.model)

    def write(self, params: Params) -> None:
        """Replace the values."""
        self.model = dict(params)


def live(values: Params, backend: Backend) -> ModelAdapter:
    """`values` as parameters: the framework's own kind, if it has one."""
    return backend.live(values) or ValuesAdapter(values, backend)
