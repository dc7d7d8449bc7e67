"""A function while it is traced: it reads no values, and does nothing twice."""

from __future__ import annotations

import copy
import importlib
import math
import operator
import pickle
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import metaframe
from frameworks import compiles_on_torch, require
from metaframe import inner_loop, meta_value_and_grad, ops
from metaframe.backend.contract import Backend
from metaframe.backend.selection import use_backend
from metaframe.errors import BackendError, CompileError, InputTypeError

Arr = Callable[..., Any]

READ: dict[str, Callable[[Any], Any]] = {
    "float": float,
    "int": int,
    "bool": bool,
    "complex": complex,
    "if": lambda x: 1 if x > 0 else 2,
    "and": lambda x: x > 0 and x < 9,
    "index": lambda x: [1, 2, 3][ops.astype(x, "int32")],
    "range": lambda x: len(range(ops.astype(x, "int32"))),
    "math": math.exp,
    "np.asarray": np.asarray,
    "np.array": np.array,
    "np.float64": np.float64,
    "to_numpy": metaframe.ops.to_numpy,
    "operator.index": lambda x: operator.index(ops.astype(x, "int32")),
}
"""Ways that there are in every framework."""
OF_FRAMEWORK: dict[str, dict[str, Callable[[Any], Any]]] = {
    "torch": {
        "numpy": lambda x: x.numpy(),
        "detach.numpy": lambda x: x.detach().cpu().numpy(),
        "tolist": lambda x: x.tolist(),
        "item": lambda x: x.item(),
        "data_ptr": lambda x: x.data_ptr(),
        "dlpack": np.from_dlpack,
        "format": lambda x: f"{x:.2f}",
        "storage": lambda x: x.untyped_storage().tolist(),
        "pickle": lambda x: pickle.loads(pickle.dumps(x)),
        "deepcopy": copy.deepcopy,
        "equal": lambda x: importlib.import_module("torch").equal(x, x),
        "allclose": lambda x: importlib.import_module("torch").allclose(x, x),
        "is_nonzero": lambda x: x.is_nonzero(),
        "contains": lambda x: 1.0 in x,
        "a list of tensors": lambda x: importlib.import_module("torch").tensor([x, x]),
    },
    "jax": {
        "item": lambda x: x.item(),
        "tolist": lambda x: x.tolist(),
        "mask": lambda x: x[None][x[None] > 0],
    },
    "tensorflow": {
        "numpy": lambda x: x.numpy(),
        "iter": lambda x: list(x[None]),
        "eval": lambda x: x.eval(),
    },
}


UNMAPPED = [OF_FRAMEWORK["torch"][name] for name in ("equal", "a list of tensors")]


def ways() -> list[Any]:
    return [
        pytest.param(name, read, id=f"{name}-{way}")
        for name, own in OF_FRAMEWORK.items()
        for way, read in {**READ, **own}.items()
    ]


def of_itself(x: Any, read: Callable[[Any], Any]) -> Any:
    return x, read(x)


def in_a_cost(x: Any, read: Callable[[Any], Any]) -> Any:
    def cost(batch: Any, v: Any) -> Any:
        read(v["w"])
        return v["w"] * v["w"] * batch

    return inner_loop(cost, {"w": x}, x, steps=1, lr=0.1)["w"]


def mapped(x: Any, read: Callable[[Any], Any]) -> Any:
    def cost(v: Any, task: Any) -> Any:
        read(task)
        return v * v * task

    return meta_value_and_grad(cost, task_map="vmap")(x, ops.stack([x, x])).grads


@pytest.mark.parametrize("within", [of_itself, in_a_cost, mapped])
@pytest.mark.parametrize(("name", "read"), ways())
def test_reading_a_value_names_the_line(
    name: str, read: Callable[[Any], Any], within: Callable[[Any, Callable[[Any], Any]], Any]
) -> None:
    require(name)
    with use_backend(name) as backend, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a pointer, which torch says to be of no use
        compiled = metaframe.compile(lambda x: within(x, read))
        # Of one that `vmap` refuses by its name we say so.
        by_vmap = within is mapped and read in UNMAPPED
        match = "vectorise" if by_vmap else r"test_compile_tracing.py:\d+ needs the value"
        with pytest.raises(BackendError if by_vmap else CompileError, match=match):
            compiled(backend.asarray(2.0))
        assert compiled.traces == 0


