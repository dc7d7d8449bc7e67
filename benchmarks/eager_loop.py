"""What an eager inner loop of a tiny torch model takes beside the same loop by hand.

    python -m benchmarks.eager_loop

An MLP 1-8-1 takes 100 steps of gradient descent on 10 points, and the loss after them is
differentiated with respect to its parameters. Both take turns in one process, on one thread.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from benchmarks import report
from metaframe import inner_loop, value_and_grad

STEPS, RATE, ROUNDS = 100, 0.01, 15
Params = dict[str, torch.Tensor]


def loss(batch: tuple[torch.Tensor, torch.Tensor], v: Params) -> torch.Tensor:
    """The mean squared error of the network."""
    x, y = batch
    hidden = torch.tanh(functional.linear(x, v["0.weight"], v["0.bias"]))
    return functional.mse_loss(functional.linear(hidden, v["2.weight"], v["2.bias"]), y)


def by_hand(v: Params, batch: Any) -> tuple[torch.Tensor, ...]:
    """The gradient through the loop, as one writes it in torch."""
    start = {name: x.detach().requires_grad_() for name, x in v.items()}
    at = start
    for _ in range(STEPS):
        grads = torch.autograd.grad(loss(batch, at), list(at.values()), create_graph=True)
        at = {name: x - RATE * g for (name, x), g in zip(at.items(), grads, strict=True)}
    return torch.autograd.grad(loss(batch, at), list(start.values()))


def by_metaframe(v: Params, batch: Any) -> tuple[torch.Tensor, ...]:
    """The same by `inner_loop`."""

    def end(v: Params) -> torch.Tensor:
        return loss(batch, inner_loop(loss, v, batch, steps=STEPS, lr=RATE))

    return tuple(value_and_grad(end)(v).grads.values())


def seconds(run: Callable[[], Any]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main(argv: list[str] | None = None) -> None:
    """Time both in turn and print the ratio."""
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    v = {name: p.detach() for name, p in model.named_parameters()}
    x = torch.linspace(-1, 1, 10, dtype=torch.float64)[:, None]
    batch = (x, torch.sin(3 * x))
    for mine, theirs in zip(by_metaframe(v, batch), by_hand(v, batch), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)
    ours, hand = [], []
    for _ in range(ROUNDS):
        ours.append(seconds(lambda: by_metaframe(v, batch)))
        hand.append(seconds(lambda: by_hand(v, batch)))
    ratio = statistics.median(a / b for a, b in zip(ours, hand, strict=True))
    row = {"metaframe ms": 1e3 * min(ours), "by hand ms": 1e3 * min(hand), "ratio": ratio}
    report.publish("eager_loop", "An eager loop of 100 steps on torch", [row])


if __name__ == "__main__":
    main()
