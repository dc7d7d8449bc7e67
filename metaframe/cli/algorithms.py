"""The algorithms that the command knows, one entry each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from metaframe.cli.config import RunConfig
from metaframe.cli.errors import UsageError, suggestion
from metaframe.learners import (
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
)
from metaframe.learners.meta_learner import MetaLearner


@dataclass(frozen=True)
class Algorithm:
    """A learner around a model.

    Attributes:
        about: one line.
        build: `(module, config) -> learner`.
        settings: the settings that this algorithm has a use for, and not all others.
        defaults: settings that differ from the general ones, and from the data set's.
        ignores: the settings of all the others that it has no use for.
        classifies: is it for classification alone?
    """

    about: str
    build: Callable[[Any, RunConfig], MetaLearner]
    settings: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    ignores: tuple[str, ...] = ()
    classifies: bool = False


ALGORITHMS = {
    "maml": Algorithm(
        "exact second-order meta-gradients (arXiv 1703.03400)",
        lambda model, c: MAML(model, c.inner_lr, c.inner_steps, norm=c.norm),
    ),
    "fomaml": Algorithm(
        "inner gradients taken for constants (arXiv 1703.03400, 5.2)",
        lambda model, c: MAML(model, c.inner_lr, c.inner_steps, first_order=True, norm=c.norm),
        ignores=("mode",),
    ),
    "maml++": Algorithm(
        "learned rates for every step, multi-step loss, annealed order (arXiv 1810.09502)",
        lambda model, c: MAMLPlusPlus(
            model,
            c.inner_lr,
            c.inner_steps,
            norm=c.norm,
            learn_norms=c.learn_norms,
            multi_step_epochs=c.multi_step_epochs,
            second_order_from=c.second_order_from,
        ),
        ("multi_step_epochs", "learn_norms", "second_order_from", "steps_per_epoch"),
        {"inner_steps": 5, "multi_step_epochs": 10},
    ),
    "reptile": Algorithm(
        "moves towards the adapted parameters (arXiv 1803.02999)",
        lambda model, c: Reptile(model, c.inner_lr, c.inner_steps, norm=c.norm),
        # After one step it moves along the plain gradient of the support loss, and learns nothing
        # of adaptation.
        defaults={"inner_steps": 5},
        ignores=("mode",),
    ),
    "anil": Algorithm(
        "adapts the head only (arXiv 1909.09157)",
        lambda model, c: ANIL(
            model, "head", inner_lr=c.inner_lr, inner_steps=c.inner_steps, norm=c.norm
        ),
    ),
    "cavia": Algorithm(
        "adapts context parameters only (arXiv 1810.03642)",
        lambda model, c: CAVIA(
            model, "context", inner_lr=c.inner_lr, inner_steps=c.inner_steps, norm=c.norm
        ),
        ("context",),
        {"context": 5, "inner_lr": 1.0},
    ),
    "metasgd": Algorithm(
        "learns the inner rates (arXiv 1707.09835)",
        lambda model, c: MetaSGD(model, c.inner_lr, c.inner_steps, norm=c.norm),
    ),
    "metacurvature": Algorithm(
        "learns a transformation of the inner gradients (arXiv 1902.03356)",
        lambda model, c: MetaCurvature(model, c.inner_lr, c.inner_steps, norm=c.norm),
    ),
    "imaml": Algorithm(
        "gradients at the solution of a proximal inner problem (arXiv 1909.04630)",
        lambda model, c: ImplicitMAML(
            model, c.inner_lr, c.inner_steps, c.proximal, c.cg_steps, norm=c.norm
        ),
        ("proximal", "cg_steps"),
        {"inner_steps": 16},
        ignores=("mode",),
    ),
    "protonet": Algorithm(
        "classes are the means of their features (arXiv 1703.05175)",
        lambda model, c: ProtoNet(model, c.ways, norm=c.norm),
        ("features",),
        {"features": 64},
        ignores=("inner_lr", "inner_steps", "eval_steps", "mode"),
        classifies=True,
    ),
    "protomaml": Algorithm(
        "MAML with a head that starts from prototypes (arXiv 1903.03096)",
        lambda model, c: ProtoMAML(model, c.ways, c.inner_lr, c.inner_steps, norm=c.norm),
        ("features",),
        {"features": 64},
        classifies=True,
    ),
}


def algorithm(name: str) -> Algorithm:
    """The algorithm called `name`."""
    if name not in ALGORITHMS:
        raise UsageError(f"no algorithm called {name!r}. {suggestion(name, ALGORITHMS)}")
    return ALGORITHMS[name]
