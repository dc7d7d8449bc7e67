"""tf.Module behind the neutral interface, and learned values as variables.

TensorFlow has no functional call. A module is run on other values by a copy of its object
structure in which tensors stand in the places of the variables; the module itself is not touched.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import tensorflow as tf

from metaframe.backend import Array, Backend
from metaframe.errors import InputError
from metaframe.models import Inputs, ModelAdapter, NamedParameters
from metaframe.models.flags import Flags

Params = dict[str, Array]


class ModuleAdapter(ModelAdapter):
    """A `tf.Module`; names are the attribute paths of its variables."""

    def __init__(self, model: tf.Module, backend: Backend) -> None:
        self.model = model
        self.backend = backend
        self._flags = Flags()
        self._checked = False

    def params(self) -> Params:
        return {n: v for n, v in self._variables().items() if v.trainable}

    def state(self) -> Params:
        return {n: v for n, v in self._variables().items() if not v.trainable}

    def _variables(self) -> Params:
        flat = self.model._flatten(
            predicate=lambda x: isinstance(x, tf.Variable), with_path=True, expand_composites=False
        )
        named: Params = {}
        for path, variable in flat:
            if not any(variable is known for known in named.values()):
                named["/".join(map(str, path))] = variable
        return named

    def signature(self) -> Hashable:
        return self._flags.of(lambda: _modules(self.model).values())

    def call(self, params: Params, state: Params, inputs: Inputs) -> tuple[Any, Params]:
        values = {**params, **state}
        tensors = {v.ref(): values[n] for n, v in self._variables().items() if n in values}
        copy = _Substitution(tensors).copy(self.model)
        if self._checked:
            return self._output(copy, inputs), state
        with tf.GradientTape() as tape:
            output = self._output(copy, inputs)
        if missed := [v.name for v in tape.watched_variables() if v.ref() in tensors]:
            raise InputError(
                f"{type(self.model).__qualname__} reads the variables {missed} from somewhere else "
                "than its attributes, such as a closure, where other values cannot be put. Read "
                "them from self."
            )
        self._checked = True
        return output, state

    def _output(self, copy: Any, inputs: Inputs) -> Any:
        try:
            return copy(*inputs.args, **inputs.kwargs)
        except AttributeError as error:
            if not (isinstance(error.obj, tf.Tensor) and hasattr(tf.Variable, error.name or "")):
                raise
            raise InputError(
                f"{type(self.model).__qualname__} calls {error.name} of a variable. It runs on "
                "tensors in the places of its variables, so that these can be adapted: read a "
                "variable as it is, self.w, and assign to none."
            ) from error

    def write(self, params: Params) -> None:
        for name, variable in self.params().items():
            variable.assign(params[name])


def _modules(node: Any, found: dict[int, tf.Module] | None = None) -> dict[int, tf.Module]:
    """All modules within, by identity. `tf.Module.submodules` takes ten times as long."""
    found = {} if found is None else found
    inside: Iterable[Any] = ()
    if isinstance(node, tf.Module):
        if id(node) not in found:
            found[id(node)] = node
            inside = vars(node).values()
    elif isinstance(node, Mapping):
        inside = node.values()
    elif isinstance(node, (list, tuple)):
        inside = node
    for x in inside:
        _modules(x, found)
    return found


class _Substitution:
    """A copy of modules, lists, tuples and mappings with tensors in the places of variables."""

    def __init__(self, tensors: Mapping[Any, Array]) -> None:
        self._tensors = tensors
        self._copies: dict[int, Any] = {}

    def copy(self, node: Any) -> Any:
        if isinstance(node, tf.Variable):
            return self._tensors.get(node.ref(), node)
        if id(node) not in self._copies and isinstance(node, tf.Module):
            # Registered before its attributes are copied: a child may refer to its parent.
            self._copies[id(node)] = fresh = object.__new__(type(node))
            fresh.__dict__.update({k: self.copy(v) for k, v in vars(node).items()})
        if id(node) in self._copies:
            return self._copies[id(node)]
        if isinstance(node, Mapping):
            return {key: self.copy(value) for key, value in node.items()}
        if isinstance(node, tuple):
            items = [self.copy(item) for item in node]
            return type(node)(*items) if hasattr(node, "_fields") else tuple(items)
        if isinstance(node, list):
            return [self.copy(item) for item in node]
        return node


class VariablesAdapter(NamedParameters):
    """Learned values as variables, for Keras optimizers to update."""

    def __init__(self, values: Params, backend: Backend) -> None:
        self.model = {name: tf.Variable(value, name=name) for name, value in values.items()}
        self.backend = backend

    def params(self) -> Params:
        return dict(self.model)

    def write(self, params: Params) -> None:
        for name, variable in self.model.items():
            variable.assign(params[name])
