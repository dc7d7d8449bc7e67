"""Peak memory and time of a second-order gradient through long attention, by blocks and plain.

    python -m benchmarks.attention --backend jax

One head of width 64, batch 1, float32: the projections of queries, keys and values adapt by one
inner step, and the cost after it is differentiated. Every case runs in a process of its own. The
first call, which compiles, is not counted. Torch runs eagerly; its compiler unrolls the blocks.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import numpy as np

from benchmarks import report
from benchmarks.harness import BACKENDS, Program, prepare, run_python, wait
from benchmarks.memory import peak_mb
from metaframe import compile as compile_whole
from metaframe import inner_loop, nn, ops, use_backend, value_and_grad

WIDTH = 64
FORMS = ("plain", "blocks")


def cost(x: Any, v: Any, block_size: int | None) -> Any:
    out = nn.attention(x @ v["query"], x @ v["key"], x @ v["value"], block_size=block_size)
    return ops.mean(ops.square(out - x))


def program(backend: str, length: int, form: str) -> Program:
    """The gradient of the cost after one inner step."""
    rng = np.random.default_rng(0)
    with use_backend(backend, dtype="float32"):
        x = ops.asarray(rng.normal(size=(1, length, WIDTH)))
        v = {
            name: ops.asarray(rng.normal(size=(WIDTH, WIDTH)) / np.sqrt(WIDTH))
            for name in ("query", "key", "value")
        }
    size = length if form == "plain" else None

    def outer(v: Any) -> Any:
        inner = inner_loop(lambda x, v: cost(x, v, size), v, x, steps=1, lr=0.1)
        return cost(x, inner, size)

    step = value_and_grad(outer)
    run = step if backend == "torch" else compile_whole(step)
    return lambda: run(v)


def inside(backend: str, length: int, form: str) -> dict[str, Any]:
    """Run one case in this process."""
    prepare(backend)
    call = program(backend, length, form)
    megabytes = peak_mb(call, "cpu", backend)
    start = time.perf_counter()
    found = call()
    wait(found)
    grads = {k: np.asarray(ops.to_numpy(g)).tolist() for k, g in found.grads.items()}
    return {"MB": megabytes, "seconds": time.perf_counter() - start, "grads": grads}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backend", choices=BACKENDS, required=True)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--inside", choices=FORMS, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    backend, length = options.backend, options.length
    if options.inside:
        print(json.dumps(inside(backend, length, options.inside)))
        return
    rows: list[dict[str, Any]] = []
    for form in FORMS:
        case = ("--backend", backend, "--length", str(length), "--inside", form)
        found = json.loads(run_python("-m", "benchmarks.attention", *case).splitlines()[-1])
        rows.append({"backend": backend, "length": length, "form": form, **found})
    plain, blocks = ({k: np.array(g) for k, g in row.pop("grads").items()} for row in rows)
    for row in rows:
        row["memory / plain"] = row["MB"] / rows[0]["MB"]
        row["time / plain"] = row["seconds"] / rows[0]["seconds"]
    rows[1]["difference"] = max(
        float(np.abs(blocks[k] - g).max() / np.abs(g).max()) for k, g in plain.items()
    )
    title = f"A second-order gradient through attention of length {length} on {backend}, cpu"
    report.publish(f"attention_{backend}", title, rows)


if __name__ == "__main__":
    main()
