"""Few-shot sinusoid regression, the standard first experiment of meta-learning.

A task is y = A sin(w x + b). The MAML paper's family has w = 1; Meta-SGD's table is on one where
the frequency varies too, so figures of the two are not comparable.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from metaframe import arguments
from metaframe.backend.registry import backends_in_use
from metaframe.errors import InputError, InputTypeError
from metaframe.tasks.sampling import BatchedSampler, Numbers, Split, scaled
from metaframe.tasks.task import Task


class SinusoidTaskSampler(BatchedSampler):
    """Sample tasks y = amplitude * sin(frequency * x + phase).

    Amplitude, phase, frequency and then x are drawn uniformly, support before query. All
    arrays are `(k, 1)`. The sine is taken in float64 and then rounded to the dtype.

    Args:
        amp_range: (low, high) of the amplitude.
        phase_range: (low, high) of the phase, in radians.
        x_range: (low, high) of the inputs.
        k_support: points in the support set.
        k_query: points in the query set.
        generator: a generator of NumPy, torch or TensorFlow to draw the seed from, once; instead
            of `seed`. The tasks themselves are drawn in NumPy on every backend.
        seed: the tasks' seed; None, with no generator, takes a fresh one, readable as
            `sampler.seed`.
        device: where the arrays are placed, as for `IndexedSampler`.
        dtype: the floating dtype of the arrays, as for `IndexedSampler`.
        freq_range: (low, high) of the angular frequency.
        split: which of the three streams of tasks. The family is the same in all of them.

    Raises:
        InputError: an empty or infinite range, or fewer than one point.
        InputTypeError: something else for a generator.

    >>> sampler = SinusoidTaskSampler(k_support=10, k_query=5, seed=0)
    >>> sampler.sample(2)[1]
    Task(support_x=(10, 1), support_y=(10, 1), query_x=(5, 1), query_y=(5, 1))

    Source: Finn et al., "Model-agnostic meta-learning" (ICML 2017), section 5.1; with
    `freq_range`: Li et al., "Meta-SGD" (arXiv 1707.09835).
    """

    def __init__(
        self,
        amp_range: tuple[float, float] = (0.1, 5.0),
        phase_range: tuple[float, float] = (0.0, math.pi),
        x_range: tuple[float, float] = (-5.0, 5.0),
        k_support: int = 10,
        k_query: int = 10,
        generator: Any = None,
        seed: int | None = None,
        device: str | None = None,
        dtype: Any = None,
        *,
        freq_range: tuple[float, float] = (1.0, 1.0),
        split: Split = "train",
    ) -> None:
        if generator is not None:
            seed = _seed_from(generator, seed)
        super().__init__(seed=seed, split=split, device=device, dtype=dtype)
        self.amp_range = _interval("amp_range", amp_range)
        self.phase_range = _interval("phase_range", phase_range)
        self.x_range = _interval("x_range", x_range)
        self.freq_range = _interval("freq_range", freq_range)
        self.k_support = arguments.integer(k_support, "k_support", at_least=1)
        self.k_query = arguments.integer(k_query, "k_query", at_least=1)

    @property
    def numbers(self) -> int:
        """The curve's three, and one for every point."""
        return 3 + self.k_support + self.k_query

    def draw_batch(self, numbers: Numbers) -> Task:
        """Make the tasks of a batch; see the class for the family."""
        curves = numbers[:, :3, None, None]
        amplitude = scaled(curves[:, 0], self.amp_range)
        phase = scaled(curves[:, 1], self.phase_range)
        frequency = scaled(curves[:, 2], self.freq_range)
        x = scaled(numbers[:, 3:, None], self.x_range)
        y = amplitude * np.sin(frequency * x + phase)
        k = self.k_support
        return Task(x[:, :k], y[:, :k], x[:, k:], y[:, k:])


def _seed_from(generator: Any, seed: int | None) -> int:
    if seed is not None:
        raise InputError(f"give generator or seed, not both; received seed={seed!r} as well.")
    if isinstance(generator, np.random.Generator):
        return int(generator.integers(2**63))
    for backend in backends_in_use():
        if (drawn := backend.seed_from(generator)) is not None:
            return drawn
    kind = type(generator)
    where = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    raise InputTypeError(
        f"generator must be a random generator of NumPy, torch or TensorFlow, received "
        f"{where}{kind.__qualname__}. Pass numpy.random.default_rng(0), or seed=0."
    )


def _interval(name: str, value: Any) -> tuple[float, float]:
    """`value` as (low, high), both finite and low <= high."""
    try:
        low, high = (float(end) for end in value)
    except (TypeError, ValueError):
        raise InputTypeError(
            f"{name} must be a pair of numbers (low, high), received {name}={value!r}."
        ) from None
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise InputError(
            f"{name} must be finite with low <= high, received {name}=({low}, {high})."
        )
    return low, high
