"""Flax models behind the neutral interface, and what finds the adapter of a Flax or Equinox model.

The libraries are looked at only once the user has imported them. Names are paths joined with "/".
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from metaframe.backend.contract import Backend
from metaframe.backend.model import BatchNorm, Forward, Inputs, ModelAdapter
from metaframe.errors import InputError, InputTypeError
from metaframe.models.attributes import Flags
from metaframe_jax._equinox import find_equinox_adapter
from metaframe_jax._names import filled, named, path_name, unique

Params = dict[str, Array]
REFERENCES = ("hijax", "ref")
"""Kinds of Variables that live in mutable references."""


def find_adapter(model: object, backend: Backend) -> ModelAdapter | None:
    """The adapter of a Flax or Equinox model; None for anything else.

    Raises:
        InputTypeError: a function that JAX made of a module.
        InputError: a linen module without its variables, an Equinox one without its state.
    """
    nnx, linen = sys.modules.get("flax.nnx"), sys.modules.get("flax.linen")
    if linen is not None and isinstance(model, linen.Module):
        if model.scope is None:
            raise InputError(
                "a linen module has no parameters of its own. Pass its variables with it: "
                "(module, module.init(key, x))."
            )
        model = model.unbind()
    function, values = model if isinstance(model, tuple) and len(model) == 2 else (_call, model)
    if nnx is not None and isinstance(values, nnx.Module) and callable(function):
        return NnxAdapter(function, values, backend)
    if linen is not None and isinstance(function, linen.Module):
        return LinenAdapter(function, values, backend)
    if (found := find_equinox_adapter(model, backend)) is None:
        _refuse_hidden(inspect.unwrap(model) if callable(model) else model)
    return found


def _refuse_hidden(inside: object) -> None:
    modules = (("equinox", "Module"), ("flax.nnx", "Module"), ("flax.linen", "Module"))
    kinds = [getattr(sys.modules[name], kind) for name, kind in modules if name in sys.modules]
    if isinstance(inside, tuple(kinds)):
        raise InputTypeError(
            f"a function such as jax.vmap(module) hides the arrays of {type(inside).__qualname__}. "
            "Pass the module itself, which is vectorised over examples, or say how it is called: "
            "(lambda module, x: jax.vmap(module)(x), module)."
        )


def _call(model: Any, *args: Any, **kwargs: Any) -> Any:
    return model(*args, **kwargs)


class NnxAdapter(ModelAdapter):
    """A `flax.nnx.Module`: `nnx.Param` are the parameters, all other variables the state.

    It runs as `function(module, *args)`.
    """

    switchable = True

    def __init__(self, function: Callable[..., Any], model: Any, backend: Backend) -> None:
        self.model = model
        self.backend = backend
        self._function = function
        self._flags = Flags()

    def params(self) -> Params:
        return _Split(self.model).arrays(parameters=True)

    def state(self) -> Params:
        return _Split(self.model).arrays(parameters=False)

    def signature(self) -> Hashable:
        # The graph definition holds every attribute that is no array, training flags included.
        graph: Hashable = _nnx().graphdef(self.model)
        try:
            hash(graph)
        except TypeError:  # some attribute is a dict or a list
            return self._flags.of(self._parts)
        return graph

    def _parts(self) -> Iterator[object]:
        nnx = _nnx()
        return (part for _, part in nnx.iter_graph(self.model) if isinstance(part, nnx.Module))

    def call(self, params: Params, state: Params, inputs: Inputs) -> tuple[Any, Params]:
        copy, norm = _Split(self.model).merged({**params, **state}), inputs.forward.norm
        if inputs.forward.training is not None:
            (copy.train if inputs.forward.training else copy.eval)()
        if norm is not None:
            for _, layer in _batch_norms(copy):
                layer.use_running_average = norm != "batch"
                kind: Any = type(layer)
                layer.__class__ = _following(kind, norm == "record")
        output = (inputs.call or self._function)(copy, *inputs.args, **inputs.kwargs)
        after = _Split(copy).arrays(parameters=False)
        moved = self.recordable() if norm == "record" else state
        return output, {**state, **{name: after[name] for name in moved if name in after}}

    def batch_norms(self) -> tuple[BatchNorm, ...]:
        names = _Split(self.model).names

        def of(path: Any, layer: Any) -> BatchNorm:
            learned = (
                names[*path, part] if getattr(layer, part) is not None else None
                for part in ("scale", "bias")
            )
            return BatchNorm(names[*path, "mean"], names[*path, "var"], *learned)

        return tuple(of(path, layer) for path, layer in _batch_norms(self.model))

    def read(self, value: Any) -> Any:
        if not _is_variable(value):
            return value
        return value.get_value() if hasattr(value, "get_value") else value.value

    def write(self, params: Params) -> None:
        nnx = _nnx()
        nnx.update(self.model, nnx.state(_Split(self.model).merged(params), nnx.Param))


class _Split:
    """A module taken apart into its graph and its arrays, each of which has one name.

    A Variable is met once, on however many ways it is reached, and is read as it is stored, which
    is before hooks such as `on_get_value`. Its value may be a structure of arrays.
    """

    def __init__(self, model: Any) -> None:
        nnx = _nnx()
        self._graph, state = nnx.split(model)
        variables, self._spec = jax.tree_util.tree_flatten_with_path(state, is_leaf=_is_variable)
        self._variables = [variable for _, variable in variables]
        values = [jax.tree_util.tree_flatten_with_path(_stored(x)) for x in self._variables]
        self._specs = [spec for _, spec in values]
        self._arrays = [[array for _, array in leaves] for leaves, _ in values]
        paths = [path for path, _ in variables]
        every = [
            (*path, *inner)
            for path, (leaves, _) in zip(paths, values, strict=True)
            for inner, _ in leaves
        ]
        found = iter(unique(map(path_name, every)))
        self._names = [[next(found) for _ in arrays] for arrays in self._arrays]
        self.names = {
            tuple(getattr(key, "key", key) for key in path): names[0]
            for path, names in zip(paths, self._names, strict=True)
            if names
        }
        """Names of Variables by the keys on the way to them."""

    def arrays(self, *, parameters: bool) -> Params:
        """The parameters by name, or everything else."""
        return {
            name: array
            for variable, names, arrays in zip(
                self._variables, self._names, self._arrays, strict=True
            )
            if isinstance(variable, _nnx().Param) == parameters
            for name, array in zip(names, arrays, strict=True)
        }

    def merged(self, values: Mapping[str, Any]) -> Any:
        """A copy of the module that holds `values`, and its own arrays under other names."""
        variables = []
        for old, spec, names, arrays in zip(
            self._variables, self._specs, self._names, self._arrays, strict=True
        ):
            given = [values.get(name, x) for name, x in zip(names, arrays, strict=True)]
            value = jax.tree_util.tree_unflatten(spec, given)
            variables.append(_plain(old, value) if _is_variable(old) else value)
        return _nnx().merge(self._graph, jax.tree_util.tree_unflatten(self._spec, variables))


def _nnx() -> Any:
    return sys.modules["flax.nnx"]


def _is_variable(x: object) -> bool:
    return isinstance(x, _nnx().Variable)


def _plain(variable: Any, value: Any) -> Any:
    """A Variable like this one that holds `value` itself, and no reference to it."""
    found: Any = variable.replace(
        value, **{k: False for k in REFERENCES if getattr(variable, k, 0)}
    )
    return found


def _stored(x: Any) -> Any:
    """The value of a Variable, or the array in a mutable reference."""
    if not _is_variable(x):
        return x
    value = x.get_raw_value() if hasattr(x, "get_raw_value") else x.raw_value
    reference = getattr(jax, "Ref", ())
    return value[...] if isinstance(value, reference) else value


def _batch_norms(model: Any) -> list[tuple[Any, Any]]:
    nnx = _nnx()
    return [(path, x) for path, x in nnx.iter_graph(model) if isinstance(x, nnx.BatchNorm)]


@functools.cache
def _following(layer: Any, record: bool) -> Any:
    """The class of a batch normalisation, with its attribute deciding whatever a call says.

    Recording puts the statistics of the examples in the place of the running ones, and normalises
    by these. Flax stores them as constants, and in the precision of the running ones.
    """

    class Following(layer):  # type: ignore[misc]
        def __call__(self, x: Any, use_running_average: Any = None, **kwargs: Any) -> Any:
            del use_running_average
            if record:
                moments = _moments(self, x, kwargs.get("mask"))
                for name, value in zip(("mean", "var"), moments, strict=True):
                    setattr(self, name, type(getattr(self, name))(value))
            return super().__call__(x, **kwargs)

    return Following


def _moments(layer: Any, x: Array, mask: Array | None) -> tuple[Array, Array]:
    """Mean and variance as `nnx.BatchNorm` computes them, in single precision at least."""
    x = x.astype(jnp.promote_types(layer.dtype or x.dtype, jnp.float32))
    features = {axis % x.ndim for axis in np.atleast_1d(layer.axis)}
    over = tuple(axis for axis in range(x.ndim) if axis not in features)

    def mean(x: Array) -> Array:
        found: Array = x.mean(over, where=mask)
        if layer.axis_name is not None:
            pmean: Any = jax.lax.pmean
            found = pmean(found, layer.axis_name, axis_index_groups=layer.axis_index_groups)
        return found

    middle = mean(x)
    return middle, mean(jnp.square(x - jnp.expand_dims(middle, over)))


class LinenAdapter(ModelAdapter):
    """`(module, variables)` of flax.linen: "params" are the parameters, the rest is the state."""

    def __init__(self, module: Any, variables: Any, backend: Backend) -> None:
        if "params" not in variables:
            variables = {"params": variables}
        self.backend = backend
        self._module = module
        self._params = variables["params"]
        self._rest = {name: values for name, values in variables.items() if name != "params"}
        self.model = (module, variables)

    def params(self) -> Params:
        return named(self._params)

    def state(self) -> Params:
        return named(self._rest)

    def call(self, params: Params, state: Params, inputs: Inputs) -> tuple[Any, Params]:
        """`module.apply`, on the bound module if `inputs.call` says what is called."""
        variables = {"params": filled(self._params, params), **filled(self._rest, state)}
        linen: Any = sys.modules["flax.linen"]
        kwargs = dict(inputs.kwargs)
        if "mutable" in kwargs:
            raise InputTypeError(
                "mutable= is not for the caller to say: every collection but the parameters is, in "
                "a copy that is dropped. Leave it out; the result is the output alone."
            )
        if inputs.call is not None:
            kwargs["method"] = _method(inputs.call)
        with linen.intercept_methods(_batch_norm_policy(linen, inputs.forward)):
            output, after = self._module.apply(
                variables, *inputs.args, mutable=list(self._rest), **kwargs
            )
        moved = named({name: values for name, values in after.items() if name in self._rest})
        kept = self.recordable() if inputs.forward.norm == "record" else state
        return output, {**state, **{name: moved[name] for name in kept if name in moved}}

    def batch_norms(self) -> tuple[BatchNorm, ...]:
        params, state = self.params(), self.state()
        means = [n for n in state if n.startswith("batch_stats/") and n.endswith("/mean")]
        paths = [path for n in means if f"{(path := n.removesuffix('/mean'))}/var" in state]

        def of(path: str) -> BatchNorm:
            learned = [f"{path.removeprefix('batch_stats/')}/{part}" for part in ("scale", "bias")]
            scale, shift = (name if name in params else None for name in learned)
            return BatchNorm(f"{path}/mean", f"{path}/var", scale, shift)

        return tuple(map(of, paths))

    def write(self, params: Params) -> None:
        self._params = filled(self._params, params)
        self.model = (self._module, {"params": self._params, **self._rest})


def _method(call: Callable[..., Any]) -> Callable[..., Any]:
    # A function with a signature that linen understands, whatever `call` is.
    def method(module: Any, *args: Any, **kwargs: Any) -> Any:
        return call(module, *args, **kwargs)

    return method


def _batch_norm_policy(linen: Any, forward: Forward) -> Callable[..., Any]:
    """An interceptor that answers for every batch norm which statistics it uses."""

    def intercept(
        method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: Any
    ) -> Any:
        layer = context.module
        called = context.method_name == "__call__"
        if forward.norm is None or not called or not isinstance(layer, linen.BatchNorm):
            return method(*args, **kwargs)
        # The layer object is this call's own copy. Its attribute is set, because linen refuses an
        # argument next to it.
        object.__setattr__(layer, "use_running_average", forward.norm == "frozen")
        if forward.norm == "record":
            object.__setattr__(layer, "momentum", 0.0)  # the average becomes this batch's
        kwargs.pop("use_running_average", None)
        return method(args[0], **kwargs)

    return intercept
