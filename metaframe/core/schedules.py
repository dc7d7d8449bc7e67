"""Learning rates as functions of the number of steps taken, from 0.

A schedule is a function with its parameters beside it. The parameters may be arrays, and a rule
that has a schedule keeps those in its state next to the count of its steps, so that everything that
a step depends on is an argument of it: gradients go through `unroll` to the parameters in every
mode. A schedule is a node of structures too, whose leaves are its parameters.

Given Python numbers, a schedule computes Python numbers, for a loop of one's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from metaframe import arguments, ops, tree
from metaframe.backend.registry import owner
from metaframe.backend.selection import is_array
from metaframe.core import checks
from metaframe.errors import InputError, InputTypeError


class Schedule:
    """A learning rate as a function of the number of steps taken.

    Args:
        fn: `fn(count, *parameters, *settings) -> rate`. In an update rule the count is an array
            without axes, so that `fn` consists of operations of the framework, or of
            `metaframe.ops`. The rate is a number, an array, or a structure that names parameters
            of the model, as `lr` of `unroll`.
        parameters: numbers and arrays that the rate is differentiable in, and other schedules.
        settings: what else `fn` takes, hashable.

    >>> import torch
    >>> from metaframe import optim
    >>> decay = torch.tensor(0.5)
    >>> rule = optim.sgd(optim.Schedule(lambda count, decay: decay**count, (decay,)))
    >>> w, g = torch.tensor(1.0), torch.tensor(2.0)
    >>> state = rule.init(w)
    >>> for _ in range(3):
    ...     step, state = rule.update(g, state, w)
    >>> step
    tensor(-0.5000)
    """

    def __init__(
        self, fn: Callable[..., Any], parameters: Sequence[Any] = (), settings: Sequence[Any] = ()
    ) -> None:
        arguments.function(fn, "fn")
        self.fn = fn
        self.parameters = tuple(parameters)
        self.settings = tuple(settings)

    def __call__(self, count: Any) -> Any:
        """The rate of the step before which `count` were taken."""
        return self.fn(count, *self.parameters, *self.settings)

    def __repr__(self) -> str:
        name = getattr(self.fn, "__name__", repr(self.fn)).removeprefix("_")
        return f"{name}({', '.join(map(repr, (*self.parameters, *self.settings)))})"


def _parts(schedule: Schedule) -> tuple[Sequence[Any], Any, tuple[str, ...]]:
    names = tuple(str(i) for i in range(len(schedule.parameters)))
    return schedule.parameters, (schedule.fn, schedule.settings), names


def _from_parts(fixed: Any, parameters: Iterable[Any]) -> Schedule:
    return Schedule(fixed[0], tuple(parameters), fixed[1])


tree.register(Schedule, _parts, _from_parts)


def as_schedule(given: Callable[[Any], Any]) -> Schedule:
    """A schedule, or a function of the count as one."""
    return given if isinstance(given, Schedule) else Schedule(given)


def parameter_arrays(schedule: Schedule, count: Any) -> tuple[Any, ...]:
    """The parameters that are arrays, in the framework and the dtype of `count`.

    Raises:
        InputTypeError: an array of another framework.
    """
    return tuple(_like(x, count) for x in tree.Packed(schedule, is_array).arrays)


def with_arrays(schedule: Schedule, arrays: tuple[Any, ...]) -> Schedule:
    """`schedule` with these arrays for parameters, as `parameter_arrays` returned them."""
    found: Schedule = tree.Packed(schedule, is_array).unpack(arrays)
    return found


def _like(x: Any, count: Any) -> Any:
    backend = owner(count)
    if backend is None:
        return x
    dtype = backend.dtype_name(count)
    if backend.owns(x):
        return x if backend.dtype_name(x) == dtype else backend.ops.astype(x, dtype)
    if (other := owner(x)) is not None:
        raise InputTypeError(
            f"a parameter of the schedule is an array of {other.name!r}, and the variables are of "
            f"{backend.name!r}. Convert one of them."
        )
    traced = backend.is_traced(count) or backend.on_cpu(count)
    return backend.asarray(x, dtype, None if traced else backend.device_of(count))


def constant(rate: Any) -> Schedule:
    """The same rate at every step.

    Args:
        rate: a number, an array, or a structure that names parameters with a rate for each.

    Returns:
        A schedule, whose only parameter is `rate`.

    >>> constant(0.1)(1000)
    0.1
    """
    return Schedule(_constant, (checks.learning_rate(rate, "rate"),))


def _constant(count: Any, rate: Any) -> Any:
    del count
    return rate


def linear(start: Any, end: Any, steps: int) -> Schedule:
    """From `start` to `end` along a line over `steps` steps, then `end`.

    As `optax.linear_schedule`; `torch.optim.lr_scheduler.LinearLR` gives both as factors.

    Args:
        start: the first rate, a number or an array without axes.
        end: the last rate, a number or an array without axes.
        steps: at least 1.

    Returns:
        A schedule, differentiable in both rates.

    Raises:
        InputError: a rate that is negative or not finite, or `steps` below 1.

    >>> linear(1.0, 0.5, 10)(5)
    0.75
    """
    checks.learning_rate(start, "start")
    checks.learning_rate(end, "end")
    arguments.integer(steps, "steps", at_least=1)
    return Schedule(_linear, (start, end), (steps,))


def _linear(count: Any, start: Any, end: Any, steps: int) -> Any:
    return start + (end - start) * _at_most(count / steps, 1.0)


def cosine(rate: Any, steps: int, end: Any = 0.0) -> Schedule:
    """From `rate` to `end` along half a cosine over `steps` steps, then `end`.

    `end + (rate - end) * (1 + cos(pi * t)) / 2` with `t = min(step / steps, 1)` (Loshchilov and
    Hutter 2017, arXiv 1608.03983, one period). As `torch.optim.lr_scheduler.CosineAnnealingLR`,
    and as `optax.cosine_decay_schedule`, whose `alpha` is `end / rate`.

    Args:
        rate: the first rate, a number or an array without axes.
        steps: at least 1.
        end: the last rate, a number or an array without axes.

    Returns:
        A schedule, differentiable in both rates.

    Raises:
        InputError: a rate that is negative or not finite, or `steps` below 1.

    >>> schedule = cosine(1.0, 100)
    >>> schedule(0), round(schedule(50), 12), schedule(200)
    (1.0, 0.5, 0.0)
    """
    checks.learning_rate(rate, "rate")
    checks.learning_rate(end, "end")
    arguments.integer(steps, "steps", at_least=1)
    return Schedule(_cosine, (rate, end), (steps,))


def _cosine(count: Any, rate: Any, end: Any, steps: int) -> Any:
    turned = math.pi * _at_most(count / steps, 1.0)
    cosine = math.cos(turned) if _is_number(turned) else ops.cos(turned)
    return end + (rate - end) * ((1 + cosine) / 2)


def exponential(rate: Any, decay: Any, steps: int = 1) -> Schedule:
    """`rate * decay ** (step / steps)`.

    As `optax.exponential_decay`, and with one step as `torch.optim.lr_scheduler.ExponentialLR`.

    Args:
        rate: the first rate, a number or an array without axes.
        decay: the factor over `steps` steps, at least 0.
        steps: at least 1.

    Returns:
        A schedule, differentiable in `rate` and `decay`.

    Raises:
        InputError: a rate or a factor that is negative, or `steps` below 1.

    >>> exponential(1.0, 0.5, 2)(4)
    0.25
    """
    checks.learning_rate(rate, "rate")
    checks.setting("decay", decay)
    arguments.integer(steps, "steps", at_least=1)
    return Schedule(_exponential, (rate, decay), (steps,))


def _exponential(count: Any, rate: Any, decay: Any, steps: int) -> Any:
    return rate * decay ** (count / steps)


def table(rates: Any) -> Schedule:
    """A rate for every step, and the last one after them.

    Args:
        rates: (K,), an array or a list of numbers.

    Returns:
        A schedule, differentiable in `rates` where they are an array of a framework.

    Raises:
        InputError: no rates, or more axes than one.

    >>> import numpy as np
    >>> schedule = table(np.array([0.5, 0.25]))
    >>> schedule(0), schedule(1), schedule(2)
    (0.5, 0.25, 0.25)
    """
    rates = np.asarray(rates, dtype=float) if isinstance(rates, (list, tuple)) else rates
    checks.learning_rate(rates, "rates")
    shape = tuple(getattr(rates, "shape", ()))
    if len(shape) != 1 or shape[0] == 0:
        raise InputError(
            f"rates need an array of shape (K,) with K at least 1, received shape {shape}."
        )
    return Schedule(_table, (rates,))


def _table(count: Any, rates: Any) -> Any:
    last = rates.shape[0] - 1
    if _is_number(count):
        rate = rates[min(int(count), last)]
        return float(rate) if isinstance(rate, np.generic) else rate
    return ops.take(rates, ops.astype(ops.minimum(count, float(last)), "int32"), 0)


def warmup(schedule: Callable[[Any], Any], steps: int) -> Schedule:
    """`schedule`, its first `steps` rates scaled from `1 / steps` up to 1.

    Args:
        schedule: a schedule, or a function of the number of steps taken.
        steps: how many rates are scaled; with 0 none is.

    Returns:
        A schedule.

    Raises:
        InputError: `steps` is negative.

    >>> warmup(constant(1.0), 4)(0), warmup(constant(1.0), 4)(9)
    (0.25, 1.0)
    """
    arguments.integer(steps, "steps", at_least=0)
    inner = as_schedule(schedule)
    return Schedule(_warmup, (inner,), (steps,)) if steps else inner


def _warmup(count: Any, schedule: Schedule, steps: int) -> Any:
    factor = _at_most((count + 1) / steps, 1.0)
    return tree.map(lambda rate: rate * factor, schedule(count))


def _at_most(x: Any, limit: float) -> Any:
    return min(x, limit) if _is_number(x) else ops.minimum(x, limit)


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float, np.number))
