"""ivy and metaframe on one backend, in ivy's environment: `ivy_comparison.py` runs this.

ivy's results are read as arrays of the framework underneath, because its own printing fails on
current versions of JAX and NumPy.
"""

from __future__ import annotations

import argparse
import json
from types import ModuleType
from typing import Any

import numpy as np

import metaframe
from benchmarks.harness import Program, difference, prepare, time_interleaved
from benchmarks.workloads import Case, Execution, metaframe_program, w1

TASKS = 25


def documented_example(library: ModuleType, to_variables: Any, arange: Any) -> Any:
    """The `maml_step` example of ivy's documentation, on either library."""

    def cost_fn(batch: Any, v: Any) -> Any:
        return batch.mean().x / v.mean().latent

    batch = library.Container({"x": arange})
    variables = library.Container({"latent": to_variables})
    cost, grads, _ = library.maml_step(batch, cost_fn, cost_fn, variables, 5, 0.01)
    return cost, grads["latent"]


def gradient_shape(library: ModuleType, arrays: dict[str, Any], square_mean: Any) -> Any:
    """The shape of the gradient of a (3, 4) weight with `batched=False`."""
    batch = library.Container({"x": arrays["x"], "y": arrays["y"]})
    variables = library.Container({"w": arrays["w"]})

    def cost_fn(batch: Any, v: Any) -> Any:
        return square_mean(batch["x"] @ v["w"] - batch["y"])

    _, grads, _ = library.maml_step(batch, cost_fn, None, variables, 1, 0.1, batched=False)
    return grads["w"].shape


def ivy_program(ivy: ModuleType, variable: Any) -> Program:
    """W1 with one inner step: all tasks in one call, as ivy's documentation does it."""
    workload = w1(TASKS)
    with metaframe.use_backend("torch", dtype="float64"):
        params = workload.model.init(0, "float64")
    tiled = {
        layer: {
            # A task axis, and for biases an axis that broadcasts over points.
            key: variable(ivy.array(np.tile(_row(np.asarray(x)), (TASKS, 1, 1)).astype("float32")))
            for key, x in values.items()
        }
        for layer, values in params.items()
    }
    keys = ("sx", "sy", "qx", "qy")
    arrays = (ivy.array(x.astype("float32")) for x in workload.tasks)
    batch = ivy.Container(dict(zip(keys, arrays, strict=True)))
    variables = ivy.Container(tiled)

    def cost(v: Any, x: Any, y: Any) -> Any:
        for name in ("layer1", "layer2"):
            x = ivy.relu(ivy.matmul(x, v[name]["w"]) + v[name]["b"])
        return ivy.mean((ivy.matmul(x, v["head"]["w"]) + v["head"]["b"] - y) ** 2)

    def program() -> Any:
        mean_cost, grads, _ = ivy.maml_step(
            batch,
            lambda batch, v: cost(v, batch["sx"], batch["sy"]),
            lambda batch, v: cost(v, batch["qx"], batch["qy"]),
            variables,
            1,
            workload.inner_lr,
        )
        leaves = [grads[layer][key] for layer in sorted(tiled) for key in sorted(tiled[layer])]
        return [x.data if isinstance(x, ivy.Array) else x for x in (mean_cost, *leaves)]

    return program


def _row(x: Any) -> Any:
    return x.reshape(1, *x.shape) if x.ndim == 2 else x.reshape(1, 1, -1)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backend", required=True)
    parser.add_argument("--budget", type=float, default=60)
    options = parser.parse_args(argv)
    backend = options.backend
    prepare(backend)

    import ivy
    from ivy.functional.ivy.gradients import _variable

    ivy.set_backend(backend)
    result: dict[str, Any] = {"backend": backend}
    native = backend_arrays(backend)
    rng = np.random.default_rng(0)
    raw = {
        "x": rng.normal(size=(2, 5, 3)),
        "y": rng.normal(size=(2, 5, 4)),
        "w": rng.normal(size=(3, 4)),
    }
    raw = {key: x.astype("float32") for key, x in raw.items()}
    arange = np.arange(1, 3, dtype="float32")
    ones = np.ones((2, 1), "float32")

    wrapped = {key: ivy.array(x) for key, x in raw.items()}
    wrapped["w"] = _variable(wrapped["w"])
    cost, grad = documented_example(ivy, _variable(ivy.array(ones)), ivy.array(arange))
    result["ivy"] = {
        "cost": _number(cost.data),
        "grad": _number(grad.data),
        "shape": list(gradient_shape(ivy, wrapped, lambda x: ivy.mean(x**2))),
    }
    cost, grad = documented_example(metaframe, native(ones), native(arange))
    result["metaframe"] = {
        "cost": _number(cost),
        "grad": _number(grad),
        "shape": list(
            gradient_shape(
                metaframe,
                {key: native(x) for key, x in raw.items()},
                lambda x: metaframe.ops.mean(metaframe.ops.square(x)),
            )
        ),
    }

    case = Case(w1(TASKS), steps=1)
    programs = {
        "metaframe compiled": metaframe_program(case, Execution(), backend, "float32"),
        "metaframe eager": metaframe_program(case, Execution(compiled=False), backend, "float32"),
        "ivy": ivy_program(ivy, _variable),
    }
    exact = metaframe_program(case, Execution(), backend, "float64")()
    result["w1_error"] = {name: difference(run()[1:], exact[1:]) for name, run in programs.items()}
    times = time_interleaved(programs, budget_s=options.budget)
    result["ms"] = {name: timing.record() for name, timing in times.items()}
    result["ratio"] = {name: t.ratio(times["metaframe compiled"]) for name, t in times.items()}
    print(json.dumps(result))


def backend_arrays(backend: str) -> Any:
    """NumPy to arrays of `backend`."""
    with metaframe.use_backend(backend) as chosen:
        return chosen.asarray


def _number(x: Any) -> float:
    return float(np.asarray(x.detach() if hasattr(x, "detach") else x).ravel()[0])


if __name__ == "__main__":
    main()
