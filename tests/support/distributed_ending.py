"""One process of a run that one process alone wants to end; how it ended as JSON.

python tests/support/distributed_ending.py BACKEND FOLDER
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from distributed_worker import prepare


def main() -> None:
    name, folder = sys.argv[1:]
    prepare(1)
    from metaframe import MAML, MetaTrainer, nn, optim, use_backend
    from metaframe.distributed import session
    from metaframe.tasks import SinusoidTaskSampler
    from metaframe.training import Callback, Run, StepSettings

    class First(Callback):
        everywhere = False

        def on_step(self, run: Run) -> None:
            if run.iteration == 13:
                run.stop("enough")

    class CtrlC(Callback):
        def on_step(self, run: Run) -> None:
            if run.iteration == 3 and workers.process == 1:
                os.kill(os.getpid(), signal.SIGINT)

    found: dict[str, Any] = {}
    with session(name, timeout=60) as workers, use_backend(name):
        model = nn.mlp([1, 4, 1])
        trainer = MetaTrainer(
            MAML((model, model.init(0)), 0.01),
            optim.sgd(0.01),
            nn.mse,
            SinusoidTaskSampler(seed=0),
            settings=StepSettings(distributed=True),
        )
        history = trainer.fit(100, 4, callbacks=[First()])
        found["stopped"] = [len(history.meta_loss), history.stopped]
        tasks = SinusoidTaskSampler(seed=1).sample(2)
        try:
            trainer.fit(100, 4, eval_every=13, eval_tasks=tasks, callbacks=[CtrlC()])
        except KeyboardInterrupt:
            found["interrupted"] = trainer.step
    threads = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    found["left of gloo"] = [name for name in threads if "gloo" in name]
    (Path(folder) / f"{workers.process}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
