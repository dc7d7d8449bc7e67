"""The torch libraries of the field and metaframe, in their environment: `peers.py` runs this.

Each library is used as its own documentation shows it: a loop over tasks, adapt on the support
set, backward through the query cost. Missing libraries are reported, not skipped in silence.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import Program, check_equal, prepare, time_interleaved
from benchmarks.workloads import WORKLOADS, Case, Execution, metaframe_program
from metaframe import tree

TOLERANCE = 1e-10
Loss = Callable[[Tensor, Tensor], Tensor]
Tasks = list[tuple[Tensor, Tensor, Tensor, Tensor]]


def module(case: Case) -> nn.Module:
    """The workload's model from torch's own layers, its parameters in metaframe's order."""
    if case.workload.name == "W1":
        return nn.Sequential(
            nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1)
        )
    blocks: list[nn.Module] = []
    for inputs in (1, 64, 64, 64):
        blocks += [
            nn.Conv2d(inputs, 64, 3, padding=1, bias=False),
            nn.BatchNorm2d(64, track_running_stats=False),
            nn.MaxPool2d(2),
            nn.ReLU(),
        ]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(64, 5))


def paired(net: nn.Module, params: Any) -> Iterator[tuple[Tensor, Tensor, list[int]]]:
    """(torch parameter, metaframe's, axes of torch's in metaframe's order), in metaframe's order.

    metaframe sorts by name: the head comes first, bias before weight, then the hidden layers.
    """
    layers = [m for m in net if list(m.parameters(recurse=False))]
    *hidden, head = layers
    ours = iter(tree.leaves(params))
    if isinstance(hidden[0], nn.Linear):
        for layer in (head, *hidden):
            yield layer.bias, next(ours), [0]
            yield layer.weight, next(ours), [1, 0]
        return
    for conv, norm in zip(hidden[::2], hidden[1::2], strict=True):
        yield conv.weight, next(ours), [2, 3, 1, 0]
        yield norm.weight, next(ours), [0]
        yield norm.bias, next(ours), [0]
    yield head.bias, next(ours), [0]
    yield head.weight, next(ours), [1, 0]


class Problem:
    """A case with torch's module, data and loss."""

    def __init__(self, case: Case, dtype: str) -> None:
        self.case, self.lr = case, case.workload.inner_lr
        self.net = module(case).to(getattr(torch, dtype))
        self.pairs = list(paired(self.net, case.workload.params("torch", dtype)))
        with torch.no_grad():
            for theirs, ours, axes in self.pairs:
                inverse = [int(i) for i in np.argsort(axes)]
                theirs.copy_(ours.permute(inverse))
        self.loss: Loss = F.mse_loss if case.workload.name == "W1" else F.cross_entropy
        arrays = list(case.workload.arrays("torch", dtype))
        if arrays[0].ndim == 5:  # images, in torch's layout
            arrays[0], arrays[2] = (x.permute(0, 1, 4, 2, 3).contiguous() for x in arrays[::2])
        self.tasks: Tasks = list(zip(*arrays, strict=True))

    def program(self, query_cost: Callable[[Any], Tensor]) -> Program:
        """Accumulate gradients over tasks with `backward`, as all of these libraries do."""

        def run() -> Any:
            self.net.zero_grad(set_to_none=True)
            total = 0.0
            for task in self.tasks:
                cost = query_cost(task) / len(self.tasks)
                cost.backward()
                total = total + cost.detach()
            return (total, *(p.grad.permute(axes) for p, _, axes in self.pairs))

        return run


def learn2learn(problem: Problem, source: Path) -> Program:
    # 0.2.0 has C sources that no current Python compiles. They concern its data sets: MAML is
    # pure Python, and imports once the package's own __init__, which imports everything, is out.
    for name in ("learn2learn", "learn2learn.algorithms"):
        package = types.ModuleType(name)
        package.__path__ = [str(source.joinpath(*name.split(".")))]
        sys.modules.setdefault(name, package)
    maml = importlib.import_module("learn2learn.algorithms.maml").MAML(problem.net, lr=problem.lr)

    def query_cost(task: Any) -> Tensor:
        sx, sy, qx, qy = task
        learner = maml.clone()
        for _ in range(problem.case.steps):
            learner.adapt(problem.loss(learner(sx), sy))
        return problem.loss(learner(qx), qy)

    return problem.program(query_cost)


