"""Names, arguments, defaults, behaviour and errors of the documented API, on each backend."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import metaframe
import zoo
from metaframe import (
    ANIL,
    MAML,
    Learner,
    MetaSGD,
    MetaTrainer,
    SinusoidTaskSampler,
    Task,
    TaskSampler,
    adapt,
    fomaml_step,
    functional_forward,
    gradient_descent_update,
    head_names,
    inner_step,
    maml_step,
    named_buffers,
    named_params,
    nn,
    ops,
    reptile_step,
)
from metaframe.backend import Backend, load_backend
from metaframe.errors import InputError, InputTypeError, MetaframeError, UnusedParameterError
from metaframe.tasks import stack_tasks

WRAPPER = (
    "module, inner_lr=0.01, inner_steps=1, first_order=False, adapt_names=None, allow_unused=True"
)
META_STEP = """
    batch, inner_cost_fn, outer_cost_fn, variables, inner_grad_steps, inner_learning_rate, /, *,
    inner_optimization_step=gradient_descent_update, inner_batch_fn=None, outer_batch_fn=None,
    average_across_steps=False, batched=True, inner_v=None, keep_inner_v=True, outer_v=None,
    keep_outer_v=True, return_inner_v=False, num_tasks=None, stop_gradients=True
"""
DOCUMENTED: list[tuple[Callable[..., Any], str]] = [
    (maml_step, META_STEP),
    (fomaml_step, META_STEP),
    (
        reptile_step,
        """
        batch, cost_fn, variables, inner_grad_steps, inner_learning_rate, /, *,
        inner_optimization_step=gradient_descent_update, batched=True, return_inner_v=False,
        num_tasks=None, stop_gradients=True
        """,
    ),
    (gradient_descent_update, "w, dcdw, lr, /, *, stop_gradients=True"),
    (MAML, WRAPPER),
    (MAML.clone, "self"),
    (MAML.forward, "self, *args, **kwargs"),
    (MetaSGD, WRAPPER),
    (ANIL, "module, head, **kwargs"),
    (head_names, "module, head"),
    (Learner.__call__, "self, *args, **kwargs"),
    (Learner.adapt, "self, support_loss"),
    (Learner.adapt_on, "self, loss_fn, x, y, *, steps=None"),
    (MetaTrainer, "maml, meta_optimizer, loss_fn, task_sampler"),
    (MetaTrainer.meta_step, "self, tasks"),
    (
        MetaTrainer.fit,
        "self, num_iterations, meta_batch_size, *, eval_every=None, eval_tasks=None, callback=None",
    ),
    (MetaTrainer.evaluate, "self, tasks"),
    (Task, "support_x, support_y, query_x, query_y"),
    (TaskSampler.sample, "self, meta_batch_size"),
    (
        SinusoidTaskSampler,
        """
        amp_range=(0.1, 5.0), phase_range=(0.0, pi), x_range=(-5.0, 5.0), k_support=10, k_query=10,
        generator=None, seed=None, device=None, dtype=None
        """,
    ),
    (SinusoidTaskSampler.sample, "self, meta_batch_size"),
    (named_params, "model"),
    (named_buffers, "model"),
    (functional_forward, "model, params, *args, buffers=None, **kwargs"),
    (inner_step, "params, loss, lr, *, first_order=False, adapt_names=None, allow_unused=True"),
    (
        adapt,
        """
        model, params, build_loss, *, lr=0.01, inner_steps=1, first_order=False, adapt_names=None,
        allow_unused=True
        """,
    ),
]
"""What the references document: ivy's functions and iteryne's, by hand from their pages."""


@pytest.mark.parametrize(
    ("function", "text"), DOCUMENTED, ids=[function.__qualname__ for function, _ in DOCUMENTED]
)
def test_arguments_and_defaults(function: Callable[..., Any], text: str) -> None:
    """Their names, order and defaults, and what goes by position; ours take more, never needed."""
    names = {"gradient_descent_update": gradient_descent_update, "pi": math.pi}
    documented = eval(f"lambda {' '.join(text.split())}: None", names)
    expected, found = (
        [(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()]
        for f in (documented, function)
    )
    assert [p for p in found if p in expected] == expected
    by_position = [p for p in expected if p[1] is not inspect.Parameter.KEYWORD_ONLY]
    taken = [p for p in found if p[1] is not inspect.Parameter.KEYWORD_ONLY]
    assert taken[: len(by_position)] == by_position
    assert all(p[2] is not inspect.Parameter.empty for p in found if p not in expected)


@pytest.fixture
def library(backend_name: str) -> zoo.Library:
    return zoo.PAIRS[backend_name]


@pytest.fixture
def model(library: zoo.Library) -> Any:
    return zoo.built(library)


@pytest.fixture
def support(backend: Backend) -> tuple[Any, Any]:
    task = zoo.tasks()[0]
    return backend.asarray(task.support_x), backend.asarray(task.support_y)


def test_functional_core(
    backend: Backend, library: zoo.Library, model: Any, support: tuple[Any, Any]
) -> None:
    x, y = support
    params = named_params(model)
    assert tuple(params) == tuple(sorted(library.names))
    assert named_buffers(model) == {}

    def build_loss(params: Any) -> Any:
        return nn.mse(functional_forward(model, params, x), y)

    found = adapt(model, params, build_loss, lr=0.1, inner_steps=2)
    expected = zoo.adapted(zoo.weights(), zoo.tasks()[0], dict.fromkeys(zoo.NAMES, 0.1), 2)
    for name, value in library.canonical(found, backend).items():
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=1e-14)
    once = inner_step(params, build_loss, 0.1)
    again = inner_step(once, build_loss, 0.1, first_order=True)
    for name, value in library.canonical(again, backend).items():
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=1e-14)


def test_only_what_is_named_adapts(backend: Backend, model: Any, support: Any) -> None:
    x, y = support
    params = named_params(model)

    def build_loss(params: Any) -> Any:
        return nn.mse(functional_forward(model, params, x), y)

    found = adapt(model, params, build_loss, adapt_names=["head/w"])
    assert found["layer1/w"] is params["layer1/w"]
    assert found["head/b"] is params["head/b"]
    assert found["head/w"] is not params["head/w"]
    learner = ANIL(model, "head").clone().adapt_on(nn.mse, x, y)
    start = named_params(model)
    assert learner.params["layer1/w"] is start["layer1/w"]
    assert learner.params["head/w"] is not start["head/w"]


def test_a_rate_for_each_name(backend: Backend, model: Any, support: Any) -> None:
    x, y = support
    rates = {"layer1/w": 0.0, "layer1/b": 0.1, "head/w": 0.2, "head/b": 0.3}
    learner = MAML(model, rates).clone().adapt_on(nn.mse, x, y)
    ours = dict(zip(zoo.NAMES, (0.0, 0.1, 0.2, 0.3), strict=True))
    expected = zoo.adapted(zoo.weights(), zoo.tasks()[0], ours, 1)
    found = zoo.PAIRS[backend.name].canonical(learner.params, backend)
    for name, value in found.items():
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=1e-14)
    with pytest.raises(InputError, match=r"no rate for .*'head/b'"):
        MAML(model, {name: r for name, r in rates.items() if name != "head/b"})


def test_adaptation_returns_the_learner_and_counts_its_steps(model: Any, support: Any) -> None:
    x, y = support
    calls = []

    def loss_fn(prediction: Any, target: Any) -> Any:
        calls.append(1)
        return nn.mse(prediction, target)

    learner = MAML(model, inner_steps=3).clone()
    assert learner.adapt_on(loss_fn, x, y) is learner
    assert len(calls) == 3
    assert learner.adapt_on(loss_fn, x, y, steps=1) is learner
    assert len(calls) == 4
    assert learner.adapt(lambda other: loss_fn(other(x), y)) is learner


def test_clones_are_independent(backend: Backend, model: Any, support: Any) -> None:
    x, y = support
    maml = MAML(model)
    one, other = maml.clone(), maml.clone()
    before = backend.to_numpy(other(x))
    one.adapt_on(nn.mse, x, y, steps=2)
    assert np.array_equal(backend.to_numpy(other(x)), before)
    assert np.array_equal(backend.to_numpy(maml(x)), before)
    assert np.abs(backend.to_numpy(one(x)) - before).max() > 1e-4


def test_bad_arguments(model: Any, support: Any) -> None:
    x, y = support
    for steps in (0, -1):
        with pytest.raises(ValueError, match="inner_steps must be at least 1"):
            MAML(model, inner_steps=steps)
        with pytest.raises(ValueError, match="inner_steps must be at least 1"):
            adapt(model, named_params(model), lambda params: None, inner_steps=steps)
        with pytest.raises(ValueError, match="steps must be at least 1"):
            MAML(model).clone().adapt_on(nn.mse, x, y, steps=steps)
    with pytest.raises(TypeError, match="inner_steps must be an int"):
        MAML(model, inner_steps=1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no parameters to adapt"):
        MAML(model, adapt_names=[])
    with pytest.raises(ValueError, match=r"'hed/w'.*Did you mean 'head/w'"):
        MAML(model, adapt_names=["hed/w"])
    with pytest.raises(ValueError, match="shares no parameters"):
        ANIL(model, "tail")
    with pytest.raises(ValueError, match="adapt_names is not an argument"):
        ANIL(model, "head", adapt_names=["head/w"])
    with pytest.raises(ValueError, match="norm must be one of"):
        MAML(model, norm="running")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="finite and not negative"):
        MAML(model, inner_lr=-0.1)
    with pytest.raises(TypeError, match="no model metaframe knows"):
        MAML(object())
    with pytest.raises(TypeError, match=r"model.init\(seed\)"):
        MAML(model[0])
    with pytest.raises(ValueError, match="which the model does not have"):
        functional_forward(model, {"head/v": y}, x)


def test_losses_that_cannot_be_adapted_to(backend: Backend, model: Any, support: Any) -> None:
    x, y = support
    learner = MAML(model).clone()
    with pytest.raises(InputError, match=r"shape \(6, 2\), need a scalar"):
        learner.adapt(lambda learner: learner(x) - y)
    with pytest.raises(InputTypeError, match="returned float"):
        learner.adapt(lambda learner: 1.0)
    with pytest.raises(TypeError, match="loss_fn must be a function"):
        learner.adapt_on("mse", x, y)  # type: ignore[arg-type]
    strict = MAML(model, allow_unused=False)
    with pytest.raises(UnusedParameterError, match="'head/b'"):
        strict.clone().adapt(lambda other: ops.sum(ops.square(other.params["head/w"])))
    strict.clone().adapt_on(nn.mse, x, y)
    assert issubclass(UnusedParameterError, (MetaframeError, ValueError, RuntimeError))


def test_unused_parameters_keep_their_values(backend: Backend, model: Any) -> None:
    learner = MAML(model, inner_lr=0.5).clone()
    before = {name: backend.to_numpy(p) for name, p in learner.params.items()}
    learner.adapt(lambda other: ops.sum(ops.square(other.params["head/w"])))
    for name, value in learner.params.items():
        expected = 0.0 * before[name] if name == "head/w" else before[name]
        np.testing.assert_allclose(backend.to_numpy(value), expected, atol=1e-15)


def test_a_loss_that_forgets_the_learner(backend: Backend, model: Any, support: Any) -> None:
    """It is computed with the model, which does not adapt."""
    x, _ = support
    maml = MAML(model)
    fixed = backend.asarray(1.0, "float64")
    with pytest.raises(InputError, match="depends on none of the adapted parameters"):
        maml.clone().adapt(lambda learner: nn.mse(fixed * x, x))
    with pytest.raises(InputTypeError, match="the loss function"):
        maml.clone().adapt(lambda learner: None)


def test_only_a_recorded_loss_can_be_an_array(backend: Backend, model: Any, support: Any) -> None:
    x, y = support
    learner = MAML(model).clone()
    value = nn.mse(learner(x), y)
    if backend.name == "torch":
        with pytest.raises(InputError, match="depends on none of the adapted parameters"):
            learner.adapt(value)  # the parameters of a pair of plain tensors record nothing
    else:
        with pytest.raises(TypeError, match=r"learner.adapt\(lambda learner"):
            learner.adapt(value)
        with pytest.raises(TypeError, match="Pass a function"):
            inner_step(named_params(model), value, 0.1)


def test_meta_gradient_by_hand(library: zoo.Library, backend: Backend) -> None:
    """The manual loop where there is no ambient tape, next to the method."""
    maml = MAML(zoo.built(library), inner_lr=0.1, inner_steps=2)

    def task_loss(params: Any, task: Any) -> Any:
        learner = maml.clone(params).adapt_on(nn.mse, task.support_x, task.support_y)
        return nn.mse(learner(task.query_x), task.query_y)

    tasks = metaframe.tree.map(backend.asarray, stack_tasks(zoo.tasks(1)))
    by_hand = metaframe.meta_value_and_grad(task_loss, task_map="loop")(
        maml.meta_parameters(), tasks
    )
    result = maml.meta_value_and_grad(nn.mse, tasks, task_map="loop")
    for name, grad in result.grads.items():
        np.testing.assert_allclose(
            backend.to_numpy(by_hand.grads[name]), backend.to_numpy(grad), rtol=0, atol=1e-14
        )


def test_zero_steps_are_the_unadapted_model(library: zoo.Library) -> None:
    maml = MAML(zoo.built(library))
    result = maml.meta_value_and_grad(nn.mse, zoo.tasks(), steps=0, task_map="loop")
    expected = zoo.meta_cost(zoo.weights(), {}, 0, zoo.tasks())
    backend = load_backend(library.backend)
    np.testing.assert_allclose(backend.to_numpy(result.cost), expected, rtol=1e-13)


def test_tasks_of_another_framework_are_refused(backend_name: str) -> None:
    maml = MAML(zoo.built(zoo.PAIRS[backend_name]))
    other = load_backend("torch" if backend_name == "jax" else "jax")
    tasks = [metaframe.tree.map(other.asarray, task) for task in zoo.tasks()]
    with pytest.raises(TypeError, match=f"the model is of '{backend_name}'"):
        maml.meta_value_and_grad(nn.mse, tasks)


def test_an_inner_optimizer(library: zoo.Library, backend: Backend) -> None:
    maml = MAML(zoo.built(library), 0.01, 1, update=metaframe.optim.adam())
    result = maml.meta_value_and_grad(nn.mse, zoo.tasks(1), task_map="loop")
    task = metaframe.tree.map(backend.asarray, zoo.tasks()[0])
    learner = maml.clone().adapt_on(nn.mse, task.support_x, task.support_y)
    np.testing.assert_allclose(
        backend.to_numpy(nn.mse(learner(task.query_x), task.query_y)),
        backend.to_numpy(result.cost),
        rtol=1e-13,
    )


def test_learned_rates_by_the_names_of_their_parameters(
    library: zoo.Library, backend: Backend
) -> None:
    """They are live: what is assigned to a meta-parameter is in the mapping, and is used."""
    maml = MetaSGD(zoo.built(library), 0.1)
    assert list(maml.lrs) == list(maml.config.names) == list(named_params(maml.module))
    for rate in maml.lrs.values():
        np.testing.assert_array_equal(backend.to_numpy(rate), np.full(rate.shape, 0.1))
    lrs = maml.lrs
    maml.assign({"learned/head/b": backend.asarray([0.3, 0.2], "float64")})
    np.testing.assert_array_equal(backend.to_numpy(lrs["head/b"]), [0.3, 0.2])
    task = zoo.tasks()[0]
    learner = maml.clone().adapt_on(nn.mse, task.support_x, task.support_y)
    moved = {name: np.full(x.shape, 0.1) for name, x in zoo.weights().items()}
    moved["b2"] = np.array([0.3, 0.2])
    expected = zoo.adapted(zoo.weights(), task, moved, 1)
    for name, value in library.canonical(learner.params, backend).items():
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=1e-14)


def test_the_settings_of_a_wrapper(model: Any) -> None:
    maml = MAML(model, 0.2, 3, True, ["head/w"], False)
    assert (maml.inner_lr, maml.inner_steps, maml.first_order) == (0.2, 3, True)
    assert (maml.adapt_names, maml.allow_unused) == (("head/w",), False)


def test_names_of_gradients_are_those_of_parameters(library: zoo.Library) -> None:
    maml = MetaSGD(zoo.built(library))
    grads = maml.meta_value_and_grad(nn.mse, zoo.tasks(1), task_map="loop").grads
    assert list(grads) == list(maml.meta_parameters())
    assert {name for name, _ in maml.clone().named_parameters()} < set(grads)
