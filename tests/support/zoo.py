"""One small network, written in every library, and its meta-gradient worked out in NumPy.

The network is `tanh(x @ w1 + b1) @ w2 + b2` under a mean squared error. Its gradient is written out
by hand, so that adaptation in NumPy owes nothing to the code under test; meta-gradients are
fourth-order finite differences of that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from frameworks import require
from metaframe import nn, ops
from metaframe.backend import use_backend
from metaframe.learners.functions import array_like
from metaframe.tasks import Task
from metaframe.testing.conformance.cases import slope

Values = dict[str, np.ndarray[Any, Any]]
NAMES = ("w1", "b1", "w2", "b2")


def weights(seed: int = 0) -> Values:
    rng = np.random.default_rng(seed)
    shapes = {"w1": (3, 4), "b1": (4,), "w2": (4, 2), "b2": (2,)}
    return {name: rng.normal(size=shape) * 0.5 for name, shape in shapes.items()}


def tasks(count: int = 3, seed: int = 1) -> list[Task]:
    rng = np.random.default_rng(seed)
    return [
        Task(*[rng.normal(size=(k, n)) for k, n in ((6, 3), (6, 2), (5, 3), (5, 2))])
        for _ in range(count)
    ]


class Fixed:
    """The same tasks again and again, so that there is no place in them to come back to."""

    def sample(self, meta_batch_size: int) -> list[Task]:
        return tasks(meta_batch_size)

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: Any) -> None:
        del state


def predict(v: Values, x: Any) -> Any:
    return np.tanh(x @ v["w1"] + v["b1"]) @ v["w2"] + v["b2"]


def loss(v: Values, x: Any, y: Any) -> float:
    return float(np.mean((predict(v, x) - y) ** 2))


def gradient(v: Values, x: Any, y: Any) -> Values:
    return backward(v, x, 2 * (predict(v, x) - y) / y.size)


def backward(v: Values, x: Any, error: Any) -> Values:
    """The gradient of a loss whose derivative in the outputs is `error`."""
    hidden = np.tanh(x @ v["w1"] + v["b1"])
    back = (error @ v["w2"].T) * (1 - hidden**2)
    return {"w1": x.T @ back, "b1": back.sum(0), "w2": hidden.T @ error, "b2": error.sum(0)}


def path(v: Values, task: Task, steps: int, step: Callable[[int, Values, Values], Values]) -> Any:
    """The points visited, from `v`; `step(k, v, gradient) -> next v`."""
    points = [v]
    for k in range(steps):
        v = step(k, v, gradient(v, task.support_x, task.support_y))
        points.append(v)
    return points


def adapted(v: Values, task: Task, rates: Any, steps: int) -> Values:
    def step(k: int, v: Values, g: Values) -> Values:
        return {name: v[name] - rates[name] * g[name] for name in v}

    last: Values = path(v, task, steps, step)[-1]
    return last


def meta_cost(v: Values, rates: Any, steps: int, batch: list[Task]) -> float:
    costs = [loss(adapted(v, t, rates, steps), t.query_x, t.query_y) for t in batch]
    return float(np.mean(costs))


def differences(fn: Callable[[Values], float], at: Values) -> Values:
    """The gradient of `fn` by the fourth-order stencil."""
    result = {}
    for name, value in at.items():
        result[name] = np.zeros_like(value)
        for index in np.ndindex(value.shape):

            def along(t: float, name: str = name, index: Any = index) -> float:
                moved = {**at, name: at[name].copy()}
                moved[name][index] += t
                return fn(moved)

            result[name][index] = slope(along)
    return result


def check_along_a_line(
    maml: Any,
    loss_fn: Any,
    tasks: list[Task],
    hows: Sequence[dict[str, Any]],
    seed: int = 0,
    step: float = 2e-4,
) -> list[Any]:
    """The meta-gradients computed by `hows`, against differences of the cost by the first of them.

    Returns:
        The results; the meta-parameters are as they were.
    """
    rng, backend = np.random.default_rng(seed), maml.backend
    live = maml.meta_parameters()
    # Copies: what a framework hands out may be the memory it computes in.
    start = {name: np.array(backend.to_numpy(x)) for name, x in maml.meta_arrays().items()}
    line = {name: rng.normal(size=x.shape) for name, x in start.items()}

    def at(t: float) -> dict[str, Any]:
        return {n: array_like(x + t * line[n], live, backend) for n, x in start.items()}

    def along(t: float) -> float:
        maml.assign(at(t))
        return float(backend.to_numpy(maml.meta_value_and_grad(loss_fn, tasks, **hows[0]).cost))

    results = [maml.meta_value_and_grad(loss_fn, tasks, **how) for how in hows]
    expected = slope(along, step)
    maml.assign(at(0.0))
    for result in results:
        found = sum((backend.to_numpy(g) * line[n]).sum() for n, g in result.grads.items())
        assert abs(found - expected) < 1e-9 * max(1.0, abs(expected))
    return results


@dataclass(frozen=True)
class Library:
    """How a library builds the network, and what it calls and how it lays out its parameters."""

    id: str
    backend: str
    build: Callable[[Values], Any]
    names: tuple[str, str, str, str]
    transposed: bool = False
    head: Callable[[Any], Any] = lambda model: "head"

    def canonical(self, named: Any, backend: Any, prefix: str = "") -> Values:
        """Values by the library's names -> values by ours."""
        found = {}
        for ours, theirs in zip(NAMES, self.names, strict=True):
            if prefix + theirs in named:
                value = backend.to_numpy(named[prefix + theirs])
                found[ours] = value.T if self.transposed and value.ndim == 2 else value
        return found


