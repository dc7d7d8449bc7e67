"""Keras 3, whichever framework it computes with.

A model is called as its user calls it, see `_keras_call.py`. The adapter comes before the
frameworks' own: with Keras on torch a Keras model is an `nn.Module` too, but
`torch.func.functional_call` does not reach its variables.
"""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

from metaframe import ops
from metaframe.backend.contract import Backend
from metaframe.backend.model import BatchNorm, Inputs, ModelAdapter, Params
from metaframe.backend.registry import known_backends, load_backend
from metaframe.backend.selection import backend_of
from metaframe.errors import InputError
from metaframe.models._keras_call import (
    Call,
    call_layer,
    is_layer,
    keras,
    layers_of,
    not_built,
    unbuilt,
)
from metaframe.models.attributes import Flags

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
    """A Keras layer or model whose weights are made; names are the variables' paths.

    `training=` is one switch for batch normalisation and dropout in Keras. It follows the
    normalisation policy, for every layer that the caller or the model does not tell otherwise. A
    BatchNormalization with `trainable=False` uses its moving statistics under any policy, as in
    Keras. Losses that layers add, such as those of regularizers, belong to the loss function: a
    model may return them, `return y, self.losses`.
    """

    switchable = True

    def __init__(self, model: Any) -> None:
        self.model = model
        self._flags = Flags()
        self._paths: tuple[str, ...] = ()
        self._check_built()
        self._check_layers()
        self.backend = self._find_backend()

    def _check_built(self) -> None:
        layers = unbuilt(self._layers())
        missing = [x.name for x in layers if x is not self.model] or [x.name for x in layers]
        has_weights = bool(self.model.variables)
        if self.model.built and (has_weights or not missing):
            return  # a layer that is missing may be one that no call reaches
        if missing or not has_weights:
            raise InputError(not_built(self._described, missing))

    def _check_layers(self) -> None:
        for layer in self._layers():
            if isinstance(layer, keras().layers.TorchModuleWrapper):
                raise InputError(
                    f"{self._described} holds the torch module "
                    f"{type(layer.module).__qualname__} in layer {layer.name!r}. It runs on its "
                    "own parameters, where other values cannot be put. Write the whole in torch "
                    "or the whole in Keras."
                )

    def _find_backend(self) -> Backend:
        name = keras().config.backend()
        if name not in known_backends():
            raise InputError(
                f"Keras computes with {name!r} here, which has no backend. Known: "
                f"{', '.join(sorted(known_backends()))}. Set the environment variable "
                "KERAS_BACKEND before Keras is imported."
            )
        values = [variable.value for variable in self._variables().values()]
        return backend_of(*values) if values else load_backend(name)

    def params(self) -> Params:
        """The values of the trainable variables."""
        return {name: variable.value for name, variable in self.variables().items()}

    def state(self) -> Params:
        """Everything else: moving statistics, frozen weights, seed generators."""
        learned = self.variables()
        return {n: v.value for n, v in self._variables().items() if n not in learned}

    def aliases(self) -> Mapping[str, str]:
        """Paths without the name of the model, which most start with."""
        return {name.removeprefix(f"{self.model.name}/"): name for name in self.params()}

    def signature(self) -> Hashable:
        """Plain attributes of all layers, such as the rate of a dropout, and what is frozen."""
        layers = self._layers()
        return self._flags.of(lambda: layers), *((x.trainable, x.compute_dtype) for x in layers)

    def batch_norms(self) -> tuple[BatchNorm, ...]:
        """Those that are not frozen: these normalise by the statistics of a batch."""
        return tuple(names for _, names in self._norms())

    def _norms(self) -> list[tuple[Any, BatchNorm]]:
        names = {id(variable): name for name, variable in self._variables().items()}
        learned, kind = self.variables(), keras().layers.BatchNormalization

        def affine(variable: Any) -> str | None:
            name = names.get(id(variable))
            return name if name in learned else None

        return [
            (
                x,
                BatchNorm(
                    names[id(x.moving_mean)],
                    names[id(x.moving_variance)],
                    affine(x.gamma),
                    affine(x.beta),
                ),
            )
            for x in self._layers()
            if isinstance(x, kind) and x.trainable and id(x.moving_mean) in names
        ]

    def call(self, params: Params, state: Params, inputs: Inputs) -> tuple[Any, Params]:
        """The model's own call, with `training` as the policy says."""
        norm, variables = inputs.forward.norm, self._variables()
        momenta = self._recorded() if norm == "record" else {}
        values = self._values({**params, **state}, variables, momenta)
        called = self._called(inputs, variables, values, momenta)
        if norm != "record":
            return called.output, {name: called.value(variables[name]) for name in state}
        found = {name: called.recorded(variables[name]) for name in momenta}
        seen = {n: x / (1 - momenta[n]) for n, x in found.items() if x is not None}
        return called.output, {**state, **seen}

    def read(self, value: Any) -> Any:
        """The value of a variable, which is the model's own again after the call."""
        return value.value if isinstance(value, keras().Variable) else value

    def withholds(self, owner: Any, name: str) -> bool:
        """Methods of Keras that train, save or change a model."""
        own = getattr(getattr(type(owner), name, None), "__module__", "")
        return name in CHANGING and own.partition(".")[0] == "keras"

    def _called(
        self, inputs: Inputs, variables: Params, values: Params, recorded: Iterable[str]
    ) -> Call:
        norm, training, layers = inputs.forward.norm, inputs.forward.training, self._layers()
        if training is None and norm is not None:
            training = norm != "frozen"
        run = self._run(inputs, training)

        def call() -> Call:
            pairs = [(variables[name], value) for name, value in values.items()]
            kept = [variables[name] for name in recorded]
            return call_layer(
                run, layers, pairs, owner=self._described, training=training, recorded=kept
            )

        with self._flags.called(lambda: layers):
            called, read = self.backend.run_foreign(call, twice=inputs.forward.twice)
        given = set(map(id, values.values()))
        self._check_own(called, [x for x in read if id(x) not in given])
        return called  # type: ignore[no-any-return]

    def _run(self, inputs: Inputs, training: bool | None) -> Any:
        model, args, kwargs = self.model, inputs.args, dict(inputs.kwargs)
        if inputs.call is not None:
            return lambda: inputs.call(model, *args, **kwargs)
        if training is not None and _has_to_be_told(model, args, kwargs):
            kwargs["training"] = training
        return lambda: model(*args, **kwargs)

    def _values(self, given: Params, variables: Params, momenta: Mapping[str, float]) -> Params:
        values = {name: self.backend.asarray(given[name]) for name in variables}
        for name, variable in variables.items():
            if tuple(values[name].shape) != tuple(variable.shape):
                raise InputError(
                    f"variable {name!r} has shape {tuple(variable.shape)}, received a value of "
                    f"shape {tuple(values[name].shape)}."
                )
        # A moving average of zeros becomes (1 - momentum) times the statistics of the examples.
        return {n: ops.zeros_like(x) if n in momenta else x for n, x in values.items()}

    def _recorded(self) -> dict[str, float]:
        """The momentum of every statistic that is recorded, by the statistic's name."""
        momenta: dict[str, float] = {}
        call = keras().layers.BatchNormalization.call
        for layer, names in self._norms():
            tells = layer.momentum != 1 and not getattr(layer, "renorm", False)
            if not tells or type(layer).call is not call:
                raise InputError(
                    f"norm='support' needs the statistics of a batch, which {layer.name!r} does "
                    "not tell with momentum=1, renorm=True or a call of its own. Use norm='batch' "
                    "or norm='frozen'."
                )
            momenta |= dict.fromkeys((names.mean, names.var), layer.momentum)
        return momenta

    def _check_own(self, called: Call, read: Sequence[Any]) -> None:
        """Check that all a call depended on and changed is the model's own."""
        foreign, assigned = called.foreign()
        frozen = {id(x.value) for x in foreign if not x.trainable}
        learned = [x for x in foreign if x.trainable]
        known = {id(x.value) for x in learned}
        learned += [x for x in read if id(x) not in frozen | known]
        if learned:
            raise InputError(
                f"{self._described} depends on the trainable variables "
                f"{_named(learned)} from outside its own: those of a layer in a closure, a Lambda "
                "or another object, or variables of the framework itself. Keep the layer in an "
                "attribute of the model, make variables with add_weight, or freeze what is not to "
                "learn with trainable=False."
            )
        metrics = set(map(id, self.model.metrics_variables)) if assigned else set()
        if changed := [x for x in assigned if id(x) not in metrics]:
            raise InputError(
                f"{self._described} changes the variables {_named(changed)}, which "
                "are not among its own. Keep them in attributes of the model. Random numbers "
                "without a seed come from a generator of Keras's own: give the model one, "
                "self.seed = keras.random.SeedGenerator(0), and pass seed=self.seed."
            )

    @property
    def _described(self) -> str:
        return f"the Keras model {self.model.name!r}"

    def _layers(self) -> list[Any]:
        return layers_of(self.model)

    def _variables(self) -> dict[str, Any]:
        """All variables by name, each once; a generator of seeds may be listed twice."""
        every = list({id(variable): variable for variable in self.model.variables}.values())
        if len(every) != len(self._paths):
            self._paths = _paths(every)
        # By place, since a copy of a model has the same variables under other paths.
        return dict(zip(self._paths, every, strict=True))

    def variables(self) -> dict[str, Any]:
        """Keras variables, which its optimizers want on every framework but TensorFlow."""
        learned = set(map(id, self.model.trainable_variables))
        return {name: v for name, v in self._variables().items() if id(v) in learned}

    def write(self, params: Params) -> None:
        """Assign the trainable variables."""
        for name, variable in self.variables().items():
            variable.assign(params[name])


def _has_to_be_told(model: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """True if `call` takes `training`, without a default, and is not given it."""
    signature = inspect.signature(model.call)
    parameter = signature.parameters.get("training")
    if parameter is None or parameter.default is not parameter.empty:
        return False
    return "training" not in signature.bind_partial(*args, **kwargs).arguments


def _named(variables: Sequence[Any]) -> list[str]:
    def name(x: Any) -> str:
        known = getattr(x, "path", None) or getattr(x, "name", None)
        return known or f"one of shape {tuple(x.shape)}"

    return [name(x) for x in variables]


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
    return KerasAdapter(model) if is_layer(model) else None
