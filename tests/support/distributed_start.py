"""One process of a run that selects its backend first; what it found as JSON.

python tests/support/distributed_start.py BACKEND FOLDER
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distributed_checks import refusal
from distributed_worker import prepare

RANK = int(os.environ.get("RANK", "0"))
SCALE = 1.0 + RANK


class Scaled:
    """A cost with a number of its own."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, v: Any, task: Any) -> Any:
        return self.scale * (v - task) ** 2


COSTS: dict[str, Callable[..., Any]] = {
    "global": lambda v, task: SCALE * (v - task) ** 2,
    "default": lambda v, task, scale=SCALE: scale * (v - task) ** 2,
    "attribute": Scaled(SCALE),
}


@contextmanager
def mesh(name: str, axis: str) -> Iterator[None]:
    """On JAX one that the user made, of all processes' devices."""
    if name != "jax":
        yield
        return
    jax = importlib.import_module("jax")
    auto = (jax.sharding.AxisType.Auto,)
    with jax.set_mesh(jax.make_mesh((jax.device_count(),), (axis,), axis_types=auto)):
        yield


def complex_results(backend: Any, v: Any, task: Any) -> Any:
    return (v - task) ** 2, backend.asarray([1j])


def main() -> None:
    name, folder = sys.argv[1:]
    prepare(1)
    import metaframe
    from metaframe.distributed import session

    metaframe.set_backend(name)  # neither makes an array nor looks for devices
    found: dict[str, Any] = {}
    with session(timeout=60) as workers:
        backend = metaframe.current_backend()
        v, tasks = (backend.asarray(x, "float32") for x in (1.0, [0.0, 1.0, 2.0, 3.0]))

        def step(cost: Any, **how: Any) -> Any:
            return metaframe.meta_value_and_grad(cost, distributed=True, **how)

        def plain(v: Any, task: Any) -> Any:
            return (v - task) ** 2

        with mesh(name, "tasks"):
            found["compiled"] = float(metaframe.compile(step(plain))(v, tasks).cost)
        with mesh(name, "devices"):
            found["eager"] = float(step(plain)(v, tasks).cost)
        for how, cost in COSTS.items():
            found[how] = refusal(lambda cost=cost: step(cost)(v, tasks))
        with_complex = step(lambda v, task: complex_results(backend, v, task), has_aux=True)
        found["complex"] = refusal(lambda: with_complex(v, tasks))
    (Path(folder) / f"{workers.process}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
