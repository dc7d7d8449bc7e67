"""TaskLoss: what a task is judged by, and how the model is called for it.

One value holds all of it, so that the trainer, the evaluation and `meta_value_and_grad` hand on a
single thing, and a compiled program is used again when an equal one comes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any, Self

from metaframe import arguments
from metaframe.backend.contract import Backend
from metaframe.backend.types import Array
from metaframe.core import checks
from metaframe.errors import InputError

LossFn = Callable[[Any, Any], Array]
"""`loss_fn(prediction, target) -> scalar`."""
LEARNED_ARGUMENT = "learned"
"""The argument by which a function asks for the outer variables beyond the model's."""


@dataclass(frozen=True)
class TaskLoss:
    """A query loss with all that may go with it. Goes wherever a `loss_fn` goes.

    `support_loss`, `call` and `weights` may have an argument called `learned`, which receives the
    outer variables that `MAML(learned=...)` was given.

    Args:
        loss_fn: `loss_fn(prediction, target) -> scalar`, the loss of the query set, and of the
            support set too unless `support_loss` is given.
        support_loss: `support_loss(prediction, target) -> scalar`, what the inner loop minimises.
        call: `call(model, x) -> prediction`; default: `model(x)`.
        weights: `weights(task) -> scalar`, by which the task's query loss is multiplied in the
            mean over tasks.
        has_aux: `loss_fn` returns `(scalar, aux)`.
        statistics: report the statistics that batch normalisation takes of the query set.

    Raises:
        InputTypeError: something else than a function.

    >>> import torch
    >>> from metaframe import MAML
    >>> from metaframe.tasks import Task
    >>> maml = MAML(torch.nn.Linear(1, 1), inner_lr=0.1)
    >>> mse, l1 = torch.nn.functional.mse_loss, torch.nn.functional.l1_loss
    >>> loss = TaskLoss(mse, support_loss=l1, call=lambda model, x: model(x["features"]))
    >>> x, y = {"features": torch.ones(4, 1)}, torch.zeros(4, 1)
    >>> sorted(maml.meta_value_and_grad(loss, [Task(x, y, x, y)]).grads)
    ['bias', 'weight']
    """

    loss_fn: LossFn
    support_loss: Callable[..., Array] | None = None
    call: Callable[..., Any] | None = None
    weights: Callable[..., Array] | None = None
    has_aux: bool = False
    statistics: bool = False

    def __post_init__(self) -> None:
        arguments.function(self.loss_fn, "loss_fn")
        for name in _OPTIONAL:
            if getattr(self, name) is not None:
                arguments.function(getattr(self, name), name)
        arguments.choice(self.has_aux, "has_aux", (False, True))
        arguments.choice(self.statistics, "statistics", (False, True))

    @classmethod
    def of(cls, loss_fn: Any, **given: Any) -> Self:
        """Make a loss function a `TaskLoss`.

        Args:
            loss_fn: `loss_fn(prediction, target) -> scalar`, or a `TaskLoss`.
            given: further fields. They replace those of `loss_fn`, unless they are None or False.

        Returns:
            A `TaskLoss`.
        """
        known = loss_fn if isinstance(loss_fn, cls) else cls(loss_fn)
        return replace(
            known, **{n: x for n, x in given.items() if x is not None and x is not False}
        )

    def __call__(self, prediction: Any, target: Any) -> Any:
        """The loss of the query set, without its aux.

        Args:
            prediction: what the model returned for the query set.
            target: the query targets.

        Returns:
            A scalar.
        """
        found = self.loss_fn(prediction, target)
        return checks.with_aux(found, "loss_fn")[0] if self.has_aux else found

    def check_learned(self, known: bool) -> None:
        """Check that no function requires outer variables where there are none.

        Args:
            known: whether the learner has outer variables beyond the model's.

        Raises:
            InputError: a function requires them.
        """
        for name in _OPTIONAL:
            fn = getattr(self, name)
            if fn is not None and not known and requires_learned(fn):
                raise InputError(
                    f"{name} has an argument 'learned', and the learner has no outer variables "
                    "beyond the model's. Give it some: MAML(model, learned={...})."
                )

    def query(self, backend: Backend, prediction: Any, target: Any) -> tuple[Array, Any]:
        """The loss of the query set, and its aux.

        Args:
            backend: the backend of the arrays.
            prediction: what the model returned for the query set.
            target: the query targets.

        Returns:
            `(loss, aux)`: a scalar, and `()` unless `has_aux`.

        Raises:
            InputError: the loss is not a scalar.
            InputTypeError: the loss is not an array of `backend`.
        """
        found = run_user(backend, self.loss_fn, prediction, target)
        loss, aux = checks.with_aux(found, "loss_fn") if self.has_aux else (found, ())
        return checks.scalar(loss, "loss_fn", backend), aux

    def support(self, backend: Backend, prediction: Any, target: Any, learned: Any) -> Array:
        """The loss that the inner loop minimises.

        Args:
            backend: the backend of the arrays.
            prediction: what the model returned for the support set.
            target: the support targets.
            learned: the outer variables beyond the model's, for the argument `learned`.

        Returns:
            A scalar.

        Raises:
            InputError: the loss is not a scalar.
            InputTypeError: the loss is not an array of `backend`.
        """
        if self.support_loss is None:
            return self.query(backend, prediction, target)[0]
        found = run_user(backend, self.support_loss, prediction, target, learned=learned)
        return checks.scalar(found, "support_loss", backend)

    def calling(self, learned: Any) -> Callable[..., Any] | None:
        """The function `call` with the outer variables filled in.

        Args:
            learned: the outer variables beyond the model's, for the argument `learned` of `call`.

        Returns:
            `call(model, x) -> prediction`; None for the model's own call.
        """
        call = self.call
        if call is None or not _asks_for_learned(call):
            return call
        return lambda model, *args: call(model, *args, learned=learned)

    def weight(self, backend: Backend, task: Any, learned: Any) -> Array | None:
        """The weight of a task's query loss.

        Args:
            backend: the backend of the arrays.
            task: the task, for `weights`.
            learned: the outer variables beyond the model's, for the argument `learned`.

        Returns:
            A scalar; None without `weights`.
        """
        if self.weights is None:
            return None
        found = run_user(backend, self.weights, task, learned=learned)
        return checks.scalar(found, "weights", backend)


_OPTIONAL = ("support_loss", "call", "weights")


def run_user(backend: Backend, fn: Callable[..., Any], *args: Any, learned: Any = None) -> Any:
    """`fn(*args)`, a user's function, with `learned` if it asks for that."""
    run = backend.user_function(backend.differentiable(fn))
    return run(*args, learned=learned) if _asks_for_learned(fn) else run(*args)


def _asks_for_learned(fn: Callable[..., Any]) -> bool:
    if isinstance(fn, FunctionType) and not hasattr(fn, "__wrapped__"):
        code = fn.__code__  # the common case, without the cost of a signature
        return LEARNED_ARGUMENT in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    return _parameter(fn) is not None


def requires_learned(fn: Callable[..., Any]) -> bool:
    """True if `fn` has an argument called `learned` without a default."""
    found = _parameter(fn)
    return found is not None and found.default is inspect.Parameter.empty


def _parameter(fn: Callable[..., Any]) -> inspect.Parameter | None:
    try:
        return inspect.signature(fn).parameters.get(LEARNED_ARGUMENT)
    except (TypeError, ValueError):  # builtins and some extension types have no signature
        return None
