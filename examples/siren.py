"""Represent real pictures by a sinusoidal network that starts close to all of them.

    python examples/siren.py --backend torch

A task is a patch of a photograph: a map from coordinates to brightness, fitted by a SIREN (Sitzmann
et al. 2020) in three steps. The start and the learning rate are learned, as for coordinate networks
by Tancik et al. 2021. The photographs are scikit-learn's: tasks of meta-training come from their
left three quarters, those of the test from the rest.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from sklearn.datasets import load_sample_images

import metaframe
from metaframe import inner_loop, meta_value_and_grad, nn, ops, optim, tree
from metaframe.backend import load_backend

SIZE, FREQUENCY, STEPS = 16, 30.0, 3


class Found(NamedTuple):
    """What the example found."""

    variables: Any
    grads: Any
    """The last meta-gradient."""
    psnr: float


def siren_init(seed: int, name: str, shape: Sequence[int]) -> Any:
    """Uniform weights with which every layer has the same distribution of activations."""
    limit = 1 / shape[0] if name.startswith("layer1") else math.sqrt(6 / shape[0]) / FREQUENCY
    return nn.glorot_uniform(seed, name, shape) / math.sqrt(6 / sum(shape)) * limit


MODEL = nn.mlp([2, 32, 32, 1], activation=lambda x: ops.sin(FREQUENCY * x), initializer=siren_init)


@functools.cache
def photographs() -> list[Any]:
    """Grey photographs at half their size, in [0, 1]."""
    return [picture[::2, ::2].mean(-1) / 255 for picture in load_sample_images().images]


def patches(rng: np.random.Generator, count: int, test: bool) -> Any:
    """Square parts of the photographs, (count, SIZE * SIZE, 1)."""
    found = []
    for _ in range(count):
        picture = photographs()[rng.integers(2)]
        edge = picture.shape[1] * 3 // 4
        low, high = (edge, picture.shape[1]) if test else (0, edge)
        row, column = rng.integers(len(picture) - SIZE), rng.integers(low, high - SIZE)
        found.append(picture[row : row + SIZE, column : column + SIZE].reshape(-1, 1))
    return np.stack(found)


def coordinates() -> Any:
    """The places of the pixels in [-1, 1]², (SIZE * SIZE, 2)."""
    line = np.linspace(-1, 1, SIZE)
    return np.stack(np.meshgrid(line, line, indexing="ij"), -1).reshape(-1, 2)


def cost(batch: Any, params: Any) -> Any:
    """The squared error of all pixels."""
    places, pixels = batch
    return nn.mse(MODEL.apply(params, places), pixels)


def task_cost(v: Any, pixels: Any) -> Any:
    """The error that is left after the inner steps."""
    batch = (ops.asarray(coordinates()), pixels)
    rate = ops.exp(v["log_rate"])
    return cost(batch, inner_loop(cost, v["params"], batch, steps=STEPS, lr=rate))


def main(argv: list[str] | None = None) -> Found:
    """Run the example; returns what it printed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backend", default="jax", choices=["jax", "torch", "tensorflow"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="one meta-step on two patches")
    options = parser.parse_args(argv)
    backend = load_backend(options.backend)
    with backend.double_precision(), metaframe.use_backend(options.backend, dtype="float64"):
        return run(options.seed, *((1, 2) if options.quick else (300, 8)))


def run(seed: int, iterations: int, meta_batch_size: int) -> Found:
    """Meta-train by Adam, and fit patches that were not trained on."""
    rng = np.random.default_rng(seed)
    v = {"params": MODEL.init(seed), "log_rate": ops.asarray(math.log(1e-3))}
    rule, gradient = optim.adam(1e-3), meta_value_and_grad(task_cost)
    if metaframe.current_backend().name != "torch":  # which runs at once what is not compiled
        gradient = metaframe.compile(gradient)
    state, test = rule.init(v), ops.asarray(patches(rng, meta_batch_size, test=True))
    for iteration in range(iterations):
        if iteration % 100 == 0:
            print(f"meta-step {iteration}: PSNR {decibels(gradient(v, test).cost):.2f} dB")
        _, grads, _ = gradient(v, ops.asarray(patches(rng, meta_batch_size, test=False)))
        updates, state = rule.update(grads, state, v)
        v = metaframe.apply_updates(v, updates)
    psnr = decibels(gradient(v, test).cost)
    print(f"PSNR of {STEPS} steps on new patches: {psnr:.4f} dB")
    return Found(*tree.map(ops.to_numpy, (v, grads)), psnr)


def decibels(error: Any) -> float:
    """The peak signal-to-noise ratio of a mean squared error."""
    return -10 * math.log10(float(error))


if __name__ == "__main__":
    main()
