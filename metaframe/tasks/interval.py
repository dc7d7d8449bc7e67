"""The figure a few-shot result is reported as: a mean over tasks with its confidence interval."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from metaframe.errors import InputError

_Z95 = 1.96


@dataclass(frozen=True)
class Estimate:
    """A mean over tasks with its 95% confidence interval.

    Args:
        mean: the mean, in the unit of the result.
        ci95: half the width of the interval: the true mean lies within `ci95` of `mean` with 95%
            confidence. NaN for a single task.
        n: how many tasks.

    >>> str(Estimate(48.7, 1.84, 600))
    '48.70 ± 1.84 (600 tasks, 95% CI)'
    """

    mean: float
    ci95: float
    n: int

    def __str__(self) -> str:
        noun = "task" if self.n == 1 else "tasks"
        return f"{self.mean:.2f} ± {self.ci95:.2f} ({self.n} {noun}, 95% CI)"


def mean_and_ci95(values: Iterable[Any]) -> Estimate:
    """The mean of one figure a task and 1.96 * std / sqrt(n), half the 95% interval.

    Args:
        values: one number for each task, in the unit of the result; any framework's scalars.

    Returns:
        an `Estimate`; `ci95` is NaN for a single task, which says nothing about the spread.

    Raises:
        InputError: no values.

    >>> mean_and_ci95([0.0, 100.0, 100.0, 0.0])
    Estimate(mean=50.0, ci95=49.0, n=4)

    Source: Finn et al., "Model-agnostic meta-learning" (ICML 2017), whose code takes the
    standard deviation over n, not n - 1.
    """
    numbers = np.array([float(value) for value in values], dtype=np.float64)
    n = len(numbers)
    if n == 0:
        raise InputError("mean_and_ci95 needs at least one value, received none.")
    ci95 = _Z95 * float(numbers.std()) / math.sqrt(n) if n > 1 else math.nan
    return Estimate(float(numbers.mean()), ci95, n)
