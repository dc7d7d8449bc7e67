"""Keras 3, whichever framework it computes with.

Keras is asked for nothing but `stateless_call`, which is why this needs neither Keras nor a
framework to be imported. It comes before the frameworks' own adapters: with Keras on torch a
Keras model is an `nn.Module` too, but `torch.func.functional_call` does not reach its variables.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from metaframe.backend import backend_of
from metaframe.errors import InputError
from metaframe.models.adapter import Inputs, ModelAdapter, Params
from metaframe.models.flags import Flags

CHANGING = frozenset(
    [
        "build",
        "compile",
        "evaluate",
        "export",
        "fit",
        "load_weights",
        "predict",
        "predict_on_batch",
        "quantize",
        "save",
        "save_weights",
        "set_weights",
        "test_on_batch",
        "train_on_batch",
    ]
)
"""Methods that Keras gives every model, and that run, change or save the one it is."""


class KerasAdapter(ModelAdapter):
    """A built Keras layer or model; names are the variables' paths.

    `training=` is one switch for batch normalisation and dropout in Keras. It follows the
    normalisation policy unless the caller passes it.
    """

    switchable = True

    def __init__(self, model: Any) -> None:
        if not model.built:
            raise InputError(
                f"Keras model {model.name!r} has no weights yet. Call it once on data, or "
                "model.build(input_shape)."
            )
        self.model = model
        self._flags = Flags()
        self._paths = _paths(model.variables)
        values = [v.value for v in (*model.trainable_variables, *model.non_trainable_variables)]
        self.backend = backend_of(*values)

    def params(self) -> Params:
        """The values of the trainable variables."""
        return self._values(self.model.trainable_variables)

    def state(self) -> Params:
        """Everything else: moving statistics, frozen weights, seed generators."""
        return self._values(self.model.non_trainable_variables)

    def aliases(self) -> Mapping[str, str]:
        """Paths without the name of the model, which most start with."""
        return {name.removeprefix(f"{self.model.name}/"): name for name in self.params()}

    def signature(self) -> Hashable:
        """Plain attributes of all layers, such as the rate of a dropout."""
        return self._flags.of(self.model._flatten_layers)

    def call(self, params: Params, state: Params, inputs: Inputs) -> tuple[Any, Params]:
        """`model.stateless_call`, with `training=` as the policy says."""
        norm, kwargs = inputs.forward.norm, dict(inputs.kwargs)
        if norm == "record":
            raise InputError(
                "norm='support' is not available for Keras models, which do not say what the "
                "statistics of one batch were. Use norm='batch' or norm='frozen'."
            )
        if inputs.call is not None:
            return self._called(inputs.call, params, state, inputs)
        training = inputs.forward.training
        if norm is not None or training is not None:
            kwargs = {"training": norm == "batch" if training is None else training, **kwargs}
        # By name: a structure that was flattened and built again does not keep the order.
        names = list(self.state())
        with self._flags.called(self.model._flatten_layers):
            output, after = self.model.stateless_call(
                [self.backend.asarray(params[name]) for name in self.params()],
                [self.backend.asarray(state[name]) for name in names],
                *inputs.args,
                **kwargs,
            )
        return output, dict(zip(names, after, strict=True))

    def read(self, value: Any) -> Any:
        """The value of a variable, which is the model's own again after the call."""
        keras: Any = sys.modules["keras"]
        return value.value if isinstance(value, keras.Variable) else value

    def withholds(self, owner: Any, name: str) -> bool:
        """What trains, saves or changes a model, where it is Keras' own."""
        own = getattr(getattr(type(owner), name, None), "__module__", "")
        return name in CHANGING and own.partition(".")[0] == "keras"

    def _called(
        self, call: Any, params: Params, state: Params, inputs: Inputs
    ) -> tuple[Any, Params]:
        keras: Any = sys.modules["keras"]
        trainable = zip(self.params(), self.model.trainable_variables, strict=True)
        others = zip(self.state(), self.model.non_trainable_variables, strict=True)
        values = {**state, **params}
        named = [(name, v) for name, v in (*trainable, *others)]
        asarray = self.backend.asarray
        with keras.StatelessScope([(v, asarray(values[n])) for n, v in named]) as scope:
            output = call(self.model, *inputs.args, **inputs.kwargs)
        after = {n: scope.get_current_value(v) for n, v in named if n in state}
        return output, after

    def _values(self, variables: Sequence[Any]) -> Params:
        every = self.model.variables
        if len(every) != len(self._paths):  # some were added, such as those of metrics
            self._paths = _paths(every)
        # By place, since a copy of a model has the same variables under other paths.
        names = {id(variable): name for name, variable in zip(self._paths, every, strict=True)}
        return {names[id(variable)]: variable.value for variable in variables}

    def variables(self) -> dict[str, Any]:
        """Keras variables, which its optimizers want on every framework but TensorFlow."""
        return dict(zip(self.params(), self.model.trainable_variables, strict=True))

    def write(self, params: Params) -> None:
        """Assign the trainable variables."""
        for variable, value in zip(self.model.trainable_variables, params.values(), strict=True):
            variable.assign(value)


def _paths(variables: Sequence[Any]) -> tuple[str, ...]:
    names: list[str] = []
    for variable in variables:
        name, copies = variable.path, 1
        while name in names:  # layers made with the same explicit name share their path
            copies += 1
            name = f"{variable.path}:{copies}"
        names.append(name)
    return tuple(names)


def keras_adapter(model: object) -> ModelAdapter | None:
    """The adapter of a Keras layer; None for anything else."""
    keras = sys.modules.get("keras")
    # Half imported while Keras itself is being imported.
    layer = getattr(getattr(keras, "layers", None), "Layer", None)
    return KerasAdapter(model) if layer is not None and isinstance(model, layer) else None
