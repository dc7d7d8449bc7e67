"""One process of a run of the command, in which one of two is not as the other.

    python tests/support/distributed_stranger.py BACKEND FOLDER FAULT

FAULT is version, data, disk or slow: another version of metaframe, other data, a disk of the first
process that is full after some files, or a process that takes its time.
"""

from __future__ import annotations

import errno
import os
import sys
import time
from typing import Any

import metaframe
from metaframe.cli import main
from metaframe.tasks import SinusoidTaskSampler
from metaframe.training import MetaTrainer

SLOW = 4


def become(fault: str) -> None:
    if fault == "version":
        metaframe.__version__ = "0.0.9"
    elif fault == "data":
        draw = SinusoidTaskSampler.draw_batch
        SinusoidTaskSampler.draw_batch = lambda self, x: draw(self, x * 0.999)  # type: ignore[method-assign]
    elif fault == "disk":
        flush, calls = os.fsync, []

        def full(descriptor: int) -> None:
            calls.append(descriptor)
            if len(calls) > 8:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            flush(descriptor)

        os.fsync = full
    else:
        advance = MetaTrainer.advance

        def late(self: MetaTrainer, *args: Any) -> Any:
            time.sleep(SLOW if self.step == 1 else 0)
            return advance(self, *args)

        MetaTrainer.advance = late  # type: ignore[method-assign]


if __name__ == "__main__":
    backend, folder, fault = sys.argv[1:]
    if int(os.environ["RANK"]) == (0 if fault == "disk" else 1):
        become(fault)
    flags = ["--iterations", "6", "--meta-batch-size", "4", "--checkpoint-every", "1"]
    flags += ["--eval-every", "0", "--eval-tasks", "2", "--width", "4", "--no-plots"]
    flags += ["--timeout", "30", "--backend", backend, "--out", f"{folder}/run"]
    sys.exit(main(["train", *flags, *(["--no-compiled"] if backend == "torch" else [])]))
