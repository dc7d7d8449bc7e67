"""The arrays of a model: meta-parameters, and the others with the reason for each.

A parameter may be frozen or made trainable at any time, so it is asked for every time anew.
Whatever is left out can be listed with the reason, and what cannot be learned is refused by name.
"""

from __future__ import annotations

from metaframe.backend.model import ModelAdapter, NamedParameters, is_inexact
from metaframe.core import checks
from metaframe.errors import InputError
from metaframe.learners.functions import Params
from metaframe.learners.programs import LEARNED
from metaframe.learners.settings import AdaptConfig

Learned = NamedParameters | None
"""The arrays that an update rule learns, if any."""


def trainable(adapter: ModelAdapter, params: Params) -> tuple[str, ...]:
    """Names of the model's meta-parameters.

    Raises:
        InputTypeError: one of them cannot be learned.
    """
    names = adapter.trainable()
    checks.learnable(params, names, adapter.backend)
    return names


def meta_parameters(adapter: ModelAdapter, learned: Learned) -> Params:
    """Those of the model, and those of the update rule with the prefix "learned/"."""
    params = adapter.params()
    meta = {name: params[name] for name in trainable(adapter, params)}
    return {**meta, **prefixed(of_rule(learned, trained=True))}


def of_rule(learned: Learned, *, trained: bool | None = None) -> Params:
    """The learned values of the update rule: all, the trained, or the frozen ones."""
    if learned is None:
        return {}
    names = frozenset(learned.trainable())
    return {n: x for n, x in learned.params().items() if trained in (None, n in names)}


def prefixed(learned: Params) -> Params:
    """`learned` under the names that it has among the meta-parameters."""
    return {LEARNED + name: value for name, value in learned.items()}


def left_out(adapter: ModelAdapter, learned: Learned) -> dict[str, str]:
    """The arrays that are no meta-parameters, by name, and why."""
    params, backend = adapter.params(), adapter.backend
    meta = frozenset(adapter.trainable())
    reasons = {
        name: "frozen" if is_inexact(x, backend) else backend.dtype_name(x)
        for name, x in params.items()
        if name not in meta
    }
    reasons |= dict.fromkeys(prefixed(of_rule(learned, trained=False)), "frozen")
    return {**reasons, **dict.fromkeys(adapter.state(), "state"), **adapter.left_aside()}


def adapting(config: AdaptConfig, adapter: ModelAdapter, learned: Learned) -> tuple[str, ...]:
    """Names of the parameters that adapt: those chosen, without those that are frozen now.

    Raises:
        InputError: none is left, one is gone, or one that was frozen has no learned rate.
    """
    adaptable = adapter.adaptable()
    known = frozenset(adaptable)
    names = tuple(name for name in config.names if name in known)
    if config.every and len(names) < len(adaptable):
        if learned is not None and config.outer is None:
            raise InputError(
                f"{sorted(known.difference(names))} were frozen when the model was wrapped, so "
                "nothing is learned about how to adapt them. Wrap it again, or freeze them."
            )
        names = adaptable
    if names == config.names:
        return names
    # Where a frozen one counts as state, as with Keras, it is there.
    known = known.union(adapter.params(), adapter.state())
    if lost := [name for name in config.names if name not in known]:
        raise InputError(
            f"the model has no parameters {lost}, which it had when it was wrapped. Wrap it again."
        )
    if not names:
        raise InputError(f"all of the parameters to adapt are frozen: {list(config.names)}.")
    return names
