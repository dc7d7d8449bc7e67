"""A step divided among workers against the step of one, on every engine, over loopback."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distributed_problem import ALGORITHMS, ALL, DTYPES, FEW, ONE, Case, batch, step, variables
from frameworks import require, slow
from metaframe import tree, use_backend
from processes import run, run_together

WORKER, CHECKS, START = (
    str(Path(__file__).parent / "support" / f"distributed_{name}.py")
    for name in ("worker", "checks", "start")
)
LIMIT = 400
"""Seconds. Nearly all of them are imports and compilers, on a machine that may be busy."""
TOLERANCE = {"float64": 1e-12, "float32": 1e-6}


@dataclass(frozen=True)
class Engine:
    """An engine, the number of its processes, and of devices in each."""

    name: str
    processes: int
    devices: int = 1
    cases: tuple[Case, ...] = ALL

    def __str__(self) -> str:
        few = "" if self.cases == ALL else "-few"
        return f"{self.name}-{self.processes}x{self.devices}{few}"

    @property
    def backend(self) -> str:
        return self.name.split("-")[0]


TORCH, MESH = Engine("torch", 2, 1, FEW), Engine("jax-mesh", 1, 4, FEW)
MIRRORED = Engine("tensorflow-mirrored", 1, 2, FEW)
SLOW = (
    Engine("torch", 1),
    Engine("torch", 2),
    Engine("torch", 4),
    Engine("jax-mesh", 1, 4),
    Engine("jax", 2),
    Engine("jax", 2, 2, FEW),
    Engine("tensorflow-mirrored", 1, 2),
    Engine("tensorflow-mirrored", 1, 4, FEW),
    Engine("tensorflow", 2),
)
Results = list[dict[str, np.ndarray[Any, Any]]]
_found: dict[Engine, Results] = {}


def results(engine: Engine, folder: Path) -> Results:
    """The findings of every process of the engine; all its cases run in one start."""
    require(engine.backend)
    if engine not in _found:
        labels = [str(case) for case in engine.cases]
        command = [WORKER, engine.name, str(folder), str(engine.devices), *labels]
        run_together(command, engine.processes, folder, LIMIT)
        files = [np.load(folder / f"{i}.npz") for i in range(engine.processes)]
        _found[engine] = [dict(file) for file in files]
    return _found[engine]


@functools.cache
def task_norm(algorithm: str, tasks: int) -> float:
    """The mean norm of the tasks' gradients, which cancel in their sum."""
    require("torch")
    norms = []
    with use_backend("torch", dtype="float64"):
        for i in range(tasks):
            one = tree.map(lambda x, i=i: x[i : i + 1], batch(tasks, "float64"))
            _, grads = step(algorithm)(one, variables("float64"))
            norms.append(np.sqrt(sum(float((g**2).sum()) for g in tree.leaves(grads))))
    return float(np.mean(norms))


def worst(found: dict[str, Any], case: Case, one: str, other: dict[str, Any], two: str) -> float:
    """The largest difference of a gradient, by the mean norm of the tasks' gradients."""
    start = f"{case}/{one}/grads/"
    names = [n.removeprefix(start) for n in found if n.startswith(start)]
    assert len(names) == 4
    gaps = [np.linalg.norm(found[f"{start}{n}"] - other[f"{case}/{two}/grads/{n}"]) for n in names]
    return float(max(gaps)) / task_norm(case.algorithm, case.tasks)


@pytest.mark.parametrize("engine", [TORCH, MESH, MIRRORED, *map(slow, SLOW)], ids=str)
def test_sharded_equals_alone(engine: Engine, tmp_path: Path) -> None:
    processes = results(engine, tmp_path)
    misses = {}
    for case in engine.cases:
        found = processes[0]
        gap = worst(found, case, "sharded", found, "alone")
        cost, alone = (found[f"{case}/{how}/cost"] for how in ("sharded", "alone"))
        if not (gap <= TOLERANCE[case.dtype] and abs(cost / alone - 1) <= TOLERANCE[case.dtype]):
            misses[str(case)] = (gap, float(cost), float(alone))
    assert not misses
    if engine.cases == ALL:
        assert worst(processes[0], ONE, "otherwise", processes[0], "alone") <= 1e-12
    for other in processes[1:]:
        for name, value in other.items():
            np.testing.assert_array_equal(processes[0][name], value, err_msg=name)


