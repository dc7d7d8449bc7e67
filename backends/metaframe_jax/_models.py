"""Flax and Equinox models behind the neutral interface.

The libraries are looked at only once the user has imported them. Names are paths joined with "/".
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from metaframe.backend import Backend
from metaframe.errors import InputError
from metaframe.models import BatchNorm, Forward, Inputs, ModelAdapter

Params = dict[str, Array]


def find_adapter(model: object, backend: Backend) -> ModelAdapter | None:
    """The adapter of a Flax or Equinox model; None for anything else."""
    nnx, linen = sys.modules.get("flax.nnx"), sys.modules.get("flax.linen")
    equinox = sys.modules.get("equinox")
    if nnx is not None and isinstance(model, nnx.Module):
        return NnxAdapter(model, backend)
    if equinox is not None and isinstance(model, equinox.Module):
        return EquinoxAdapter(_over_examples, model, backend)
    if linen is not None and isinstance(model, linen.Module):
        raise InputError(
            "a linen module has no parameters of its own. Pass its variables with it: "
            "(module, module.init(key, x))."
        )
    if not (isinstance(model, tuple) and len(model) == 2):
        return None
    function, values = model
    if linen is not None and isinstance(function, linen.Module):
        return LinenAdapter(function, values, backend)
    if equinox is not None and isinstance(values, equinox.Module) and callable(function):
        return EquinoxAdapter(function, values, backend)
    return None


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _named(tree: Any) -> Params:
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


class NnxAdapter(ModelAdapter):
    """A `flax.nnx.Module`: `nnx.Param` are the parameters, all other variables the state."""

    switchable = True

    def __init__(self, model: Any, backend: Backend) -> None:
        self.model = model
        self.backend = backend

    def _split(self, model: Any) -> tuple[Any, Any, Any]:
        nnx: Any = sys.modules["flax.nnx"]
        graph, params, rest = nnx.split(model, nnx.Param, ...)
        return graph, nnx.to_pure_dict(params), nnx.to_pure_dict(rest)

    def params(self) -> Params:
        return _named(self._split(self.model)[1])

    def state(self) -> Params:
        return _named(self._split(self.model)[2])

    def signature(self) -> Hashable:
        # The graph definition holds every attribute that is no array, training flags included.
        graph: Hashable = self._split(self.model)[0]
        return graph

    def call(self, params: Params, state: Params, inputs: Inputs) -> tuple[Any, Params]:
        copy, norm = self._with({**params, **state}), inputs.forward.norm
        if inputs.forward.training is not None:
            (copy.train if inputs.forward.training else copy.eval)()
        if norm is not None:
            for _, layer in _batch_norms(copy):
                layer.use_running_average = norm != "batch"
                kind: Any = type(layer)
                layer.__class__ = _following(kind, norm == "record")
        output = (inputs.call or type(copy).__call__)(copy, *inputs.args, **inputs.kwargs)
        after = _named(self._split(copy)[2])
        moved = self.recordable() if norm == "record" else state
        return output, {**state, **{name: after[name] for name in moved}}

    def batch_norms(self) -> tuple[BatchNorm, ...]:
        paths = ("/".join(map(str, path)) for path, _ in _batch_norms(self.model))
        return tuple(_batch_norm(path, path, self.params()) for path in paths)

    def read(self, value: Any) -> Any:
        nnx: Any = sys.modules["flax.nnx"]
        if not isinstance(value, nnx.Variable):
            return value
        return value.get_value() if hasattr(value, "get_value") else value.value

    def write(self, params: Params) -> None:
        nnx: Any = sys.modules["flax.nnx"]
        nnx.update(self.model, nnx.state(self._with(params), nnx.Param))

    def _with(self, values: Params) -> Any:
        """A copy of the model that holds `values`."""
        nnx: Any = sys.modules["flax.nnx"]
        graph, everything = nnx.split(self.model)
        pure = nnx.to_pure_dict(everything)
        filled = jax.tree_util.tree_map_with_path(lambda path, x: values.get(_name(path), x), pure)
        nnx.replace_by_pure_dict(everything, filled)
        return nnx.merge(graph, everything)


def _batch_norms(model: Any) -> list[tuple[Any, Any]]:
    nnx: Any = sys.modules["flax.nnx"]
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


def _batch_norm(statistics: str, affine: str, params: Params) -> BatchNorm:
    learned = [f"{affine}/{part}" for part in ("scale", "bias")]
    scale, shift = (name if name in params else None for name in learned)
    return BatchNorm(f"{statistics}/mean", f"{statistics}/var", scale, shift)


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
        return _named(self._params)

    def state(self) -> Params:
        return _named(self._rest)

    def call(self, params: Params, state: Params, inputs: Inputs) -> tuple[Any, Params]:
        variables = {"params": _filled(self._params, params), **_filled(self._rest, state)}
        linen: Any = sys.modules["flax.linen"]
        with linen.intercept_methods(_batch_norm_policy(linen, inputs.forward)):
            output, after = self._module.apply(
                variables,
                *inputs.args,
                mutable=list(self._rest),
                method=inputs.call,
                **inputs.kwargs,
            )
        moved = _named(after)
        if inputs.forward.norm == "record":
            moved = {name: moved[name] for name in self.recordable()}
        return output, {**state, **moved}

    def batch_norms(self) -> tuple[BatchNorm, ...]:
        statistics = [name for name in self.state() if name.startswith("batch_stats/")]
        paths = [name.removesuffix("/mean") for name in statistics if name.endswith("/mean")]
        params = self.params()
        return tuple(_batch_norm(path, path.removeprefix("batch_stats/"), params) for path in paths)

    def write(self, params: Params) -> None:
        self._params = _filled(self._params, params)
        self.model = (self._module, {"params": self._params, **self._rest})


def _filled(tree: Any, values: Params) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: values[_name(path)], tree)


def _batch_norm_policy(linen: Any, forward: Forward) -> Callable[..., Any]:
    """An interceptor that answers for every batch norm which statistics it uses."""

    def intercept(
        method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: Any
    ) -> Any:
        layer = context.module
        if forward.norm is None or not isinstance(layer, linen.BatchNorm):
            return method(*args, **kwargs)
        # The layer object is this call's own copy. Its attribute is set, because linen refuses an
        # argument next to it.
        object.__setattr__(layer, "use_running_average", forward.norm == "frozen")
        if forward.norm == "record":
            object.__setattr__(layer, "momentum", 0.0)  # the average becomes this batch's
        kwargs.pop("use_running_average", None)
        return method(args[0], **kwargs)

    return intercept


class EquinoxAdapter(ModelAdapter):
    """An `equinox.Module`, run by `function(module, *args)`; parameters are its float arrays.

    What a module returns besides its output, such as an `equinox.nn.State`, is the function's to
    deal with, and so is the choice of statistics.
    """

    output_first = True
    switchable = True

    def __init__(self, function: Callable[..., Any], model: Any, backend: Backend) -> None:
        self.model = model
        self.backend = backend
        self._function = function

    def params(self) -> Params:
        equinox: Any = sys.modules["equinox"]
        return _named(equinox.filter(self.model, equinox.is_inexact_array))

    def call(self, params: Params, state: Params, inputs: Inputs) -> tuple[Any, Params]:
        call = inputs.call or self._function
        model, training = self._with(params), inputs.forward.training
        if training is not None:
            equinox: Any = sys.modules["equinox"]
            model = equinox.nn.inference_mode(model, value=not training)
        return call(model, *inputs.args, **inputs.kwargs), state

    def write(self, params: Params) -> None:
        self.model = self._with(params)

    def _with(self, params: Params) -> Any:
        def fill(path: tuple[Any, ...], leaf: Any) -> Any:
            return params.get(_name(path), leaf)

        return jax.tree_util.tree_map_with_path(fill, self.model)


def _over_examples(module: Any, *args: Any, **kwargs: Any) -> Any:
    return jax.vmap(lambda *xs: module(*xs, **kwargs))(*args)
