"""Chains of links and update rules, against the trajectories of torch.optim and optax."""

from __future__ import annotations

import importlib
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from frameworks import require
from metaframe import optim, per_step, unroll
from metaframe.core.chain import rule
from metaframe.errors import InputError, InputTypeError

Call = Callable[..., Any]
LR, DECAY, STEPS = 0.1, 0.05, 6
START = np.array([[1.0, -2.0, 0.5], [0.3, 0.7, -1.1]])
GRADS = np.random.default_rng(3).normal(size=(STEPS, *START.shape))
ADD = optim.add_decayed_weights(DECAY)

OURS: dict[str, optim.Optimizer] = {
    "sgd": optim.chain(ADD, optim.sgd(LR)),
    "momentum": optim.chain(ADD, optim.momentum(LR)),
    "nesterov": optim.chain(ADD, optim.momentum(LR, nesterov=True)),
    "adam": optim.chain(ADD, optim.adam(LR)),
    "adamw": optim.adamw(LR),
    "rmsprop": optim.chain(ADD, optim.rmsprop(LR)),
    "adagrad": optim.chain(ADD, optim.adagrad(LR)),
    "clipped": optim.chain(optim.clip(value=0.8), optim.clip(norm=0.5), ADD, optim.sgd(LR)),
    "clipped after": optim.chain(optim.adam(LR), optim.clip(value=0.05)),
    "cosine": optim.chain(ADD, optim.adam(optim.cosine(LR, 4, end=0.01))),
    "exponential": optim.sgd(optim.exponential(LR, 0.7)),
    "linear": optim.momentum(optim.linear(LR, 0.02, 4)),
    "warmup": optim.adam(optim.warmup(optim.constant(LR), 4)),
}
IN_TORCH: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("SGD", {"weight_decay": DECAY}),
    "momentum": ("SGD", {"weight_decay": DECAY, "momentum": 0.9}),
    "nesterov": ("SGD", {"weight_decay": DECAY, "momentum": 0.9, "nesterov": True}),
    "adam": ("Adam", {"weight_decay": DECAY}),
    "adamw": ("AdamW", {}),
    "rmsprop": ("RMSprop", {"weight_decay": DECAY, "alpha": 0.9}),
    "adagrad": ("Adagrad", {"weight_decay": DECAY, "initial_accumulator_value": 0.1, "eps": 1e-7}),
    "cosine": ("Adam", {"weight_decay": DECAY}),
    "exponential": ("SGD", {}),
    "linear": ("SGD", {"momentum": 0.9}),
    "warmup": ("Adam", {}),
}
SCHEDULED_IN_TORCH: dict[str, tuple[str, dict[str, Any]]] = {
    "cosine": ("CosineAnnealingLR", {"T_max": 4, "eta_min": 0.01}),
    "exponential": ("ExponentialLR", {"gamma": 0.7}),
    "linear": ("LinearLR", {"start_factor": 1.0, "end_factor": 0.2, "total_iters": 4}),
    "warmup": ("LinearLR", {"start_factor": 0.25, "end_factor": 1.0, "total_iters": 3}),
}


def by_torch(name: str) -> list[Any]:
    torch = importlib.import_module("torch")
    w = torch.nn.Parameter(torch.tensor(START))
    kind, settings = IN_TORCH[name]
    optimizer = getattr(torch.optim, kind)([w], lr=LR, **settings)
    schedule = None
    if name in SCHEDULED_IN_TORCH:
        kind, settings = SCHEDULED_IN_TORCH[name]
        schedule = getattr(torch.optim.lr_scheduler, kind)(optimizer, **settings)
    found = []
    # Torch's cosine rises again after its end.
    for g in GRADS[: 4 if name == "cosine" else STEPS]:
        w.grad = torch.tensor(g)
        optimizer.step()
        if schedule is not None:
            schedule.step()
        found.append(w.detach().numpy().copy())
    return found