def test_engines_agree(tmp_path: Path) -> None:
    """Other engines see what all processes of one share, such as a rate in the wrong precision."""
    engines = (TORCH, MESH, MIRRORED)
    folders = [tmp_path / str(engine) for engine in engines]
    for folder in folders:
        folder.mkdir()
    first, *others = (results(e, f)[0] for e, f in zip(engines, folders, strict=True))
    for case in FEW:
        for other in others:
            gap = worst(first, case, "sharded", other, "sharded")
            assert gap <= {"float64": 1e-12, "float32": 2e-6}[case.dtype], case


def test_every_case_is_there() -> None:
    assert len(ALL) == len(ALGORITHMS) * 4 * len(DTYPES)


CHECKED = (Engine("torch", 2), Engine("jax-mesh", 1, 2), Engine("jax", 2), Engine("tensorflow", 2))


@pytest.mark.parametrize("engine", list(map(slow, CHECKED)), ids=str)
def test_what_is_exchanged_and_refused(engine: Engine, tmp_path: Path) -> None:
    require(engine.backend)
    command = [CHECKS, engine.name, str(tmp_path), str(engine.devices)]
    run_together(command, engine.processes, tmp_path, LIMIT)
    everyone = [json.loads((tmp_path / f"{i}.json").read_text()) for i in range(engine.processes)]
    for found in everyone:
        assert found["collectives"] == 1
        assert found["batched"].startswith("InputError: distributed=True divides the tasks")
        assert found["nan"] == "NonFiniteError: the cost of task 5 is nan."
        assert found["within a gradient"].startswith("InputError: a distributed step within")
        if engine.backend == "torch":
            assert found["from outside"].startswith("InputError: a distributed step within")
        assert found["share"] <= 1e-14
        assert found["within a compiled one"].startswith("InputError: a distributed step within")
        assert found["still well"] == "nothing raised"
        if engine.processes > 1:
            for part in ("process 0 has", "= 0.06", "process 1 has", "= 1.06"):
                assert part in found["settings"]
            for part in ("process 0 has", "batch/query/x = float64 (6, ", "process 1 has", "(5, "):
                assert part in found["shapes"]
        assert found == everyone[0]


@pytest.mark.parametrize("backend_name", ["torch", slow("jax"), slow("tensorflow")])
def test_a_backend_selected_before_the_session(backend_name: str, tmp_path: Path) -> None:
    """And costs that differ by a number, however they come by it, in any mesh of JAX."""
    require(backend_name)
    run_together([START, backend_name, str(tmp_path)], 2, tmp_path, LIMIT)
    everyone = [json.loads((tmp_path / f"{i}.json").read_text()) for i in range(2)]
    for found in everyone:
        assert found["compiled"] == found["eager"] == 1.5
        for how in ("global", "default", "attribute"):
            assert found[how].startswith("DistributedError: the 2 processes do not agree"), how
            assert all(part in found[how] for part in ("= 1.0", "= 2.0"))
        assert found["complex"].startswith("InputError: with distributed=True")


LATE = """
import metaframe
from metaframe.distributed import session

metaframe.set_backend({name!r}, dtype="float16")
try:
    with session():
        pass
except metaframe.errors.BackendError as error:
    print(error)
"""
ALONE = """
import numpy as np
import metaframe

metaframe.set_backend({name!r})
try:
    metaframe.meta_value_and_grad(lambda v, t: (v - t) ** 2, distributed=True)(1.0, np.ones(2))
except metaframe.errors.BackendError as error:
    print(error)
"""
PLACE = {
    "RANK": "0",
    "WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "1",
    "METAFRAME_PEERS": "127.0.0.1:1,127.0.0.1:2",
}


@pytest.mark.parametrize("backend_name", ["jax", "tensorflow"])
def test_a_session_that_comes_too_late(backend_name: str) -> None:
    require(backend_name)
    said = run(["-c", LATE.format(name=backend_name)], **PLACE)
    assert "Enter it first; select a device or dtype inside of it." in said


def test_a_step_without_the_session(backend_name: str) -> None:
    said = run(["-c", ALONE.format(name=backend_name)], **PLACE)
    assert "WORLD_SIZE is 2, and this process has not joined the others." in said
