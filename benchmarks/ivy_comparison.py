"""ivy 1.0.0.5 and metaframe: the documented example, and the time of a meta-step.

    python -m benchmarks.ivy_comparison

Makes an environment of its own, `.venv-ivy`, with ivy and current frameworks, and runs each
backend in its own process. The first table runs the `maml_step` example of ivy's documentation on
both libraries, against the exact answer. The second times one meta-step of second-order MAML on
25 sinusoid tasks, one inner step: ivy with all tasks in one call as its documentation does it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.environments import FRAMEWORKS, SUPPORT, environment
from benchmarks.harness import BACKENDS, run_python

IVY = "ivy==1.0.0.5"
# ivy's JAX backend imports flax without asking for it.
ALSO_NEEDED = ("flax==0.12.8",)
TOLERANCE = 1e-6


def exact_answer(steps: int = 5, lr: float = 0.01, tasks: int = 2) -> tuple[float, float]:
    """Cost and gradient of the documented example, from its closed form in Python's floats.

    The cost of all tasks is mean(x) / mean(v). Every task's variable starts at 1 and takes the
    same steps v <- v + lr * mean(x) / v^2, with derivative dv <- dv * (1 - 2 lr mean(x) / v^3);
    the gradient is summed over the tasks' variables, each of which has 1 / tasks of the mean.
    """
    mean_x = sum(range(1, tasks + 1)) / tasks
    v, dv = 1.0, 1.0
    for _ in range(steps):
        v, dv = v + lr * mean_x / v**2, dv * (1 - 2 * lr * mean_x / v**3)
    return mean_x / v, -mean_x / v**2 * dv


def measure(python: str, backend: str, budget: float) -> dict[str, Any]:
    """Run one backend in ivy's environment."""
    # ivy writes a log and a cache into the working directory.
    with tempfile.TemporaryDirectory() as folder:
        printed = run_python(
            *("-m", "benchmarks.ivy_case", "--backend", backend, "--budget", str(budget)),
            python=python,
            cwd=Path(folder),
        )
    found: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return found


def correctness_rows(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    cost, grad = exact_answer()
    rows: list[dict[str, Any]] = [
        {"library": "exact", "cost": f"{cost:.8f}", "gradient": f"{grad:.8f}"}
    ]
    for library in ("ivy", "metaframe"):
        for result in results:
            found = result[library]
            right = max(abs(found["cost"] - cost), abs(found["grad"] - grad)) < TOLERANCE
            shape = tuple(found["shape"])
            rows.append(
                {
                    "library": library,
                    "backend": result["backend"],
                    "cost": f"{found['cost']:.8f}",
                    "gradient": f"{found['grad']:.8f}",
                    "": "right" if right else "wrong",
                    "gradient of a (3, 4) weight, batched=False": (
                        f"{shape}, {'right' if shape == (3, 4) else 'wrong'}"
                    ),
                }
            )
    return rows


def time_rows(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "backend": result["backend"],
            "library": name,
            "CPU ms": timing["cpu_ms"],
            "times metaframe compiled": result["ratio"][name],
            "gradient error": result["w1_error"][name],
        }
        for result in results
        for name, timing in result["ms"].items()
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--budget", type=float, default=30, help="seconds of timing a backend")
    options = parser.parse_args(argv)
    python = environment("ivy", FRAMEWORKS, (IVY, *ALSO_NEEDED, *SUPPORT))
    results = [measure(python, backend, options.budget) for backend in BACKENDS]
    report.publish(
        "ivy_correctness",
        f"The maml_step example of ivy's documentation ({IVY})",
        correctness_rows(results),
    )
    title = "Second-order MAML on 25 sinusoid tasks, one inner step, one core"
    report.publish("ivy_time", title, time_rows(results))
    report.bars(
        "ivy_time",
        title,
        {f"{row['library']} ({row['backend']})": row["CPU ms"] for row in time_rows(results)},
        "CPU ms per meta-step",
    )


if __name__ == "__main__":
    main()