@compiles_on_torch
def test_closed_over_values_are_known(backend: Backend, arr: Arr) -> None:
    known = arr([2.0, 3.0])
    compiled = metaframe.compile(lambda x: x * float(backend.to_numpy(known).max()))
    np.testing.assert_array_equal(backend.to_numpy(compiled(arr([1.0]))), [3.0])


@compiles_on_torch
def test_printing_shows_no_values(
    backend: Backend, arr: Arr, capsys: pytest.CaptureFixture[str]
) -> None:
    def fn(x: Any) -> Any:
        print(x, f"{x}")  # noqa: T201
        return 2 * x

    compiled = metaframe.compile(fn)
    for _ in range(2):
        compiled(arr([7.25]))
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) == 1
    assert "7.25" not in printed


@compiles_on_torch
def test_the_first_call_runs_the_function_once(backend: Backend, arr: Arr) -> None:
    seen: list[str] = []

    def cost(batch: Any, v: Any) -> Any:
        return ops.mean((v["w"] * batch["x"] - batch["y"]) ** 2)

    def step(v: Any, batch: Any) -> Any:
        seen.append("step")
        return metaframe.maml_step(batch, cost, None, v, 1, 0.1, batched="vmap")[:2]

    compiled = metaframe.compile(step)
    v, batch = {"w": arr(0.5)}, {"x": arr(np.ones((2, 3))), "y": arr(np.zeros((2, 3)))}
    for _ in range(3):
        compiled(v, batch)
    assert seen == ["step"]


def test_under_jax_transforms_too() -> None:
    require("jax")
    jax = importlib.import_module("jax")
    seen: list[int] = []

    def cube(x: Any) -> Any:
        seen.append(1)
        return (x**3).sum()

    x = jax.numpy.arange(3.0)
    for transformed in (jax.grad, jax.vmap, jax.jit, lambda fn: lambda x: jax.jvp(fn, (x,), (x,))):
        seen.clear()
        compiled = metaframe.compile(cube)
        run = transformed(compiled)
        run(x), run(x)
        assert seen == [1]


def test_a_tensorflow_variable_is_assigned_once_a_call() -> None:
    require("tensorflow")
    tf = importlib.import_module("tensorflow")
    count, seen, made = tf.Variable(0.0), list[int](), list[Any]()

    def fn(x: Any) -> Any:
        seen.append(1)
        if not made:
            made.append(tf.Variable(3.0))  # as a layer of Keras does when it is first called
        return x * made[0] * count.assign_add(1.0)

    compiled = metaframe.compile(fn)
    assert [float(compiled(tf.constant(1.0))) for _ in range(2)] == [3.0, 6.0]
    assert seen == [1]
    with pytest.raises(CompileError, match=r"tf\.Variable from a value that it computes"):
        metaframe.compile(lambda x: tf.Variable(2 * x) + x)(tf.constant(1.0))


@pytest.mark.parametrize("whose", ["was given", "closes over"])
def test_torch_changes_nothing_in_place(whose: str) -> None:
    require("torch")
    torch = importlib.import_module("torch")
    closed, x = torch.zeros(2), torch.ones(2)

    def fn(x: Any) -> Any:
        (x if whose == "was given" else closed)[0].add_(1.0)
        return x + closed

    with pytest.raises(CompileError, match=f"in place that it {whose}"):
        metaframe.compile(fn)(x)
    assert closed.tolist() == [0, 0]
    assert x.tolist() == [1, 1]


def test_torch_may_change_what_it_makes_and_sees_what_others_change() -> None:
    require("torch")
    torch = importlib.import_module("torch")
    closed = torch.ones(2)

    def fn(x: Any) -> Any:
        made = torch.zeros(2)
        made[0] = x.sum()
        return made.add_(closed)

    compiled = metaframe.compile(fn)
    assert compiled(torch.ones(2)).tolist() == [3, 1]
    closed.add_(1.0)
    assert compiled(torch.ones(2)).tolist() == [4, 2]


