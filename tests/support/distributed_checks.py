"""One process of a run that checks what the processes refuse and exchange; results as JSON.

python tests/support/distributed_checks.py ENGINE FOLDER DEVICES
"""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import distributed_problem as problem
from distributed_worker import active, prepare

RANK = int(os.environ.get("RANK", "0"))


def arrays(backend: Any, values: Any) -> Any:
    from metaframe import tree

    return tree.map(backend.asarray, values)


def refusal(call: Callable[[], Any]) -> str:
    """The error that `call` raises, as a text."""
    try:
        call()
    except Exception as error:  # noqa: BLE001  the test says which it should be
        return f"{type(error).__name__}: {error}"
    return "nothing raised"


def collectives(name: str, step: Any, batch: Any, v: Any) -> int:
    """How many one step has."""
    if name == "torch":
        return _calls(importlib.import_module("torch.distributed"), lambda: step(batch, v))
    if name == "jax":
        jax = importlib.import_module("jax")
        text = jax.jit(step).lower(batch, v).compile().as_text()
        return len(
            re.findall(
                r"\b(?:all-reduce|all-gather|all-to-all|collective-permute)(?:-start)?\(", text
            )
        )
    tf = importlib.import_module("tensorflow")
    graph = tf.function(lambda: step(batch, v), autograph=False).get_concrete_function()
    nodes = list(graph.graph.as_graph_def().node)
    for function in graph.graph.as_graph_def().library.function:
        nodes += function.node_def
    return sum(node.op.startswith("Collective") for node in nodes)


def _calls(module: Any, run: Callable[[], Any]) -> int:
    """Collectives of torch that `run` starts."""
    names = ("all_reduce", "all_gather", "broadcast", "all_to_all", "reduce_scatter", "reduce")
    found: list[str] = []
    originals = {name: getattr(module, name) for name in names}

    def counted(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            found.append(name)
            return originals[name](*args, **kwargs)

        return call

    for name in names:
        setattr(module, name, counted(name))
    try:
        run()
    finally:
        for name in names:
            setattr(module, name, originals[name])
    return len(found)


def spoilt(task: int) -> Any:
    """The batch with one target of one task that is no number."""
    batch = problem.batch(7, "float64")
    batch["query"]["y"][task, 0, 0] = np.nan
    return batch


def task_cost(v: Any, task: Any) -> Any:
    from metaframe import inner_loop

    adapted = inner_loop(problem.support_cost, v, task, steps=2, lr=problem.RATE)
    return problem.query_cost(task, adapted)


def gap_of_share(backend: Any, batch: Any, v: Any) -> float:
    """The largest difference made by passing this process's own tasks instead of all."""
    from metaframe import compile, meta_value_and_grad, tree
    from metaframe.distributed import Share

    whole = meta_value_and_grad(task_cost, distributed=True)
    parts = meta_value_and_grad(task_cost, distributed=Share(7))
    if backend.name != "torch":
        whole, parts = compile(whole), compile(parts)
    share = backend.workers().share(7)
    own = tree.map(lambda x: backend.ops.stack([x[i] for i in share]), batch)
    pairs = zip(tree.leaves(whole(v, batch)), tree.leaves(parts(v, own)), strict=True)
    return max(float(np.abs(backend.to_numpy(a) - backend.to_numpy(b)).max()) for a, b in pairs)


def checks(name: str) -> dict[str, Any]:
    from metaframe import meta_value_and_grad, use_backend

    found: dict[str, Any] = {}
    with use_backend(name, dtype="float64") as backend:
        batch, v = (
            arrays(backend, x) for x in (problem.batch(7, "float64"), problem.variables("float64"))
        )
        step = problem.step("maml", distributed=True)
        step(batch, v)  # agreed on
        found["collectives"] = collectives(name, step, batch, v)
        found["batched"] = refusal(
            lambda: problem.step("maml", distributed=True, batched=True)(batch, v)
        )
        checked = problem.step("maml", distributed=True, check_finite=True)
        found["nan"] = refusal(lambda: checked(arrays(backend, spoilt(5)), v))
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            problem.RATE = 0.06 + RANK
            found["settings"] = refusal(lambda: step(batch, v))
            problem.RATE = 0.05
            fewer = arrays(backend, problem.batch(6 - RANK, "float64"))
            found["shapes"] = refusal(lambda: step(fewer, v))

        def cost(xs: Any) -> Any:
            inputs = {**v, "head": {**v["head"], "b": xs[0]}}
            return meta_value_and_grad(task_cost, distributed=True)(inputs, batch).cost, ()

        transformed = backend.value_and_grad(cost)
        around = importlib.import_module("jax").jit if name == "jax" else lambda fn: fn
        compiled = backend.value_and_grad(around(cost))
        found["within a compiled one"] = refusal(lambda: compiled((v["head"]["b"],)))
        found["share"] = gap_of_share(backend, batch, v)
        found["within a gradient"] = refusal(lambda: transformed((v["head"]["b"],)))
        if name == "torch":
            leaf = v["head"]["b"].clone().requires_grad_()
            result = cost((leaf,))[0]
            found["from outside"] = refusal(lambda: result.backward())
        found["still well"] = refusal(lambda: step(batch, v))
    return found


def main() -> None:
    engine, folder, devices = sys.argv[1:]
    prepare(int(devices))
    with active(engine, int(devices)) as name:
        found = checks(name)
    (Path(folder) / f"{RANK}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
