"""The training loop by the compiled step inside it, by the clock on the wall.

    python -m benchmarks.loop [--backend torch] [--workload digits] [--budget 20]

Four ways to train the same model on the same tasks: the compiled step on one batch again and again
(the reference); the loop of the README, which samples a batch for each step; `MetaTrainer.fit`; and
`fit` with the callbacks of the command line, which write metrics and checkpoints and draw a
progress bar. They take turns in one process with all the cores that the framework takes, and each
has the time of its quickest turn: other people's work only ever adds to it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import metaframe
from benchmarks import report
from benchmarks.harness import BACKENDS, ROOT, import_path, wait
from metaframe import nn, ops, optim
from metaframe.learners import MAML
from metaframe.tasks import IndexedSampler, SinusoidTaskSampler, digits_sampler, stack_tasks
from metaframe.training import Checkpoints, MetaTrainer, StepSettings
from metaframe.training.metrics import MetricsLog
from metaframe.training.progress import ProgressBar

TARGETS = {"own loop": 2.5, "fit": 1.25}
TURN_S = 0.5
"""Seconds of a turn of the compiled step; the others take as many steps."""
FEWEST, MOST = 320, 4000
"""Steps of a turn: `fit` needs a few to find its stride."""


@dataclass(frozen=True)
class Training:
    """A model to train, and the tasks it is trained on."""

    model: nn.Model
    loss_fn: Callable[..., Any]
    sampler: IndexedSampler
    tasks: int
    inner_lr: float
    inner_steps: int


def sinusoid() -> Training:
    """The first experiment of the MAML paper: 25 tasks of 10 and 10 points, one inner step."""
    model = nn.mlp([1, 40, 40, 1])
    return Training(model, nn.mse, SinusoidTaskSampler(seed=0), 25, 0.01, 1)


def digits() -> Training:
    """The command's default training on digits, with 16 tasks: 5-way 1-shot, three steps."""
    network = nn.mlp([64, 128, 64, 5])
    model = nn.Model(
        network.init, lambda params, x: network.apply(params, ops.reshape(x, (-1, 64)))
    )
    return Training(model, nn.cross_entropy, digits_sampler(queries=10, seed=0), 16, 0.1, 3)


WORKLOADS = {"sinusoid": sinusoid, "digits": digits}


def compiled_step(of: Training, outer: optim.Optimizer) -> Callable[..., Any]:
    """The step of the README's loop."""

    def cost(data: Any, v: Any) -> Any:
        return of.loss_fn(of.model.apply(v, data[0]), data[1])

    def task_cost(v: Any, task: Any) -> Any:
        support = task.support_x, task.support_y
        adapted = metaframe.inner_loop(cost, v, support, steps=of.inner_steps, lr=of.inner_lr)
        return cost((task.query_x, task.query_y), adapted)

    @metaframe.compile
    def meta_step(params: Any, state: Any, tasks: Any) -> Any:
        mean, grads, _ = metaframe.meta_value_and_grad(task_cost)(params, tasks)
        updates, state = outer.update(grads, state, params)
        return metaframe.apply_updates(params, updates), state, mean

    return meta_step


def ways(of: Training, folder: Path) -> dict[str, Callable[[int], None]]:
    """The ways to train, each a function of the number of steps."""
    outer = optim.adam(1e-3)
    step, start = compiled_step(of, outer), of.model.init(seed=0)
    batch = of.sampler.sample_batch(of.tasks)

    def loop(next_batch: Callable[[], Any]) -> Callable[[int], None]:
        def run(steps: int) -> None:
            params, state = start, outer.init(start)
            for _ in range(steps):
                params, state, mean = step(params, state, next_batch())
            wait(mean)

        return run

    trainer = MetaTrainer(
        MAML((of.model, start), of.inner_lr, of.inner_steps),
        optim.adam(1e-3),
        of.loss_fn,
        of.sampler,
        settings=StepSettings(compiled=True),
    )

    def command(steps: int) -> None:
        with Path(os.devnull).open("w") as nowhere:
            from rich.console import Console

            bar = ProgressBar(Console(file=nowhere))
            kept = Checkpoints(folder / "checkpoints", 1000)
            trainer.fit(steps, of.tasks, callbacks=[kept, MetricsLog(folder), bar])

    return {
        "step alone": loop(lambda: batch),
        "own loop": loop(lambda: stack_tasks(of.sampler.sample(of.tasks))),
        "fit": lambda steps: void(trainer.fit(steps, of.tasks)),
        "command": command,
    }


def void(value: object) -> None:
    del value


def measure(backend: str, workload: str, budget: float) -> list[dict[str, Any]]:
    """Rows of one backend and workload, in this process."""
    metaframe.set_backend(backend)
    of = WORKLOADS[workload]()
    with tempfile.TemporaryDirectory() as folder:
        runs = ways(of, Path(folder))
        for run in runs.values():
            run(FEWEST)  # compiles
        alone = runs["step alone"]
        steps = int(min(MOST, max(FEWEST, TURN_S * FEWEST / seconds(alone, FEWEST))))
        best = dict.fromkeys(runs, float("inf"))
        started = time.perf_counter()
        turns = 0
        while turns < 3 or time.perf_counter() - started < budget:
            turns += 1
            for name, run in runs.items():
                best[name] = min(best[name], seconds(run, steps) / steps)
    return [
        {
            "workload": f"{workload}, {of.tasks} tasks",
            "backend": backend,
            "way": name,
            "ms a step": 1e3 * each,
            "tasks/s": of.tasks / each,
            "by the step": each / best["step alone"],
            "target": TARGETS.get(name),
            "turns": turns,
        }
        for name, each in best.items()
    ]


def seconds(run: Callable[[int], None], steps: int) -> float:
    started = time.perf_counter()
    run(steps)
    return time.perf_counter() - started


def in_a_process(backend: str, workload: str, budget: float) -> list[dict[str, Any]]:
    """As `measure`, with the framework's own choice of threads."""
    arguments = ["--inside", "--backend", backend, "--workload", workload, "--budget", str(budget)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.loop", *arguments],
        cwd=ROOT,
        env={**os.environ, **import_path(), "TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr.strip()[-2000:])
    rows: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backend", choices=BACKENDS, action="append")
    parser.add_argument("--workload", choices=WORKLOADS, action="append")
    parser.add_argument("--budget", type=float, default=20, help="seconds of timing for each")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    backends, workloads = options.backend or BACKENDS, options.workload or list(WORKLOADS)
    if options.inside:
        print(json.dumps(measure(backends[0], workloads[0], options.budget)))
        return
    rows = [
        row
        for workload in workloads
        for backend in backends
        for row in in_a_process(backend, workload, options.budget)
    ]
    title = "Training loops by their compiled step, wall clock"
    missed = [r for r in rows if r["target"] and r["by the step"] > r["target"]]
    notes = [f"{r['workload']}, {r['backend']}: {r['way']} misses its target" for r in missed]
    report.publish("loop", title, rows, notes)
    bars = {
        f"{r['workload']}, {r['backend']}: {r['way']}": r["by the step"]
        for r in rows
        if r["way"] != "step alone"
    }
    report.bars("loop", title, bars, "time by that of the compiled step alone")


if __name__ == "__main__":
    main()
