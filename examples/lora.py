"""Adapt only the LoRA matrices of a small language model, whose embedding is also its head.

    python examples/lora.py

The model is a `torch.nn.Module` called in the common form, `model(**batch)` with `input_ids` and
`labels`, which returns its loss. A task is a hidden order of the tokens. Inner steps move the
low-rank matrices alone (Hu et al. 2021); the outer step moves all parameters, so that these
matrices have something to adapt. The head shares the embedding's weight and gets one gradient.
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional

import metaframe
from metaframe import MAML
from metaframe.tasks import Task, stack_tasks

TOKENS, LENGTH, WIDTH, RANK, HEADS, STEPS, RATE = 12, 6, 32, 4, 4, 3, 1.0


class Found(NamedTuple):
    """What the example found."""

    model: nn.Module
    grads: dict[str, Any]
    """The last meta-gradient."""
    before: float
    after: float


class LoRALinear(nn.Linear):
    """A dense layer plus a product of two low-rank matrices, zero at first."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.lora_a = nn.Parameter(torch.randn(RANK, inputs) / inputs**0.5)
        self.lora_b = nn.Parameter(torch.zeros(outputs, RANK))

    def forward(self, x: Any) -> Any:
        """(..., inputs) to (..., outputs)."""
        return super().forward(x) + x @ self.lora_a.T @ self.lora_b.T


class LanguageModel(nn.Module):
    """One causal transformer block between an embedding and the same weight as the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, WIDTH)
        self.position = nn.Parameter(0.1 * torch.randn(LENGTH, WIDTH))
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(WIDTH) for _ in range(3))
        self.qkv, self.out = LoRALinear(WIDTH, 3 * WIDTH), LoRALinear(WIDTH, WIDTH)
        self.up, self.down = LoRALinear(WIDTH, 2 * WIDTH), LoRALinear(2 * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, TOKENS, bias=False)
        nn.init.normal_(self.embedding.weight, std=WIDTH**-0.5)
        self.head.weight = self.embedding.weight

    def forward(self, input_ids: Any, labels: Any) -> dict[str, Any]:
        """Logits for (examples, length) tokens, and the mean loss."""
        x = self.embedding(input_ids) + self.position
        parts = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        x = x + self.down(functional.gelu(self.up(self.norm2(x))))
        logits = self.head(self.norm3(x))
        loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"logits": logits, "loss": loss}


def sampled(rng: np.random.Generator) -> Task:
    """A task: each token is followed by the next one in a hidden cyclic order."""
    order = rng.permutation(TOKENS)

    def batch(count: int) -> tuple[dict[str, Any], Any]:
        places = rng.permutation(TOKENS)[:count, None] + np.arange(LENGTH + 1)
        tokens = order[places % TOKENS]
        return {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:]}, tokens[:, 1:]

    return Task(*batch(6), *batch(6))


def loss(output: dict[str, Any], labels: Any) -> Any:
    """The loss that the model returned."""
    del labels
    return output["loss"]


def call(model: Any, batch: dict[str, Any]) -> Any:
    """The common form of a call."""
    return model(**batch)


def main(argv: list[str] | None = None) -> Found:
    """Run the example; returns what it printed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backend", default="torch", choices=["torch"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="one meta-step on two tasks")
    options = parser.parse_args(argv)
    with metaframe.use_backend("torch", dtype="float64"):
        return run(options.seed, *((1, 2) if options.quick else (300, 16)))


def run(seed: int, iterations: int, meta_batch_size: int) -> Found:
    """Meta-train by torch's Adam, and adapt to tasks that were not trained on."""
    torch.manual_seed(seed)
    model, rng = LanguageModel().double(), np.random.default_rng(seed)
    names = [name for name, _ in model.named_parameters() if "lora" in name]
    maml = MAML(model, inner_lr=RATE, inner_steps=STEPS, adapt_names=names)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    print(f"{sum(sizes[name] for name in names)} of {sum(sizes.values())} parameters adapt")
    optimizer = torch.optim.Adam(maml.parameters(), lr=3e-3)
    test = stack_tasks([sampled(rng) for _ in range(meta_batch_size)])
    for iteration in range(iterations):
        tasks = stack_tasks([sampled(rng) for _ in range(meta_batch_size)])
        cost, grads, _ = maml.meta_value_and_grad(loss, tasks, call=call)
        for name, parameter in maml.named_parameters():
            parameter.grad = grads[name]
        optimizer.step()
        if iteration % 100 == 0:
            print(f"meta-step {iteration}: loss after adaptation {float(cost):.4f}")
    before, after = (
        float(maml.meta_value_and_grad(loss, test, call=call, steps=steps).cost)
        for steps in (0, STEPS)
    )
    print(f"loss on new tasks: {before:.6f} before adaptation, {after:.6f} after {STEPS} steps")
    return Found(model, grads, before, after)


if __name__ == "__main__":
    main()
