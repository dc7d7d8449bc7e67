"""How the time of a meta-gradient grows with tasks, inner steps and width.

    python -m benchmarks.scaling --backend jax

W1 with one of its sizes changed at a time. The last column is the time by that of the first size:
vectorised tasks cost less than their number, and inner steps about theirs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import report
from benchmarks.harness import BACKENDS, Timing, prepare, time_interleaved
from benchmarks.workloads import Case, Execution, metaframe_program, w1


@dataclass(frozen=True)
class Axis:
    """One size of W1, and the values it takes."""

    name: str
    case: Callable[[int], Case]
    sizes: Sequence[int]
    quick: Sequence[int]


AXES = (
    Axis("tasks", lambda n: Case(w1(tasks=n)), (1, 8, 64, 512, 1024), (1, 64, 512)),
    Axis("inner steps", lambda n: Case(w1(), steps=n), (1, 5, 10, 25, 50), (1, 5)),
    Axis("width", lambda n: Case(w1(width=n)), (20, 40, 80, 160, 320), (40, 160)),
)


def execution(backend: str, axis: Axis, eager: bool, chunk_size: int | None) -> Execution:
    # torch has no loop in compiled form: its compiler takes minutes over 25 unrolled steps.
    unrolled = backend == "torch" and axis.name == "inner steps"
    return Execution(compiled=not (eager or unrolled), chunk_size=chunk_size)


def measure(
    backend: str, axis: Axis, sizes: Sequence[int], chosen: Execution, device: str, budget: float
) -> Any:
    where = None if device == "cpu" else device
    programs = {
        str(n): metaframe_program(axis.case(n), chosen, backend, "float32", where) for n in sizes
    }
    times: dict[str, Timing] = time_interleaved(programs, budget_s=budget, device=device)
    first = times[str(sizes[0])]
    return [
        {
            "size": axis.name,
            "value": n,
            "run": chosen.name,
            "ms": times[str(n)].ms,
            "first call s": times[str(n)].first_call_s,
            f"by {sizes[0]}": times[str(n)].ratio(first),
        }
        for n in sizes
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backend", choices=BACKENDS, required=True)
    parser.add_argument("--axis", nargs="+", default=[axis.name for axis in AXES])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--eager", action="store_true", help="nothing is compiled")
    parser.add_argument("--chunk-size", type=int, help="tasks at once; default: all")
    parser.add_argument("--budget", type=float, default=40, help="seconds of timing a size")
    options = parser.parse_args(argv)
    prepare(options.backend, options.device)
    title = f"Scaling of W1 on {options.backend}, {options.device}"
    unit = f"{'CPU' if options.device == 'cpu' else 'wall'} ms per meta-gradient"
    for axis in AXES:
        if axis.name in options.axis:
            sizes = axis.quick if options.quick else axis.sizes
            chosen = execution(options.backend, axis, options.eager, options.chunk_size)
            rows = measure(options.backend, axis, sizes, chosen, options.device, options.budget)
            device = options.device.replace(":", "")
            how = "" if chosen.compiled else "_eager"
            if chosen.chunk_size:
                how += f"_by_{chosen.chunk_size}"
            name = f"scaling_{options.backend}_{axis.name.replace(' ', '_')}_{device}{how}"
            report.publish(name, f"{title}: {axis.name}", rows)
            points = {row["value"]: row["ms"] for row in rows}
            report.lines(name, title, {rows[0]["run"]: points}, (axis.name, unit))


if __name__ == "__main__":
    main()
