"""Modes that run a step again equal "reverse", or refuse.

Wherever what is differentiated stands, under any transform of the user's, for complex data, and
where running a step again would differ.

The truth is the inner loop written in NumPy, differentiated by finite differences.
"""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from frameworks import require, slow
from metaframe import compile as compile_whole
from metaframe import inner_loop, maml_step, meta_value_and_grad, ops, use_backend
from metaframe.backend import Backend
from metaframe.errors import BackendError, InputError
from metaframe.testing.conformance.cases import slope
from metaframe.testing.conformance.clause import Bench
from metaframe.testing.conformance.closed_form import assert_close

Call = Callable[..., Any]

X = np.array([[1.0, 2.0], [1.0, 3.0]])
W, K, RATE = 0.4, 1.3, 0.1
FIRST, SECOND = 1e-10, 2e-7
"""What a stencil can tell of a first and a second derivative."""


def reference(k: float) -> float:
    """The mean outer cost of two tasks after two steps on k times the inner cost."""
    total = 0.0
    for x in X:
        w = W
        for _ in range(2):
            w -= RATE * k * np.mean(2 * x * (w * x - 1))
        total += np.mean((w * x - 2) ** 2) / 2
    return float(total)


def derivative(order: int) -> float:
    if order == 0:
        return reference(K)
    if order == 1:
        return float(slope(lambda t: reference(K + t), 1e-2))
    return float(slope(lambda s: slope(lambda t: reference(K + s + t), 1e-2), 1e-2))


def value(k: Any, arr: Call, mode: Any, batched: Any, where: str) -> Any:
    """`reference` by `maml_step`, with `k` closed over, in the batch, a variable or the rate."""
    batch, v, rate = {"x": arr(X)}, {"w": arr(W)}, RATE
    chosen = {}
    if where == "batch":
        batch["k"] = ops.stack([k, k])
    elif where == "variable":
        v["k"], chosen = k, {"inner_v": "w"}
    elif where == "rate":
        rate = {"w": k * RATE}

    def inner(task: Any, v: Any) -> Any:
        factor = {"closure": k, "rate": 1.0}.get(where)
        factor = v["k"] if where == "variable" else factor
        factor = ops.mean(task["k"]) if where == "batch" else factor
        return factor * ops.mean((v["w"] * task["x"] - 1.0) ** 2)

    def outer(task: Any, v: Any) -> Any:
        return ops.mean((v["w"] * task["x"] - 2.0) ** 2)

    how = {"batched": batched, "mode": mode, "stop_gradients": False, **chosen}
    return maml_step(batch, inner, outer, v, 2, rate, **how)[0]


# -- transforms of the user's ------------------------------------------------------------------


def torch_transforms() -> dict[str, tuple[int, Call]]:
    """By name the order of the derivative, and the transform of a function at a point."""
    torch = importlib.import_module("torch")
    forward_ad = importlib.import_module("torch.autograd.forward_ad")
    grad, vmap = torch.func.grad, torch.func.vmap

    def tape(f: Call, k: Any, **how: Any) -> Any:
        x = k.clone().requires_grad_()
        return torch.autograd.grad(f(x), x, **how)[0]

    def tape_twice(f: Call, k: Any) -> Any:
        x = k.clone().requires_grad_()
        (first,) = torch.autograd.grad(f(x), x, create_graph=True)
        return torch.autograd.grad(first, x)[0]

    def dual(f: Call, k: Any) -> Any:
        with forward_ad.dual_level():
            y = f(forward_ad.make_dual(k, torch.ones_like(k)))
            return forward_ad.unpack_dual(y).tangent

    return {
        "value": (0, lambda f, k: f(k)),
        "vmap": (0, lambda f, k: vmap(f)(torch.stack([k, k]))[0]),
        "grad": (1, lambda f, k: grad(f)(k)),
        "grad of grad": (2, lambda f, k: grad(grad(f))(k)),
        "vmap of grad": (1, lambda f, k: vmap(grad(f))(torch.stack([k, k]))[1]),
        "grad of vmap": (1, lambda f, k: grad(lambda k: vmap(f)(torch.stack([k, k])).mean())(k)),
        "jacrev": (1, lambda f, k: torch.func.jacrev(f)(k)),
        "tape": (1, tape),
        "tape twice": (2, tape_twice),
        "tape of grad": (2, lambda f, k: tape(grad(f), k)),
        "jvp": (1, lambda f, k: torch.func.jvp(f, (k,), (torch.ones_like(k),))[1]),
        "hessian": (2, lambda f, k: torch.func.hessian(f)(k)),
        "dual": (1, dual),
    }


