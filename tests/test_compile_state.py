"""A program belongs to the framework's state, and a function runs again in the state it ran in."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import pytest

import metaframe
from frameworks import require, slow
from metaframe import ops
from metaframe.backend.contract import Backend
from metaframe.backend.registry import load_backend
from metaframe.backend.selection import use_backend

Scope = Callable[[], AbstractContextManager[Any]]


@contextmanager
def setting(get: Callable[[], Any], put: Callable[[Any], Any], value: Any) -> Iterator[None]:
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)


def torch_scopes(torch: Any) -> dict[str, Scope]:
    flags = torch.backends.mkldnn
    return {
        "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        "default dtype": lambda: setting(
            torch.get_default_dtype, torch.set_default_dtype, torch.float64
        ),
        "no_grad": torch.no_grad,
        "inference_mode": torch.inference_mode,
        "default device": lambda: torch.device("cpu"),
        "matmul precision": lambda: setting(
            torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "high"
        ),
        "deterministic": lambda: setting(
            torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True
        ),
        "mkldnn": lambda: setting(
            lambda: flags.enabled, lambda on: setattr(flags, "enabled", on), False
        ),
        "attention": lambda: torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    }


def jax_scopes(jax: Any) -> dict[str, Scope]:
    return {
        "64 bits": lambda: jax.enable_x64(not jax.config.jax_enable_x64),
        "matmul precision": lambda: jax.default_matmul_precision("bfloat16"),
        "promotion": lambda: jax.numpy_dtype_promotion("strict"),
        "ranks": lambda: jax.numpy_rank_promotion("raise"),
        "default device": lambda: jax.default_device(jax.devices()[0]),
        "prng": lambda: jax.default_prng_impl("rbg"),
    }


def tensorflow_scopes(tf: Any) -> dict[str, Scope]:
    keras, experimental = importlib.import_module("keras"), tf.config.experimental
    return {
        "device": lambda: tf.device("CPU:0"),
        "strategy": lambda: tf.distribute.OneDeviceStrategy("CPU:0").scope(),
        "TensorFloat-32": lambda: setting(
            experimental.tensor_float_32_execution_enabled,
            experimental.enable_tensor_float_32_execution,
            False,
        ),
        "floatx": lambda: setting(keras.config.floatx, keras.config.set_floatx, "float16"),
        "policy": lambda: setting(
            keras.config.dtype_policy, keras.config.set_dtype_policy, "mixed_bfloat16"
        ),
        "epsilon": lambda: setting(keras.config.epsilon, keras.config.set_epsilon, 0.25),
        "image data format": lambda: setting(
            keras.config.image_data_format, keras.config.set_image_data_format, "channels_first"
        ),
    }


SCOPES: dict[str, Callable[[Any], dict[str, Scope]]] = {
    "torch": torch_scopes,
    "jax": jax_scopes,
    "tensorflow": tensorflow_scopes,
}


def test_every_state_is_a_key(backend: Backend) -> None:
    """And goes with it."""
    backend_keys = {name: _key(backend) for name in ("first", "second")}
    assert backend_keys["first"] == backend_keys["second"]
    for name, scope in SCOPES[backend.name](importlib.import_module(backend.name)).items():
        with scope():
            inside = _key(backend)
            assert _key(backend) == inside, name
        assert hash(inside) is not None
        assert inside != backend_keys["first"], name
        assert _key(backend) == backend_keys["first"], name


def _key(backend: Backend) -> Any:
    from metaframe.core.keras_settings import keras_settings

    return backend.ambient(), keras_settings()


def of_torch(torch: Any) -> Any:
    made = torch.tensor([0.1])
    return lambda x: (x @ x) * made.new_tensor(0.1).to(torch.get_default_dtype())


def of_jax(jax: Any) -> Any:
    return lambda x: jax.numpy.asarray(0.1) * (x @ x)


def of_keras(tf: Any) -> Any:
    keras = importlib.import_module("keras")
    return lambda x: (
        keras.layers.Dense(2, kernel_initializer="ones")(x) * float(keras.config.floatx()[-2:])
    )


@pytest.mark.parametrize(
    ("name", "made", "scopes"),
    [
        ("jax", of_jax, ("64 bits", "matmul precision")),
        ("tensorflow", of_keras, ("floatx", "policy")),
        slow("torch", of_torch, ("autocast", "default dtype")),
    ],
)
def test_a_program_of_each_state(
    name: str, made: Callable[[Any], Any], scopes: tuple[str, ...]
) -> None:
    """The compiled function is the function, in every state and back again."""
    require(name)
    framework = importlib.import_module(name)
    fn, backend = made(framework), load_backend(name)
    compiled = metaframe.compile(fn)
    x = backend.asarray(np.ones((2, 2), np.float32))
    known = {"": lambda: setting(lambda: None, lambda _: None, None)}
    known |= SCOPES[name](framework)
    for scope in ("", *scopes, ""):
        with known[scope]():
            found, expected = compiled(x), fn(x)
            assert backend.dtype_name(found) == backend.dtype_name(expected)
            np.testing.assert_allclose(
                backend.to_numpy(found).astype("float64"),
                backend.to_numpy(expected).astype("float64"),
                rtol=1e-2,
            )
    assert compiled.traces == 1 + len(scopes)


@pytest.mark.parametrize("compiled", [False, slow(True)])
def test_what_runs_again_on_torch_runs_in_the_same_state(compiled: bool) -> None:
    """Going back through mapped tasks or a program runs the function once more."""
    require("torch")
    torch = importlib.import_module("torch")
    torch.manual_seed(0)
    start = torch.randn(8, 8)

    def fn(w: Any) -> Any:
        return (
            (torch.mm(w, w).float() * ops.asarray(2.0).to(torch.get_default_dtype())).pow(2).mean()
        )

    def over_tasks(w: Any) -> Any:
        return metaframe.meta_value_and_grad(lambda w, t: fn(w * t))(w, torch.ones(2)).cost

    run = metaframe.compile(fn) if compiled else over_tasks
    found = []
    for each in (run, fn):
        w = start.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16), use_backend("torch", dtype="float32"):
            y = each(w)
        y.backward()  # neither autocast nor a selected backend is active any more
        found.append((y.detach(), w.grad))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4)
