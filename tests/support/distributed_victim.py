"""One process of a run in which process 1 comes to grief at step 5.

    python tests/support/distributed_victim.py BACKEND FOLDER TIMEOUT FAULT

FAULT is kill, stop or raise. The time at which it happens is left in FOLDER/fault.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import distributed_problem as problem
from distributed_worker import prepare

STEPS = 200


def come_to_grief(folder: Path, fault: str) -> None:
    (folder / "fault").write_text(str(time.time()))
    if fault == "raise":
        raise ValueError("the disk with the data is gone")
    os.kill(os.getpid(), signal.SIGKILL if fault == "kill" else signal.SIGSTOP)


def main() -> None:
    name, folder, timeout, fault = sys.argv[1:]
    prepare(1)
    from metaframe import compile, tree, use_backend
    from metaframe.distributed import session

    with session(name, timeout=float(timeout)) as workers, use_backend(name) as backend:
        batch = tree.map(backend.asarray, problem.batch(8, "float32"))
        v = tree.map(backend.asarray, problem.variables("float32"))
        step = problem.step("fomaml", distributed=True)
        run = step if name == "torch" else compile(step)
        for i in range(STEPS):
            if i == 5 and workers.process == 1:
                come_to_grief(Path(folder), fault)
            _, grads = run(batch, v)
            v = tree.map(lambda x, g: x - 0.01 * g, v, grads)
            time.sleep(0.05)


if __name__ == "__main__":
    main()
