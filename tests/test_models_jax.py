"""Models of Flax and Equinox as they are: one contract, over a zoo of them.

The output under a policy is the model's own under that policy; afterwards all that the model holds
is as it was; the meta-gradient is that of finite differences, however the tasks run, and the
gradient through a `Learner`.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import numpy as np
import pytest

from frameworks import require, slow
from metaframe import MAML, nn
from metaframe.backend import Forward, Inputs
from metaframe.errors import InputError, InputTypeError
from metaframe.models import functional
from metaframe.models.lookup import adapter_of
from metaframe.tasks import Task
from metaframe.testing.conformance.cases import slope

require("jax")
for library in ("flax", "equinox"):
    pytest.importorskip(library)

import equinox as eqx  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from flax import nnx  # noqa: E402

import jax_models  # noqa: E402

ZOO = jax_models.zoo()
SLOW = {
    "nnx rnn",
    "nnx attention",
    "nnx scan and remat",
    "nnx dropout",
    "linen lifted",
    "linen nested batch norm",
    "linen rnn and attention",
    "equinox cells and attention",
    "equinox convolution",
}
"""Those that take seconds to compile."""
QUICK = ("nnx tied", "linen boxes and counts", "equinox shared", "equinox batch norm")
"""Those whose meta-gradient is looked at by default."""


def rows(seed: int, size: int = 6) -> Any:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(size, 3)))


def held(model: Any) -> list[Any]:
    """Every array of a model: the object it is, the object that holds it, and its bits."""

    def bits(x: Any) -> Any:
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        return np.asarray(x).tobytes() if isinstance(x, (jax.Array, np.ndarray)) else x

    found: list[Any] = []
    if isinstance(model, nnx.Module):
        for path, x in nnx.iter_graph(model):
            if isinstance(x, nnx.Variable):
                raw = x.get_raw_value()
                found += (path, id(x), type(x), x.get_metadata(), id(raw), bits(raw))
        return found
    return [(id(x), bits(x)) for x in jax.tree.leaves(model)]


@pytest.mark.parametrize("name", [slow(name) if name in SLOW else name for name in ZOO])
def test_the_output_is_the_models_own_and_nothing_changes(name: str) -> None:
    entry = ZOO[name]
    model = entry.build()
    before = held(model)

    @jax.jit
    def outputs(x: Any) -> Any:
        found = []
        for norm in (None, "batch", "frozen", "record"):
            apply, params, state = functional(model, norm=norm)  # type: ignore[arg-type]
            found.append((apply(params, state, x)[0], entry.own(model, norm, x)))
        return found

    for norm, (found, own) in zip(
        (None, "batch", "frozen", "record"), outputs(rows(0)), strict=True
    ):
        np.testing.assert_allclose(found, own, rtol=0, atol=1e-14, err_msg=str(norm))

    def break_off(called: Any, *args: Any) -> None:
        with contextlib.suppress(TypeError, ValueError):  # a part cannot be called, or not so
            called(*args)
        raise ZeroDivisionError

    adapter = adapter_of(model)
    with pytest.raises(ZeroDivisionError):
        adapter.call(adapter.params(), adapter.state(), Inputs((rows(0),), call=break_off))
    assert held(model) == before


def tasks() -> list[Task]:
    def task(seed: int) -> Task:
        x, y = rows(seed), rows(seed + 1)
        return Task(x, x[:, :2] ** 2, y, y[:, 1:] ** 2)

    return [task(2), task(4)]


@pytest.mark.parametrize(
    ("name", "task_maps"),
    [
        *((name, ["vmap"]) for name in QUICK),
        *(slow(name, ["vmap", "scan", "loop"], id=f"{name}-every way") for name in ZOO),
    ],
)
def test_the_meta_gradient(name: str, task_maps: list[Any]) -> None:
    maml, batch, rng = MAML(ZOO[name].build(), 0.05), tasks(), np.random.default_rng(0)
    start = maml.meta_arrays()
    line = {n: jnp.asarray(rng.normal(size=x.shape)) for n, x in start.items()}
    results = [maml.meta_value_and_grad(nn.mse, batch, task_map=how) for how in task_maps]

    def along(t: float) -> float:
        maml.assign({n: x + t * line[n] for n, x in start.items()})
        return float(maml.meta_value_and_grad(nn.mse, batch, task_map=task_maps[0]).cost)

    expected = slope(along, 5e-5)
    for result in results:
        found = sum(float((g * line[n]).sum()) for n, g in result.grads.items())
        assert abs(found - expected) < 1e-9 * max(1.0, abs(expected))
    maml.assign(start)

    @jax.jit
    def through_learners(values: Any) -> Any:
        learners = [maml.clone(values).adapt_on(nn.mse, t.support_x, t.support_y) for t in batch]
        return (
            sum(
                nn.mse(learn(t.query_x), t.query_y)
                for learn, t in zip(learners, batch, strict=True)
            )
            / 2
        )

    grads = jax.grad(through_learners)(start)
    for key, grad in results[0].grads.items():
        np.testing.assert_allclose(grads[key], grad, rtol=0, atol=1e-12, err_msg=key)


# -- how a model is called ------------------------------------------------------------------------


def called(model: Any, *args: Any, call: Any = None, norm: Any = None, **kwargs: Any) -> Any:
    adapter = adapter_of(model)
    inputs = Inputs(args, kwargs, Forward(norm), call)
    return adapter.call(adapter.params(), adapter.state(), inputs)[0]


def test_another_call_of_a_model() -> None:
    """`Inputs.call` gets the model with the substituted values, in place of `model(...)`."""
    x = rows(0)
    twice = jax_models.Twice()
    expected = twice.layer(x)
    np.testing.assert_array_equal(called(twice, x, call=lambda m, x: m.layer(x)), expected)
    np.testing.assert_array_equal(called((lambda m, x: m.layer(x), twice), x), expected)
    module, variables = ZOO["linen setup"].build()
    expected = module.apply(variables, x, method="features")
    for found in (
        called((module, variables), x, call=lambda m, x: m.features(x)),
        called((module, variables), x, method="features"),
        called(module.bind(variables), x, call=type(module).features),
    ):
        np.testing.assert_array_equal(found, expected)
    assert called((module, variables), call=lambda m: m.layer.features) == 3
    mlp = jax_models.eqx_mlp()
    expected = jax.vmap(mlp.layers[0])(x) * 2

    def first(module: Any, x: Any, factor: float = 1) -> Any:
        return jax.vmap(module.layers[0])(x) * factor

    np.testing.assert_allclose(called(mlp, x, call=first, factor=2), expected, atol=1e-14)
    np.testing.assert_allclose(called(mlp, x, 2, call=first), expected, atol=1e-14)
    of_batch = (lambda m, x: jax.vmap(m)(x), mlp)
    found = called(of_batch, x, call=lambda m, x: jax.vmap(m.layers[0])(x) * 2)
    np.testing.assert_allclose(found, expected, atol=1e-14)
    assert called(mlp, call=lambda m: m.width_size) == 4
    assert called(ZOO["equinox batch norm"].build(), call=lambda m: m.norm.mode) == "batch"
    pair = (lambda v, x: v["w"] * x, {"w": jnp.asarray(2.0)})
    np.testing.assert_array_equal(called(pair, x, call=lambda m, x: 3 * m(x)), 6 * x)


def test_an_equinox_module_is_vectorised_once() -> None:
    x, mlp = rows(0), jax_models.eqx_mlp()
    own = jax.vmap(mlp)(x)
    mapped = eqx.filter_vmap(mlp)
    for model in (mlp, mapped, eqx.filter_jit(mapped), eqx.filter_checkpoint(mapped)):
        np.testing.assert_allclose(called(model, x), own, rtol=0, atol=1e-14)
    for function in (jax.vmap(mlp), jax.jit(mlp), jax.jit(jax.vmap(mlp)), jax.vmap(jax.jit(mlp))):
        with pytest.raises(InputTypeError, match=r"hides the arrays of MLP\. Pass the module"):
            MAML(function)
    with pytest.raises(InputTypeError, match=r"hides the arrays of Linear\. Pass the module"):
        MAML(jax.jit(nnx.Linear(2, 1, rngs=nnx.Rngs(0))))


def test_a_module_with_state_comes_with_it() -> None:
    module, state = ZOO["equinox batch norm"].build()
    for model in (module, jax_models.EqxStateful("batch")):
        with pytest.raises(InputError, match=r"keeps state.*make_with_state"):
            MAML(model)
    maml = MAML((module, state), 0.05, norm="support")
    maml.meta_value_and_grad(nn.mse, tasks())
    assert len(jax.tree.leaves(state)) == 3, "a state that was written to is of no use any more"
    with pytest.raises(InputError, match="needs batch normalisation that says where"):
        MAML((module, state), norm="per-step")


@pytest.mark.parametrize("name", ["equinox batch norm", "equinox batch norm by averages"])
def test_recorded_statistics_of_equinox(name: str) -> None:
    """Those of one set of examples, for others to be normalised by."""
    adapter, x = adapter_of(ZOO[name].build()), rows(0)
    params, state = adapter.params(), adapter.state()
    output, recorded = adapter.call(params, state, Inputs((x,), forward=Forward("record")))
    again, _ = adapter.call(params, recorded, Inputs((x[:2],), forward=Forward("frozen")))
    np.testing.assert_allclose(again, output[:2], rtol=0, atol=1e-13)


class Transformed(NamedTuple):
    """As `haiku.Transformed`, whose fields are how it is recognised."""

    init: Any
    apply: Any


def test_what_haiku_transforms_is_refused_with_the_way_out() -> None:
    transformed = Transformed(None, lambda params, rng, x: x @ params["linear"]["w"])
    params = {"linear": {"w": jnp.ones((3, 2))}}
    for model in (transformed, (transformed, params), (transformed, params, {})):
        with pytest.raises(InputTypeError, match=r"lambda params, x: transformed.apply\(params"):
            MAML(model)
    maml = MAML((lambda params, x: transformed.apply(params, None, x), params), 0.05)
    assert list(maml.meta_value_and_grad(nn.mse, tasks()).grads) == ["linear/w"]
    with pytest.raises(InputTypeError, match="received two functions"):
        MAML((transformed.init or max, transformed.apply))


def test_what_is_asked_of_a_linen_call_is_the_output() -> None:
    with pytest.raises(InputTypeError, match="mutable="):
        called(ZOO["linen setup"].build(), rows(0), mutable=["batch_stats"])


# -- arrays and their names -----------------------------------------------------------------------


class Slashes(nnx.Module):
    def __init__(self) -> None:
        self.d = nnx.Dict({"a/b": nnx.Param(jnp.ones((3, 2)))})
        self.d["a"] = nnx.Dict(b=nnx.Param(jnp.full(2, 0.5)))

    def __call__(self, x: Any) -> Any:
        return x @ self.d["a/b"] + self.d["a"]["b"]


class Doubled(nnx.Param):
    def get_value(self, **how: Any) -> Any:
        return 2 * super().get_value(**how)


class Structured(nnx.Module):
    """A Variable around a structure, one that reads otherwise, and one that the call deletes."""

    def __init__(self) -> None:
        self.p = nnx.Param({"w": jnp.ones((3, 2)), "b": jnp.zeros(2)})
        self.doubled = Doubled(jnp.ones(2))
        self.gone = nnx.Variable(jnp.ones(2))
        self.settings = {"rate": 0.5}

    def __call__(self, x: Any) -> Any:
        gone, p = self.gone, self.p.get_value()
        del self.gone
        return (x @ p["w"] + p["b"]) * self.doubled.get_value() * gone * self.settings["rate"]


@pytest.mark.parametrize("build", [Slashes, Structured])
def test_every_array_has_a_name_of_its_own(build: Any) -> None:
    model, x = build(), rows(0)
    np.testing.assert_array_equal(called(model, x), nnx.clone(model)(x))
    maml = MAML(model, 0.05)
    sizes = [x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param))]
    assert sorted(x.size for x in maml.meta_parameters().values()) == sorted(sizes)
    grads = maml.meta_value_and_grad(nn.mse, tasks()).grads
    assert all(float(jnp.abs(g).max()) > 1e-3 for g in grads.values())
    maml.assign({name: x + 1 for name, x in maml.meta_parameters().items()})
    np.testing.assert_array_equal(called(model, x), nnx.clone(model)(x))


@pytest.mark.parametrize("kind", ["ref", "hijax"])
def test_variables_that_flax_is_trying_out(kind: str) -> None:
    with nnx.var_defaults(**{kind: True}):
        model = jax_models.Twice()
    x, layer, maml = rows(0), model.layer, MAML(model, 0.05)
    kernel, before = layer.kernel, layer.kernel[...]
    np.testing.assert_array_equal(called(model, x), model(x))
    maml.meta_value_and_grad(nn.mse, tasks())
    np.testing.assert_array_equal(kernel[...], before)
    maml.assign({"layer/kernel": before + 1})
    np.testing.assert_array_equal(kernel[...], before + 1)
    np.testing.assert_array_equal(called(model, x), model(x))


def test_what_equinox_takes_for_constants_is_listed() -> None:
    maml = MAML(ZOO["equinox mixed leaves"].build(), 0.05)
    assert maml.not_learned() == {"table": "state", "frozen": "NumPy array"}


def test_parameters_that_came_from_numpy() -> None:
    """As those of a checkpoint."""
    module, variables = ZOO["linen setup"].build()
    maml = MAML((module, jax.tree.map(np.asarray, variables)), 0.05)
    expected = MAML((module, variables), 0.05).meta_value_and_grad(nn.mse, tasks())
    found = maml.meta_value_and_grad(nn.mse, tasks())
    for name, grad in expected.grads.items():
        np.testing.assert_array_equal(found.grads[name], grad)


def test_a_part_of_a_module_of_nnx_that_is_learned() -> None:
    """By a filter of `nnx.split`, with the rest held fixed."""
    model, x = jax_models.Adapted(), rows(0)
    graph, lora, rest = nnx.split(model, nnx.LoRAParam, ...)
    maml = MAML((lambda lora, x: nnx.merge(graph, lora, rest)(x), lora), 0.05)
    np.testing.assert_array_equal(maml(x), model(x))
    assert all("lora" in name for name in maml.meta_value_and_grad(nn.mse, tasks()).grads)
