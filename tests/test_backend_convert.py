"""Arrays from one framework to another: the same bits, in the same structure."""

from __future__ import annotations

import importlib
import itertools
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from frameworks import BACKENDS, require
from metaframe import Container, compile, convert, optim, tree
from metaframe.backend import Backend, load_backend
from metaframe.errors import InputError, InputTypeError, UnknownKeyError

Call = Callable[..., Any]
Values = np.ndarray[Any, Any]

PAYLOAD = np.array([0x7FC12345, 0xFFA00001, 0x7F800000], np.uint32).view(np.float32)
VALUES: dict[str, Values] = {
    "float32": np.array([1.5, -0.0, 1e-45, np.inf], np.float32),
    "float64": np.array([[0.1, -0.0], [5e-324, -np.inf]]),
    "float16": np.array([0.1, -0.0], np.float16),
    "nan payload": PAYLOAD,
    "int64": np.array([-(2**62), 2**62 + 1]),
    "int32": np.arange(6, dtype=np.int32).reshape(2, 3),
    "uint8": np.array([0, 255], np.uint8),
    "bool": np.array([True, False]),
    "0-d": np.array(-0.0),
    "0-d bool": np.array(True),
    "empty": np.zeros((0, 3)),
    "transposed": np.arange(6.0).reshape(2, 3).T,
    "reversed": np.arange(5.0)[::-1],
    "unaligned": np.arange(9.0, dtype=np.float32)[1:],
    "large": np.arange(4096.0),
}


@pytest.fixture(params=list(itertools.permutations(BACKENDS, 2)), ids="-".join)
def pair(request: pytest.FixtureRequest) -> tuple[Backend, Backend]:
    for name in request.param:
        require(name)
    return load_backend(request.param[0]), load_backend(request.param[1])


def same_bits(found: Values, expected: Values) -> None:
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert np.array(found).tobytes() == np.array(expected).tobytes()


@pytest.mark.parametrize("name", VALUES)
def test_every_bit_arrives(pair: tuple[Backend, Backend], name: str) -> None:
    source, target = pair
    x = source.asarray(VALUES[name])
    there = convert(x, to=target.name)
    assert target.owns(there)
    same_bits(target.to_numpy(there), source.to_numpy(x))
    same_bits(source.to_numpy(convert(there, to=source.name)), VALUES[name])


def test_bfloat16(pair: tuple[Backend, Backend]) -> None:
    source, target = pair
    x = source.asarray(np.array([1.0, -0.0, 3.140625, np.nan, 2.0**-130]), "bfloat16")
    there = convert(x, to=target.name)
    assert target.dtype_name(there) == "bfloat16"
    same_bits(target.to_numpy(there), source.to_numpy(x))
    if target.name == "torch":
        strided = convert(source.ops.transpose(source.ops.stack([x, x]), (1, 0)), to="torch")
        assert strided.shape == (5, 2)


def test_strided_views(pair: tuple[Backend, Backend]) -> None:
    """A view that its own framework made, which NumPy's import cannot."""
    source, target = pair
    x = source.ops.transpose(source.asarray(np.arange(12.0).reshape(3, 4)), (1, 0))[1:, ::2]
    same_bits(target.to_numpy(convert(x, to=target.name)), source.to_numpy(x))


@pytest.mark.parametrize("to", ["jax", "tensorflow"])
def test_signs_that_torch_has_not_applied_yet(to: str) -> None:
    for name in ("torch", to):
        require(name)
    import torch

    for x in (torch.tensor([1 + 2j]).conj(), torch.tensor([1 + 2j]).conj().imag):
        found = load_backend(to).to_numpy(convert(x, to=to))
        same_bits(np.asarray(found), x.resolve_conj().resolve_neg().numpy())


def test_memory_is_shared_where_it_can_be() -> None:
    for name in ("torch", "jax"):
        require(name)
    x = load_backend("torch").asarray(np.arange(4096.0))
    # Aligned as XLA wants it: torch allocates so, NumPy need not.
    there = convert(x.clone() if x.data_ptr() % 64 else x, to="jax")
    back = convert(there, to="torch")
    assert back.data_ptr() == there.unsafe_buffer_pointer()


def test_structures(pair: tuple[Backend, Backend]) -> None:
    """Containers, the state of an optimizer, NumPy leaves; numbers stay as they are."""
    source, target = pair
    v = Container(layer={"w": source.asarray([1.0, 2.0])}, b=source.asarray(0.5))
    rule = optim.adam(1e-3)
    _, state = rule.update(v, rule.init(v), v, None)
    given = {"v": v, "state": state, "batch": np.arange(3), "steps": 3, "name": "a", "no": None}
    found = convert(given, to=target.name)
    assert tree.structure(found) == tree.structure(given)
    assert isinstance(found["v"], Container)
    assert (found["steps"], found["name"]) == (3, "a")
    assert target.owns(found["batch"])
    moved, _ = rule.update(found["v"], found["state"], found["v"], None)
    assert all(map(target.owns, tree.leaves(moved)))


