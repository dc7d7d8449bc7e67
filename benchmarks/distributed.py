"""Tasks divided among workers: measured with 1, 2 and 4, simulated with 8 to 4,096.

    python -m benchmarks.distributed

Measures what the cost model of docs/scaling.md needs, with torch and gloo over loopback, one thread
a process: the processor time of a task and of a step's fixed part, and the time of an all-reduce.
Then the model is compared with a worker's processor time in whole steps (several workers on one
machine wait for each other), and workers that are late now and then are simulated.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import report
from benchmarks.harness import ONE_THREAD

SEED = 0
STEPS = 5
TASKS = (4, 16, 32)
REPEATS = 5
ALL_REDUCED = (10_000, 1_000_000)
"""Floats."""


@dataclass(frozen=True)
class Costs:
    """Seconds, and bytes a second."""

    task: float
    fixed: float
    latency: float
    """Of one message."""
    bandwidth: float

    def all_reduce(self, size: float, workers: int) -> float:
        """Of so many bytes: in a ring or, for a small buffer among many, up and down a tree."""
        passes, depth = 2 * (workers - 1), 2 * math.ceil(math.log2(workers))
        ring = passes * (self.latency + size / workers / self.bandwidth)
        return min(ring, depth * (self.latency + size / self.bandwidth))

    def step(self, tasks: int, workers: int, size: float) -> float:
        """Workers that all take the same time."""
        return self.fixed + -(-tasks // workers) * self.task + self.all_reduce(size, workers)


@dataclass(frozen=True)
class Stragglers:
    """How the time of a task varies, and how often a whole worker is slow."""

    spread: float = 0.1
    """Standard deviation of the logarithm of a task's time."""
    probability: float = 0.001
    """Of a worker being slow in a step."""
    factor: float = 3.0
    """By which it is."""


