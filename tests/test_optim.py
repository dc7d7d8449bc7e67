"""Update rules: their steps against formulas in NumPy, their defaults against other libraries'."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from documents import ROOT
from frameworks import require
from metaframe import optim

RULES = ("sgd", "momentum", "adam", "adamw", "rmsprop", "adagrad")
IN_TORCH = {
    "sgd": "SGD",
    "momentum": "SGD",
    "adam": "Adam",
    "adamw": "AdamW",
    "rmsprop": "RMSprop",
    "adagrad": "Adagrad",
}
IN_OPTAX = {rule: rule for rule in RULES} | {"momentum": "sgd"}
ELSEWHERE = {"initial_accumulator": "initial_accumulator_value"}
"""What both call a setting of ours."""
ROW = re.compile(r"^\| `(\w+)\((\w+)\)` \| (\S+) \| (\S+) \| (\S+) \|$", re.MULTILINE)


def defaults(function: Any) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def settings(rule: str) -> dict[str, Any]:
    return {k: v for k, v in defaults(getattr(optim, rule)).items() if k != "learning_rate"}


def torch_default(rule: str, setting: str) -> Any:
    found = defaults(getattr(importlib.import_module("torch.optim"), IN_TORCH[rule]))
    if setting in ("b1", "b2"):
        return found["betas"][int(setting[1]) - 1]
    own = {"momentum": "momentum", "rmsprop": "alpha"}
    return found[own[rule] if setting == "decay" else ELSEWHERE.get(setting, setting)]


def optax_default(rule: str, setting: str) -> Any:
    found = defaults(getattr(pytest.importorskip("optax"), IN_OPTAX[rule]))
    name = "momentum" if (rule, setting) == ("momentum", "decay") else setting
    return found[ELSEWHERE.get(name, name)]


EVERY = [(rule, setting) for rule in RULES for setting in settings(rule)]


@pytest.mark.parametrize(("rule", "setting"), EVERY)
def test_a_default_that_torch_and_optax_share_is_ours(rule: str, setting: str) -> None:
    require("torch")
    theirs = torch_default(rule, setting), optax_default(rule, setting)
    ours = settings(rule)[setting]
    if rule == "momentum" and setting == "decay":
        assert not any(theirs)  # off, in what is the plain rule there
        return
    assert ours in theirs
    if theirs[0] == theirs[1]:
        assert ours == theirs[0]


def test_the_page_lists_every_default() -> None:
    require("torch")
    rows = ROW.findall((ROOT / "docs/reference/optim.md").read_text())
    shown = [
        (
            rule,
            setting,
            str(settings(rule)[setting]),
            str(torch_default(rule, setting)),
            str(optax_default(rule, setting)),
        )
        for rule, setting in EVERY
    ]
    assert rows == shown


@pytest.mark.parametrize("rule", RULES)
def test_a_learning_rate_has_no_default(rule: str) -> None:
    assert defaults(getattr(optim, rule))["learning_rate"] is None


LR, STEPS = 0.1, 4
Array = np.ndarray[Any, Any]


def sgd(gradients: list[Array], w: Array) -> Iterator[Array]:
    for g in gradients:
        yield -LR * g


def momentum(gradients: list[Array], w: Array, nesterov: bool = False) -> Iterator[Array]:
    m = np.zeros_like(w)
    for g in gradients:
        m = 0.9 * m + g
        yield -LR * (g + 0.9 * m if nesterov else m)


def adam(gradients: list[Array], w: Array, decay: float = 0.0) -> Iterator[Array]:
    m, s = np.zeros_like(w), np.zeros_like(w)
    for k, g in enumerate(gradients, 1):
        m, s = 0.9 * m + 0.1 * g, 0.999 * s + 0.001 * g**2
        move = (m / (1 - 0.9**k)) / (np.sqrt(s / (1 - 0.999**k)) + 1e-8)
        step = -LR * (move + decay * w)
        w = w + step
        yield step


def rmsprop(gradients: list[Array], w: Array) -> Iterator[Array]:
    s = np.zeros_like(w)
    for g in gradients:
        s = 0.9 * s + 0.1 * g**2
        yield -LR * g / (np.sqrt(s) + 1e-8)


def adagrad(gradients: list[Array], w: Array) -> Iterator[Array]:
    s = np.full_like(w, 0.1)
    for g in gradients:
        s = s + g**2
        yield -LR * g / (np.sqrt(s) + 1e-7)


def clipped(gradients: list[Array], w: Array) -> Iterator[Array]:
    for g in gradients:
        g = np.clip(g, -0.8, 0.8)
        yield -LR * g * min(1.0, 0.5 / np.linalg.norm(g))


FORMULAS: dict[str, tuple[optim.Optimizer, Callable[..., Iterator[Array]]]] = {
    "sgd": (optim.sgd(LR), sgd),
    "momentum": (optim.momentum(LR), momentum),
    "nesterov": (optim.momentum(LR, nesterov=True), lambda g, w: momentum(g, w, True)),
    "adam": (optim.adam(LR), adam),
    "adamw": (optim.adamw(LR), lambda g, w: adam(g, w, 1e-2)),
    "rmsprop": (optim.rmsprop(LR), rmsprop),
    "adagrad": (optim.adagrad(LR), adagrad),
    "clipped": (optim.clipped(optim.sgd(LR), norm=0.5, value=0.8), clipped),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_steps_follow_the_formula(
    backend: Any, arr: Callable[..., Any], to_np: Callable[..., Any], name: str
) -> None:
    """On gradients with a zero among them, of which a root must make no NaN."""
    rule, formula = FORMULAS[name]
    w = np.array([1.0, -2.0, 0.5])
    gradients = list(np.random.default_rng(0).normal(size=(STEPS, 3)))
    gradients[0][2] = 0.0
    at, state = {"w": arr(w)}, rule.init({"w": arr(w)})
    for g, expected in zip(gradients, formula(gradients, w), strict=True):
        updates, state = rule.update({"w": arr(g)}, state, at)
        at = optim.apply_updates(at, updates)
        w = w + expected
        np.testing.assert_allclose(to_np(at["w"]), w, rtol=1e-12)
