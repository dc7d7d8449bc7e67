"""tf.Module behind the neutral interface, and learned values as variables.

A module is run on other values by a copy of its structure, see `_substitution.py`. The Keras
layers in it are not copied: they run as those of a Keras model do.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import tensorflow as tf

from metaframe.backend.contract import Backend
from metaframe.backend.model import Inputs, ModelAdapter, NamedParameters
from metaframe.backend.types import Array
from metaframe.errors import InputError
from metaframe.models._keras_call import Call, call_layer, is_layer, is_variable, layers_of
from metaframe.models.attributes import Flags
from metaframe_tensorflow import _private
from metaframe_tensorflow._foreign import has_functions, watched
from metaframe_tensorflow._remarks import without_remarks
from metaframe_tensorflow._substitution import Held, Substitution, leaves, walk

T = TypeVar("T")
Params = dict[str, Array]


@dataclass(frozen=True)
class _Found:
    """A variable of a module; `of_keras` is Keras's own object around it, if there is one."""

    variable: tf.Variable
    learned: bool
    of_keras: Any = None


class ModuleAdapter(ModelAdapter):
    """A `tf.Module`; names are the attribute paths of its variables.

    A Keras layer in it learns with it: before the paths of its variables comes the layer's own.
    """

    def __init__(self, model: tf.Module, backend: Backend) -> None:
        self.model = model
        self.backend = backend
        self._flags = Flags()
        if not self._found() and not self._layers():
            raise InputError(
                f"{self._described} has no variables in its attributes. If it makes them "
                "when it is called, call it once on data."
            )

    def params(self) -> Params:
        return {name: x.variable for name, x in self._found().items() if x.learned}

    def state(self) -> Params:
        return {name: x.variable for name, x in self._found().items() if not x.learned}

    def aliases(self) -> Mapping[str, str]:
        names = {id(x.variable): name for name, x in self._found().items()}
        every = (("/".join(path), id(x)) for path, x in walk(self.model))
        return {path: names[known] for path, known in every if known in names}

    def signature(self) -> Hashable:
        layers = self._layers()
        modules = [self.model, *(x for _, x in walk(self.model) if isinstance(x, tf.Module))]
        frozen = ((layer.trainable, layer.compute_dtype) for layer in layers)
        return self._flags.of(lambda: [*modules, *layers]), *frozen

    def call(self, params: Params, state: Params, inputs: Inputs) -> tuple[Any, Params]:
        found, given = self._found(), {**params, **state}
        # Tensors, so that to read one is to read no variable.
        values = {name: tf.convert_to_tensor(given[name]) for name in found}
        held = {n: Held(x.variable, values[n]) for n, x in found.items() if not _can_learn(x)}
        places = {id(x.variable): held.get(n, values[n]) for n, x in found.items()}
        of_keras = {n: (x.of_keras, values[n]) for n, x in found.items() if x.of_keras is not None}
        run = self._run(Substitution(places).copy(self.model), inputs)
        output, after = self._output(run, of_keras, inputs.forward.twice)
        moved = {n: _left(held[n], values[n]) for n in state if n not in of_keras}
        return output, {**state, **moved, **{n: x for n, x in after.items() if n in state}}

    def read(self, value: Any) -> Any:
        """The value of a variable, as it is among those that a call is given."""
        if isinstance(value, Held):
            return value.tensor
        return value.value if is_variable(value) else value

    def withholds(self, owner: Any, name: str) -> bool:
        """Lists of variables, which the learner has by other names."""
        del owner
        return name.endswith("variables") and hasattr(tf.Module, name)

    def _output(
        self, run: Callable[[], T], of_keras: dict[str, tuple[Any, Array]], twice: bool
    ) -> tuple[T, Params]:
        """The result of `run`, and the values that Keras variables have after it."""
        layers = self._layers()
        if not layers and not of_keras:
            output, read = watched(run)
            self._check_read(read, frozenset())
            return output, {}

        def call() -> Call:
            return call_layer(run, layers, list(of_keras.values()), owner=self._described)

        # The module's own are functions of its copy, and AutoGraph translates them.
        inline = has_functions(layers)
        called, read = self.backend.run_foreign(call, twice=twice) if inline else watched(call)
        frozen = frozenset(id(x.value) for x in called.foreign()[0] if not x.trainable)
        self._check_read(read, frozen)
        return called.output, {n: called.value(variable) for n, (variable, _) in of_keras.items()}

    def _run(self, module: Any, inputs: Inputs) -> Callable[[], Any]:
        if inputs.call is None and not callable(module):
            raise InputError(
                f"{self._described} has no __call__. Say what is called, such as "
                "call=lambda module, x: module.forward(x)."
            )

        def run() -> Any:
            try:
                # Every copy traces its tf.functions anew.
                with without_remarks("triggered tf.function retracing"):
                    if inputs.call is None:
                        output = _private.translated(module)(*inputs.args, **inputs.kwargs)
                    else:
                        output = inputs.call(module, *inputs.args, **inputs.kwargs)
                if any(isinstance(x, Held) for _, x in leaves(output)):
                    return tf.nest.map_structure(self.read, output)
                return output
            except AttributeError as error:
                of_tensor = isinstance(error.obj, tf.Tensor)
                if not (of_tensor and hasattr(tf.Variable, error.name or "")):
                    raise
                raise InputError(
                    f"{self._described} calls {error.name} of a variable. It runs on tensors in "
                    "the places of its variables, so that these can be adapted: read a variable "
                    "as it is, self.w, and assign to those alone that are not trainable."
                ) from error

        return run

    def _check_read(self, read: Sequence[Any], frozen: frozenset[int]) -> None:
        """Variables that were read, which the tensors in their places should have been."""
        known = {id(x.variable) for x in self._found().values()}
        if own := [x.name for x in read if id(x) in known]:
            raise InputError(
                f"{self._described} reads the variables {own} from somewhere else than its "
                "attributes, such as a closure, where other values cannot be put. Read them from "
                "self."
            )
        if others := [x.name for x in read if id(x) not in frozen]:
            raise InputError(
                f"{self._described} depends on the trainable variables {others}, which are not "
                "among its own: a tf.Module does not know of those in a closure or in an object "
                "that is no tf.Module. Keep them in attributes of a tf.Module, or freeze what is "
                "not to learn with trainable=False."
            )

    @property
    def _described(self) -> str:
        return f"the tf.Module {type(self.model).__qualname__}"

    def _found(self) -> dict[str, _Found]:
        found: dict[str, _Found] = {}
        seen: set[int] = set()
        for path, leaf in walk(self.model):
            for name, x in _variables("/".join(path), leaf):
                if id(x.variable) not in seen:
                    seen.add(id(x.variable))
                    found[_unused(name, found)] = x
        return found

    def _layers(self) -> list[Any]:
        outer = [x for _, x in walk(self.model) if is_layer(x)]
        return list({id(x): x for layer in outer for x in layers_of(layer)}.values())

    def write(self, params: Params) -> None:
        for name, variable in self.params().items():
            variable.assign(params[name])


