"""Defaults of the update rules against those of torch.optim and optax."""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any

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
