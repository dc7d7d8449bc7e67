"""From a model to its adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from metaframe.backend.model import Forward, Inputs, ModelAdapter, Norm, Params
from metaframe.backend.registry import backends_in_use
from metaframe.errors import InputTypeError
from metaframe.models._keras import keras_adapter
from metaframe.models._pair import pair_adapter


def adapter_of(model: Any) -> ModelAdapter:
    """The adapter of `model`.

    Raises:
        InputTypeError: no framework knows it as a model.

    >>> import torch
    >>> adapter_of(torch.nn.Linear(3, 2)).trainable()
    ('weight', 'bias')
    """
    if isinstance(model, ModelAdapter):
        return model
    finders = (keras_adapter, *(b.adapter for b in backends_in_use()), pair_adapter)
    for find in finders:
        found = find(model)
        if found is not None:
            return found
    raise InputTypeError(
        f"{type(model).__module__}.{type(model).__qualname__} is no model metaframe knows. Pass a "
        "torch.nn.Module, a flax.nnx or Equinox module, a linen module with its variables, a Keras "
        "model, a tf.Module, or a pair (apply, params)."
    )


class FunctionalModel(NamedTuple):
    """A model as values and a pure function.

    `output, state = apply(params, state, *args, **kwargs)`.

    >>> import torch
    >>> model = FunctionalModel(lambda params, state, x: (params["w"] * x, state), {"w": 2.0}, {})
    >>> model.apply(model.params, model.state, 3.0)
    (6.0, {})
    """

    apply: Callable[..., tuple[Any, Params]]
    """`apply(params, state, *args, **kwargs) -> (output, state)`, pure."""
    params: Params
    """The parameters by name."""
    state: Params
    """Arrays that are not parameters, such as running statistics, by name."""


def functional(model: Any, *, norm: Norm | None = None) -> FunctionalModel:
    """Any framework's model as `(apply, params, state)`.

    Args:
        model: see the module.
        norm: what batch normalisation uses, see `Forward`; default: as the model itself says.

    Returns:
        A pure function, the model's parameters and its state.

    Raises:
        InputTypeError: not a model.
        InputError: a model without weights yet, or an unknown policy.

    >>> import torch
    >>> apply, params, state = functional(torch.nn.Linear(3, 2))
    >>> sorted(params), state
    (['bias', 'weight'], {})
    >>> apply(params, state, torch.ones(5, 3))[0].shape
    torch.Size([5, 2])
    """
    adapter, forward = adapter_of(model), Forward(norm)

    def apply(params: Params, state: Params, *args: Any, **kwargs: Any) -> tuple[Any, Params]:
        return adapter.call(params, state, Inputs(args, kwargs, forward))

    return FunctionalModel(apply, adapter.params(), adapter.state())
