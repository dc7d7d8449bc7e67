"""A cost of shape (1,) is a scalar wherever a cost is taken, and what comes back is one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import metaframe
import zoo
from metaframe import (
    MAML,
    ImplicitMAML,
    MetaTrainer,
    Reptile,
    adapt,
    fomaml_step,
    functional_forward,
    inner_loop,
    inner_step,
    maml_step,
    meta_value_and_grad,
    named_params,
    nn,
    ops,
    optim,
    reptile_step,
    tree,
)
from metaframe.backend import Backend
from metaframe.errors import InputError
from metaframe.tasks import stack_tasks
from metaframe.training import evaluate

TASKS = stack_tasks(zoo.tasks())
Shaped = Callable[[Any], Any]


def cost_fn(shaped: Shaped) -> Callable[[Any, Any], Any]:
    def cost(batch: Any, v: Any) -> Any:
        return shaped(ops.mean(ops.square(batch["x"] * v["w"] - batch["y"])))

    return cost


def batch(backend: Backend, tasks: int = 3) -> Any:
    x, y = np.random.default_rng(0).normal(size=(2, tasks, 4))
    return {"x": backend.asarray(x), "y": backend.asarray(y)}


def variables(backend: Backend) -> Any:
    return {"w": backend.asarray(np.linspace(-1.0, 1.0, 4))}


def stepped(step: Any, costs: int, **options: Any) -> Any:
    def run(backend: Backend, shaped: Shaped) -> Any:
        v = variables(backend)
        if options.get("batched", True) is True:
            v = {"w": ops.stack([v["w"]] * 3)}
        return step(batch(backend), *[cost_fn(shaped)] * costs, v, 2, 0.1, **options)

    return run


def looped(backend: Backend, shaped: Shaped, **options: Any) -> Any:
    def task_cost(v: Any, task: Any) -> Any:
        adapted = inner_loop(cost_fn(shaped), v, task, steps=2, lr=0.1, **options)
        return cost_fn(shaped)(task, adapted)

    step = meta_value_and_grad(task_cost, task_map="scan")
    run = metaframe.compile(step) if backend.compiles_quickly else step
    return run(variables(backend), batch(backend))


def of_learner(kind: Callable[..., Any], **options: Any) -> Any:
    def run(backend: Backend, shaped: Shaped) -> Any:
        maml = kind(zoo.built(zoo.PAIRS[backend.name]), **options)
        found = maml.meta_value_and_grad(loss_fn(shaped), TASKS, task_map="scan")
        task = tree.map(backend.asarray, zoo.tasks()[0])
        learner = maml.clone().adapt_on(loss_fn(shaped), task.support_x, task.support_y)
        return tuple(found), learner.params

    return run


def loss_fn(shaped: Shaped) -> Any:
    return lambda prediction, target: shaped(nn.mse(prediction, target))


def functional(backend: Backend, shaped: Shaped) -> Any:
    model = zoo.built(zoo.PAIRS[backend.name])
    task = tree.map(backend.asarray, zoo.tasks()[0])

    def loss(params: Any) -> Any:
        found = functional_forward(model, params, task.support_x)
        return shaped(nn.mse(found, task.support_y))

    learner = MAML(model).clone().adapt(lambda learner: shaped(ops.sum(learner(task.query_x))))
    once = inner_step(named_params(model), loss, 0.1, allow_unused=False)
    return once, adapt(model, once, loss, inner_steps=2), learner.params


def trained(backend: Backend, shaped: Shaped) -> Any:
    maml = MAML(zoo.built(zoo.PAIRS[backend.name]), 0.1)
    trainer = MetaTrainer(
        *(maml, optim.sgd(0.1), loss_fn(shaped), zoo.Fixed()), metric=loss_fn(shaped)
    )
    history = trainer.fit(1, 2, eval_every=1, eval_tasks=zoo.tasks())
    found = evaluate(maml, loss_fn(shaped), zoo.tasks(), 3, metric=loss_fn(shaped))
    scores = found.losses, found.scores, found.inductive
    return history.meta_loss, history.eval_loss, history.eval_score, scores, maml.meta_parameters()


ENTRIES: dict[str, Callable[[Backend, Shaped], Any]] = {
    **{
        f"maml_step-{batched}": stepped(maml_step, 2, batched=batched, average_across_steps=True)
        for batched in (True, False, "vmap", "scan")
    },
    "maml_step-stop_gradients": stepped(maml_step, 2, stop_gradients=False),
    "fomaml_step": stepped(fomaml_step, 2),
    "reptile_step": stepped(reptile_step, 1),
    "reptile_step-False": stepped(reptile_step, 1, batched=False, stop_gradients=False),
    "reverse": looped,
    "remat": lambda backend, shaped: looped(backend, shaped, mode="remat"),
    "mixed": lambda backend, shaped: looped(backend, shaped, mode="mixed"),
    "order-1": lambda backend, shaped: looped(backend, shaped, order=1),
    "functional": functional,
    "MAML": of_learner(MAML, inner_steps=2),
    "Reptile": of_learner(Reptile, inner_steps=2),
    "ImplicitMAML": of_learner(ImplicitMAML, inner_steps=1),
    "trainer": trained,
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_one_element_counts_as_a_scalar(backend: Backend, entry: str, to_np: Any) -> None:
    plain, one = (
        to_np(ENTRIES[entry](backend, shaped))
        for shaped in (lambda cost: cost, lambda cost: ops.reshape(cost, (1,)))
    )
    expected, found = tree.leaves(plain), tree.leaves(one)
    assert tree.structure(plain) == tree.structure(one)
    for a, b in zip(expected, found, strict=True):
        assert np.shape(a) == np.shape(b)
        np.testing.assert_allclose(b, a, rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize("shape", [(2,), (1, 1), (0,)])
def test_any_other_shape_does_not(backend: Backend, shape: tuple[int, ...]) -> None:
    def cost(batch: Any, v: Any) -> Any:
        return ops.broadcast_to(ops.sum(v["w"]), shape) if 0 not in shape else v["w"][:0]

    with pytest.raises(InputError, match=r"returned shape .*need a scalar"):
        maml_step(batch(backend), cost, None, variables(backend), 1, 0.1, batched="vmap")