def _variables(path: str, leaf: Any) -> Iterator[tuple[str, _Found]]:
    """The variables that a thing in a module is, or holds in a way that `walk` does not see."""
    if isinstance(leaf, tf.Variable):
        yield path, _Found(leaf, leaf.trainable)
    elif is_variable(leaf):
        yield path, _Found(leaf.value, leaf.trainable, leaf)
    elif is_layer(leaf):
        learned = set(map(id, leaf.trainable_variables))
        for x in leaf.variables:
            yield f"{path}/{x.path}", _Found(x.value, id(x) in learned, x)


def _unused(name: str, names: Mapping[str, Any]) -> str:
    copies, unused = 1, name
    while unused in names:  # layers made with the same explicit name share their path
        copies += 1
        unused = f"{name}:{copies}"
    return unused


def _can_learn(found: _Found) -> bool:
    return found.learned and bool(found.variable.dtype.is_floating)


def _left(held: Held, given: Array) -> Array:
    """The value that a call left in the place of a variable."""
    tensor = held.tensor
    if tensor is given or hasattr(tensor, "numpy"):
        return tensor
    graph = tf.compat.v1.get_default_graph()
    while graph is not None and graph is not tensor.graph:
        graph = getattr(graph, "outer_graph", None)
    if graph is None:
        raise InputError(
            f"the variable {held.name!r} is assigned within a tf.function or a loop of a "
            "tf.Module, out of which other values cannot be taken. Assign where the module is "
            "called, or take the tf.function off."
        )
    return tensor


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