def jax_transforms() -> dict[str, tuple[int, Call]]:
    """As for torch."""
    jax = importlib.import_module("jax")
    grad, stack = jax.grad, importlib.import_module("jax.numpy").stack

    def scan(f: Call, k: Any) -> Any:
        return jax.lax.scan(lambda carry, _: (carry, f(carry)), k, None, length=2)[1].mean()

    return {
        "value": (0, lambda f, k: f(k)),
        "grad": (1, lambda f, k: grad(f)(k)),
        "grad of grad": (2, lambda f, k: grad(grad(f))(k)),
        "vmap of grad": (1, lambda f, k: jax.vmap(grad(f))(stack([k, k]))[1]),
        "grad of vmap": (1, lambda f, k: grad(lambda k: jax.vmap(f)(stack([k, k])).mean())(k)),
        "jit of grad": (1, lambda f, k: jax.jit(grad(f))(k)),
        "grad of jit": (1, lambda f, k: grad(jax.jit(f))(k)),
        "grad of scan": (1, lambda f, k: grad(functools.partial(scan, f))(k)),
        "grad of checkpoint": (1, lambda f, k: grad(jax.checkpoint(f))(k)),
        "jvp": (1, lambda f, k: jax.jvp(f, (k,), (1.0,))[1]),
        "hessian": (2, lambda f, k: jax.hessian(f)(k)),
    }