def optax_rules(optax: Any) -> dict[str, Any]:
    add = optax.add_decayed_weights(DECAY)

    def exact(schedule: Any) -> Any:
        return lambda count: schedule(count.astype("float64"))  # in float32 otherwise

    return {
        "sgd": optax.chain(add, optax.sgd(LR)),
        "momentum": optax.chain(add, optax.sgd(LR, momentum=0.9)),
        "nesterov": optax.chain(add, optax.sgd(LR, momentum=0.9, nesterov=True)),
        "adam": optax.chain(add, optax.adam(LR)),
        "adamw": optax.adamw(LR, weight_decay=1e-2),
        "rmsprop": optax.chain(add, optax.rmsprop(LR, eps_in_sqrt=False)),
        "clipped": optax.chain(optax.clip(0.8), optax.clip_by_global_norm(0.5), add, optax.sgd(LR)),
        "clipped after": optax.chain(optax.adam(LR), optax.clip(0.05)),
        "cosine": optax.chain(add, optax.adam(optax.cosine_decay_schedule(LR, 4, alpha=0.1))),
        "exponential": optax.sgd(exact(optax.exponential_decay(LR, 1, 0.7))),
        "linear": optax.sgd(exact(optax.linear_schedule(LR, 0.02, 4)), momentum=0.9),
        "warmup": optax.adam(exact(optax.linear_schedule(LR / 4, LR, 3))),
    }


def by_optax(name: str) -> list[Any]:
    jax, optax = importlib.import_module("jax"), importlib.import_module("optax")
    found = []
    with jax.enable_x64(True):
        rule = optax_rules(optax)[name]
        w = jax.numpy.asarray(START)
        state = rule.init(w)
        for g in GRADS:
            updates, state = rule.update(jax.numpy.asarray(g), state, w)
            w = optax.apply_updates(w, updates)
            found.append(np.asarray(w))
    return found


def ours(name: str, arr: Call, to_np: Call) -> list[Any]:
    w, rule = arr(START), OURS[name]
    state, found = rule.init(w), []
    for g in GRADS:
        updates, state = rule.update(arr(g), state, w)
        w = optim.apply_updates(w, updates)
        found.append(to_np(w))
    return found


@pytest.mark.parametrize("name", IN_TORCH)
def test_trajectories_of_torch(name: str, arr: Call, to_np: Call) -> None:
    require("torch")
    for mine, theirs in zip(ours(name, arr, to_np), by_torch(name), strict=False):
        np.testing.assert_allclose(mine, theirs, rtol=1e-12)


@pytest.mark.parametrize("name", sorted(set(OURS) - {"adagrad"}))
def test_trajectories_of_optax(name: str, arr: Call, to_np: Call) -> None:
    """Its Adagrad adds eps under the root, and is another rule."""
    require("jax")
    pytest.importorskip("optax")
    for mine, theirs in zip(ours(name, arr, to_np), by_optax(name), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-12)


def test_a_chain_in_a_loop(arr: Call, to_np: Call) -> None:
    """The loop's rate goes to the rule in the chain, one for each variable; links keep state."""

    def halved_after_two(grads: Any, count: Any, params: Any) -> Any:
        scale = 1.0 if float(to_np(count)) < 2 else 0.5
        return {k: scale * g for k, g in grads.items()}, count + 1

    link = optim.Link(halved_after_two, lambda params: 0 * params["w"])
    chained = optim.chain(link, optim.momentum(decay=0.5))
    assert rule(chained) == "link, momentum"
    v, gs = {"w": arr(1.0), "b": arr(2.0)}, np.array([1.0, 2.0, 4.0, 8.0])
    found = unroll(
        lambda g, v: g * (v["w"] + v["b"]),
        v,
        per_step(arr(gs)),
        lr={"w": 0.1, "b": 0.2},
        update=chained,
    )
    m, total = 0.0, 0.0
    for g in (1.0, 2.0, 2.0, 4.0):
        m = 0.5 * m + g
        total += m
    expected = {"w": 1.0 - 0.1 * total, "b": 2.0 - 0.2 * total}
    assert to_np(found.variables) == pytest.approx(expected, rel=1e-12)
    again = unroll(
        lambda g, v: g * (v["w"] + v["b"]),
        v,
        per_step(arr(gs)),
        lr={"w": 0.1, "b": 0.2},
        update=chained,
        state=found.state,
    )
    assert to_np(again.state[0]) == 8