def higher(problem: Problem, source: Path) -> Program:
    import higher

    del source
    optimizer = torch.optim.SGD(problem.net.parameters(), lr=problem.lr)

    def query_cost(task: Any) -> Tensor:
        sx, sy, qx, qy = task
        with higher.innerloop_ctx(problem.net, optimizer, copy_initial_weights=False) as (net, opt):
            for _ in range(problem.case.steps):
                opt.step(problem.loss(net(sx), sy))
            return problem.loss(net(qx), qy)

    return problem.program(query_cost)


def torchopt(problem: Problem, source: Path) -> Program:
    import torchopt

    del source
    optimizer = torchopt.MetaSGD(problem.net, lr=problem.lr)

    def query_cost(task: Any) -> Tensor:
        sx, sy, qx, qy = task
        start = torchopt.extract_state_dict(problem.net, by="reference")
        state = torchopt.extract_state_dict(optimizer, by="reference")
        for _ in range(problem.case.steps):
            optimizer.step(problem.loss(problem.net(sx), sy))
        cost = problem.loss(problem.net(qx), qy)
        torchopt.recover_state_dict(problem.net, start)
        torchopt.recover_state_dict(optimizer, state)
        return cost

    return problem.program(query_cost)


def iteryne(problem: Problem, source: Path) -> Program:
    import iteryne

    del source
    maml = iteryne.MAML(problem.net, inner_lr=problem.lr)

    def query_cost(task: Any) -> Tensor:
        sx, sy, qx, qy = task
        learner = maml.clone()
        for _ in range(problem.case.steps):
            learner.adapt(problem.loss(learner(sx), sy))
        return problem.loss(learner(qx), qy)

    return problem.program(query_cost)


LIBRARIES: dict[str, Callable[[Problem, Path], Program]] = {
    "learn2learn": learn2learn,
    "higher": higher,
    "torchopt": torchopt,
    "iteryne": iteryne,
}


def programs(case: Case, dtype: str, source: Path) -> tuple[dict[str, Program], dict[str, str]]:
    """Programs by name, and the libraries that could not be used with the reason."""
    task_map = "vmap" if case.workload.name == "W1" else "scan"
    eager = Execution(task_map, compiled=False)
    found = {eager.name: metaframe_program(case, eager, "torch", dtype)}
    if case.workload.name == "W1":
        compiled = Execution()
        found[compiled.name] = metaframe_program(case, compiled, "torch", dtype)
    missing = {}
    for name, make in LIBRARIES.items():
        try:
            # Each gets a module of its own: some of them replace its parameters.
            found[name] = make(Problem(case, dtype), source)
            found[name]()
        except Exception as error:  # noqa: BLE001 - whatever it is, it goes into the table
            found.pop(name, None)
            missing[name] = f"{type(error).__name__}: {error}"
    return found, missing


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workload", choices=WORKLOADS, default="W1")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--budget", type=float, default=30)
    parser.add_argument("--source", type=Path, required=True)
    options = parser.parse_args(argv)
    prepare("torch")
    case = Case(WORKLOADS[options.workload](), options.steps)
    errors = check_equal(programs(case, "float64", options.source)[0], TOLERANCE)
    runnable, missing = programs(case, "float32", options.source)
    times = time_interleaved(runnable, budget_s=options.budget)
    ours = next(name for name in reversed(times) if name.startswith("metaframe"))
    rows = [
        {
            "case": case.name,
            "library": name,
            "CPU ms": timing.ms,
            f"by {ours}": timing.ratio(times[ours]),
            "difference": errors[name],
        }
        for name, timing in times.items()
    ]
    rows += [
        {"case": case.name, "library": name, "note": note.splitlines()[0]}
        for name, note in missing.items()
    ]
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
