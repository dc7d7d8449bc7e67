"""Learned values that belong to no model, such as inner learning rates."""

from __future__ import annotations

from metaframe.backend.contract import Backend
from metaframe.backend.model import NamedParameters, Params


class ValuesAdapter(NamedParameters):
    """Named arrays, for frameworks without parameter objects."""

    def __init__(self, values: Params, backend: Backend) -> None:
        self.model = dict(values)
        self.backend = backend

    def params(self) -> Params:
        """The values."""
        return dict(self.model)

    def write(self, params: Params) -> None:
        """Replace the values, in the mapping that its users have."""
        self.model.update(params)


def live(values: Params, backend: Backend) -> NamedParameters:
    """`values` as parameters: the framework's own kind, if it has one."""
    return backend.live(values) or ValuesAdapter(values, backend)


def kept(values: Params, backend: Backend) -> NamedParameters:
    """`values` as what is saved with a model and not trained: the framework's kind, if any."""
    return backend.kept(values) or ValuesAdapter(values, backend)
