"""One process of a distributed run: every case sharded and alone, into a file of its own.

python tests/support/distributed_worker.py ENGINE FOLDER CASE...
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np


def prepare(devices: int) -> None:
    """Settings made before a framework is imported."""
    os.environ.update(
        CUDA_VISIBLE_DEVICES="",
        JAX_PLATFORMS="cpu",
        JAX_ENABLE_X64="1",
        TF_CPP_MIN_LOG_LEVEL="3",
        OMP_NUM_THREADS="1",
        TF_NUM_INTRAOP_THREADS="1",
        TF_NUM_INTEROP_THREADS="2",
        XLA_FLAGS=f"--xla_force_host_platform_device_count={devices}",
    )


@contextmanager
def active(engine: str, devices: int) -> Iterator[str]:
    """The engine's group, mesh or strategy; yields the backend's name."""
    from metaframe.distributed import session

    name = engine.split("-")[0]
    if engine == "tensorflow-mirrored":
        tf = importlib.import_module("tensorflow")
        cpu = tf.config.list_physical_devices("CPU")[0]
        logical = [tf.config.LogicalDeviceConfiguration()] * devices
        tf.config.set_logical_device_configuration(cpu, logical)
        strategy = tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(devices)])
        with strategy.scope():
            yield name
    elif engine == "jax-mesh":
        jax = importlib.import_module("jax")
        auto = (jax.sharding.AxisType.Auto,)
        with jax.set_mesh(jax.make_mesh((devices,), ("tasks",), axis_types=auto)):
            yield name
    else:
        with session(name, timeout=60):
            yield name


def results(name: str, labels: list[str]) -> dict[str, Any]:
    import distributed_problem as problem
    from metaframe import compile, tree, use_backend

    found: dict[str, Any] = {}
    for case in problem.ALL:
        if str(case) not in labels:
            continue
        with use_backend(name, dtype=case.dtype) as backend:
            batch, v = (
                tree.map(lambda x: backend.asarray(x), values)
                for values in (problem.batch(case.tasks, case.dtype), problem.variables(case.dtype))
            )
            for how in ("sharded", "otherwise", "alone"):
                if how == "alone" and os.environ.get("RANK", "0") != "0":
                    continue  # one process is enough to compare with
                if how == "otherwise" and (case != problem.ONE or len(labels) < len(problem.ALL)):
                    continue
                step = problem.step(case.algorithm, distributed=how != "alone")
                compiled = (name == "torch") == (how == "otherwise")
                run = compile(step) if compiled else step
                cost, grads = tree.map(backend.to_numpy, run(batch, v))
                leaves = zip(tree.key_chains(grads), tree.leaves(grads), strict=True)
                found |= {f"{case}/{how}/grads/{chain}": x for chain, x in leaves}
                found[f"{case}/{how}/cost"] = cost
    return found


def main() -> None:
    engine, folder, devices, *labels = sys.argv[1:]
    prepare(int(devices))
    with active(engine, int(devices)) as name:
        found = results(name, labels)
    rank = os.environ.get("RANK", "0")
    np.savez(Path(folder) / f"{rank}.npz", **found)


if __name__ == "__main__":
    main()
