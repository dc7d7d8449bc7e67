"""Learning rates as functions of the number of outer steps taken, from 0.

The rate enters a compiled step as an array, so that a change compiles nothing anew.
"""

from __future__ import annotations

import math

from metaframe import arguments
from metaframe.core import checks
from metaframe.training.step import Schedule


def constant(rate: float) -> Schedule:
    """The same rate at every step.

    >>> constant(0.1)(1000)
    0.1
    """
    checks.learning_rate(rate)
    return lambda step: rate


def cosine(rate: float, steps: int, end: float = 0.0) -> Schedule:
    """From `rate` to `end` along half a cosine over `steps` steps, then `end`.

    `end + (rate - end) * (1 + cos(pi * t)) / 2` with `t = min(step / steps, 1)` (Loshchilov and
    Hutter 2017, arXiv 1608.03983, one period).

    >>> schedule = cosine(1.0, 100)
    >>> schedule(0), round(schedule(50), 12), schedule(200)
    (1.0, 0.5, 0.0)
    """
    checks.learning_rate(rate)
    checks.learning_rate(end)
    arguments.integer(steps, "steps", at_least=1)

    def at(step: int) -> float:
        done = min(step / steps, 1.0)
        return end + (rate - end) * (1 + math.cos(math.pi * done)) / 2

    return at


def warmup(schedule: Schedule, steps: int) -> Schedule:
    """`schedule`, its first `steps` rates scaled from `1 / steps` up to 1.

    >>> warmup(constant(1.0), 4)(0), warmup(constant(1.0), 4)(9)
    (0.25, 1.0)
    """
    arguments.integer(steps, "steps", at_least=0)
    return lambda step: schedule(step) * min((step + 1) / steps, 1.0) if steps else schedule(step)
