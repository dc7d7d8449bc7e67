"""Every relative of MAML: learners give its meta-gradients, bad input is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import metaframe
import zoo
from metaframe import (
    ANIL,
    CAVIA,
    MAML,
    ImplicitMAML,
    MAMLPlusPlus,
    MetaCurvature,
    MetaSGD,
    ProtoMAML,
    ProtoNet,
    Reptile,
    nn,
)
from metaframe.backend import Backend
from metaframe.errors import InputError
from metaframe.models.precision import mixed_precision
from metaframe.tasks import Task, stack_tasks

LR, STEPS = 0.1, 2


@pytest.fixture
def model(backend: Backend) -> Any:
    return zoo.built(zoo.PAIRS[backend.name])


FAMILY: dict[str, Callable[[Any], Any]] = {
    "maml++": lambda model: MAMLPlusPlus(model, LR, STEPS),
    "curvature": lambda model: MetaCurvature(model, LR, STEPS),
    "cavia": lambda model: CAVIA(model, "layer1/b", inner_lr=LR, inner_steps=STEPS),
    "implicit": lambda model: ImplicitMAML(model, LR, STEPS),
    "protonet": lambda model: ProtoNet(model, 2),
    "proto-maml": lambda model: ProtoMAML(model, 2, LR, STEPS),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILY)
def test_a_learner_does_the_same(name: str, model: Any, backend: Backend) -> None:
    maml = FAMILY[name](model)
    tasks, loss_fn = zoo.tasks(1), nn.mse
    if name.startswith("proto"):
        tasks, loss_fn = [binary(task) for task in tasks], nn.cross_entropy

    def task_loss(params: Any, task: Any) -> Any:
        learner = maml.clone(params).adapt_on(loss_fn, task.support_x, task.support_y)
        return loss_fn(learner(task.query_x), task.query_y)

    batch = metaframe.tree.map(backend.asarray, stack_tasks(tasks))
    step: Any = metaframe.meta_value_and_grad(task_loss, task_map="loop")
    step = metaframe.compile(step) if backend.compiles_quickly else step
    by_hand = step({n: backend.stop_gradient(x) for n, x in maml.meta_parameters().items()}, batch)
    result = maml.meta_value_and_grad(loss_fn, batch, task_map="loop")
    for key, grad in result.grads.items():
        np.testing.assert_allclose(
            backend.to_numpy(by_hand.grads[key]), backend.to_numpy(grad), rtol=0, atol=1e-14
        )


def binary(task: Task) -> Task:
    labels = [(y[:, 0] > np.median(y[:, 0])).astype(int) for y in (task.support_y, task.query_y)]
    return Task(task.support_x, labels[0], task.query_x, labels[1])


@pytest.mark.parametrize("name", FAMILY)
def test_backward_through_a_learner(name: str) -> None:
    library = zoo.LIBRARIES[0]
    assert library.id == "torch"
    module = zoo.built(library)
    import torch

    if name == "cavia":
        maml: Any = CAVIA(module, "0.bias", inner_lr=LR, inner_steps=STEPS)
    else:
        maml = FAMILY[name](module)
    task, loss_fn = zoo.tasks(1)[0], nn.mse
    if name.startswith("proto"):
        task, loss_fn = binary(task), nn.cross_entropy
    task = metaframe.tree.map(torch.from_numpy, task)
    learner = maml.clone().adapt_on(loss_fn, task.support_x, task.support_y)
    loss_fn(learner(task.query_x), task.query_y).backward()
    expected = maml.meta_value_and_grad(loss_fn, [task], task_map="loop").grads
    for key, parameter in maml.meta_parameters().items():
        torch.testing.assert_close(parameter.grad, expected[key], rtol=0, atol=1e-13)
    registered = {id(p) for p in maml.parameters()}
    assert all(id(p) in registered for p in maml.meta_parameters().values())


def contextual() -> Any:
    """A torch model with batch normalisation, and a context parameter behind it."""
    import torch

    class Contextual(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.norm = torch.nn.Linear(3, 4, bias=False), torch.nn.BatchNorm1d(4)
            self.context = torch.nn.Parameter(torch.zeros(2))
            self.head = torch.nn.Linear(6, 2)

        def forward(self, x: Any) -> Any:
            hidden = torch.tanh(self.norm(self.body(x)))
            return self.head(torch.cat([hidden, self.context.expand(len(x), 2)], 1))

    torch.manual_seed(0)
    return Contextual().double()


WHOLE = ("body.weight", "norm.weight", "norm.bias", "context", "head.weight", "head.bias")
MOVING: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "maml": (MAML, WHOLE),
    "anil": (lambda m, **how: ANIL(m, "head", **how), WHOLE[4:]),
    "meta-sgd": (MetaSGD, WHOLE),
    "maml++": (MAMLPlusPlus, WHOLE),
    "maml++ norms": (
        lambda m, **how: MAMLPlusPlus(m, learn_norms=True, **how),
        (WHOLE[0], *WHOLE[3:]),
    ),
    "curvature": (MetaCurvature, WHOLE),
    "cavia": (lambda m, **how: CAVIA(m, "context", **how), ("context",)),
    "implicit": (ImplicitMAML, WHOLE),
    "proto-maml": (
        lambda m, **how: ProtoMAML(m, 2, **how),
        (*WHOLE, "prototypes/w", "prototypes/b"),
    ),
    "reptile": (Reptile, WHOLE),
}


@pytest.mark.parametrize("norm", ["batch", "frozen", "support", "per-step"])
@pytest.mark.parametrize("name", MOVING)
def test_what_moves_does_not_depend_on_the_norm(name: str, norm: str) -> None:
    import torch

    make, expected = MOVING[name]
    maml = make(contextual(), inner_lr=LR, inner_steps=STEPS, norm=norm)
    task = binary(zoo.tasks(1)[0])
    x, y = torch.from_numpy(task.support_x), torch.from_numpy(task.support_y)
    one, two = (maml.clone().adapt_on(nn.cross_entropy, x, y, steps=n).params for n in (1, 2))
    moved = {n for n in one if not torch.allclose(one[n], two[n], rtol=0, atol=1e-7)}
    assert moved == set(expected)


@pytest.mark.parametrize("name", MOVING)
def test_a_result_holds_no_record(name: str) -> None:
    """One of a context did, and its tasks ran one by one, with a warning that misled."""
    make, _ = MOVING[name]
    tasks = [binary(task) for task in zoo.tasks()]
    maml = make(contextual(), inner_lr=LR)
    cost, grads, aux = maml.meta_value_and_grad(nn.cross_entropy, tasks, task_map="vmap")
    assert not any(x.requires_grad for x in (cost, *grads.values(), *aux.values()))


def test_a_context_starts_at_zero_whatever_the_model_holds() -> None:
    import torch

    tasks, results = zoo.tasks(), []
    x, y = torch.from_numpy(tasks[0].support_x), torch.from_numpy(tasks[0].support_y)
    for value in (0.0, float("nan")):
        module = contextual()
        torch.nn.init.constant_(module.context, value)
        maml = CAVIA(module, "context", inner_lr=LR, inner_steps=STEPS)
        by_loss = maml.clone()
        by_loss.adapt(nn.mse(by_loss(x), y))
        nn.mse(by_loss(x), y).backward()
        result = maml.meta_value_and_grad(nn.mse, tasks)
        results.append([*result.grads.values(), *(p.grad for p in maml.meta_parameters().values())])
    assert all(map(torch.equal, *results))


def test_a_parameter_that_is_gone_is_an_error() -> None:
    """It used to be left out of the adaptation as if it had been frozen."""
    import torch

    module = contextual()
    maml = MAML(module)
    module.head = torch.nn.Linear(6, 2, bias=False).double()
    with pytest.raises(InputError, match=r"has no parameters \['head\.bias'\].*Wrap it again"):
        maml.clone()


def test_an_adapter_around_another_keeps_its_layout() -> None:
    """Which mode of a weight is which does not depend on what the model computes in."""
    import torch

    module = torch.nn.Conv2d(3, 8, 5)
    shapes = [
        {n: tuple(p.shape) for n, p in MetaCurvature(model).meta_parameters().items()}
        for model in (module, mixed_precision(module))
    ]
    assert shapes[0] == shapes[1]
    assert shapes[0]["learned/weight/out"] == (8, 8)


def test_reptile_has_no_backward() -> None:
    import torch

    module = zoo.built(zoo.LIBRARIES[0])
    task = metaframe.tree.map(torch.from_numpy, zoo.tasks()[0])
    learner = Reptile(module, LR, 3).clone().adapt_on(nn.mse, task.support_x, task.support_y)
    loss = nn.mse(learner(task.query_x), task.query_y)
    assert not loss.requires_grad
    with pytest.raises(InputError, match=r"Use learner\.adapt_on"):
        Reptile(module).clone().adapt(nn.mse(module(task.support_x), task.support_y))


def test_bad_arguments(model: Any, backend: Backend) -> None:
    with pytest.raises(InputError, match="multi_step_epochs must be at least 0"):
        MAMLPlusPlus(model, multi_step_epochs=-1)
    with pytest.raises(InputError, match="epoch must be at least 0"):
        MAMLPlusPlus(model).epoch = -1
    with pytest.raises(InputError, match="proximal must be a positive number"):
        ImplicitMAML(model, proximal=0.0)
    with pytest.raises(InputError, match="cg_steps must be at least 1"):
        ImplicitMAML(model, cg_steps=0)
    with pytest.raises(InputError, match="positive number; received 0"):
        Reptile(model, 0)
    with pytest.raises(InputError, match="context shares no parameters"):
        CAVIA(model, "film")
    with pytest.raises(InputError, match="adapt_names is not an argument"):
        CAVIA(model, "head", adapt_names=["head/w"])
    with pytest.raises(InputError, match="leaves nothing to meta-learn"):
        CAVIA((model[0], {"head": model[1]["head"]}), "head")
    with pytest.raises(InputError, match="ways must be at least 2"):
        ProtoNet(model, 1)
    with pytest.raises(InputError, match="takes no inner steps"):
        ProtoNet(model, 2).meta_value_and_grad(nn.cross_entropy, zoo.tasks(), steps=1)
    with pytest.raises(InputError, match="seen no support set"):
        ProtoNet(model, 2).clone()(backend.asarray(zoo.tasks()[0].query_x))
    with pytest.raises(InputError, match=r"no meta-parameter called 'hed/w'.*head/w"):
        MAML(model).clone({"hed/w": backend.asarray(0.0)})
