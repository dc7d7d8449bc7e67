"""The lock on a folder: between processes, threads and forks, and after a death."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from frameworks import require
from metaframe import MAML, nn, optim
from metaframe.backend import Backend, use_backend
from metaframe.cli import main
from metaframe.errors import InputError
from metaframe.files import write
from metaframe.files.lock import LOCK, locked
from metaframe.tasks import SinusoidTaskSampler
from metaframe.training import Checkpoints, MetaTrainer, read_checkpoint, save_checkpoint

HOLDER = """
import sys, time
from pathlib import Path
from metaframe.files.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
print("free", flush=True)
"""


@contextmanager
def holder(folder: Path, program: str = HOLDER) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock until it ends or its input does."""
    command = [sys.executable, "-c", program, str(folder)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def trainer(seed: int = 0) -> MetaTrainer:
    model = nn.mlp([1, 3, 1])
    maml = MAML((model, model.init(seed)), 0.01)
    return MetaTrainer(maml, optim.sgd(1e-2), nn.mse, SinusoidTaskSampler(seed=0))


def test_who_holds_it_since_when_and_what_to_do(tmp_path: Path) -> None:
    with holder(tmp_path) as other:
        says = (
            rf"in use by process {other.pid} on '{re.escape(os.uname().nodename)}', since '2\d\d\d-"
            r".* UTC'\. Wait for it, or end that process.* remove .*\.lock to take"
        )
        with pytest.raises(InputError, match=says), locked(tmp_path):
            pass
        assert other.poll() is None
        assert other.stdin is not None
        other.stdin.close()
        assert other.wait() == 0
    with locked(tmp_path):
        assert [p.name for p in tmp_path.iterdir()] == [LOCK]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_a_lock_of_a_dead_process_is_taken(signum: int, tmp_path: Path) -> None:
    with holder(tmp_path) as other:
        other.send_signal(signum)
        other.wait()
        assert (tmp_path / LOCK).exists()
        with locked(tmp_path):
            pass
    assert list(tmp_path.iterdir()) == []


def test_a_stopped_process_still_holds_it(tmp_path: Path) -> None:
    with holder(tmp_path) as other:
        other.send_signal(signal.SIGSTOP)
        with pytest.raises(InputError, match=f"process {other.pid}"), locked(tmp_path):
            pass


FORKING = HOLDER.replace(
    "    print(",
    """
    import os
    child = os.fork()
    if child == 0:
        os.close(0), os.close(1)
        time.sleep(60)
        os._exit(0)
    Path(sys.argv[1], "child").write_text(str(child))
    print(""",
)


def test_a_child_that_outlives_its_parent_holds_nothing(tmp_path: Path) -> None:
    with holder(tmp_path, FORKING) as other:
        other.kill()
        other.wait()
        child = int((tmp_path / "child").read_text())
        try:
            os.kill(child, 0)  # it is alive
            time.sleep(0.1)
            with locked(tmp_path):
                pass
        finally:
            os.kill(child, signal.SIGKILL)


def test_threads_of_one_process_keep_each_other_away(tmp_path: Path) -> None:
    inside, most, refused = 0, 0, 0

    def work(number: int) -> None:
        nonlocal inside, most, refused
        for _ in range(50):
            try:
                with locked(tmp_path):
                    inside += 1
                    most = max(most, inside)
                    time.sleep(0.001)
                    inside -= 1
            except InputError:
                refused += 1

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert most == 1
    assert refused > 0
    assert list(tmp_path.iterdir()) == []


def test_a_copy_of_the_folder_ends_no_lock(tmp_path: Path) -> None:
    """As with locks that end when a process closes the file anywhere."""
    with locked(tmp_path):
        (tmp_path / LOCK).read_bytes()
        with pytest.raises(InputError, match=f"process {os.getpid()} on"), locked(tmp_path):
            pass


def test_a_folder_is_taken_over_by_removing_the_file(tmp_path: Path) -> None:
    with locked(tmp_path):
        (tmp_path / LOCK).unlink()
        with holder(tmp_path), pytest.raises(InputError, match="process "), locked(tmp_path):
            pass
    assert (tmp_path / LOCK).exists(), "who was taken over from leaves the other's file"


@pytest.mark.parametrize("text", [b"", b"[" * 9000, b'{"pid": "x"}', b"\xff", b"{}"], ids=repr)
def test_whatever_the_file_says(text: bytes, tmp_path: Path) -> None:
    (tmp_path / LOCK).write_bytes(text)
    with (tmp_path / LOCK).open("rb+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="in use by another process"), locked(tmp_path):
            pass
    with locked(tmp_path):
        pass


def test_a_file_system_without_locks_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.warns(UserWarning, match="cannot be locked"), locked(tmp_path):
        pass


def test_no_descriptor_is_left(tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    for _ in range(20):
        with locked(tmp_path), pytest.raises(InputError), locked(tmp_path):
            pass
    assert os.listdir("/proc/self/fd") == before


# -- in training -----------------------------------------------------------------------------------


def test_two_trainers_do_not_share_a_folder(tmp_path: Path) -> None:
    require("torch")
    with use_backend("torch", dtype="float64"):
        with holder(tmp_path) as other:
            runner = trainer()
            with pytest.raises(InputError, match=f"process {other.pid}"):
                runner.fit(1, 2, callbacks=[Checkpoints(tmp_path, every=1)])
            assert runner.step == 0
        trainer().fit(1, 2, callbacks=[Checkpoints(tmp_path, every=1)])
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001.safetensors"]


def test_a_run_that_is_refused_or_fails_unlocks_its_folder(tmp_path: Path) -> None:
    require("torch")
    with use_backend("torch", dtype="float64"):
        (tmp_path / "step-00000009.safetensors").touch()
        with pytest.raises(InputError, match="later steps"):
            trainer().fit(1, 2, callbacks=[Checkpoints(tmp_path, every=1)])
    assert not (tmp_path / LOCK).exists()


def test_two_commands_do_not_share_a_run_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    require("torch")
    run = tmp_path / "run"
    flags = ["--iterations", "2", "--meta-batch-size", "2", "--eval-every", "0", "--backend"]
    train = ["train", *flags, "torch", "--no-compiled", "--eval-tasks", "2", "--no-plots"]
    run.mkdir()
    with holder(run) as other:
        assert main([*train, "--out", str(run)]) == 1
        assert f"process {other.pid} on" in capsys.readouterr().err
        assert [p.name for p in run.iterdir()] == [LOCK]
    assert main([*train, "--out", str(run)]) == 0
    assert not (run / LOCK).exists()
    before = {p: p.read_bytes() for p in run.rglob("*.*")}
    with holder(run) as other:
        for command in (["resume", str(run), "--iterations", "3"], [*train, "--out", str(run)]):
            again = [*command, "--overwrite"] if command[0] == "train" else command
            assert main(again) == 1
            assert f"process {other.pid} on" in capsys.readouterr().err
        assert main(["evaluate", str(run), "--eval-tasks", "2"]) == 0  # which writes nothing
    (run / LOCK).unlink()
    assert {p: p.read_bytes() for p in run.rglob("*.*")} == before


# -- saving ------------------------------------------------------------------------------------


def test_threads_save_a_trainer_to_one_path(backend: Backend, tmp_path: Path) -> None:
    del backend
    runners, path = [trainer(seed) for seed in range(4)], tmp_path / "c"

    def save(runner: MetaTrainer) -> None:
        for _ in range(10):
            save_checkpoint(path, runner)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(save, runners))
    found = read_checkpoint(path).arrays
    assert any(
        all(np.array_equal(found[name], x) for name, x in runner.state()[0].items())
        for runner in runners
    )
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


WRITING = HOLDER.replace("with locked(Path(sys.argv[1])):", "").replace(
    '    print("held", flush=True)\n    sys.stdin.read()',
    """
import os
from metaframe.files.write import write_atomically
def wait(descriptor):
    print("held", flush=True)
    sys.stdin.read()
os.fsync, fsync = wait, os.fsync
try:
    write_atomically(Path(sys.argv[1]) / "file", b"x" * 1000)
finally:
    os.fsync = fsync
""",
)


def test_what_a_living_process_writes_is_not_cleared(tmp_path: Path) -> None:
    """And what it had begun is, once it is dead."""
    with holder(tmp_path, WRITING) as other:
        write.clear_unfinished(tmp_path)
        (left,) = tmp_path.iterdir()
        assert left.name.endswith(write.UNFINISHED)
        other.kill()
        other.wait()
        write.clear_unfinished(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_process_numbers_count_in_their_namespace_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers of one name and one volume have each their own process 7."""
    here = write._here()
    assert here == write.HERE
    monkeypatch.setattr(os, "readlink", lambda path: "pid:[1]")
    assert write._here() != here


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EIO])
def test_a_disk_that_takes_no_more_is_one_message(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the second checkpoint: the first one stays, and the folder is unlocked."""
    require("torch")
    flush, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 10:
            raise OSError(code, os.strerror(code))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    flags = ["--iterations", "40", "--checkpoint-every", "1", "--eval-every", "0", "--no-compiled"]
    run = tmp_path / "run"
    command = ["train", *flags, "--backend", "torch", "--meta-batch-size", "2", "--out", str(run)]
    assert main(command) == 1
    said = capsys.readouterr().err
    assert os.strerror(code) in said
    assert "Traceback" not in said
    monkeypatch.setattr(os, "fsync", flush)
    files = sorted((run / "checkpoints").iterdir())
    assert files
    for file in files:
        read_checkpoint(file)
    assert not [p for p in run.rglob("*") if p.name == LOCK or p.name.endswith(write.UNFINISHED)]


def test_clocks_that_jump_change_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Backwards, by years, at every reading: neither the lock nor training looks at them."""
    require("torch")
    clock: Any = iter(range(2_000_000_000, 0, -50_000_000))
    with use_backend("torch", dtype="float64"):
        one, other = trainer(), trainer()
        one.fit(4, 2, callbacks=[Checkpoints(tmp_path / "one", every=1)])
        monkeypatch.setattr(time, "time", lambda: next(clock))
        monkeypatch.setattr(time, "gmtime", lambda: time.struct_time((1970, *[1] * 8)))
        other.fit(4, 2, callbacks=[Checkpoints(tmp_path / "other", every=1)])
    for file in sorted((tmp_path / "one").iterdir()):
        assert read_checkpoint(file).plain == read_checkpoint(tmp_path / "other" / file.name).plain