def simulated(
    costs: Costs, late: Stragglers, tasks: int, workers: int, size: float, steps: int = 100
) -> float:
    """The mean time of a step that waits for the last worker."""
    rng = np.random.default_rng(SEED)
    each = -(-tasks // workers)
    times = []
    for _ in range(steps):
        # The sum of log-normal times of mean one, by its first two moments.
        deviation = np.sqrt(np.expm1(late.spread**2) / each)
        compute = each * costs.task * np.maximum(rng.normal(1.0, deviation, workers), 0)
        slow = rng.random(workers) < late.probability
        compute = np.where(slow, late.factor * compute, compute)
        times.append(costs.fixed + compute.max() + costs.all_reduce(size, workers))
    return float(np.mean(times))


def work(folder: str) -> None:
    """One process of a measurement."""
    import torch
    import torch.distributed as dist

    from metaframe import use_backend
    from metaframe.distributed import session

    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    with session("torch", timeout=120) as workers, use_backend("torch"):
        for tasks in TASKS:
            found[f"step {tasks}"] = timed(a_step(tasks), time.process_time)
        if workers.processes > 1:
            for size in ALL_REDUCED:
                buffer = torch.zeros(size)
                found[f"reduce {size}"] = timed(
                    lambda b=buffer: dist.all_reduce(b), time.perf_counter
                )
    if workers.is_first:
        Path(folder, f"{workers.processes}.json").write_text(json.dumps(found))


def a_step(tasks: int) -> Callable[[], Any]:
    """FOMAML on W1, the tasks one after the other."""
    from benchmarks.workloads import w1
    from metaframe import fomaml_step

    work = w1(tasks)
    data, params = work.arrays("torch", "float32"), work.params("torch", "float32")
    return lambda: fomaml_step(
        data,
        lambda task, v: work.cost(task[:2], v),
        lambda task, v: work.cost(task[2:], v),
        params,
        STEPS,
        work.inner_lr,
        batched="scan",
        distributed=True,
    )


def timed(run: Callable[[], Any], clock: Callable[[], float]) -> float:
    """Seconds: the least of several, which others' work on the machine disturbs least."""
    run()
    found = []
    for _ in range(REPEATS):
        start = clock()
        run()
        found.append(clock() - start)
    return min(found)


def measure(processes: Sequence[int]) -> dict[int, dict[str, float]]:
    """The findings of `work` with each number of processes."""
    from metaframe.distributed.launch import launch

    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.distributed", "--worker", folder]
        for count in processes:
            if launch(command, count):
                raise SystemExit(f"the measurement with {count} processes failed")
        return {n: json.loads(Path(folder, f"{n}.json").read_text()) for n in processes}


def fitted(found: dict[int, dict[str, float]]) -> Costs:
    """The model's constants, from one process and from two."""
    alone, two = found[1], found[2]
    few, middle, many = TASKS
    task = (alone[f"step {many}"] - alone[f"step {middle}"]) / (many - middle)
    small, large = (two[f"reduce {size}"] for size in ALL_REDUCED)
    per_byte = max(large - small, 1e-9) / (4 * (ALL_REDUCED[1] - ALL_REDUCED[0]))
    latency = max(small / 2 - 2 * ALL_REDUCED[0] * per_byte, 1e-6)
    fixed = max(alone[f"step {few}"] - few * task, 0.0)
    return Costs(task, fixed, latency, 1 / per_byte)


def compare(found: dict[int, dict[str, float]], costs: Costs) -> list[dict[str, Any]]:
    """A worker's processor time of whole steps next to the model's, which waits for no one."""
    rows = []
    for workers, times in found.items():
        for tasks in TASKS:
            measured = times[f"step {tasks}"]
            expected = costs.fixed + -(-tasks // workers) * costs.task
            rows.append(
                {
                    "workers": workers,
                    "tasks": tasks,
                    "measured CPU ms": 1e3 * measured,
                    "model ms": 1e3 * expected,
                    "measured / model": measured / expected,
                }
            )
    return rows


CLUSTER = Costs(task=5e-3, fixed=1e-3, latency=2e-5, bandwidth=1.25e9)
"""A task of 5 ms, and 10 Gbit/s Ethernet."""


def table(tasks_of: Callable[[int], int], parameters: int) -> list[dict[str, Any]]:
    rows = []
    for workers in (8, 16, 64, 256, 1024, 4096):
        tasks = tasks_of(workers)
        size = 4.0 * (parameters + tasks)
        even = CLUSTER.step(tasks, workers, size)
        late = simulated(CLUSTER, Stragglers(), tasks, workers, size)
        alone = CLUSTER.fixed + tasks * CLUSTER.task
        rows.append(
            {
                "workers": workers,
                "tasks": tasks,
                "compute ms": 1e3 * -(-tasks // workers) * CLUSTER.task,
                "all-reduce ms": 1e3 * CLUSTER.all_reduce(size, workers),
                "step ms": 1e3 * even,
                "with stragglers ms": 1e3 * late,
                "efficiency": alone / workers / late,
            }
        )
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--no-measure", action="store_true", help="the simulation alone")
    options = parser.parse_args(argv)
    os.environ.update(ONE_THREAD, CUDA_VISIBLE_DEVICES="")
    if options.worker:
        work(options.worker)
        return
    if not options.no_measure:
        found = measure(sorted({1, 2, *options.processes}))
        costs = fitted(found)
        notes = [
            f"task {1e3 * costs.task:.2f} ms, fixed {1e3 * costs.fixed:.2f} ms, message "
            f"{1e6 * costs.latency:.0f} us, {costs.bandwidth / 1e9:.2f} GB/s"
        ]
        rows = compare(found, costs)
        report.publish("distributed_measured", "Steps and the model, torch, gloo", rows, notes)
    for name, parameters in (("MLP, 1,761 parameters", 1761), ("ResNet-12, 8M", 8_000_000)):
        about = f"{name}: 4 tasks a worker, 5 ms a task, 10 Gbit/s"
        key = "distributed_" + name.split(",")[0].lower().replace("-", "")
        report.publish(key, about, table(lambda workers: 4 * workers, parameters))


if __name__ == "__main__":
    main()
