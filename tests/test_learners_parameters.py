"""No parameter is left out silently: it is learned, refused by name, or listed with the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from frameworks import require
from metaframe import (
    MAML,
    MetaSGD,
    ProtoNet,
    adapt,
    fomaml_step,
    inner_loop,
    inner_step,
    maml_step,
    meta_value_and_grad,
    named_buffers,
    named_params,
    nn,
    ops,
    reptile_step,
)
from metaframe.backend import Backend, load_backend
from metaframe.errors import InputError, InputTypeError
from metaframe.tasks import Task

# -- models: y = w x + |z|, with z of every dtype -------------------------------------------------


def _torch(dtype: str) -> Any:
    import torch

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, z = torch.nn.Parameter(torch.ones(3)), torch.ones(3).to(getattr(torch, dtype))
            self.z = torch.nn.Parameter(z, requires_grad=z.is_floating_point() or z.is_complex())

        def forward(self, x: Any) -> Any:
            return x * self.w + abs(self.z * 1).float()

    return Model()


def _jax(dtype: str) -> Any:
    import jax.numpy as jnp

    return jnp.ones(3, jnp.float32), jnp.ones(3).astype(getattr(jnp, dtype))


def _nnx(dtype: str) -> Any:
    nnx = pytest.importorskip("flax.nnx")

    class Model(nnx.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self.w, self.z = map(nnx.Param, _jax(dtype))

        def __call__(self, x: Any) -> Any:
            return x * self.w[...] + abs(self.z[...] * 1)

    return Model()


def _linen(dtype: str) -> Any:
    linen = pytest.importorskip("flax.linen")
    w, z = _jax(dtype)

    class Model(linen.Module):  # type: ignore[misc, name-defined]
        @linen.compact  # type: ignore[untyped-decorator]
        def __call__(self, x: Any) -> Any:
            learned = (self.param(n, lambda _, v=v: v) for n, v in (("w", w), ("z", z)))
            return next(learned) * x + abs(next(learned) * 1)

    return Model(), {"params": {"w": w, "z": z}}


def _equinox(dtype: str) -> Any:
    eqx = pytest.importorskip("equinox")

    class Model(eqx.Module):  # type: ignore[misc, name-defined]
        w: Any
        z: Any

        def __call__(self, x: Any) -> Any:
            return x * self.w + abs(self.z * 1)

    return Model(*_jax(dtype))


def _tf_module(dtype: str) -> Any:
    import tensorflow as tf

    class Model(tf.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.w, self.z = tf.Variable(tf.ones(3)), tf.Variable(tf.cast(tf.ones(3), dtype))

        def __call__(self, x: Any) -> Any:
            z = tf.cast(self.z, tf.int32) if self.z.dtype == tf.bool else self.z
            return x * self.w + tf.cast(abs(z * 1), tf.float32)

    return Model()


def _keras(dtype: str) -> Any:
    keras = pytest.importorskip("keras")
    import tensorflow as tf

    class Layer(keras.layers.Layer):  # type: ignore[misc, name-defined]
        def build(self, shape: Any) -> None:
            del shape
            self.w = self.add_weight(shape=(3,), initializer="ones", name="w")
            self.z = self.add_weight(shape=(3,), initializer="ones", name="z", dtype=dtype)

        def call(self, x: Any) -> Any:
            z = tf.convert_to_tensor(self.z)
            z = tf.cast(z, tf.int32) if z.dtype == tf.bool else z
            return x * self.w + tf.cast(abs(z), tf.float32)

    return keras.Sequential([keras.layers.Input((3,)), Layer(name="layer")])


def _pair(backend: str) -> Callable[[str], Any]:
    def build(dtype: str) -> Any:
        asarray = load_backend(backend).asarray

        def apply(v: Any, x: Any) -> Any:
            z = ops.astype(v["z"], "int32") if dtype == "bool" else v["z"]
            return x * v["w"] + ops.astype(ops.abs(z), "float32")

        z = asarray(np.ones(3, bool)) if dtype == "bool" else asarray(np.ones(3, "f4"), dtype)
        return apply, {"w": asarray(np.ones(3, "float32")), "z": z}

    return build


MODELS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "torch": ("torch", _torch),
    "nnx": ("jax", _nnx),
    "linen": ("jax", _linen),
    "equinox": ("jax", _equinox),
    "tf_module": ("tensorflow", _tf_module),
    "keras": ("tensorflow", _keras),
    **{f"pair-{name}": (name, _pair(name)) for name in ("torch", "jax", "tensorflow")},
}
EAGERLY: dict[str, Any] = {"compiled": False, "task_map": "loop"}


@pytest.fixture(params=MODELS)
def build(request: pytest.FixtureRequest) -> Callable[[str], Any]:
    backend, build = MODELS[request.param]
    require(backend)
    return build


def named(values: Any) -> set[str]:
    """Names without the paths that lead to them."""
    return {name.rpartition("/")[2] for name in values}


def task() -> Task:
    x, y = np.random.default_rng(0).normal(size=(2, 4, 3)).astype("float32")
    return Task(x, y, x, y)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, "complex64") for name in MODELS),
        # Keras itself makes no weights of eight bits.
        *((name, "float8_e4m3fn") for name in MODELS if name != "keras"),
    ],
)
def test_what_cannot_be_learned_is_refused_by_name(name: str, dtype: str) -> None:
    backend, build = MODELS[name]
    require(backend)
    model = build(dtype)
    others = {"adapt_names": [name for name in named_params(model) if name.endswith("w")]}
    hows: Any = ((MAML, {}), (MetaSGD, {}), (ProtoNet, {"ways": 2}), (MAML, others))
    for kind, how in hows:
        with pytest.raises(InputTypeError, match=rf"parameter '.*z' is {dtype}; gradients need"):
            kind(model, **how)


@pytest.mark.parametrize("dtype", ["int32", "bool"])
def test_what_no_gradient_is_of_is_listed(build: Callable[[str], Any], dtype: str) -> None:
    model = build(dtype)
    maml = MAML(model, 0.1)
    assert named(maml.meta_parameters()) == {"w"}
    left = {name.rpartition("/")[2]: why for name, why in maml.not_learned().items()}
    assert left in ({"z": dtype}, {"z": "state"})
    assert named({**named_params(model), **named_buffers(model)}) == {"w", "z"}
    grads = maml.meta_value_and_grad(nn.mse, [task()], **EAGERLY).grads
    assert named(grads) == {"w"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_are_learned(build: Callable[[str], Any], dtype: str) -> None:
    maml = MAML(build(dtype), 0.1)
    assert maml.not_learned() == {}
    result = maml.meta_value_and_grad(nn.mse, [task()], **EAGERLY)
    found = {n.rpartition("/")[2]: maml.backend.dtype_name(g) for n, g in result.grads.items()}
    assert found == {"w": "float32", "z": dtype}
    exact = MAML(build("float32"), 0.1).meta_value_and_grad(nn.mse, [task()], **EAGERLY).grads
    for pair in zip(result.grads.values(), exact.values(), strict=True):
        value, expected = (maml.backend.to_numpy(g).astype("float64") for g in pair)
        np.testing.assert_allclose(value, expected, rtol=0, atol=0.02 * np.abs(expected).max())


# -- variables ----------------------------------------------------------------------------------


def squares(batch: Any, v: Any) -> Any:
    return ops.mean(ops.square(v["w"] * batch["x"]))


VARIABLES: dict[str, Callable[[Any, Any], Any]] = {
    "maml_step": lambda b, v: maml_step(b, squares, None, v, 1, 0.1, batched="vmap"),
    "fomaml_step": lambda b, v: fomaml_step(b, squares, None, v, 1, 0.1, batched="scan"),
    "reptile_step": lambda b, v: reptile_step(b, squares, v, 1, 0.1, batched=False),
    "inner_loop": lambda b, v: inner_loop(squares, v, b, steps=1, lr=0.1),
    "meta_value_and_grad": lambda b, v: meta_value_and_grad(lambda v, t: squares(t, v))(v, b),
}


@pytest.mark.parametrize("name", VARIABLES)
@pytest.mark.parametrize("dtype", ["complex64", "float8_e4m3fn", "int32", "bool"])
def test_a_variable_without_gradients_is_refused_by_name(
    name: str, dtype: str, backend: Backend
) -> None:
    ones = np.ones(2, dtype if dtype in ("int32", "bool") else "float32")
    z = backend.asarray(ones, None if ones.dtype == dtype else dtype)
    v = {"w": backend.asarray(np.ones(2, "float32")), "z": z}
    batch = {"x": backend.asarray(np.ones((2, 2), "float32"))}
    with pytest.raises(InputTypeError, match=f"variable 'z' is {dtype}; gradients need a float"):
        VARIABLES[name](batch, v)


def test_functions_of_named_parameters_refuse_it_too(backend: Backend) -> None:
    params = {
        "w": backend.asarray(np.ones(2)),
        "z": backend.asarray(np.ones(2), "complex64"),
        "n": backend.asarray(np.ones(2, "int32")),
    }

    def loss(v: Any) -> Any:
        return ops.sum(ops.square(v["w"]))

    model = (lambda v, x: v["w"] * x, params)
    for call in (
        lambda **how: inner_step(params, loss, 0.1, **how),
        lambda **how: adapt(model, params, loss, **how),
    ):
        with pytest.raises(InputTypeError, match="parameter 'z' is complex64"):
            call()
        assert call(adapt_names=["w"])["z"] is params["z"]


# -- freezing, at any time ------------------------------------------------------------------------


def frozen_or_not() -> Any:
    require("torch")
    import torch

    layers = torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3)
    return torch.nn.Sequential(*layers)


def adapted_by(maml: Any) -> set[str]:
    """The parameters that an adaptation moves, by a learner and by the meta-gradient alike."""
    import torch

    t = task()
    x, y = torch.tensor(t.support_x), torch.tensor(t.support_y)
    learner = maml.clone()
    before = dict(learner.params)
    learner.adapt_on(nn.mse, x, y)
    cost = maml.meta_value_and_grad(nn.mse, [t]).cost
    torch.testing.assert_close(nn.mse(learner(x), y), cost)
    return {name for name, value in learner.params.items() if value is not before[name]}


def test_parameters_frozen_and_thawed_later() -> None:
    model = frozen_or_not()
    every = set(named_params(model))
    body, head = {n for n in every if n[0] == "0"}, {n for n in every if n[0] == "2"}
    model[0].requires_grad_(False)
    maml, chosen = MAML(model, 0.1), MAML(model, 0.1, adapt_names=head)
    rated = MetaSGD(model, 0.1)
    assert maml.not_learned() == dict.fromkeys(sorted(body, reverse=True), "frozen")
    assert adapted_by(maml) == head
    model[0].requires_grad_(True)
    assert set(maml.meta_parameters()) == every
    assert adapted_by(maml) == every
    assert adapted_by(chosen) == head
    with pytest.raises(InputError, match=r"\['0.bias', '0.weight'\] were frozen when"):
        rated.clone()
    model[2].requires_grad_(False)
    assert adapted_by(maml) == body
    assert maml.not_learned() == dict.fromkeys(sorted(head, reverse=True), "frozen")


def test_learned_rates_may_be_frozen() -> None:
    maml = MetaSGD(frozen_or_not(), 0.1)
    expected = maml.meta_value_and_grad(nn.mse, [task()])
    maml.rates.requires_grad_(False)
    found = maml.meta_value_and_grad(nn.mse, [task()])
    assert set(found.grads) == set(named_params(maml.module)) == set(maml.variables())
    assert float(found.cost.detach()) == float(expected.cost.detach())
    assert set(maml.not_learned()) == {f"learned/{n}" for n in named_params(maml.module)}
    assert adapted_by(maml) == set(named_params(maml.module))


def test_a_learners_parameters_have_flags_of_their_own() -> None:
    """Those of the model stay as they are, and their gradients go on to accumulate."""
    model = frozen_or_not()
    model[0].bias.requires_grad_(False)
    learner = MAML(model, 0.1).clone()
    before = [p.requires_grad for p in model.parameters()]
    for value in learner.params.values():
        for flag in (False, True):
            try:
                value.requires_grad_(flag)
            except RuntimeError as error:  # what is computed from the model's cannot be frozen
                assert "leaf" in str(error)  # noqa: PT017
    assert [p.requires_grad for p in model.parameters()] == before
    import torch

    x = torch.ones(4, 3)
    nn.mse(learner.adapt_on(nn.mse, x, x)(x), x).backward()
    assert [p.grad is not None for p in model.parameters()] == before
