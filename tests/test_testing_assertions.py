"""Each assertion passes on what is right, and fails with a message on what is planted."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from frameworks import BACKENDS, require
from metaframe import compile, meta_value_and_grad, nn, ops, tree
from metaframe.backend import current_backend, load_backend
from metaframe.errors import InputError, InputTypeError
from metaframe.tasks import FewShotSampler, IndexedSampler, SinusoidTaskSampler, Task
from metaframe.testing import (
    Adaptation,
    assert_backends_agree,
    assert_compiled_once,
    assert_meta_gradient,
    assert_no_leak,
)
from metaframe.testing.differences import slope

Call = Callable[..., Any]

V = {"b": np.array([0.3]), "w": np.array([0.5])}
BATCH = {"x": np.array([[1.0, 2.0], [0.5, -1.5]])}


def cost(task: Any, v: Any) -> Any:
    return ops.mean(ops.tanh(v["w"] * task["x"] + v["b"]) ** 2)


# -- finite differences ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fn", "expected"), [(np.sin, 1.0), (np.exp, 1.0), (lambda t: 3 * t, 3.0), (np.tan, 1.0)]
)
def test_slope(fn: Call, expected: float) -> None:
    found = slope(fn)
    assert abs(found.value - expected) <= 1e-11
    assert abs(found.value - expected) <= 10 * found.error + 1e-12


@pytest.mark.parametrize(
    "fn", [abs, lambda t: abs(t) + t, lambda t: max(t, 0.0), lambda t: float(t > 0)]
)
def test_slope_at_a_kink_is_not_trusted(fn: Call) -> None:
    assert slope(fn).error >= 0.4


def test_meta_gradient(backend: Any, arr: Call) -> None:
    adaptation = Adaptation(steps=2, lr=0.3)
    assert_meta_gradient(cost, arr(V), arr(BATCH), adaptation)


def test_neutral_inputs_go_to_the_selected_backend(backend: Any) -> None:
    assert_meta_gradient(cost, V, BATCH, Adaptation(steps=0))


def test_a_wrong_meta_gradient() -> None:
    require("torch")
    backend = load_backend("torch")
    right = meta_value_and_grad(Adaptation(lr=0.3).task_cost(cost, backend))

    def step(v: Any, batch: Any) -> Any:
        value, grads, _ = right(v, batch)
        return value, {**grads, "w": grads["w"] * (1 + 1e-6)}

    given = *(tree.map(backend.asarray, x) for x in (V, BATCH)), Adaptation(lr=0.3)
    with pytest.raises(AssertionError, match=r"wrong:\n  'w': \S+ along .* say \S+$"):
        assert_meta_gradient(cost, *given, step=step)
    assert_meta_gradient(cost, *given, step=step, rtol=1e-5)


def test_double_precision_on_jax_is_left_as_it_was() -> None:
    require("jax")
    jax = importlib.import_module("jax")
    with jax.enable_x64(False):
        v = {"w": jax.numpy.ones(2)}
        assert v["w"].dtype == "float32"
        assert_meta_gradient(lambda task, v: ops.mean(v["w"] ** 4 * task), v, jax.numpy.ones(2))
        assert jax.numpy.ones(1).dtype == "float32"


# -- backends ----------------------------------------------------------------------------------


def test_backends_agree() -> None:
    for name in BACKENDS:
        require(name)

    def run(v: Any, batch: Any) -> Any:
        task_cost = Adaptation(steps=2, lr=0.3).task_cost(cost, current_backend())
        return meta_value_and_grad(task_cost)(v, batch)[:2]

    assert_backends_agree(run, V, BATCH)
    assert_backends_agree(run, V, BATCH, dtype="float32", rtol=1e-5)


def test_backends_that_differ() -> None:
    for name in ("torch", "jax"):
        require(name)

    def run(x: Any) -> Any:
        return {"y": ops.sum(x) * (1 + 1e-9 * (current_backend().name == "jax"))}

    with pytest.raises(AssertionError, match="'y' differs between torch and jax by 3e-09"):
        assert_backends_agree(run, np.arange(3.0), backends=("torch", "jax"))
    assert_backends_agree(run, np.arange(3.0), backends=("torch", "jax"), rtol=1e-8)

    def shape(x: Any) -> Any:
        return x[None] if current_backend().name == "jax" else x

    with pytest.raises(AssertionError, match=r"shape \(3,\) on torch and \(1, 3\) on jax"):
        assert_backends_agree(shape, np.arange(3.0), backends=("torch", "jax"))


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_agreement_next_to_what_is_not_finite(value: float) -> None:
    for name in ("torch", "jax"):
        require(name)

    def run(x: Any, *, at: int, factor: float) -> Any:
        rest = [x * factor, x]
        rest.insert(at, x * value)
        return ops.concat(rest, axis=0)

    def on(of_torch: Any, of_jax: Any) -> Any:
        return lambda x: run(x, **(of_torch if current_backend().name == "torch" else of_jax))

    given, backends = np.array([1.0, 2.0]), ("torch", "jax")
    same = {"at": 0, "factor": 1.0}
    assert_backends_agree(on(same, same), given, backends=backends)
    with pytest.raises(AssertionError, match="differs between torch and jax by 2, largest value 2"):
        assert_backends_agree(on(same, {"at": 0, "factor": 2.0}), given, backends=backends)
    with pytest.raises(AssertionError, match="other infinities or NaN on torch than on jax"):
        assert_backends_agree(on(same, {"at": 1, "factor": 1.0}), given, backends=backends)


def test_agreement_takes_two() -> None:
    with pytest.raises(InputError, match="takes two backends, received \\['torch'\\]"):
        assert_backends_agree(ops.sum, np.ones(2), backends=["torch"])


def test_agreement_takes_numpy(backend: Any, arr: Call) -> None:
    with pytest.raises(InputTypeError, match=f"received one of {backend.name}"):
        assert_backends_agree(ops.sum, arr(np.ones(2)), backends=("torch", "jax"))


# -- compilation -------------------------------------------------------------------------------


def test_compiled_once() -> None:
    require("jax")
    jax = load_backend("jax")
    step = compile(lambda v, scale: v["w"] * scale)
    with pytest.raises(AssertionError, match="never called"):
        assert_compiled_once(step)
    for value in (1.0, 2.0):
        step({"w": jax.asarray([value, 1.0])}, jax.asarray(value))
    assert_compiled_once(step)
    step({"w": jax.asarray([1.0, 2.0, 3.0])}, jax.asarray(1.0))
    with pytest.raises(AssertionError, match=r"compiled 2 times; .*\n  program 2: .*'0/w'"):
        assert_compiled_once(step)


def test_compiled_for_a_number_that_changes() -> None:
    require("jax")
    jax = load_backend("jax")
    step = compile(lambda x, *, rate: x * rate)
    step(jax.asarray([1.0]), rate=0.1)
    step(jax.asarray([1.0]), rate=0.2)
    with pytest.raises(AssertionError, match=r"argument 'rate'.*0\.2.*, not .*0\.1"):
        assert_compiled_once(step)


def test_compiled_only_by_us() -> None:
    with pytest.raises(InputTypeError, match=r"what metaframe\.compile returned"):
        assert_compiled_once(nn.mse)


# -- samplers ----------------------------------------------------------------------------------

IMAGES = np.random.default_rng(0).random((120, 4)).astype(np.float32)
LABELS = np.repeat(np.arange(12), 10)


def few_shot(**how: Any) -> FewShotSampler:
    return FewShotSampler(IMAGES, LABELS, ways=2, shots=2, queries=3, **how)


def test_samplers_without_a_leak() -> None:
    samplers = [few_shot(split=split) for split in ("train", "validation")]
    assert_no_leak(*samplers)
    assert [s.position for s in samplers] == [0, 0]
    assert_no_leak(SinusoidTaskSampler(seed=1), tasks=5)


FORMS: dict[str, Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]] = {
    "numbers": lambda labels: labels,
    "column": lambda labels: labels[:, None],
    "one-hot": lambda labels: np.eye(3, dtype=np.float32)[labels],
}


class Leaky(IndexedSampler):
    """Classification of single numbers, with a fault to choose."""

    def __init__(self, fault: str, form: str = "numbers", **how: Any) -> None:
        super().__init__(**how)
        self._fault, self._form = fault, form

    def draw(self, rng: np.random.Generator) -> Task:
        classes = np.argsort(rng.random(3))
        labels = classes if self._fault == "labels" else np.arange(3)
        support = 10.0 * classes[:, None] + np.floor(4 * rng.random((3, 1)))
        query = 5 + 10.0 * classes[:, None] + np.floor(4 * rng.random((3, 1)))
        if self._fault == "query":
            query[1] = support[2]
        labels = FORMS[self._form](labels)
        return Task(support, labels, query, labels)


def test_query_in_support() -> None:
    with pytest.raises(
        AssertionError,
        match=r"sampler 0, task 0: 1 examples .* support example 2 = query example 1",
    ):
        assert_no_leak(Leaky("query"))


@pytest.mark.parametrize("form", FORMS)
def test_labels_that_never_change(form: str) -> None:
    assert_no_leak(Leaky("none", form))
    with pytest.raises(AssertionError, match=r"sampler 0: .* had the same label in all of them"):
        assert_no_leak(Leaky("labels", form))
    assert_no_leak(Leaky("labels", form), labels=False)


def test_splits_that_overlap() -> None:
    with pytest.raises(AssertionError, match=r"samplers 0 and 1 have .* examples in common"):
        assert_no_leak(Leaky("none"), Leaky("none", split="test"))


def test_too_few_tasks_to_tell() -> None:
    with pytest.raises(AssertionError, match="no example came twice in 1 tasks"):
        assert_no_leak(few_shot(), tasks=1)


def test_structured_examples() -> None:
    class Structured:
        def sample(self, meta_batch_size: int) -> list[Task]:
            rng = np.random.default_rng(0)
            rows = [{"a": rng.random(4), "b": rng.random((4, 2))} for _ in range(2)]
            y = rng.random(4)
            return [Task(rows[0], y, rows[1], y)] * meta_batch_size

    assert_no_leak(Structured())
    assert tree.key_chains(Structured().sample(1)[0])[0] == "support_x/a"
