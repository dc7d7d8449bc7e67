"""Peak memory of the gradient modes, and whether memory stays flat over many meta-steps.

    python -m benchmarks.memory --backend jax

Every case runs in a process of its own. What counts is the most memory held during one
meta-gradient, beyond what the process held before it; the first call, which compiles, is not
counted.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import report
from benchmarks.harness import BACKENDS, Program, prepare, run_python, wait
from benchmarks.workloads import Case, Execution, Workload, metaframe_program, w1, w2
from metaframe import current_backend, nn, ops
from metaframe.core.container import Container

MODES = ("reverse", "remat", "mixed")
META_STEPS = 500


def transformer(
    tasks: int = 1, width: int = 128, length: int = 64, vocabulary: int = 64, sequences: int = 8
) -> Workload:
    """One block of a language model: attention and an MLP, predicting the next token."""
    shapes = {
        "embedding": (vocabulary, width),
        "position": (length, width),
        "query": (width, width),
        "key": (width, width),
        "value": (width, width),
        "out": (width, width),
        "up": (width, 4 * width),
        "down": (4 * width, width),
        "head": (width, vocabulary),
    }
    mask = np.tril(np.ones((length, length), bool))

    def init(seed: int, dtype: str | None = None) -> Container:
        rng = np.random.default_rng(seed)
        return Container(
            {
                name: ops.asarray(rng.normal(size=shape) / math.sqrt(width), dtype)
                for name, shape in shapes.items()
            }
        )

    def apply(p: Any, tokens: Any) -> Any:
        x = nn.embedding(p["embedding"], tokens) + p["position"]
        h = nn.layer_norm(x)
        keys = (nn.dense(h, p[name]) for name in ("query", "key", "value"))
        seen = current_backend(tokens).asarray(mask)
        x = x + nn.dense(nn.attention(*keys, mask=seen), p["out"])
        h = nn.gelu(nn.dense(nn.layer_norm(x), p["up"]))
        return nn.dense(nn.layer_norm(x + nn.dense(h, p["down"])), p["head"])

    rng = np.random.default_rng(0)
    text = rng.integers(vocabulary, size=(2, tasks, sequences, length + 1))
    data = (text[0, ..., :-1], text[0, ..., 1:], text[1, ..., :-1], text[1, ..., 1:])
    return Workload("transformer", nn.Model(init, apply), nn.cross_entropy, data, 0.01)


@dataclass(frozen=True)
class Subject:
    """A case to measure, and how it runs on each backend."""

    case: Callable[[], Case]
    backends: tuple[str, ...] = BACKENDS
    task_map: str = "vmap"
    eager: tuple[str, ...] = ("torch",)  # its compiler unrolls, which takes minutes here


SUBJECTS = {
    "MLP K=50": Subject(lambda: Case(w1(tasks=25, width=128, points=100), steps=50)),
    "transformer K=50": Subject(lambda: Case(transformer(), steps=50)),
    "Conv4 K=5": Subject(lambda: Case(w2(tasks=1), steps=5), task_map="scan"),
}


def megabytes(field: str) -> float:
    """A figure of /proc/self/status: VmRSS is held now, VmHWM the most since the last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise KeyError(field)


def reset_peak() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def peak_mb(program: Program, device: str, backend: str) -> float:
    """Memory one call takes beyond what is held before it."""
    wait(program())
    if device != "cpu":
        return _peak_of_device(program, backend)
    reset_peak()
    before = megabytes("VmRSS")
    wait(program())
    return megabytes("VmHWM") - before


def _peak_of_device(program: Program, backend: str) -> float:
    """From the framework's own allocator; JAX cannot reset it, so compiling counts there."""
    if backend == "torch":
        import torch

        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        wait(program())
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    if backend == "tensorflow":
        import tensorflow as tf

        tf.config.experimental.reset_memory_stats("GPU:0")
        wait(program())
        return tf.config.experimental.get_memory_info("GPU:0")["peak"] / 2**20
    import jax

    wait(program())
    return (jax.devices()[0].memory_stats() or {})["peak_bytes_in_use"] / 2**20


def inside(backend: str, subject: str, mode: str, device: str) -> float:
    """Run one case in this process."""
    prepare(backend, device)
    chosen = SUBJECTS[subject]
    execution = Execution(chosen.task_map, mode, compiled=backend not in chosen.eager)
    where = None if device == "cpu" else device
    program = metaframe_program(chosen.case(), execution, backend, "float32", where)
    return peak_mb(program, device, backend)


def growth_mb(backend: str, compiled: bool) -> float:
    """How much more memory is held after many meta-steps than after the first tenth of them."""
    prepare(backend)
    program = metaframe_program(Case(w1()), Execution(compiled=compiled), backend, "float32")
    held = []
    for count in (META_STEPS // 10, META_STEPS - META_STEPS // 10):
        for _ in range(count):
            wait(program())
        reset_peak()
        held.append(megabytes("VmRSS"))
    return held[1] - held[0]


def modes(backend: str, subject: str, device: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for mode in MODES:
        case = ("--backend", backend, "--device", device, "--inside", subject, mode)
        row: dict[str, Any] = {"case": subject, "backend": backend, "mode": mode}
        try:
            row["MB"] = json.loads(run_python("-m", "benchmarks.memory", *case).splitlines()[-1])
            row["by reverse"] = row["MB"] / (rows[0] if rows else row).get("MB", math.nan)
        except (RuntimeError, TimeoutError) as error:
            row["note"] = str(error).split("\n--------")[0].splitlines()[-1]
        rows.append(row)
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backend", choices=BACKENDS, required=True)
    parser.add_argument("--case", nargs="+", default=list(SUBJECTS), choices=SUBJECTS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--inside", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--growth", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    backend, device = options.backend, options.device
    if options.inside:
        print(json.dumps(inside(backend, *options.inside, device)))
        return
    if options.growth:
        print(json.dumps(growth_mb(backend, options.growth == "compiled")))
        return
    rows = [row for subject in options.case for row in modes(backend, subject, device)]
    title = f"Peak memory of one meta-gradient on {backend}, {device}"
    name = f"memory_{backend}_{device.replace(':', '')}"
    report.publish(name, title, rows)
    peaks = {f"{row['case']}: {row['mode']}": row["MB"] for row in rows if "MB" in row}
    report.bars(name, title, peaks, "MB")
    kind = "compiled" if backend != "torch" else "eager"
    printed = run_python("-m", "benchmarks.memory", "--backend", backend, "--growth", kind)
    grown = json.loads(printed.splitlines()[-1])
    report.publish(
        f"memory_growth_{backend}",
        f"Memory held after {META_STEPS} meta-steps of W1, less that after {META_STEPS // 10}",
        [{"backend": backend, "run": kind, "MB": grown}],
    )


if __name__ == "__main__":
    main()
