"""Memory and time of gradients through long loops: "replay" by "remat".

    python -m benchmarks.long_loops --backend jax

An MLP 16-64-64-1 takes K steps of Adam on 64 points, and the loss after them is differentiated with
respect to the start, the points and the rate. Every case runs in a process of its own; what counts
is the most memory held during one gradient, beyond what the process held before it.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import numpy as np

from benchmarks import report
from benchmarks.harness import BACKENDS, prepare, run_python, wait
from benchmarks.memory import peak_mb
from metaframe import compile, nn, optim, unroll, use_backend, value_and_grad

CASES = (("remat", 1000), ("replay", 1000), ("replay", 10_000))
"""Mode and number of steps."""


def inside(backend: str, mode: Any, steps: int) -> dict[str, float]:
    """Run one case in this process."""
    prepare(backend)
    rng = np.random.default_rng(0)
    model = nn.mlp([16, 64, 64, 1])

    def loss(batch: Any, v: Any) -> Any:
        return nn.mse(model.apply(v, batch[0]), batch[1])

    def end(given: Any) -> Any:
        how = {"steps": steps, "lr": given["lr"], "update": optim.adam(), "mode": mode}
        return loss(given["points"], unroll(loss, given["v"], given["points"], **how).variables)

    with use_backend(backend) as selected:
        points = rng.normal(size=(64, 16)), rng.normal(size=(64, 1))
        given = {
            "v": model.init(0),
            "points": tuple(selected.asarray(x, "float32") for x in points),
            "lr": selected.asarray(1e-3, "float32"),
        }
        gradient = value_and_grad(end)
        run = gradient if backend == "torch" else compile(lambda given: gradient(given))

        def program() -> Any:
            return run(given).grads

        peak = peak_mb(program, "cpu", backend)
        start = time.perf_counter()
        wait(program())
        return {"MB": peak, "s": time.perf_counter() - start}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backend", choices=BACKENDS, required=True)
    parser.add_argument("--steps-at-most", type=int, default=10_000)
    parser.add_argument("--inside", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.inside:
        mode, steps = options.inside
        print(json.dumps(inside(options.backend, mode, int(steps))))
        return
    rows: list[dict[str, Any]] = []
    for mode, steps in CASES:
        if steps > options.steps_at_most:
            continue
        case = ("--backend", options.backend, "--inside", mode, str(steps))
        found = json.loads(run_python("-m", "benchmarks.long_loops", *case).splitlines()[-1])
        row: dict[str, Any] = {"backend": options.backend, "mode": mode, "steps": steps, **found}
        first = rows[0] if rows else row
        row["memory by remat of 1000"] = row["MB"] / first["MB"]
        row["time a step by remat"] = row["s"] / steps / (first["s"] / first["steps"])
        rows.append(row)
    report.publish(
        f"long_loops_{options.backend}",
        f"Gradient through K steps of Adam on {options.backend}",
        rows,
    )


if __name__ == "__main__":
    main()
