"""metaframe against the best code written by hand on the same framework.

    python -m benchmarks.handwritten --backend jax --workload W1

First every variant's cost and gradient is checked against the others in float64, then they are
timed in float32, taking turns. The last column is the time by that of the fastest hand-written
variant of the same kind: compiled against compiled, eager against eager.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterable
from typing import Any

from benchmarks import report
from benchmarks.harness import (
    BACKENDS,
    Program,
    Timing,
    check_equal,
    prepare,
    time_interleaved,
)
from benchmarks.workloads import WORKLOADS, Case, Execution, metaframe_program
from metaframe import tree

TOLERANCE = 1e-10

EXECUTIONS: dict[str, tuple[Execution, ...]] = {
    "W1": (
        Execution(),
        Execution("scan"),
        Execution(mode="remat"),
        Execution(mode="mixed"),
        Execution(compiled=False),
    ),
    "W2": (
        Execution("scan"),
        Execution("scan", "remat"),
        Execution("scan", compiled=False),
        Execution("scan", "remat", compiled=False),
    ),
}
# Where compiling a loop in Python, or an eager loop over small operations, takes minutes.
TOO_SLOW: dict[str, tuple[str, ...]] = {
    "torch": (
        "W1 metaframe scan, compiled",
        "W2 metaframe scan, compiled",
        "W2 metaframe scan remat, compiled",
    ),
    "jax": ("W2 metaframe scan, eager", "W2 metaframe scan remat, eager"),
    "tensorflow": ("W2 metaframe scan, eager", "W2 metaframe scan remat, eager"),
}


def variants(backend: str, case: Case, dtype: str, device: str) -> dict[str, Program]:
    """Hand-written programs and metaframe's, by name."""
    where = None if device == "cpu" else device
    params = tree.leaves(case.workload.params(backend, dtype, where))
    tasks = case.workload.arrays(backend, dtype, where)
    hand = importlib.import_module(f"benchmarks.hand_{backend}")
    found: dict[str, Program] = dict(hand.programs(case, list(params), tasks))
    for execution in executions(backend, case):
        found[execution.name] = metaframe_program(case, execution, backend, dtype, where)
    return found


def executions(backend: str, case: Case) -> Iterable[Execution]:
    for execution in EXECUTIONS[case.workload.name]:
        slow = f"{case.workload.name} {execution.name}" in TOO_SLOW.get(backend, ())
        if not slow and (case.order == 2 or execution.mode == "reverse"):
            yield execution


def is_eager(name: str) -> bool:
    return "eager" in name


def best_by_hand(times: dict[str, Timing], like: str) -> Timing:
    """The fastest hand-written variant of the kind of `like`, or of any if that kind has none.

    No framework has an eager form and a compiled form that are both worth writing for W2.
    """
    by_hand = {name: t for name, t in times.items() if not name.startswith("metaframe")}
    alike = [t for name, t in by_hand.items() if is_eager(name) == is_eager(like)]
    return min(alike or by_hand.values(), key=lambda t: t.ms)


def rows(case: Case, times: dict[str, Timing], errors: dict[str, float]) -> list[dict[str, Any]]:
    return [
        {
            "case": case.name,
            "variant": name,
            "ms": timing.ms,
            "first call s": timing.first_call_s,
            "difference": errors[name],
            "by best hand-written": timing.ratio(best_by_hand(times, name)),
        }
        for name, timing in times.items()
    ]


def measure(backend: str, case: Case, device: str, budget: float) -> list[dict[str, Any]]:
    errors = check_equal(variants(backend, case, "float64", device), TOLERANCE)
    programs = variants(backend, case, "float32", device)
    times: dict[str, Timing] = {}
    for eager in (False, True):  # apart, so that a slow eager variant leaves rounds for the rest
        group = {name: program for name, program in programs.items() if is_eager(name) == eager}
        times |= time_interleaved(group, budget_s=budget / 2, device=device)
    return rows(case, times, errors)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backend", choices=BACKENDS, required=True)
    parser.add_argument("--workload", choices=WORKLOADS, default="W1")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--order", type=int, nargs="+", default=[2, 1], choices=[1, 2])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--budget", type=float, default=40, help="seconds of timing a case")
    options = parser.parse_args(argv)
    prepare(options.backend, options.device)

    workload = WORKLOADS[options.workload]()
    found: list[dict[str, Any]] = []
    for order in options.order:
        for steps in options.steps:
            case = Case(workload, steps, order)
            found += measure(options.backend, case, options.device, options.budget)
    name = f"handwritten_{options.backend}_{options.workload}_{options.device.replace(':', '')}"
    title = f"metaframe and hand-written {options.backend}, {options.workload}, {options.device}"
    report.publish(name, title, found)
    report.bars(
        name,
        title,
        {f"{row['case']}: {row['variant']}": row["ms"] for row in found},
        f"{'CPU' if options.device == 'cpu' else 'wall'} ms per meta-gradient",
    )


if __name__ == "__main__":
    main()