def _torch(v: Values) -> Any:
    import torch

    model = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)
    ).double()
    with torch.no_grad():
        for p, name in zip(model.parameters(), NAMES, strict=True):
            p.copy_(torch.from_numpy(v[name]).T if p.dim() == 2 else torch.from_numpy(v[name]))
    return model


def _nnx(v: Values) -> Any:
    import jax.numpy as jnp

    nnx = pytest.importorskip("flax.nnx")

    class Net(nnx.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            settings = {"rngs": nnx.Rngs(0), "param_dtype": jnp.float64}
            self.layer1, self.head = nnx.Linear(3, 4, **settings), nnx.Linear(4, 2, **settings)
            for layer, i in ((self.layer1, 1), (self.head, 2)):
                layer.kernel[...] = jnp.asarray(v[f"w{i}"])
                layer.bias[...] = jnp.asarray(v[f"b{i}"])

        def __call__(self, x: Any) -> Any:
            return self.head(jnp.tanh(self.layer1(x)))

    return Net()


def _linen(v: Values) -> Any:
    import jax.numpy as jnp

    linen = pytest.importorskip("flax.linen")

    class Net(linen.Module):  # type: ignore[misc, name-defined]
        @linen.compact  # type: ignore[untyped-decorator]
        def __call__(self, x: Any) -> Any:
            x = linen.Dense(4, name="layer1", param_dtype=jnp.float64)(x)
            return linen.Dense(2, name="head", param_dtype=jnp.float64)(jnp.tanh(x))

    layers = {
        name: {"kernel": jnp.asarray(v[f"w{i}"]), "bias": jnp.asarray(v[f"b{i}"])}
        for i, name in ((1, "layer1"), (2, "head"))
    }
    return Net(), {"params": layers}


def _equinox(v: Values) -> Any:
    import jax
    import jax.numpy as jnp

    equinox = pytest.importorskip("equinox")
    model = equinox.nn.MLP(3, 2, 4, 1, activation=jnp.tanh, key=jax.random.key(0))
    values = [jnp.asarray(v[n].T if v[n].ndim == 2 else v[n]) for n in NAMES]

    def where(m: Any) -> list[Any]:
        return [m.layers[0].weight, m.layers[0].bias, m.layers[1].weight, m.layers[1].bias]

    return equinox.tree_at(where, model, values)


def _keras(v: Values) -> Any:
    keras = pytest.importorskip("keras")
    model = keras.Sequential(
        [
            keras.layers.Input((3,), dtype="float64"),
            keras.layers.Dense(4, activation="tanh", name="layer1", dtype="float64"),
            keras.layers.Dense(2, name="head", dtype="float64"),
        ],
        name="net",
    )
    model.set_weights([v[name] for name in NAMES])
    return model


def _tf_module(v: Values) -> Any:
    import tensorflow as tf

    class Net(tf.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.layer1 = {name: tf.Variable(v[f"{name}1"]) for name in ("w", "b")}
            self.head = [tf.Variable(v["w2"]), tf.Variable(v["b2"])]

        def __call__(self, x: Any) -> Any:
            x = tf.tanh(x @ self.layer1["w"] + self.layer1["b"])
            return x @ self.head[0] + self.head[1]

    return Net()


def pair(v: Values, backend: str) -> Any:
    with use_backend(backend, dtype="float64"):
        layers = {
            name: {"w": ops.asarray(v[f"w{i}"]), "b": ops.asarray(v[f"b{i}"])}
            for i, name in ((1, "layer1"), (2, "head"))
        }
    return nn.mlp([3, 4, 2], activation=ops.tanh), layers


def _pair_library(backend: str) -> Library:
    names = ("layer1/w", "layer1/b", "head/w", "head/b")
    return Library(f"pair-{backend}", backend, lambda v: pair(v, backend), names)


PAIRS = {name: _pair_library(name) for name in ("torch", "jax", "tensorflow")}
_FLAX = ("layer1/kernel", "layer1/bias", "head/kernel", "head/bias")
_EQUINOX = tuple(f"layers/{i}/{part}" for i in (0, 1) for part in ("weight", "bias"))
_KERAS = ("net/layer1/kernel", "net/layer1/bias", "net/head/kernel", "net/head/bias")
LIBRARIES = (
    Library(
        "torch",
        "torch",
        _torch,
        ("0.weight", "0.bias", "2.weight", "2.bias"),
        transposed=True,
        head=lambda m: m[2],
    ),
    Library("nnx", "jax", _nnx, _FLAX, head=lambda m: m.head),
    Library("linen", "jax", _linen, _FLAX),
    Library("equinox", "jax", _equinox, _EQUINOX, transposed=True, head=lambda m: m.layers[1]),
    Library("keras", "tensorflow", _keras, _KERAS, head=lambda m: m.layers[-1]),
    Library(
        "tf_module",
        "tensorflow",
        _tf_module,
        ("layer1/w", "layer1/b", "head/0", "head/1"),
        head=lambda m: m.head,
    ),
    *PAIRS.values(),
)


def every_library() -> Any:
    """Parametrise over the libraries; `-k nnx` or `-k jax` choose."""
    return pytest.mark.parametrize(
        "library", LIBRARIES, ids=lambda lib: f"{lib.backend}-{lib.id.removesuffix(lib.backend)}"
    )


def built(library: Library, v: Values | None = None) -> Any:
    """The network in `library`; skips where that is not installed."""
    require(library.backend)
    return library.build(weights() if v is None else v)
