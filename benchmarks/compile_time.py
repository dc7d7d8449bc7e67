"""How long the first call takes, and the import.

    python -m benchmarks.compile_time

W1 with one inner step. The time is that of the first compiled call in a fresh process: tracing,
compiling, the C++ compiler included, and one run. Three states of the machine: nothing was ever
compiled on it; another program was, so that torch's compiler knows the processor and has its
headers at hand; this program was.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from typing import Any

import metaframe
from benchmarks import report
from benchmarks.harness import BACKENDS, Program, prepare, run_python, wait
from benchmarks.workloads import Case, Execution, metaframe_program, w1

IMPORT = (
    "import time, sys; w, c = time.perf_counter(), time.process_time(); import metaframe; "
    "print(time.process_time() - c, time.perf_counter() - w, "
    "sorted({'jax', 'tensorflow', 'torch'} & set(sys.modules)))"
)


def inside(backend: str, steps: int) -> tuple[float, float]:
    """CPU and wall seconds of the first call, in this process; no step is another program."""
    prepare(backend)
    program = _another_program(backend)
    if steps:
        program = metaframe_program(Case(w1(), steps), Execution(), backend, "float32")
    cpu, wall = _cpu_seconds(), time.perf_counter()
    wait(program())
    return _cpu_seconds() - cpu, time.perf_counter() - wall


def _another_program(backend: str) -> Program:
    double = metaframe.compile(lambda x: x * 2)
    x = w1().arrays(backend, "float32")
    return lambda: double(x[0])


def _cpu_seconds() -> float:
    """Of this process and its children: torch's compiler runs a C++ compiler."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def compile_rows(steps: list[int]) -> list[dict[str, Any]]:
    return [_row(backend, count) for backend in BACKENDS for count in steps]


def _row(backend: str, steps: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as nothing, tempfile.TemporaryDirectory() as used:
        first = _apart(backend, steps, nothing)
        _apart(backend, 0, used)
        return {
            "backend": backend,
            "inner steps": steps,
            "first on the machine, CPU s": first[0],
            "first of the program, CPU s": (new := _apart(backend, steps, used))[0],
            "program known, CPU s": (again := _apart(backend, steps, used))[0],
            "wall s of these": " ".join(f"{wall:.1f}" for _, wall in (first, new, again)),
        }


def _apart(backend: str, steps: int, cache: str) -> tuple[float, float]:
    """`inside` a fresh process whose compiler keeps what it learns in the folder `cache`."""
    case = ("--inside", backend, "--steps", str(steps))
    caches = {"TMPDIR": cache, "JAX_COMPILATION_CACHE_DIR": cache}  # torch's are in TMPDIR
    printed = run_python("-m", "benchmarks.compile_time", *case, env=caches)
    cpu, wall = json.loads(printed.splitlines()[-1])
    return cpu, wall


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
        {
            f"{row['backend']} K={row['inner steps']}": row["first of the program, CPU s"]
            for row in rows
        },
        "CPU seconds",
    )


if __name__ == "__main__":
    main()
