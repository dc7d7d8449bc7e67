"""How long the first call takes, and the import.

    python -m benchmarks.compile_time

W1 with one inner step, each framework in a fresh process with its compilation caches off. The time
is that of the first compiled call: tracing, compiling, the C++ compiler included, and one run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from typing import Any

from benchmarks import report
from benchmarks.harness import BACKENDS, prepare, run_python, wait
from benchmarks.workloads import Case, Execution, metaframe_program, w1

NO_CACHES = {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "JAX_ENABLE_COMPILATION_CACHE": "false"}
IMPORT = (
    "import time, sys; w, c = time.perf_counter(), time.process_time(); import metaframe; "
    "print(time.process_time() - c, time.perf_counter() - w, "
    "sorted({'jax', 'tensorflow', 'torch'} & set(sys.modules)))"
)


def inside(backend: str, steps: int) -> tuple[float, float]:
    """CPU and wall seconds of the first call, in this process."""
    prepare(backend)
    program = metaframe_program(Case(w1(), steps), Execution(), backend, "float32")
    cpu, wall = _cpu_seconds(), time.perf_counter()
    wait(program())
    return _cpu_seconds() - cpu, time.perf_counter() - wall


def _cpu_seconds() -> float:
    """Of this process and its children: torch's compiler runs a C++ compiler."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def compile_rows(steps: list[int]) -> list[dict[str, Any]]:
    rows = []
    for backend in BACKENDS:
        for count in steps:
            case = ("--inside", backend, "--steps", str(count))
            printed = run_python("-m", "benchmarks.compile_time", *case, env=NO_CACHES)
            cpu, wall = json.loads(printed.splitlines()[-1])
            rows.append({"backend": backend, "inner steps": count, "CPU s": cpu, "wall s": wall})
    return rows


def import_row(runs: int = 5) -> dict[str, Any]:
    printed = [run_python("-c", IMPORT).split(maxsplit=2) for _ in range(runs)]
    cpu, wall = (statistics.median(float(p[i]) for p in printed) for i in (0, 1))
    frameworks = printed[0][2].strip()
    return {"CPU s": cpu, "wall s": wall, "frameworks imported": frameworks}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[1])
    parser.add_argument("--inside", choices=BACKENDS, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.inside:
        print(json.dumps(inside(options.inside, options.steps[0])))
        return
    report.publish("import_time", "import metaframe", [import_row()])
    rows = compile_rows(options.steps)
    title = "First compiled call of W1"
    report.publish("compile_time", title, rows)
    report.bars(
        "compile_time",
        title,
        {f"{row['backend']} K={row['inner steps']}": row["CPU s"] for row in rows},
        "CPU seconds",
    )


if __name__ == "__main__":
    main()
