"""Two processes, one of which fails: the other one ends, in time and with a reason."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from frameworks import require, slow
from metaframe.distributed.launch import environments
from processes import codes, logs, running

VICTIM = str(Path(__file__).parent.joinpath("support", "distributed_victim.py"))
TIMEOUT = 10.0
START = 240
"""Seconds until the fault: imports and compilers, on a machine that may be busy."""

LOST = "process 0 of 2 lost another one"
TOLD = "process 1 of 2 failed: ValueError: the disk with the data is gone"
# JAX ends the process from C++, where no exception of Python's can be had.
SAID = {
    ("torch", "kill"): LOST,
    ("torch", "stop"): LOST,
    ("torch", "raise"): TOLD,
    ("jax", "kill"): "another task died",
    ("jax", "stop"): "another task died",
    ("jax", "raise"): TOLD,
    ("tensorflow", "kill"): LOST,
    ("tensorflow", "stop"): LOST,
    ("tensorflow", "raise"): TOLD,
}


@pytest.mark.parametrize(
    ("backend_name", "fault"),
    [slow(*case) for case in SAID],
)
def test_the_survivor_ends(backend_name: str, fault: str, tmp_path: Path) -> None:
    require(backend_name)
    command = [VICTIM, backend_name, str(tmp_path), str(TIMEOUT), fault]
    with running(command, environments(2), tmp_path) as (survivor, victim):
        end = time.monotonic() + START
        while not (tmp_path / "fault").exists():
            assert time.monotonic() < end, logs(tmp_path)
            assert survivor.poll() is None, logs(tmp_path)
            time.sleep(0.1)
        (code,) = codes([survivor], TIMEOUT + 30)
        assert code not in (None, 0), logs(tmp_path)
        assert SAID[backend_name, fault] in (tmp_path / "0.log").read_text()
        if fault == "raise":
            (code,) = codes([victim], TIMEOUT + 30)
            assert code not in (None, 0), logs(tmp_path)
            assert "the disk with the data is gone" in (tmp_path / "1.log").read_text()
