"""Equinox modules behind the neutral interface.

Equinox's convention is a module of one example, which its user vectorises. So a module alone runs
over the leading axis of its inputs, and so do its other methods; a pair `(function, module)` runs
as the function says, and one that was wrapped in `equinox.filter_vmap` as it is.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from metaframe.backend.contract import Backend
from metaframe.backend.model import Inputs, ModelAdapter
from metaframe.errors import InputError
from metaframe_jax._names import filled, named

Params = dict[str, Array]
Call = Callable[..., Any]


def find_equinox_adapter(model: object, backend: Backend) -> ModelAdapter | None:
    """The adapter of an Equinox module, alone, with a function or with its state; None for others.

    Raises:
        InputError: a module that needs its state.
    """
    equinox = sys.modules.get("equinox")
    if equinox is None:
        return None
    if isinstance(model, equinox.Module):
        if any(map(_is_index, jax.tree_util.tree_leaves(model, is_leaf=_is_index))):
            raise InputError(
                f"the module {type(model).__qualname__} keeps state, such as running statistics. "
                "Pass it with its state, (module, state) as equinox.nn.make_with_state returns "
                "them, or say how it is called: (function, module)."
            )
        return EquinoxAdapter(None, model, backend)
    if not (isinstance(model, tuple) and len(model) == 2):
        return None
    first, second = model
    if isinstance(first, equinox.Module) and isinstance(second, equinox.nn.State):
        return StatefulAdapter(first, second, backend)
    if callable(first) and isinstance(second, equinox.Module):
        return EquinoxAdapter(first, second, backend)
    return None


class EquinoxAdapter(ModelAdapter):
    """An `equinox.Module`; its inexact arrays are the parameters, its other arrays the state.

    With a `function`, what a module returns besides its output is the function's to deal with, and
    so is the choice of statistics.
    """

    output_first = True
    switchable = True

    def __init__(self, function: Call | None, model: Any, backend: Backend) -> None:
        self.model = model
        self.backend = backend
        self._function = function
        self._of_one_example = function is None and not _is_vectorised(model)

    def params(self) -> Params:
        return _arrays(self.model, inexact=True)

    def state(self) -> Params:
        return _arrays(self.model, inexact=False)

    def left_aside(self) -> dict[str, str]:
        return _numpy(self.model)

    def call(self, params: Params, state: Params, inputs: Inputs) -> tuple[Any, Params]:
        module = _in_mode(_holding(self.model, {**params, **state}), inputs.forward.training)
        call = functools.partial(inputs.call or self._function or _called, module)
        if self._of_one_example and inputs.call is None:
            return over_examples(call, inputs), state
        return call(*inputs.args, **inputs.kwargs), state

    def write(self, params: Params) -> None:
        self.model = _holding(self.model, params)


def _in_mode(module: Any, training: bool | None) -> Any:
    """The module in training or inference mode, or as it is."""
    if training is None:
        return module
    equinox: Any = sys.modules["equinox"]
    return equinox.nn.inference_mode(module, value=not training)


class StatefulAdapter(ModelAdapter):
    """`(module, state)` as `equinox.nn.make_with_state` returns them, called as `module(x, state)`.

    The module is of one example and the state of all. `equinox.nn.BatchNorm` follows the policy;
    in its mode "ema", which normalises by averages, "batch" and "record" start these anew.
    """

    output_first = True
    switchable = True

    def __init__(self, module: Any, state: Any, backend: Backend) -> None:
        self.model = (module, state)
        self.backend = backend
        axes = {layer.axis_name for layer in _batch_norms(module)}
        if len(axes) > 1 or not all(isinstance(axis, str) for axis in axes):
            raise InputError(
                f"batch normalisation over the axes {sorted(map(str, axes))}: there is one, over "
                "examples. Say how the module is vectorised: (function, module)."
            )
        self._axis = next(iter(axes), None)

    def params(self) -> Params:
        return _arrays(self.model[0], inexact=True)

    def state(self) -> Params:
        module, state = self.model
        return {**_arrays(module, inexact=False), **named(_held(module, state))}

    def left_aside(self) -> dict[str, str]:
        return _numpy(self.model[0])

    def call(self, params: Params, state: Params, inputs: Inputs) -> tuple[Any, Params]:
        """`module(*args, state)`, or `inputs.call(module, *args)`, which gets no state."""
        module = _in_mode(_holding(self.model[0], {**params, **state}), inputs.forward.training)
        if inputs.call is not None and not inputs.args:  # an attribute is read
            return inputs.call(module, **inputs.kwargs), state
        if inputs.call is not None:
            return over_examples(functools.partial(inputs.call, module), inputs, self._axis), state
        norm = inputs.forward.norm
        given = _with(module, self.model[1], state)
        if norm is not None:
            module, given = _under(module, given, frozen=norm == "frozen")
        output, after = over_examples(module, inputs, self._axis, given)
        moved = named(_held(module, after))
        if norm == "record":
            moved = {name: moved[name] for name in named(_held(module, after, of_norms=True))}
        return output, {**state, **moved}

    def write(self, params: Params) -> None:
        module, state = self.model
        self.model = (_holding(module, params), state)


def over_examples(call: Call, inputs: Inputs, axis: str | None = None, state: Any = None) -> Any:
    """`call` on every row of those positional arguments that have rows, and the same `state`."""
    args, kwargs = inputs.args, inputs.kwargs
    axes = jax.tree_util.tree_map(lambda x: 0 if getattr(x, "ndim", 0) else None, args)
    whole = () if state is None else (state,)
    if not jax.tree_util.tree_leaves(axes):
        return call(*args, *whole, **kwargs)
    return jax.vmap(
        lambda *xs: call(*xs, **kwargs),
        in_axes=(*axes, *(None for _ in whole)),
        out_axes=0 if state is None else (0, None),
        axis_name=axis,
    )(*args, *whole)


def _called(module: Any, *args: Any, **kwargs: Any) -> Any:
    return module(*args, **kwargs)


def _is_vectorised(module: Any) -> bool:
    """True if its user wrapped it in `equinox.filter_vmap`, possibly in `filter_jit` too."""
    equinox: Any = sys.modules["equinox"]
    mapped = type(equinox.filter_vmap(_called)), type(equinox.filter_pmap(_called))
    while module is not None and not isinstance(module, mapped):
        module = getattr(module, "__wrapped__", None)
    return module is not None


def _is_index(x: object) -> bool:
    """True if it is the place of a state, whose first value is not learned."""
    return isinstance(x, sys.modules["equinox"].nn.StateIndex)


def _arrays(module: Any, *, inexact: bool) -> Params:
    return {
        name: x
        for name, x in named(module, _is_index).items()
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.inexact) == inexact
    }


def _numpy(module: Any) -> dict[str, str]:
    """Floats in NumPy arrays, which Equinox takes for constants."""
    leaves = named(module, _is_index).items()
    arrays = {n: x for n, x in leaves if isinstance(x, np.ndarray)}
    return {n: "NumPy array" for n, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.inexact)}


def _holding(module: Any, values: Params) -> Any:
    """The module with `values` in the places of its arrays."""
    leaves = named(module, _is_index).items()
    own = [name for name, x in leaves if isinstance(x, jax.Array) and name in values]
    return filled(module, {name: values[name] for name in own}, _is_index)


def _batch_norms(module: Any) -> list[Any]:
    layer: Any = sys.modules["equinox"].nn.BatchNorm
    leaves = jax.tree_util.tree_leaves(module, is_leaf=lambda x: isinstance(x, layer))
    return [x for x in leaves if isinstance(x, layer)]


def _held(module: Any, state: Any, *, of_norms: bool = False) -> dict[str, Any]:
    """The values that `state` holds for a module, by the names of the places."""
    places = {n: x for n, x in named(module, _is_index).items() if _is_index(x)}
    if of_norms:
        norms = named(_batch_norms(module), _is_index).values()
        markers = {x.marker for x in norms if _is_index(x)}
        places = {name: place for name, place in places.items() if place.marker in markers}
    return {name: state.get(place) for name, place in places.items()}


def _with(module: Any, state: Any, values: Params) -> Any:
    """A copy of `state` that holds `values`; writing to a state makes the one before useless."""
    leaves, spec = jax.tree_util.tree_flatten(state)
    copy = jax.tree_util.tree_unflatten(spec, leaves)
    places = {n: x for n, x in named(module, _is_index).items() if _is_index(x)}
    for name, held in filled(_held(module, copy), values).items():
        copy = copy.set(places[name], held)
    return copy


def _under(module: Any, state: Any, *, frozen: bool) -> tuple[Any, Any]:
    """The module with every batch normalisation in this mode, its averages empty if they move."""
    equinox: Any = sys.modules["equinox"]
    layers = _batch_norms(module)
    if layers:
        module = equinox.tree_at(
            lambda m: [layer.inference for layer in _batch_norms(m)], module, [frozen] * len(layers)
        )
    for layer in () if frozen else layers:
        if layer.mode == "ema":
            state = state.set(layer.ema_first_time_index, jnp.array(True))
            continue
        empty = jax.tree_util.tree_map(jnp.zeros_like, state.get(layer.batch_state_index))
        state = state.set(layer.batch_counter, jnp.zeros_like(state.get(layer.batch_counter)))
        state = state.set(layer.batch_state_index, empty)
    return module, state
