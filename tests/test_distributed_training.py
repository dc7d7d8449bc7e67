"""`metaframe train` in several processes: the same run, whoever shares its tasks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from frameworks import require, slow
from metaframe.training.checkpoint import latest_checkpoint, read_checkpoint
from processes import LIMIT, descendants, environment, run, run_together

RUN = [
    *("--iterations", "6", "--meta-batch-size", "5", "--eval-tasks", "4", "--eval-steps", "1"),
    *("--width", "8", "--checkpoint-every", "2"),
    *("--precision", "float64", "--no-plots", "--timeout", "60"),
]
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node")
LAUNCH = ("-m", "metaframe.cli", "launch", "--processes")
CLI = ("-m", "metaframe.cli")


VALIDATED = ("--eval-every", "3", "--validation-tasks", "4")


def on(backend_name: str, validated: Sequence[str] = VALIDATED) -> list[str]:
    """Flags for the backend: torch takes longer to compile than to run a few steps."""
    eager = ["--no-compiled"] * (backend_name == "torch")
    return [*RUN, *validated, "--backend", backend_name, *eager]


def last(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Parameters and optimizer of the last checkpoint."""
    arrays = read_checkpoint(latest_checkpoint(folder / "checkpoints")).arrays
    return {name: x for name, x in arrays.items() if not name.startswith("rng.")}


def assert_same(one: Path, other: Path) -> None:
    first, second = last(one), last(other)
    assert set(first) == set(second)
    for name, value in first.items():
        np.testing.assert_allclose(second[name], value, rtol=1e-10, atol=1e-13, err_msg=name)


@pytest.mark.parametrize(
    ("starter", "backend_name"),
    [
        slow(TORCHRUN, "torch"),
        (LAUNCH, "torch"),
        slow(LAUNCH, "jax"),
        slow(LAUNCH, "tensorflow"),
    ],
    ids=["torchrun-torch", "launch-torch", "launch-jax", "launch-tensorflow"],
)
def test_shared_training_is_the_same_run(
    starter: Sequence[str], backend_name: str, tmp_path: Path
) -> None:
    require(backend_name)
    shared, alone = tmp_path / "shared", tmp_path / "alone"
    flags = on(backend_name)
    module = () if starter is LAUNCH else CLI
    said = run([*starter, "2", *module, "train", *flags, "--out", str(shared)])
    assert said.count("everything is in") == 1  # the first process alone reports
    run([*CLI, "train", *flags, "--out", str(alone)])
    assert_same(shared, alone)
    records = [(folder / "metrics.jsonl").read_text().count("\n") for folder in (shared, alone)]
    assert records == [8, 8]  # and writes


THREADS = pytest.mark.xfail(strict=True, reason="threads of gloo outlive the session of torch")


@pytest.mark.parametrize(
    "backend_name", [pytest.param("torch", marks=THREADS), slow("jax"), slow("tensorflow")]
)
def test_when_one_process_stops_all_do(backend_name: str, tmp_path: Path) -> None:
    """After the same step: the next tenth one, or the next evaluation.

    No thread of gloo outlives the session: at the interpreter's end it could abort the process.
    """
    require(backend_name)
    script = str(Path(__file__).parent.joinpath("support", "distributed_ending.py"))
    run_together([script, backend_name, str(tmp_path)], 2, tmp_path, LIMIT)
    first, second = (json.loads((tmp_path / f"{i}.json").read_text()) for i in range(2))
    both = {"interrupted": 26, "left of gloo": []}
    assert first == {"stopped": [20, "enough"], **both}
    assert second == {"stopped": [20, "stopped by another process"], **both}


@pytest.mark.slow
@pytest.mark.parametrize("then", [2, 1])
def test_resumes_with_fewer_processes(then: int, tmp_path: Path) -> None:
    require("torch")
    shared, alone = tmp_path / "shared", tmp_path / "alone"
    flags = on("torch")
    first = [*LAUNCH, "4", "train", *flags, "--iterations", "4", "--out", str(shared)]
    run(first)
    run([*LAUNCH, str(then), "resume", str(shared), "--iterations", "6"])
    run([*CLI, "train", *flags, "--out", str(alone)])
    assert_same(shared, alone)


@pytest.mark.slow
@pytest.mark.parametrize("backend_name", ["jax", "tensorflow"])
def test_restarts_from_the_last_checkpoint(backend_name: str, tmp_path: Path) -> None:
    """Start all processes again, as a job manager does when one was killed, and resume."""
    require(backend_name)
    shared, alone = tmp_path / "shared", tmp_path / "alone"
    many = ["--iterations", "2000", "--checkpoint-every", "100"]
    flags = [*on(backend_name, ["--eval-every", "0"]), *many, "--timeout", "10"]
    command = [sys.executable, *LAUNCH, "2", "train", *flags, "--out", str(shared)]
    variables = environment({"JAX_ENABLE_X64": "1"})
    with subprocess.Popen(command, env=variables, start_new_session=True) as launcher:
        try:
            kill_one(launcher, shared, at_step=150)
            assert launcher.wait(LIMIT) != 0
        finally:
            for pid in [launcher.pid, *descendants(launcher.pid)]:
                if Path(f"/proc/{pid}").exists():
                    os.kill(pid, signal.SIGKILL)
    run([*LAUNCH, "2", "resume", str(shared)])
    run([*CLI, "train", *flags, "--out", str(alone)])
    assert_same(shared, alone)


def kill_one(starter: subprocess.Popen[Any], folder: Path, at_step: int, which: int = -1) -> None:
    """Kill -9 the last process that `starter` started, once so many steps are recorded."""
    end = time.monotonic() + LIMIT
    metrics = folder / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count('"grad_norm"') < at_step:
        assert time.monotonic() < end
        assert starter.poll() is None
        time.sleep(0.05)
    os.kill(descendants(starter.pid)[which], signal.SIGKILL)


RESTARTS = 20


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_torchrun_restarts_end_alike(tmp_path: Path) -> None:
    """One process killed in each of 20 runs; all end with the bits of a run without a fault."""
    require("torch")
    flags = [*on("torch", ["--eval-every", "0"]), "--iterations", "80"]
    start = [*TORCHRUN, "2", "--max-restarts", "3", "--monitor-interval", "0.1", *CLI]
    # Without it a restarted process reads the address of a dead one (pytorch issue 135712).
    setting = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    run([*start, "train", *flags, "--out", str(tmp_path / "whole")], **setting)
    expected = last(tmp_path / "whole")
    for i in range(RESTARTS):
        folder = tmp_path / str(i)
        command = [sys.executable, *start, "train", *flags, "--out", str(folder)]
        with subprocess.Popen(command, env=environment(setting), start_new_session=True) as agent:
            try:
                kill_one(agent, folder, at_step=1 + i, which=-1 - i % 2)
                assert agent.wait(LIMIT) == 0
            finally:
                for pid in [agent.pid, *descendants(agent.pid)]:
                    if Path(f"/proc/{pid}").exists():
                        os.kill(pid, signal.SIGKILL)
        for name, value in last(folder).items():
            np.testing.assert_array_equal(value, expected[name], err_msg=f"{i}: {name}")
