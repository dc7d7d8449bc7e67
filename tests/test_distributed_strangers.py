"""Two processes of which one is not as the other: both say why and end, or wait and go on."""

from __future__ import annotations

from pathlib import Path

import pytest

from frameworks import require, slow
from metaframe.distributed.launch import environments
from metaframe.training import latest_checkpoint, read_checkpoint
from processes import LIMIT, codes, logs, running

STRANGER = str(Path(__file__).parent.joinpath("support", "distributed_stranger.py"))
SAID = {
    "version": ("the 2 processes do not agree: process 0 has", "versions/metaframe = '0.0.9'"),
    "data": ("the 2 processes do not agree: process 0 has", "first_tasks/train = "),
    "disk": ("No space left on device",),
}
LOST = ("process 1 of 2 lost another one", "another task died", "process 0 of 2 failed: OSError")
"""What the other one finds: the store of torch and JAX, which keeps last words, is process 0's."""


@pytest.mark.parametrize("fault", SAID)
@pytest.mark.parametrize("backend_name", [slow("torch"), slow("jax"), slow("tensorflow")])
def test_both_end_and_say_why(backend_name: str, fault: str, tmp_path: Path) -> None:
    require(backend_name)
    command = [STRANGER, backend_name, str(tmp_path), fault]
    with running(command, environments(2), tmp_path) as found:
        ended = codes(found, LIMIT)
    assert None not in ended, logs(tmp_path)
    assert 0 not in ended, logs(tmp_path)
    first, second = ((tmp_path / log).read_text() for log in ("0.log", "1.log"))
    for said in (first,) if fault == "disk" else (first, second):
        for part in SAID[fault]:
            assert part in said, logs(tmp_path)
    if fault == "disk":
        assert any(part in second for part in LOST), logs(tmp_path)
        read_checkpoint(latest_checkpoint(tmp_path / "run" / "checkpoints"))
    else:
        assert not (tmp_path / "run").exists(), "nothing has begun"


@pytest.mark.parametrize("backend_name", [slow("torch"), slow("jax"), slow("tensorflow")])
def test_a_slow_process_is_waited_for(backend_name: str, tmp_path: Path) -> None:
    require(backend_name)
    command = [STRANGER, backend_name, str(tmp_path), "slow"]
    with running(command, environments(2), tmp_path) as found:
        assert codes(found, LIMIT) == [0, 0], logs(tmp_path)
    assert latest_checkpoint(tmp_path / "run" / "checkpoints").stem == "step-00000006"
