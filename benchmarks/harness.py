"""Measuring: variants interleaved in one process, one thread, medians of process CPU time.

A benchmark on a shared machine has two enemies, drift and other people's work. Interleaving the
variants lets drift hit all of them alike, and a ratio is taken within each round before the
median is taken over rounds. CPU time of the process leaves out what others use; on an accelerator
only wall time means anything, so there it is the figure.
"""

from __future__ import annotations

import os
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from metaframe import tree

ROOT = Path(__file__).resolve().parent.parent
BACKENDS = ("jax", "torch", "tensorflow")
Program = Callable[[], Any]
"""Everything bound; returns a flat sequence of arrays, the cost first."""

# Read by the frameworks when they are imported, so a process sets them first.
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "TF_NUM_INTRAOP_THREADS": "1",
    "TF_NUM_INTEROP_THREADS": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TF_ENABLE_ONEDNN_OPTS": "1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
}


def prepare(backend: str, device: str = "cpu") -> None:
    """Settle threads and devices for `backend`; call it before the framework is imported."""
    if device == "cpu":
        os.environ.update(ONE_THREAD, JAX_PLATFORMS="cpu")
    if backend == "jax":
        import jax

        jax.config.update("jax_enable_x64", True)  # for the checks; timings are in float32
    elif backend == "torch":
        import torch

        if device == "cpu":
            torch.set_num_threads(1)
    elif backend == "tensorflow":
        import tensorflow as tf

        if device == "cpu":
            tf.config.threading.set_intra_op_parallelism_threads(1)
            tf.config.threading.set_inter_op_parallelism_threads(1)
            tf.config.set_visible_devices([], "GPU")


def wait(result: Any) -> None:
    """Until `result` is there: frameworks return before an accelerator has finished."""
    arrays = tree.leaves(result)
    first = arrays[0]
    if hasattr(first, "block_until_ready"):
        for x in arrays:
            x.block_until_ready()
    elif getattr(first, "is_cuda", False):
        import torch

        torch.cuda.synchronize()
    elif "GPU" in str(getattr(first, "device", "")):
        for x in arrays:
            x.numpy()


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call, one entry a round."""

    cpu: Sequence[float]
    wall: Sequence[float]
    first_call_s: float
    on_cpu: bool = True

    @property
    def rounds(self) -> Sequence[float]:
        return self.cpu if self.on_cpu else self.wall

    @property
    def ms(self) -> float:
        return statistics.median(self.rounds)

    def ratio(self, reference: Timing) -> float:
        """Median over rounds of this time by the reference's in the same round."""
        if len(self.rounds) != len(reference.rounds):  # not timed together
            return self.ms / reference.ms
        pairs = zip(self.rounds, reference.rounds, strict=True)
        return statistics.median(a / b for a, b in pairs if b > 0)

    def record(self) -> dict[str, float]:
        return {
            "cpu_ms": round(statistics.median(self.cpu), 4),
            "wall_ms": round(statistics.median(self.wall), 4),
            "first_call_s": round(self.first_call_s, 3),
            "rounds": len(self.cpu),
        }


def time_interleaved(
    programs: Mapping[str, Program],
    *,
    rounds: int = 51,
    sample_s: float = 0.02,
    budget_s: float = 60.0,
    device: str = "cpu",
) -> dict[str, Timing]:
    """Time every program, taking turns in an order that changes: caches remember who was before.

    Args:
        programs: what to time, by name.
        rounds: turns, at least 3 even if the budget is spent.
        sample_s: a program is repeated within its turn until it fills this time.
        budget_s: stop starting rounds after this much wall time.
        device: "cpu" counts CPU time, anything else wall time.
    """
    first = {name: _clocked(program, 1)[1] / 1e3 for name, program in programs.items()}
    repeats = {}
    for name, program in programs.items():
        once = min(_clocked(program, 1)[1] for _ in range(2)) / 1e3
        repeats[name] = max(1, min(1000, round(sample_s / max(once, 1e-6))))
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
    shuffled = random.Random(0)
    started = time.perf_counter()
    for i in range(rounds):
        if i >= 3 and time.perf_counter() - started > budget_s:
            break
        for name in shuffled.sample(list(programs), len(programs)):
            samples[name].append(_clocked(programs[name], repeats[name]))
    return {
        name: Timing(*map(list, zip(*pairs, strict=True)), first[name], device == "cpu")
        for name, pairs in samples.items()
    }


def _clocked(program: Program, repeats: int) -> tuple[float, float]:
    """CPU and wall milliseconds of one call."""
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(repeats):
        result = program()
    wait(result)
    scale = 1e3 / repeats
    return (time.process_time() - cpu) * scale, (time.perf_counter() - wall) * scale


def difference(xs: Any, ys: Any) -> float:
    """The largest difference of two results, relative to the size of each array."""
    both = zip(tree.leaves(xs), tree.leaves(ys), strict=True)
    pairs = [(_numpy(x), _numpy(y)) for x, y in both]
    return max(
        float(np.linalg.norm((x - y.reshape(x.shape)).ravel()) / (np.linalg.norm(y.ravel()) or 1.0))
        for x, y in pairs
    )


def _numpy(x: Any) -> np.ndarray[Any, Any]:
    return x.detach().cpu().numpy() if hasattr(x, "detach") else np.asarray(x)


def check_equal(programs: Mapping[str, Program], tolerance: float) -> dict[str, float]:
    """Differences from the first program; raises if one is beyond `tolerance`."""
    results = {name: program() for name, program in programs.items()}
    reference = next(iter(results))
    found = {name: difference(result, results[reference]) for name, result in results.items()}
    if wrong := {name: error for name, error in found.items() if not error <= tolerance}:
        raise SystemExit(f"not the numbers of {reference!r} to {tolerance:g}: {wrong}")
    return found


def peak_rss_mb() -> float:
    """The most memory this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run_python(
    *args: str,
    python: str = sys.executable,
    cwd: Path | None = None,
    timeout: float = 600,
    env: Mapping[str, str] | None = None,
) -> str:
    """The output of `python *args` on its own, with one thread and this checkout on its path."""
    done = subprocess.run(
        [python, *args],
        cwd=cwd or ROOT,
        env={**os.environ, **ONE_THREAD, **import_path(), **(env or {})},
        timeout=timeout,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-2000:] or f"status {done.returncode}")
    return done.stdout


def import_path() -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "backends")])}
