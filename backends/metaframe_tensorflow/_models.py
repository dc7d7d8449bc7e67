"""tf.Module behind the neutral interface, and learned values as variables.

TensorFlow has no functional call. A module is run on other values by a copy of its object
structure in which tensors stand in the places of the variables; the module itself is not touched.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any

import tensorflow as tf

from metaframe.backend import Array, Backend
from metaframe.errors import InputError
from metaframe.models import Inputs, ModelAdapter, NamedParameters
from metaframe.models._keras_call import is_layer, layers_of
from metaframe.models.flags import Flags
from metaframe_tensorflow import _private

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
        named: Params = {}
        for path, variable in _private.named_variables(self.model):
            if not any(variable is known for known in named.values()):
                named["/".join(map(str, path))] = variable
        return named

    def signature(self) -> Hashable:
        return self._flags.of(self._parts)

    def _parts(self) -> Iterator[object]:
        for x in _held(self.model).values():
            if isinstance(x, tf.Module):
                yield x
            elif is_layer(x):
                yield from layers_of(x)

    def withholds(self, owner: Any, name: str) -> bool:
        return name.endswith("variables") and hasattr(tf.Module, name)

    def call(self, params: Params, state: Params, inputs: Inputs) -> tuple[Any, Params]:
        values = {**params, **state}
        tensors = {v.ref(): values[n] for n, v in self._variables().items() if n in values}
        copy = _Substitution(tensors).copy(self.model)
        if self._checked:
            return self._output(copy, inputs), state
        with tf.GradientTape() as tape:
            output = self._output(copy, inputs)
        self._check_read({v.ref(): v.name for v in tape.watched_variables()}, known=tensors)
        self._checked = True
        return output, state

    def _check_read(self, names: Mapping[Any, str], known: Mapping[Any, Array]) -> None:
        """Variables that were read, which the tensors in their places should have been."""
        model = type(self.model).__qualname__
        if own := [name for ref, name in names.items() if ref in known]:
            raise InputError(
                f"{model} reads the variables {own} from somewhere else than its attributes, such "
                "as a closure, where other values cannot be put. Read them from self."
            )
        layers = [x for x in _held(self.model).values() if is_layer(x)]
        # Keras freezes a layer and leaves its variables trainable for a tape.
        frozen = {v.value.ref() for layer in layers for v in layer.non_trainable_variables}
        if others := [name for ref, name in names.items() if ref not in frozen]:
            raise InputError(
                f"{model} depends on the trainable variables {others}, which are not among its "
                "own: a tf.Module does not know of those in a Keras layer, a closure or another "
                "object, nor of those it makes when it is called. Keep them in attributes of a "
                "tf.Module, make the whole a Keras model, or freeze what is not to learn with "
                "trainable=False."
            )

    def _output(self, copy: Any, inputs: Inputs) -> Any:
        try:
            return (inputs.call or type(copy).__call__)(copy, *inputs.args, **inputs.kwargs)
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


def _held(node: Any, found: dict[int, Any] | None = None) -> dict[int, Any]:
    """Modules and what else there is in them, by identity.

    For modules alone `tf.Module.submodules` would do, in three times the time.
    """
    found = {} if found is None else found
    inside: Iterable[Any] = ()
    if isinstance(node, Mapping):
        inside = node.values()
    elif isinstance(node, (list, tuple)):
        inside = node
    elif id(node) not in found:
        found[id(node)] = node
        inside = vars(node).values() if isinstance(node, tf.Module) else ()
    for x in inside:
        _held(x, found)
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
