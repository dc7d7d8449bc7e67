"""Processes that run together, for tests: always with a limit, and with nothing left behind."""

from __future__ import annotations

import codecs
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from metaframe.distributed.launch import environments

ROOT = Path(__file__).resolve().parents[2]
PATHS = [str(ROOT), str(ROOT / "backends"), str(ROOT / "tests" / "support")]

LIMIT = 300
"""Seconds that `run` waits."""

Process = subprocess.Popen[bytes]


def environment(own: Mapping[str, str]) -> dict[str, str]:
    """Of a test's process: quiet, without a GPU, on one thread."""
    found = [*PATHS, *filter(None, [os.environ.get("PYTHONPATH")])]
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    return {
        **inherited,
        "PYTHONPATH": os.pathsep.join(found),
        "CUDA_VISIBLE_DEVICES": "",
        "JAX_PLATFORMS": "cpu",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "OMP_NUM_THREADS": "1",
        "NO_COLOR": "1",
        "COLUMNS": "200",
        "TERM": "dumb",
        **own,
    }


@contextmanager
def running(
    command: Sequence[str], each: Sequence[Mapping[str, str]], folder: Path
) -> Iterator[list[Process]]:
    """One Python process for each of these environments; their output goes to `folder`/I.log."""
    found: list[Process] = []
    try:
        for i, own in enumerate(each):
            with (folder / f"{i}.log").open("wb") as log:
                process = subprocess.Popen(
                    [sys.executable, *command],
                    env=environment(own),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            found.append(process)
        yield found
    finally:
        for process in found:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def codes(processes: Sequence[Process], limit: float) -> list[int | None]:
    """Exit codes after at most `limit` seconds, None for those that still run."""
    end = time.monotonic() + limit
    while time.monotonic() < end and any(p.poll() is None for p in processes):
        time.sleep(0.05)
    return [p.poll() for p in processes]


def logs(folder: Path) -> str:
    """The output of the processes."""
    return "\n".join(f"{f.name}:\n{f.read_text()}" for f in sorted(folder.glob("*.log")))


def run_together(command: Sequence[str], processes: int, folder: Path, limit: float) -> None:
    """Run the command in that many processes, which must all succeed in time."""
    each = environments(processes) if processes > 1 else [{}]
    with running(command, each, folder) as found:
        assert codes(found, limit) == [0] * processes, logs(folder)


def run(command: Sequence[str], **own: str) -> str:
    """Run Python with these arguments, which must succeed within `LIMIT`; what it said."""
    process = subprocess.Popen(
        [sys.executable, *command],
        env=environment({"JAX_ENABLE_X64": "1", **own}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=LIMIT)
    finally:
        _end(process)
    assert process.returncode == 0, output
    return output


def _end(process: subprocess.Popen[str]) -> None:
    for pid in [process.pid, *descendants(process.pid)]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


def descendants(pid: int) -> list[int]:
    """The processes that `pid` started, and theirs."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, path.read_text().split()):
            found += [child, *descendants(child)]
    return found


class Terminal:
    """A command of metaframe in a pseudo-terminal."""

    def __init__(self, *args: str, cwd: Path | None = None) -> None:
        import pty

        self._screen, inside = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "metaframe.cli", *args],
            env={**os.environ, "TERM": "xterm", "COLUMNS": "150"},
            stdin=inside,
            stdout=inside,
            stderr=inside,
            cwd=cwd,
            start_new_session=True,
        )
        os.close(inside)
        self.shown = ""
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode

    def expect(self, text: str) -> None:
        """Read until `text` is shown."""
        while text not in self.shown:
            try:
                self.shown += self._decode(os.read(self._screen, 4096))
            except OSError:  # the command has ended
                raise AssertionError(f"{text!r} never came:\n{self.shown}") from None

    def wait(self) -> int:
        """Read to the end; the exit code."""
        with suppress(OSError):
            while data := os.read(self._screen, 4096):
                self.shown += self._decode(data)
        os.close(self._screen)
        return self.process.wait()
