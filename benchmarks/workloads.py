"""A workload with an inner loop around it, and metaframe's program for that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import metaframe
from metaframe import optim
from metaframe.cli.workloads import WORKLOADS as WORKLOADS
from metaframe.cli.workloads import Workload as Workload
from metaframe.cli.workloads import w1 as w1
from metaframe.cli.workloads import w2 as w2


@dataclass(frozen=True)
class Case:
    """A workload with the inner loop around it."""

    workload: Workload
    steps: int = 1
    order: int = 2

    @property
    def name(self) -> str:
        """Such as "W1 K=5 first order"."""
        order = {1: "first order", 2: "second order"}[self.order]
        return f"{self.workload.name} K={self.steps} {order}"


@dataclass(frozen=True)
class Execution:
    """How metaframe runs a case."""

    task_map: str = "vmap"
    mode: str = "reverse"
    compiled: bool = True
    chunk_size: int | None = None

    @property
    def name(self) -> str:
        """Such as "metaframe vmap remat, eager"."""
        chunks = f" by {self.chunk_size}" if self.chunk_size else ""
        mode = "" if self.mode == "reverse" else f" {self.mode}"
        how = "compiled" if self.compiled else "eager"
        return f"metaframe {self.task_map}{chunks}{mode}, {how}"


def support(task: Any) -> Any:
    return task[:2]


def query(task: Any) -> Any:
    return task[2:]


def metaframe_program(
    case: Case, execution: Execution, backend: str, dtype: str, device: str | None = None
) -> Callable[[], Any]:
    """One meta-gradient of `case` by metaframe: cost and gradients."""
    workload = case.workload
    step = metaframe.maml_step if case.order == 2 else metaframe.fomaml_step
    options: dict[str, Any] = {"mode": execution.mode} if case.order == 2 else {}

    def meta_gradient(params: Any, tasks: Any) -> Any:
        return step(
            tasks,
            workload.cost,
            None,
            params,
            case.steps,
            workload.inner_lr,
            inner_optimization_step=optim.sgd(),
            inner_batch_fn=support,
            outer_batch_fn=query,
            batched=execution.task_map,
            chunk_size=execution.chunk_size,
            **options,
        )[:2]

    run = metaframe.compile(meta_gradient) if execution.compiled else meta_gradient
    params = workload.params(backend, dtype, device)
    tasks = workload.arrays(backend, dtype, device)

    return lambda: run(params, tasks)
