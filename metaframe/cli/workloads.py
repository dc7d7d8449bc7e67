"""The two workloads that everything is measured on, as NumPy arrays: the same on each framework.

W1: regression of sinusoids, an MLP 1-40-40-1, 25 tasks of 10 + 10 points. All dispatch.
W2: 5-way 1-shot classification, 25 queries, a Conv4 with 64 channels on 28x28 images, 8 tasks.
All arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from metaframe import nn
from metaframe.backend.selection import use_backend

Array = np.ndarray[Any, Any]
SEED = 0


@dataclass(frozen=True)
class Workload:
    """Tasks are (support x, support y, query x, query y), each with a leading task axis."""

    name: str
    model: nn.Model
    loss: Callable[[Any, Any], Any]
    tasks: tuple[Array, ...]
    inner_lr: float = 0.01
    convolutional: bool = False

    def params(self, backend: str, dtype: str, device: str | None = None) -> Any:
        """The model's parameters on `backend`."""
        with use_backend(backend, dtype=dtype, device=device):
            return self.model.init(SEED, dtype)

    def arrays(self, backend: str, dtype: str, device: str | None = None) -> tuple[Any, ...]:
        """The tasks on `backend`, floats as `dtype`."""
        with use_backend(backend, dtype=dtype, device=device) as chosen:
            return tuple(
                chosen.asarray(x, dtype if x.dtype.kind == "f" else None, device)
                for x in self.tasks
            )

    def cost(self, data: Any, params: Any) -> Any:
        """The cost of `params` on (x, y), for metaframe."""
        x, y = data
        return self.loss(self.model.apply(params, x), y)


def w1(tasks: int = 25, width: int = 40, points: int = 10) -> Workload:
    """Sinusoids of random amplitude and phase, as in MAML; `width` units in both layers."""
    rng = np.random.default_rng(SEED)
    amplitude = rng.uniform(0.1, 5.0, (tasks, 1, 1))
    phase = rng.uniform(0.0, np.pi, (tasks, 1, 1))
    x = rng.uniform(-5.0, 5.0, (tasks, 2 * points, 1))
    y = amplitude * np.sin(x + phase)
    model = nn.mlp([1, width, width, 1])
    data = (x[:, :points], y[:, :points], x[:, points:], y[:, points:])
    return Workload("W1", model, nn.mse, data)


def w2(tasks: int = 8, width: int = 64, ways: int = 5, queries: int = 25) -> Workload:
    """Random images: what is measured does not depend on what is in them. `width` channels."""
    rng = np.random.default_rng(SEED)
    support_y = np.tile(np.arange(ways), (tasks, 1))
    query_y = np.tile(np.arange(queries) % ways, (tasks, 1))
    support_x, query_x = (rng.normal(size=(tasks, n, 28, 28, 1)) for n in (ways, queries))
    data = (support_x, support_y, query_x, query_y)
    # With a larger step the loss on these images is chaotic: two exact programs disagree.
    return Workload("W2", nn.conv4(ways, width), nn.cross_entropy, data, 0.01, convolutional=True)


WORKLOADS: dict[str, Callable[..., Workload]] = {"W1": w1, "W2": w2}