def tensorflow_transforms() -> dict[str, tuple[int, Call]]:
    """As for torch."""
    tf = importlib.import_module("tensorflow")
    graph = functools.partial(tf.function, autograph=False)

    def tape(f: Call, k: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(k)
            y = f(k)
        return tape.gradient(y, k)

    def forward(f: Call, k: Any) -> Any:
        with tf.autodiff.ForwardAccumulator(k, tf.ones_like(k)) as accumulator:
            y = f(k)
        return accumulator.jvp(y)

    def later(f: Call, k: Any) -> Any:
        """The function is traced before there is a tape."""
        traced = graph(f)
        traced(k)
        return tape(traced, k)

    def captured(f: Call, k: Any) -> Any:
        k = tf.identity(k)
        traced = graph(lambda: f(k))
        traced()
        return tape(lambda k: traced(), k)

    def of_variable(f: Call, k: Any) -> Any:
        k = tf.Variable(k)
        traced = graph(lambda: f(k))
        traced()
        return tape(lambda k: traced(), k)

    def rows(mapped: Call, f: Call, k: Any) -> Any:
        return tf.reduce_mean(mapped(f, tf.stack([k, k])))

    return {
        "value": (0, lambda f, k: f(k)),
        "tape": (1, tape),
        "tape of tape": (2, lambda f, k: tape(functools.partial(tape, f), k)),
        "tape in a function": (1, lambda f, k: graph(functools.partial(tape, f))(k)),
        "tape around a function": (1, lambda f, k: tape(graph(f), k)),
        "tape after tracing": (1, later),
        "captured": (1, captured),
        "variable": (1, lambda f, k: tape(f, tf.Variable(k))),
        "variable of a function": (1, of_variable),
        "tape of map_fn": (1, lambda f, k: tape(functools.partial(rows, tf.map_fn, f), k)),
        "tape of vectorized_map": (
            1,
            lambda f, k: tape(functools.partial(rows, tf.vectorized_map, f), k),
        ),
        "accumulator": (1, forward),
        "accumulator around a function": (1, lambda f, k: forward(graph(f), k)),
    }


TRANSFORMS: dict[str, Call] = {
    "torch": torch_transforms,
    "jax": jax_transforms,
    "tensorflow": tensorflow_transforms,
}
NAMES = {
    "torch": [
        *("value", "vmap", "grad", "grad of grad", "vmap of grad", "grad of vmap", "jacrev"),
        *("tape", "tape twice", "tape of grad", "jvp", "hessian", "dual"),
    ],
    "jax": [
        *("value", "grad", "grad of grad", "vmap of grad", "grad of vmap", "jit of grad"),
        *("grad of jit", "grad of scan", "grad of checkpoint", "jvp", "hessian"),
    ],
    "tensorflow": [
        *("value", "tape", "tape of tape", "tape in a function", "tape around a function"),
        *("tape after tracing", "captured", "variable", "variable of a function"),
        *("tape of map_fn", "tape of vectorized_map"),
        *("accumulator", "accumulator around a function"),
    ],
}
FORWARD = ("jvp", "hessian", "dual", "accumulator")
LOOPS_OF_CONSTANTS = ("captured", "variable of a function")


def refused(name: str, transform: str, where: str, batched: Any) -> str:
    """The words of an expected error; empty where a result is."""
    if name == "torch":
        if transform in FORWARD:
            return "forward mode|closes over"
        alone = transform in ("value", "vmap")
        return "closes over.*Make it an argument" if where == "closure" and not alone else ""
    if name == "tensorflow":
        if transform == "accumulator":
            return "ForwardAccumulator does not go through"
        if transform in LOOPS_OF_CONSTANTS and batched == "scan" and where == "closure":
            return "closes over a tensor or variable from outside"
    return ""


USUAL = {
    ("remat", "scan", "closure"): {
        "torch": NAMES["torch"],
        "jax": ["grad", "vmap of grad", "jit of grad", "grad of scan", "hessian"],
        "tensorflow": [
            *("tape", "tape in a function", "tape around a function", "captured"),
            *("variable of a function", "accumulator"),
        ],
    },
    ("mixed", False, "batch"): {
        "torch": NAMES["torch"],
        "jax": ["grad", "jit of grad", "hessian"],
        "tensorflow": ["tape", "tape around a function"],
    },
}
"""What is run by default: every transform of torch, those of the others that differ in kind."""


MODES, STRATEGIES = ("remat", "mixed"), ("vmap", "scan", False)
PLACES = ("closure", "batch", "variable", "rate")


def combinations() -> Iterator[Any]:
    """A third of all combinations, with every pair of choices among them, and the usual ones."""
    for i, j, k in itertools.product(range(2), range(3), range(4)):
        how = MODES[i], STRATEGIES[j], PLACES[k]
        for name, transforms in NAMES.items():
            for n, transform in enumerate(transforms):
                usual = transform in USUAL.get(how, {}).get(name, [])
                if usual or (n + i + j + k) % 3 == 0:
                    yield (pytest.param if usual else slow)(name, transform, *how)


def test_the_combinations_hold_every_pair() -> None:
    """A fault of one transform in one mode, say, is found whatever the other choices are."""
    chosen = [x.values for x in combinations()]
    for name, transforms in NAMES.items():
        axes = [[name], transforms, MODES, STRATEGIES, PLACES]
        for a, b in itertools.combinations(range(5), 2):
            found = {(x[a], x[b]) for x in chosen if x[0] == name}
            assert found == set(itertools.product(axes[a], axes[b]))


@pytest.mark.parametrize(("name", "transform", "mode", "batched", "where"), [*combinations()])
def test_under_a_transform(name: str, transform: str, mode: Any, batched: Any, where: str) -> None:
    require(name)
    order, run = TRANSFORMS[name]()[transform]
    with use_backend(name, dtype="float64") as backend:
        arr = Bench(backend).arr

        def f(k: Any) -> Any:
            return value(k, arr, mode, batched, where)

        message = refused(name, transform, where, batched)
        if message:
            with pytest.raises((InputError, BackendError), match=message):
                run(f, arr(K))
            return
        found = backend.to_numpy(run(f, arr(K)))
        assert_close(found, np.asarray(derivative(order)), SECOND if order == 2 else FIRST)


@pytest.mark.parametrize("mode", ["remat", "mixed"])
@pytest.mark.parametrize("batched", ["scan", slow("vmap"), slow(False)])
def test_a_tape_in_a_function_around_a_scan(mode: Any, batched: Any) -> None:
    """TensorFlow: forward mode in the gradient graph of a loop had no tangents."""
    require("tensorflow")
    tf = importlib.import_module("tensorflow")
    with use_backend("tensorflow", dtype="float64") as tensorflow:
        batch = {"x": tensorflow.asarray(X)}

        def run(w: Any, mode: Any) -> Any:
            def inner(task: Any, v: Any) -> Any:
                return ops.mean((ops.tanh(v["w"] * task["x"]) - 1.0) ** 2)

            with tf.GradientTape() as tape:
                tape.watch(w)
                how = {"batched": batched, "mode": mode, "stop_gradients": False}
                cost = maml_step(batch, inner, None, {"w": w}, 1, 0.1, **how)[0]
            return tape.gradient(cost, w)

        w = tensorflow.asarray(np.asarray(W))
        found, plain = (
            tensorflow.to_numpy(tf.function(functools.partial(run, mode=m), autograph=False)(w))
            for m in (mode, "reverse")
        )

    def cost(w: float) -> float:
        total = 0.0
        for x in X:
            y = np.tanh(w * x)
            v = w - 0.1 * np.mean(2 * (y - 1) * (1 - y**2) * x)
            total += np.mean((np.tanh(v * x) - 1) ** 2) / 2
        return float(total)

    assert_close(plain, np.asarray(slope(lambda t: cost(W + t))), FIRST)
    assert_close(found, plain)


@pytest.mark.parametrize("backend_name", ["jax", "tensorflow", slow("torch")], indirect=True)
@pytest.mark.parametrize("mode", ["remat", "mixed"])
def test_constants_in_a_closure(backend: Backend, arr: Call, to_np: Call, mode: Any) -> None:
    """Integers and floats that nobody differentiates, in a compiled program of rolled loops."""

    def step(v: Any, tasks: Any) -> Any:
        def meta_cost(v: Any, task: Any) -> Any:
            def cost(batch: Any, inner: Any) -> Any:
                off = inner["u"] * batch["x"] - ops.take(task["y"], task["labels"])
                return ops.mean(ops.square(off))

            data = {"x": task["x"]}
            return ops.sum(inner_loop(cost, v, data, steps=3, lr=0.1, mode=mode)["u"])

        return meta_value_and_grad(meta_cost)(v, tasks).grads

    tasks = {"x": X, "y": np.array([[1.0, 2.0], [3.0, 4.0]]), "labels": np.array([[0, 1], [1, 0]])}
    found = to_np(compile_whole(step)(arr({"u": np.array(0.5)}), arr(tasks)))
    wanted = np.mean([(1 - 0.2 * np.mean(x**2)) ** 3 for x in X])
    assert_close(found["u"], np.asarray(wanted))


# -- complex data --------------------------------------------------------------------------------


def complex_functions(name: str) -> tuple[Call, Call]:
    """`complex(real, imaginary)` and `squares(z, w)`, the squares of |z w + 1|."""
    framework = importlib.import_module("jax.numpy" if name == "jax" else name)
    if name == "tensorflow":
        return (
            framework.complex,
            lambda z, w: framework.abs(z * framework.cast(w, z.dtype) + 1.0) ** 2,
        )
    make = importlib.import_module("jax").lax.complex if name == "jax" else framework.complex
    return make, lambda z, w: framework.abs(z * w + 1.0) ** 2


def complex_reference(p: Any) -> float:
    z, w = p + 0.5j * p**2, 0.7
    for _ in range(2):
        w -= 0.05 * np.mean(2 * np.real(np.conj(z) * (z * w + 1)))
    return float(np.mean(np.abs(z * w + 1) ** 2))


@pytest.mark.parametrize("mode", ["reverse", "remat", "mixed"])
@pytest.mark.parametrize("where", ["batch", "variable"])
def test_complex_data(backend: Backend, arr: Call, to_np: Call, mode: Any, where: str) -> None:
    """Their cotangents, of either convention, and their second derivatives."""
    make, squares = complex_functions(backend.name)

    def outer(p: Any) -> Any:
        z = make(p, 0.5 * p**2)
        batch, v = ({"z": z}, {}) if where == "batch" else ({}, {"z": z})
        v = {**v, "w": arr(0.7)}

        def cost(batch: Any, v: Any) -> Any:
            return ops.mean(squares({**batch, **v}["z"], v["w"]))

        how = {"steps": 2, "lr": 0.05, "mode": mode, "inner_v": "w"}
        return cost(batch, inner_loop(cost, v, batch, **how))

    def gradient(p: Any) -> Any:
        return backend.value_and_grad(lambda xs: (outer(xs[0]), ()))((p,))[2][0]

    def along(p: Any) -> Any:
        return backend.value_and_grad(lambda xs: (ops.sum(gradient(xs[0])), ()))((p,))[2][0]

    p = np.array([0.3, 0.1])
    units = np.eye(2)

    def wanted(p: Any) -> Any:
        return np.array([slope(lambda t, e=e: complex_reference(p + t * e)) for e in units])

    assert_close(to_np(gradient(arr(p))), wanted(p), FIRST)
    second = np.array([slope(lambda t, e=e: wanted(p + t * e).sum()) for e in units])
    assert_close(to_np(along(arr(p))), second, 1e-7)


@pytest.mark.parametrize(
    ("mode", "task_map"),
    [
        *(("remat", "vmap"), ("mixed", "loop"), slow("remat", "scan"), slow("mixed", "scan")),
        *(slow("remat", "loop"), slow("mixed", "vmap")),
    ],
)
def test_complex_tasks(backend: Backend, arr: Call, to_np: Call, mode: Any, task_map: Any) -> None:
    _, squares = complex_functions(backend.name)

    def cost(task: Any, v: Any) -> Any:
        return ops.mean(squares(task["z"], v["w"]))

    def meta_gradient(mode: Any) -> Any:
        def meta_cost(v: Any, task: Any) -> Any:
            return cost(task, inner_loop(cost, v, task, steps=2, lr=0.05, mode=mode))

        tasks = {"z": backend.asarray(np.array([[0.3 + 0.1j, 1.0], [0.5j, 0.2]]))}
        return to_np(meta_value_and_grad(meta_cost, task_map=task_map)(arr({"w": 0.7}), tasks)[:2])

    assert_close(meta_gradient(mode), meta_gradient("reverse"))


# -- what running again would do twice -----------------------------------------------------------


def changes_in_torch() -> dict[str, tuple[Call, bool]]:
    """A factor by each way to write into a tensor, and whether it was there before."""
    torch = importlib.import_module("torch")
    functional = torch.nn.functional
    count, buffer = torch.zeros((), dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    norm = torch.nn.BatchNorm1d(2).double()
    still = torch.nn.BatchNorm1d(2, affine=False, track_running_stats=False)
    mean, var = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    rows = torch.tensor([[0.0, 1.0], [2.0, 4.0]], dtype=torch.float64)

    def made_here() -> Any:
        fresh = torch.zeros(2, dtype=torch.float64)
        fresh[0] = 1.0
        fresh += 1.0
        return torch.tensor([3.0]).mul_(2.0).sum() + fresh.sum()

    return {
        "counter": (lambda: count.add_(1.0).sum(), True),
        "item": (lambda: buffer.__setitem__(0, 2.0) or buffer.sum(), True),
        "view": (lambda: buffer.view(2, 1)[0].fill_(3.0).sum(), True),
        "out": (lambda: torch.add(rows, 1.0, out=torch.empty_like(rows)).sum(), False),
        "out of a closure": (lambda: torch.add(buffer, 1.0, out=buffer).sum(), True),
        "batch norm": (lambda: norm(rows).sum() + 1.0, True),
        "batch norm without a module": (
            lambda: functional.batch_norm(rows, mean, var, training=True).sum() + 1.0,
            True,
        ),
        "batch norm in evaluation": (
            lambda: functional.batch_norm(rows, mean, var, training=False).sum() + 1.0,
            False,
        ),
        "batch norm without statistics": (lambda: still(rows).sum() + 1.0, False),
        "made here": (made_here, False),
    }


@pytest.mark.parametrize(
    "change",
    [
        *("counter", "item", "view", "out", "out of a closure", "batch norm"),
        *("batch norm without a module", "batch norm in evaluation"),
        *("batch norm without statistics", "made here"),
    ],
)
@pytest.mark.parametrize("mode", ["remat", slow("mixed")])
def test_changes_in_place(change: str, mode: Any) -> None:
    """torch: a second run would change the tensor once more, and may see what the first left."""
    require("torch")
    factor, was_there = changes_in_torch()[change]

    def cost(task: Any, v: Any) -> Any:
        return factor() * ops.mean(ops.square(v["u"] * task["x"]))

    with use_backend("torch", dtype="float64") as torch:
        v, batch = {"u": torch.asarray(0.7)}, {"x": torch.asarray(X[0])}
        run = functools.partial(inner_loop, cost, v, batch, steps=2, lr=0.01)
        if was_there:
            with pytest.raises(InputError, match=f"mode='{mode}'.* changes a tensor in place"):
                run(mode=mode)
            return
        found, plain = (torch.to_numpy(run(mode=m)["u"]) for m in (mode, "reverse"))
        assert_close(found, plain)


def test_an_update_rule_that_changes_its_argument() -> None:
    """torch: in place, as the framework's own optimizers do."""
    require("torch")

    def update(v: Any, grads: Any, lr: Any, *, stop_gradients: bool) -> Any:
        return {"u": v["u"].data.sub_(lr * grads["u"])}

    with use_backend("torch", dtype="float64") as torch:
        v, x = {"u": torch.asarray(0.7)}, torch.asarray(X[0])
        with pytest.raises(InputError, match="changes a tensor in place"):
            inner_loop(
                lambda x, v: ops.mean(ops.square(v["u"] * x)),
                v,
                x,
                steps=2,
                lr=0.1,
                update=update,
                mode="remat",
            )


@pytest.mark.parametrize("mode", ["remat", "mixed"])
def test_a_cost_that_needs_a_value(mode: Any) -> None:
    """JAX traces a step that runs again, also where it would run eagerly."""
    require("jax")

    def cost(task: Any, v: Any) -> Any:
        loss = ops.mean(ops.square(v["u"] * task["x"]))
        return loss if float(loss) > 1.0 else 2.0 * loss

    with use_backend("jax", dtype="float64") as jax:
        v, batch = {"u": jax.asarray(0.7)}, {"x": jax.asarray(X[0])}
        with pytest.raises(
            InputError, match=f"mode='{mode}' runs an inner step again.*it is traced"
        ):
            inner_loop(cost, v, batch, steps=2, lr=0.01, mode=mode)


# -- the same numbers in every setting -----------------------------------------------------------


@pytest.mark.parametrize("mode", ["remat", slow("mixed")])
@pytest.mark.parametrize(
    "how",
    [
        {"steps": 0},
        {"average_across_steps": True},
        {"batched": "vmap", "chunk_size": 2},
        {"batched": False, "return_inner_v": "first"},
    ],
    ids=["no step", "average", "chunks", "loop"],
)
def test_the_settings_of_a_step(arr: Call, to_np: Call, mode: Any, how: dict[str, Any]) -> None:
    batch = {"x": np.vstack([X, X[:1] + 1.0]), "n": np.array([1, 2, 3])}
    v = {"w": np.array([0.4, -0.3]), "b": np.array(0.1)}
    rates = {"w": arr(np.array([0.1, 0.2])), "b": arr(0.05)}

    def cost(task: Any, v: Any) -> Any:
        x, n = (ops.reshape(task[key], shape) for key, shape in (("x", (2,)), ("n", ())))
        return ops.mean(ops.tanh(v["w"] * x + v["b"]) ** 2) * ops.astype(n, "float64")

    given = {"batched": "vmap", **how}
    steps = given.pop("steps", 2)
    found, plain = (
        to_np(maml_step(arr(batch), cost, None, arr(v), steps, rates, mode=m, **given))
        for m in (mode, "reverse")
    )
    assert_close(found, plain)
