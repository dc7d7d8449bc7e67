"""The neutral interface to a model: named parameters, named state, and a pure call.

Every framework keeps parameters in another place, and every one can run a model on other values
than the model holds. An adapter brings both to one form, flat dictionaries from names to arrays,
and never changes the model, except in `assign`, where that is what is asked for.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from metaframe import arguments
from metaframe.backend.types import Array
from metaframe.errors import InputError, nearest

Params = dict[str, Array]
"""Name to array."""
Norm = Literal["batch", "frozen", "record"]


@dataclass(frozen=True)
class Forward:
    """The way a model is called, apart from its inputs. Checked when it is made.

    Attributes:
        norm: what batch normalisation normalises by: "batch", the statistics of the examples in
            hand; "frozen", those in the state; "record", the examples' own, which the returned
            state then holds, with everything else as it was given; None leaves it to the model.
        twice: True if the result will be differentiated twice. Kernels without a second derivative
            are then avoided.
        repeated: True if the call will be run again in a backward pass. A model that draws numbers
            from a hidden stream is then refused, since the second draw would be another.
        training: training or evaluation mode, for everything but batch normalisation, such as
            dropout; None leaves it to the model. For models that are `switchable`. Keras has one
            switch for both, and this is it.

    >>> Forward(norm="batch").twice
    True
    """

    norm: Norm | None = None
    twice: bool = True
    repeated: bool = False
    training: bool | None = None

    def __post_init__(self) -> None:
        arguments.choice(self.norm, "norm", (None, "batch", "frozen", "record"))


@dataclass(frozen=True, eq=False)
class Inputs:
    """One call of a model: its arguments, the policy `forward`, and what is called.

    Attributes:
        args: positional arguments.
        kwargs: keyword arguments.
        forward: how the model is called.
        call: `call(model, *args, **kwargs)`, such as another method of the model; None for
            `model(*args, **kwargs)`.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    forward: Forward = Forward()
    call: Callable[..., Any] | None = None


class BatchNorm(NamedTuple):
    """The names of the arrays of a batch normalisation in the state and the parameters.

    >>> BatchNorm("bn.running_mean", "bn.running_var", "bn.weight", "bn.bias").scale
    'bn.weight'
    """

    mean: str
    """The running mean, in the state."""
    var: str
    """The running variance, in the state."""
    scale: str | None = None
    """The factor, in the parameters; None if there is none."""
    shift: str | None = None
    """The shift, in the parameters; None if there is none."""


class NamedParameters(abc.ABC):
    """Parameters by name, wherever a framework keeps them: a model's, or learned values alone.

    >>> import torch
    >>> from metaframe.models.lookup import adapter_of
    >>> adapter = adapter_of(torch.nn.Linear(2, 1))
    >>> adapter.assign({"bias": torch.tensor([1.5])})
    >>> adapter.params()["bias"].item()
    1.5
    """

    model: Any
    """The holder of the parameters, with their current values: the user's model."""
    backend: Any
    """The `Backend` of its arrays."""

    @abc.abstractmethod
    def params(self) -> Params:
        """The parameters, live where the framework's are, in the model's own order."""

    @abc.abstractmethod
    def write(self, params: Params) -> None:
        """Make `params`, which are complete and of the right shapes, the model's parameters.

        Args:
            params: arrays by name, one for each parameter.
        """

    def trainable(self) -> tuple[str, ...]:
        """Names of the parameters to learn. Default: all but integers and booleans.

        A complex one is among them, so that it is refused and not left out.
        """
        return tuple(name for name, x in self.params().items() if is_inexact(x, self.backend))

    def variables(self) -> dict[str, Any]:
        """The variables that the framework's own optimizers update. Default: the parameters."""
        return dict(self.params())

    def assign(self, values: Mapping[str, Array]) -> None:
        """Set parameters by name; those not named keep their values.

        Args:
            values: arrays by name.

        Raises:
            InputError: an unknown name, or another shape than the parameter's.
        """
        params = self.params()
        for name, value in values.items():
            if name not in params:
                raise InputError(f"no parameter called {name!r}. {nearest(name, params)}")
            if tuple(value.shape) != tuple(params[name].shape):
                raise InputError(
                    f"parameter {name!r} has shape {tuple(params[name].shape)}, received shape "
                    f"{tuple(value.shape)}."
                )
        self.write({**params, **values})


def is_inexact(x: Array, backend: Any) -> bool:
    """True if `x` is of real or complex numbers, and not of integers or booleans.

    >>> import torch
    >>> from metaframe.backend.registry import load_backend
    >>> [is_inexact(torch.ones(1, dtype=dtype), load_backend("torch"))
    ...  for dtype in (torch.bfloat16, torch.complex64, torch.int64)]
    [True, True, False]
    """
    return bool(backend.is_floating(x) or backend.dtype_name(x).startswith("complex"))


class ModelAdapter(NamedParameters):
    """A model of any framework.

    >>> import torch
    >>> from metaframe.models.lookup import adapter_of
    >>> adapter = adapter_of(torch.nn.Linear(2, 1))
    >>> values = {"weight": torch.ones(1, 2), "bias": torch.zeros(1)}
    >>> adapter.call(values, {}, Inputs((torch.tensor([[1.0, 2.0]]),)))[0].item()
    3.0
    """

    output_first: bool = False
    """Weights are laid out (outputs, inputs, *window); otherwise (*window, inputs, outputs)."""
    switchable: bool = False
    """True if `call` follows `Forward.training`."""

    @abc.abstractmethod
    def call(self, params: Params, state: Params, inputs: Inputs) -> tuple[Any, Params]:
        """Call the model with other values in place of its own.

        Args:
            params: all parameters by name.
            state: all of the state by name, as `state()` names it.
            inputs: the arguments and how the model is called.

        Returns:
            `(output, state)`: the model's output, and the state it leaves.
        """

    def state(self) -> Params:
        """Arrays that are no parameters: running statistics, random keys. Default: none."""
        return {}

    def batch_norms(self) -> tuple[BatchNorm, ...]:
        """Batch normalisations whose statistics are in the state and can be recorded.

        Default: none are known of.
        """
        return ()

    def recordable(self) -> tuple[str, ...]:
        """Names of the means and variances of `batch_norms`."""
        return tuple(name for norm in self.batch_norms() for name in (norm.mean, norm.var))

    def adaptable(self) -> tuple[str, ...]:
        """Names of the parameters an inner loop may adapt. Default: those that are trained."""
        return self.trainable()

    def given(self) -> Mapping[str, Any]:
        """The parameters as the objects the user knows them by. Default: those of `params`."""
        return self.params()

    def left_aside(self) -> Mapping[str, str]:
        """Numbers that neither `params` nor `state` has, and what they are. Default: none."""
        return {}

    def aliases(self) -> Mapping[str, str]:
        """Other names of parameters, and the ones in `params`: of tied weights, or for short.

        Default: there are none.
        """
        return {}

    def read(self, value: Any) -> Any:
        """`value`, an attribute of the model, as its user has it outside of the call.

        Asked while other values are in place of the model's own. Default: itself.
        """
        return value

    def withholds(self, owner: Any, name: str) -> bool:
        """True if an attribute of the model or of a part of it is of no use to a learner.

        Such are what the framework gives every model to change it, or to list its own parameters.
        Default: none.

        Args:
            owner: the model or a part of it.
            name: the name of the attribute.

        Returns:
            True for one that a learner does not pass on.
        """
        del owner, name
        return False

    def signature(self) -> Hashable:
        """What, besides arrays, decides what `call` computes, such as a training flag."""
        return None
