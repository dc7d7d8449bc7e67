"""Which parameters a name or a part stands for, and what rates by name are accepted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import zoo
from frameworks import require
from metaframe import ANIL, MAML, MAMLPlusPlus, MetaSGD, head_names, inner_step, use_backend
from metaframe.errors import InputError, InputTypeError


def test_a_tied_head_by_its_name() -> None:
    require("torch")
    import torch

    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = torch.nn.Embedding(6, 4), torch.nn.Linear(4, 6)
            self.head.weight = self.embed.weight

    model = Tied()
    assert head_names(model, "head") == head_names(model, model.head)
    assert head_names(model, "head") == ("embed.weight", "head.bias")


def test_a_head_of_which_a_part_is_frozen() -> None:
    model = zoo.built(zoo.LIBRARIES[0])
    model[2].bias.requires_grad_(False)
    assert ANIL(model, model[2]).config.names == ("2.weight",)
    assert ANIL(model, "2").config.names == ("2.weight",)
    model[2].weight.requires_grad_(False)
    with pytest.raises(InputError, match="the parameters of the head are frozen"):
        ANIL(model, "2")


def test_a_layer_of_keras_without_the_name_of_the_model() -> None:
    library = next(library for library in zoo.LIBRARIES if library.id == "keras")
    model = zoo.built(library)
    assert head_names(model, "head") == head_names(model, model.layers[-1])
    assert head_names(model, "net/head") == head_names(model, "head")
    with pytest.raises(InputError, match="shares no parameters"):
        head_names(model, "hea")


def test_a_part_of_parameters_in_numpy() -> None:
    require("jax")
    params = {"body": np.ones((3, 3)), "head": {"w": np.ones((3, 1)), "b": 0.0}, "scale": 0.0}
    with use_backend("jax"):
        assert head_names((lambda p, x: x, params), params["head"]) == ("head/w",)


@pytest.mark.parametrize(
    ("rates", "error", "message"),
    [
        ({"weight": float("nan")}, InputError, "learning rate 'weight' must be finite"),
        ({"weight": -1.0}, InputError, "learning rate 'weight' must be finite and not negative"),
        ({"weight": "a"}, InputTypeError, "learning rate 'weight' must be a number or an array"),
        ({"weight": 0.1, "wieght": 0.1}, InputError, "'wieght', which is no parameter.*'weight'"),
        ({}, InputError, r"no rate for the adapted parameters \['weight'\]"),
        ([0.1], InputTypeError, "a mapping from the names"),
    ],
)
def test_rates_are_checked_when_a_learner_is_made(rates: Any, error: Any, message: str) -> None:
    require("torch")
    import torch

    model = torch.nn.Linear(1, 1)
    for kind in (MAML, MetaSGD, MAMLPlusPlus):
        with pytest.raises(error, match=message):
            kind(model, rates, adapt_names=["weight"])
    params = dict(model.named_parameters())
    with pytest.raises(error, match=message):
        inner_step(params, params["weight"].sum(), rates, adapt_names=["weight"])
    MAML(model, {"weight": 0.1, "bias": 0.1}, adapt_names=["weight"])