def test_numbers_of_torch_are_those_of_the_function() -> None:
    require("torch")
    torch = importlib.import_module("torch")

    def fn(x: Any) -> Any:
        return torch.nn.functional.dropout(x, 0.5) * x + torch.randn(6)

    compiled = metaframe.compile(fn)
    for differentiated in (False, True):
        x = torch.arange(1.0, 7.0, requires_grad=differentiated)
        found = []
        for run in (compiled, fn):
            torch.manual_seed(3)
            results = [run(x), run(x)]
            if differentiated:
                results += torch.autograd.grad(results[1].sum(), x)
            found.append(results)
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
    state = torch.get_rng_state()
    with pytest.raises(CompileError, match=r"torch\.Generator of its own"):
        metaframe.compile(lambda x: x + torch.rand(2, generator=torch.Generator()))(torch.ones(2))
    with pytest.raises(CompileError, match="sets the state of torch's random generator"):
        metaframe.compile(lambda x: (torch.manual_seed(1), x + torch.rand(2))[1])(torch.ones(2))
    torch.set_rng_state(state)


@pytest.mark.parametrize("draw", [random.random, lambda: float(np.random.rand())])  # noqa: NPY002
def test_numbers_of_python_and_numpy_are_part_of_the_program(draw: Callable[[], float]) -> None:
    require("torch")
    torch = importlib.import_module("torch")
    compiled = metaframe.compile(lambda x: x * draw())
    x = torch.ones(2, requires_grad=True)
    first, second = compiled(x), compiled(x)
    before = draw()
    (slope,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(slope, first.detach(), rtol=0, atol=0)
    assert draw() != before


def test_the_gradient_of_mapped_tasks_has_the_numbers_of_its_value() -> None:
    """Going back runs the tasks once more, one by one, and would draw another mask."""
    require("torch")
    torch = importlib.import_module("torch")

    def cost(w: Any, t: Any) -> Any:
        return (torch.nn.functional.dropout(w, 0.5) * w * t).sum()

    w = torch.ones(8, requires_grad=True)
    value = meta_value_and_grad(cost)(w, torch.ones(2)).cost
    (slope,) = torch.autograd.grad(value, w)
    # Of a sum of squares.
    torch.testing.assert_close(slope.sum(), 2 * value.detach())


def test_tensorflow_graphs_keep_assertions_and_the_seed() -> None:
    """XLA would drop the one and draw other numbers."""
    require("tensorflow")
    tf = importlib.import_module("tensorflow")

    def checked(x: Any) -> Any:
        tf.debugging.assert_less(x, 1.0)
        return 2 * x

    compiled = metaframe.compile(checked)
    compiled(tf.constant(0.5))
    with pytest.raises(tf.errors.InvalidArgumentError):
        compiled(tf.constant(1.5))
    generator = tf.random.Generator.from_seed(1)
    drawn = metaframe.compile(lambda x: x + generator.normal(()))
    found = [float(drawn(tf.constant(0.0))) for _ in range(2)]
    generator.reset_from_seed(1)
    assert found == [float(generator.normal(())) for _ in range(2)]


@pytest.mark.parametrize(
    "x", [np.array(["a"]), np.array([None, 1.0]), np.array([(1, 2.0)], "i4,f4")], ids=str
)
def test_arrays_without_numbers_are_refused(backend: Backend, x: Any) -> None:
    for call in (
        lambda: metaframe.compile(lambda x: x)(x),
        lambda: ops.sum(x),
        lambda: inner_loop(lambda b, v: v["w"], {"w": 1.0}, x, steps=1, lr=0.1),
    ):
        with pytest.raises(InputTypeError, match="no numbers"):
            call()


@compiles_on_torch
def test_arrays_in_another_byte_order(backend: Backend) -> None:
    x = np.arange(3.0).astype(">f8")
    assert not x.dtype.isnative
    for found in (ops.sum(x), metaframe.compile(ops.sum)(x), ops.sum(np.arange(3, dtype=">i4"))):
        assert float(backend.to_numpy(found)) == 3.0
    assert float(backend.to_numpy(ops.sum(np.arange(3, dtype=np.longdouble)))) == 3.0