def test_foreign_links(arr: Call, to_np: Call) -> None:
    """Any pair is a link: here one of optax, on JAX arrays or numbers of the same formulas."""

    class Pair:
        init = staticmethod(lambda params: ())
        update = staticmethod(lambda grads, state, params=None: (2 * grads, state))

    chained = optim.chain(Pair(), optim.sgd(0.5))
    w = arr(1.0)
    updates, _ = chained.update(arr(3.0), chained.init(w), w)
    assert to_np(updates) == -3.0


def test_a_chain_within_a_chain(arr: Call, to_np: Call) -> None:
    inner = optim.chain(ADD, optim.adam(LR))
    nested, flat = optim.chain(optim.clip(norm=0.5), inner), optim.clipped(inner, norm=0.5)
    assert rule(nested) == rule(flat) == "adam"
    w = arr(START)
    one, other = (r.update(arr(GRADS[0]), r.init(w), w) for r in (nested, flat))
    assert isinstance(one[1], optim.AdamState)
    assert isinstance(other[1], optim.AdamState)
    assert np.array_equal(to_np(one[0]), to_np(other[0]))


def test_which_weights_decay(arr: Call, to_np: Call) -> None:
    params = {"w": arr(2.0), "b": arr(2.0), "n": {"s": arr(2.0)}}
    for mask, decayed in (("w", "w"), (["w", "n"], "ws"), ({"n": True}, "s"), (None, "wbs")):
        link = optim.add_decayed_weights(0.5, mask)
        grads, _ = link.update({"w": arr(0.0), "b": arr(0.0), "n": {"s": arr(0.0)}}, (), params)
        found = {"w": grads["w"], "b": grads["b"], "s": grads["n"]["s"]}
        assert to_np(found) == {k: float(k in decayed) for k in "wbs"}


def test_a_learned_decay_has_its_gradient(backend: Any, arr: Call, to_np: Call) -> None:
    """W (1 - lr d)^2 after two steps without gradient, differentiated in d."""

    def end(xs: Any) -> Any:
        chained = optim.chain(optim.add_decayed_weights(xs[0]), optim.sgd(0.1))
        found = unroll(lambda _, v: 0 * v, arr(3.0), (), steps=2, lr=None, update=chained)
        return found.variables, ()

    _, _, (slope,) = backend.value_and_grad(end)((arr(0.5),))
    assert to_np(slope) == pytest.approx(3 * 2 * (1 - 0.05) * -0.1, rel=1e-12)


def test_chains_are_pickled(arr: Call, to_np: Call) -> None:
    chained = pickle.loads(pickle.dumps(OURS["cosine"]))
    w = arr(START)
    mine = chained.update(arr(GRADS[0]), chained.init(w), w)[0]
    theirs = OURS["cosine"].update(arr(GRADS[0]), OURS["cosine"].init(w), w)[0]
    assert np.array_equal(to_np(mine), to_np(theirs))


def test_bad_chains() -> None:
    with pytest.raises(InputError, match=r"exactly one update rule .* received 0"):
        optim.chain(optim.clip(norm=1.0))
    with pytest.raises(InputError, match="received 2 in 2 parts"):
        optim.chain(optim.sgd(0.1), optim.adam(0.1))
    with pytest.raises(InputTypeError, match=r"a part of a chain is .* received function"):
        optim.chain(optim.clip_by_value, optim.sgd(0.1))
    with pytest.raises(InputError, match="norm=, value= or both, received neither"):
        optim.clip()
    with pytest.raises(InputError, match="must be above 0, received -1"):
        optim.clip(norm=-1.0)
    with pytest.raises(InputError, match="weight_decay has to be in"):
        optim.add_decayed_weights(-0.1)
    with pytest.raises(InputTypeError, match="weight decay needs the parameters"):
        optim.chain(ADD, optim.sgd(0.1)).update({"w": 1.0}, ())