def test_unaligned_memory_can_be_computed_with(pair: tuple[Backend, Backend]) -> None:
    """TensorFlow takes such memory through DLPack and ends the process at its first use."""
    source, target = pair
    x = convert(source.asarray(VALUES["unaligned"]), to=target.name)
    assert float(target.to_numpy(target.ops.sum(x * x))) == 204.0


def test_parameters_arrive_as_constants() -> None:
    for name in BACKENDS:
        require(name)
    torch, tf = importlib.import_module("torch"), importlib.import_module("tensorflow")
    parameter, variable = torch.nn.Parameter(torch.ones(3)), tf.Variable([1.0, 2.0])
    assert not convert(parameter, to="torch").requires_grad
    assert not isinstance(convert(variable, to="tensorflow"), tf.Variable)
    assert convert({"p": parameter, "v": variable}, to="jax")["v"].tolist() == [1.0, 2.0]


def test_device(backend: Backend) -> None:
    place = backend.devices()[0]
    x = convert({"x": np.ones(2)}, to=backend.name, device=place)["x"]
    assert backend.owns(x)


def test_what_jax_cannot_hold() -> None:
    for name in ("torch", "jax"):
        require(name)
    jax = importlib.import_module("jax")
    torch = load_backend("torch")
    with jax.enable_x64(False):
        with pytest.raises(RuntimeError, match="64-bit types switched off"):
            convert(torch.asarray(np.ones(2)), to="jax")
        small = convert(torch.asarray(np.array([1, -2])), to="jax")
        assert small.tolist() == [1, -2]
        with pytest.raises(InputError, match="'y' is int64 and has values that jax's int32"):
            convert({"y": torch.asarray(np.array([2**40]))}, to="jax")


def test_bad_input(backend: Backend, arr: Call) -> None:
    with pytest.raises(UnknownKeyError, match="Did you mean 'torch'"):
        convert(arr(1.0), to="trch")
    with pytest.raises(InputTypeError, match=r"'model' is a builtins\.object"):
        convert({"model": object()}, to=backend.name)
    target = "jax" if backend.name != "jax" else "torch"
    with pytest.raises(InputError, match="'x' is inside a transform"):
        compile(lambda x: convert({"x": x}, to=target))(arr([1.0]))


@pytest.mark.parametrize(
    "x",
    [
        np.array([1.0], object),
        np.array(["text"]),
        np.array(["2020-01-01"], "M8[D]"),
        np.zeros(2, [("field", "f4")]),
        np.ones(2, np.longdouble),
    ],
    ids=lambda x: x.dtype.name,
)
def test_what_is_no_number_to_any_framework(backend: Backend, x: Values) -> None:
    dtype = re.escape(str(x.dtype))
    pattern = f"'x' is .*NumPy (array of|with the dtype) {dtype}.*(no numbers|dense numbers)"
    with pytest.raises(InputTypeError, match=pattern):
        convert({"x": x}, to=backend.name)


def unusual(name: str) -> Any:
    """An array that no other framework has."""
    framework = importlib.import_module(name.partition(" ")[0])
    return {
        "jax key": lambda: framework.random.key(0),
        "torch sparse": lambda: framework.eye(2).to_sparse(),
        "torch quantized": lambda: framework.quantize_per_tensor(
            framework.ones(2), 0.1, 0, framework.qint8
        ),
        "tensorflow string": lambda: framework.constant(["text"]),
        "tensorflow resource": lambda: framework.Variable(1.0).handle,
        "tensorflow quantized": lambda: (
            framework.quantization.quantize([1.0], 0.0, 1.0, framework.qint8).output
        ),
    }[name]()


@pytest.mark.filterwarnings("ignore:torch.quantize:UserWarning")  # they are deprecated
@pytest.mark.parametrize(
    "name",
    [
        "jax key",
        "torch sparse",
        "torch quantized",
        "tensorflow string",
        "tensorflow resource",
        "tensorflow quantized",
    ],
)
def test_what_another_framework_does_not_have(backend: Backend, name: str) -> None:
    """TensorFlow aborts the process when it is asked for the memory of strings."""
    own = name.partition(" ")[0]
    require(own)
    x = unusual(name)
    if own == backend.name:
        assert backend.owns(convert({"x": x}, to=own)["x"])
        return
    with pytest.raises(InputTypeError, match=f"'x' is an array of {own} with the dtype"):
        convert({"x": x}, to=backend.name)


def test_four_bits_have_no_place_in_torch() -> None:
    require("jax")
    require("torch")
    jnp = importlib.import_module("jax.numpy")
    with pytest.raises(InputTypeError, match="int4"):
        convert(jnp.array([1], dtype=jnp.int4), to="torch")


def test_another_byte_order(backend: Backend) -> None:
    for values in (np.array([1.5, -2.0]), np.array([1, 2**40])):
        swapped = values.astype(values.dtype.newbyteorder())
        same_bits(backend.to_numpy(convert(swapped, to=backend.name)), values)
