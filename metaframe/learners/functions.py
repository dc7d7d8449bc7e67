"""Adapting a model as pure functions of named parameters.

Everything the classes do is here: a gradient of the support loss with respect to named parameters,
and an update of them. Parameters are dictionaries from name to array; nothing is changed in place.
With `first_order` the gradients are constants, which is all the difference it makes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from metaframe import arguments, ops, optim, tree
from metaframe.backend.contract import Backend
from metaframe.backend.model import Inputs, is_inexact
from metaframe.backend.selection import backend_of, convert_neutral, current_selection
from metaframe.backend.types import Array
from metaframe.core import checks, rates
from metaframe.core.entrance import entrance
from metaframe.core.update_rule import GRADIENT_DESCENT, UpdateRule
from metaframe.errors import InputError, InputTypeError, UnusedParameterError, nearest
from metaframe.models.lookup import adapter_of

Params = dict[str, Array]
LearningRate = float | Array | Mapping[str, Array]
"""One rate for all parameters, or one for each by its name or that of a part of the model."""
Loss = Array | Callable[[Params], Array]
"""A loss, or a function from parameters to a loss."""


def named_params(model: Any) -> Params:
    """A fresh `{name: parameter}` of `model`.

    Where the framework has parameter objects, in torch, TensorFlow and Keras, these are the
    model's own, so what changes them changes the model.

    Args:
        model: a model of any framework, as for `MAML`.

    Returns:
        A dict in the model's own order.

    >>> import torch
    >>> list(named_params(torch.nn.Linear(3, 2)))
    ['weight', 'bias']
    """
    return adapter_of(model).params()


def named_buffers(model: Any) -> Params:
    """A fresh `{name: array}` of what is no parameter, such as running statistics.

    Args:
        model: a model of any framework, as for `MAML`.

    Returns:
        A dict of arrays, empty for a model without such.

    >>> import torch
    >>> list(named_buffers(torch.nn.BatchNorm1d(3)))
    ['running_mean', 'running_var', 'num_batches_tracked']
    """
    return adapter_of(model).state()


@entrance
def functional_forward(
    model: Any,
    params: Mapping[str, Array],
    *args: Any,
    buffers: Mapping[str, Array] | None = None,
    **kwargs: Any,
) -> Any:
    """The output of `model` with `params` in place of its own.

    Neither the model nor any array given is changed: running statistics that the model would
    update are updated in a copy that is dropped.

    Args:
        model: any model, see `metaframe.models`.
        params: arrays by name, as from `named_params`.
        args: passed to the model's forward pass.
        buffers: arrays by name, as from `named_buffers`; the model's for those left out.
        kwargs: passed to the model's forward pass.

    Returns:
        What the model returns.

    >>> import torch
    >>> model = torch.nn.Linear(2, 1)
    >>> params = {"weight": torch.ones(1, 2), "bias": torch.zeros(1)}
    >>> functional_forward(model, params, torch.tensor([[1.0, 2.0]]))
    tensor([[3.]])
    """
    adapter = adapter_of(model)
    params = _converted(params)
    values = {**adapter.params(), **_known(params, adapter.params(), "params")}
    state = {**adapter.state(), **_known(buffers or {}, adapter.state(), "buffers")}
    return adapter.call(values, state, Inputs(args, kwargs))[0]


@entrance
def inner_step(
    params: Mapping[str, Array],
    loss: Loss,
    lr: LearningRate,
    *,
    first_order: bool = False,
    adapt_names: Iterable[str] | None = None,
    allow_unused: bool = True,
) -> Params:
    """One differentiable step of gradient descent, `p - lr * d loss / d p`.

    Args:
        params: parameters by name, the point at which the loss is.
        loss: a function of `params`; on torch also a loss computed from them.
        lr: one step size, or one for each adapted parameter, by its name or that of its layer.
        first_order: take the gradients for constants.
        adapt_names: parameters to update, by default all but integers and booleans; the others
            are passed on as the same objects.
        allow_unused: leave adapted parameters that the loss does not depend on as they are.

    Returns:
        The parameters after the step.

    Raises:
        InputError: an unknown name, nothing to adapt, or a loss that depends on none of it.
        UnusedParameterError: an unused parameter, with `allow_unused=False`.
        InputTypeError: a loss that is an array, where operations are not recorded, or a parameter
            to update that is complex.

    >>> import torch
    >>> params = {"w": torch.tensor(1.0, requires_grad=True)}
    >>> inner_step(params, (params["w"] - 3.0) ** 2, lr=0.25)
    {'w': tensor(2., grad_fn=<AddBackward0>)}
    """
    params = _converted(params)
    backend = backend_of(*params.values())
    known = tuple(name for name, x in params.items() if is_inexact(x, backend))
    names = adapted_names(known, adapt_names)
    checks.learnable(params, names, backend)
    adapted = {name: params[name] for name in names}
    rate = GRADIENT_DESCENT.rate(rate_for(lr, names, params), adapted)
    grads = gradients(backend, params, names, loss, first_order, allow_unused)
    return descend(params, grads, GRADIENT_DESCENT, (), rate)[0]


@entrance
def adapt(
    model: Any,
    params: Mapping[str, Array],
    build_loss: Callable[[Params], Array],
    *,
    lr: LearningRate = 0.01,
    inner_steps: int = 1,
    first_order: bool = False,
    adapt_names: Iterable[str] | None = None,
    allow_unused: bool = True,
) -> Params:
    """`inner_steps` times `inner_step` from `params`: the adapted parameters.

    Args:
        model: the model whose trainable parameters are adapted by default.
        params: the parameters to start from, by name.
        build_loss: from parameters to the support loss; called at every step.
        lr: see `inner_step`.
        inner_steps: how many steps, at least 1.
        first_order: see `inner_step`.
        adapt_names: see `inner_step`.
        allow_unused: see `inner_step`.

    Returns:
        The adapted parameters by name.

    Raises:
        InputError: fewer steps than one; otherwise as `inner_step`.

    >>> import torch
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> x, y = torch.ones(1, 1), torch.zeros(1, 1)
    >>> def build_loss(params):
    ...     return (functional_forward(model, params, x) - y).square().mean()
    >>> start = {"weight": torch.ones(1, 1)}
    >>> adapt(model, start, build_loss, lr=0.25, inner_steps=2)["weight"].item()
    0.25
    """
    arguments.integer(inner_steps, "inner_steps", at_least=1)
    arguments.function(build_loss, "build_loss")
    trainable = [name for name in adapter_of(model).trainable() if name in params]
    names = adapted_names(trainable, adapt_names)
    for _ in range(inner_steps):
        params = inner_step(
            params,
            build_loss,
            lr,
            first_order=first_order,
            adapt_names=names,
            allow_unused=allow_unused,
        )
    return dict(params)


def adapted_names(known: Sequence[str], chosen: Iterable[str] | None) -> tuple[str, ...]:
    """The names to adapt, in the order of `known`."""
    wanted = set(known) if chosen is None else set(chosen)
    for name in sorted(wanted - set(known)):
        raise InputError(f"adapt_names has {name!r}, which is no parameter. {nearest(name, known)}")
    if not wanted:
        raise InputError(
            "no parameters to adapt: the model has no trainable ones, or adapt_names is empty."
        )
    return tuple(name for name in known if name in wanted)


def gradients(
    backend: Backend,
    params: Params,
    names: Sequence[str],
    loss: Loss,
    first_order: bool,
    allow_unused: bool,
) -> dict[str, Array | None]:
    """Gradients of `loss` by name; None where a parameter is known to be unused."""
    xs = tuple(params[name] for name in names)

    def value(xs: tuple[Array, ...]) -> Array:
        at = {**params, **dict(zip(names, xs, strict=True))}
        return checks.scalar(loss(at), "the loss function", backend)

    objective = value if callable(loss) else checks.scalar(loss, "loss", backend)
    found = backend.loss_gradient(objective, xs, first_order=first_order)
    grads = dict(zip(names, found, strict=True))
    if all(grad is None for grad in grads.values()):
        raise InputError(
            f"the loss depends on none of the adapted parameters {list(names)}. Compute it with "
            "the learner that adapts, from its current parameters."
        )
    if not allow_unused:
        for i, name in enumerate(names):
            if grads[name] is None or (callable(loss) and _is_unused(backend, value, xs, i)):
                raise UnusedParameterError(
                    f"the loss does not depend on parameter {name!r}. Leave it out of adapt_names, "
                    "or pass allow_unused=True to keep it as it is."
                )
    return grads


def _is_unused(backend: Backend, value: Any, xs: tuple[Array, ...], i: int) -> bool:
    unused = []

    def alone(one: tuple[Array, ...]) -> tuple[Array, tuple[Array, ...]]:
        return value((*xs[:i], *one, *xs[i + 1 :])), ()

    # Zeros do not tell an unused parameter from one at a stationary point; the backend does.
    backend.value_and_grad(alone, lambda: unused.append(i))((xs[i],))
    return bool(unused)


def descend(
    params: Params,
    grads: Mapping[str, Array | None],
    rule: UpdateRule,
    state: Any,
    rate: optim.Rate,
) -> tuple[Params, Any]:
    """`params` after one update, and the rule's new state; unused ones stay the same objects.

    `rate` is what `rule.rate` returns.
    """
    names = sorted(grads)  # the order of a dictionary's leaves
    current = tree.Flat.of({name: params[name] for name in names})
    before = tree.Flat.of(state)
    filled = tuple(
        ops.zeros_like(x) if (g := grads[name]) is None else g
        for name, x in zip(names, current.arrays, strict=True)
    )
    after = rule.apply(current, filled, before, rate)
    changed = dict(zip(names, after.params, strict=True))
    used = {name: changed[name] for name, grad in grads.items() if grad is not None}
    return {**params, **used}, before.build(after.state)


def rate_for(
    lr: LearningRate,
    names: Sequence[str],
    known: Collection[str] | None = None,
    *,
    name: str = "lr",
) -> optim.Rate:
    """`lr` by name for the adapted parameters, or the one rate for all.

    A mapping may have rates for other parameters as well, if they are among those `known`, and for
    parts of a model, such as a layer: the rate at "layer1" is that of all of its parameters.
    """
    if not isinstance(lr, Mapping) and not tree.is_leaf(lr):
        raise InputTypeError(
            f"{name} is a number or an array, or a mapping from the names of parameters to such; "
            f"received {lr!r}."
        )
    lr = checks.learning_rate(lr, name)
    if not rates.is_structure(lr):
        return lr
    others = None if known is None else tuple(known)
    found = rates.matched(lr, names, name=name, known=others, noun="parameter")
    return dict(zip(names, found, strict=True))


def _converted(params: Mapping[str, Array]) -> Params:
    """`params` with NumPy arrays as arrays of the selected backend, if one is selected."""
    selection = current_selection()
    if selection is None or not any(isinstance(x, np.ndarray) for x in params.values()):
        return dict(params)
    arrays = convert_neutral(tuple(params.values()), backend_of(*params.values()))
    return dict(zip(params, arrays, strict=True))


def array_like(x: Any, like: Params, backend: Backend) -> Array:
    """Neutral `x` on the device of these parameters, and in their dtype if it is floating."""
    example = next(p for p in like.values() if backend.is_floating(p))
    dtype = backend.dtype_name(example) if np.asarray(x).dtype.kind == "f" else None
    return backend.asarray(
        x, dtype, None if backend.is_traced(example) else backend.device_of(example)
    )


def _known(values: Mapping[str, Array], known: Mapping[str, Array], what: str) -> dict[str, Array]:
    for name in values:
        if name not in known:
            raise InputError(
                f"{what} has {name!r}, which the model does not have. {nearest(name, known)}"
            )
    return dict(values)
