"""torch modules as people write them, and losses. Layers are in `zoo_torch_layers`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BATCH = 4
Build = Callable[[], nn.Module]


class Apply(nn.Module):
    """A function, or what a function makes of a layer."""

    def __init__(self, fn: Callable[..., Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.fn, self.layers = fn, nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(*self.layers, x)


# -- structures -----------------------------------------------------------------------------------


class TwoPaths(nn.Module):
    """A submodule that is reached by two paths."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = nn.Sequential(nn.Linear(3, 4), nn.Tanh()), nn.Linear(4, 2)
        self.net = nn.Sequential(self.encoder, self.head)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Tied(nn.Module):
    """One parameter in several modules, under several names, and as another one's buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)
        self.second.weight = self.first.weight
        self.again = self.first.bias
        self.head.register_buffer("mixing", self.first.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.second(torch.tanh(self.first(x)))) + self.again
        return self.head(x @ self.head.mixing)


class Containers(nn.Module):
    """Parameters in lists and dictionaries, buffers that are not saved, some that are shared."""

    def __init__(self) -> None:
        super().__init__()
        self.list = nn.ParameterList([torch.randn(3, 4), torch.randn(4)])
        self.dict = nn.ParameterDict({"out": nn.Parameter(torch.randn(4, 2))})
        self.blocks = nn.ModuleDict({"a": nn.Tanh(), "b": nn.Linear(2, 2)})
        self.register_buffer("scale", torch.full((2,), 0.5), persistent=False)
        self.blocks["b"].register_buffer("scale", self.scale)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks["a"](x @ self.list[0] + self.list[1]) @ self.dict["out"]
        return self.blocks["b"](x * self.scale) * self.blocks["b"].scale


class Delegating(nn.Module):
    """Attributes of its own making."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x: Tensor) -> Tensor:
        return self.append and self.inner(x)


class Averaging(nn.Module):
    """Buffers that the forward pass writes what it sees to, or replaces."""

    def __init__(self, replace: bool = False) -> None:
        super().__init__()
        self.layer, self.replace = nn.Linear(3, 2), replace
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("count", torch.tensor(0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.sin(self.layer(x))
        if self.replace:
            self.mean = 0.9 * self.mean + 0.1 * y.mean(0)
        else:
            self.mean.mul_(0.9).add_(0.1 * y.mean(0))
        self.count += 1
        return y - self.mean


class OwnNorm(nn.Module):
    """Parameters as a whole, in the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        size = sum(p.square().sum() for p in self.parameters())
        return self.layer(x) / (1 + size)


def repeated() -> nn.Module:
    layer = nn.Linear(3, 3)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Sequential(layer, nn.Linear(3, 2)))


def hooked(kind: str) -> nn.Module:
    layer = nn.Linear(3, 2)
    if kind == "forward":
        layer.register_forward_hook(lambda module, args, y: 2 * torch.sin(y))
    elif kind == "forward, with keywords":
        layer.register_forward_hook(lambda m, args, kwargs, y: 2 * torch.sin(y), with_kwargs=True)
    else:
        layer.register_forward_pre_hook(lambda module, args: (torch.sin(args[0]),))
    return layer


def frozen() -> nn.Module:
    model = mlp()
    model[0].weight.requires_grad_(False)
    return model


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def normalised() -> nn.Module:
    layer = nn.BatchNorm1d(4)
    return nn.Sequential(nn.Linear(3, 4), layer, nn.Tanh(), nn.Linear(4, 4), layer, nn.Linear(4, 2))


STRUCTURES: dict[str, Build] = {
    "two paths": TwoPaths,
    "one layer, three times": repeated,
    "tied": Tied,
    "containers": Containers,
    "own __getattr__": Delegating,
    "buffers in place": Averaging,
    "buffers replaced": lambda: Averaging(replace=True),
    "its own parameters": OwnNorm,
    "forward hook": lambda: hooked("forward"),
    "forward hook, with keywords": lambda: hooked("forward, with keywords"),
    "forward pre-hook": lambda: hooked("forward pre"),
    "frozen in part": frozen,
    "batch norm, shared": normalised,
    "batch norm in eval mode": lambda: normalised().eval(),
    "DataParallel": lambda: nn.DataParallel(mlp()),
    "torch.compile": lambda: torch.compile(mlp(), backend="eager"),
    "traced by fx": lambda: torch.fx.symbolic_trace(mlp()),
}


# -- losses ---------------------------------------------------------------------------------------

CLASSES = 4


def classes(g: torch.Generator) -> Tensor:
    return torch.randint(CLASSES, (BATCH,), generator=g)


def numbers(g: torch.Generator) -> Tensor:
    return torch.randn(BATCH, CLASSES, generator=g, dtype=torch.float64)


def bits(g: torch.Generator) -> Tensor:
    return torch.randint(2, (BATCH, CLASSES), generator=g).double()


def signs(g: torch.Generator) -> Tensor:
    return 2 * bits(g) - 1


def probabilities(g: torch.Generator) -> Tensor:
    return torch.softmax(numbers(g), -1)


def labels(g: torch.Generator) -> Tensor:
    return torch.stack(
        [torch.randperm(CLASSES + 1, generator=g)[:CLASSES] - 1 for _ in range(BATCH)]
    )


def spoken(p: Tensor, y: Tensor) -> Tensor:
    """Sequences of 5 steps, and two labels."""
    steps = torch.stack([p.roll(t, 1) * (1 + t / 5) for t in range(5)]).log_softmax(-1)
    words = y.unsqueeze(1).expand(-1, 2) % (CLASSES - 1) + 1
    return nn.CTCLoss()(steps, words, (5,) * BATCH, (2,) * BATCH)


Loss = tuple[Callable[[Tensor, Tensor], Tensor], Callable[[torch.Generator], Tensor]]
WEIGHTS = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
LOSSES: dict[str, Loss] = {
    "MSELoss": (nn.MSELoss(), numbers),
    "L1Loss": (nn.L1Loss(), numbers),
    "SmoothL1Loss": (nn.SmoothL1Loss(), numbers),
    "HuberLoss": (nn.HuberLoss(delta=0.7), numbers),
    "CrossEntropyLoss": (nn.CrossEntropyLoss(WEIGHTS, label_smoothing=0.1), classes),
    "CrossEntropyLoss, probabilities": (nn.CrossEntropyLoss(), probabilities),
    "CrossEntropyLoss, ignored": (nn.CrossEntropyLoss(ignore_index=1), classes),
    "LinearCrossEntropyLoss": (
        lambda p, y: F.linear_cross_entropy(p, torch.eye(CLASSES).double(), y),
        classes,
    ),
    "NLLLoss": (lambda p, y: nn.NLLLoss()(p.log_softmax(-1), y), classes),
    "BCELoss": (lambda p, y: nn.BCELoss()(p.sigmoid(), y), bits),
    "BCEWithLogitsLoss": (nn.BCEWithLogitsLoss(pos_weight=WEIGHTS), bits),
    "KLDivLoss": (
        lambda p, y: nn.KLDivLoss(reduction="batchmean")(p.log_softmax(-1), y),
        probabilities,
    ),
    "PoissonNLLLoss": (nn.PoissonNLLLoss(), bits),
    "HingeEmbeddingLoss": (nn.HingeEmbeddingLoss(), signs),
    "SoftMarginLoss": (nn.SoftMarginLoss(), signs),
    "MarginRankingLoss": (lambda p, y: nn.MarginRankingLoss(0.3)(p, p.sin(), y), signs),
    "CosineEmbeddingLoss": (lambda p, y: nn.CosineEmbeddingLoss()(p, p.sin() + 1, y[:, 0]), signs),
    "MultiMarginLoss": (nn.MultiMarginLoss(), classes),
    "MultiMarginLoss, squared": (nn.MultiMarginLoss(2, 0.7, WEIGHTS), classes),
    "MultiLabelMarginLoss": (nn.MultiLabelMarginLoss(), labels),
    "MultiLabelSoftMarginLoss": (nn.MultiLabelSoftMarginLoss(), bits),
    "TripletMarginLoss": (lambda p, y: nn.TripletMarginLoss()(p, p.sin() + 1, y), numbers),
    "TripletMarginWithDistanceLoss": (
        lambda p, y: nn.TripletMarginWithDistanceLoss()(p, p.sin() + 1, y),
        numbers,
    ),
    "CTCLoss": (spoken, classes),
    "one_hot": (lambda p, y: F.mse_loss(p, F.one_hot(y, CLASSES).to(p)), classes),
    "cdist": (lambda p, y: torch.cdist(p, y).mean(), numbers),
}
LOSSES_ONLY_IN_A_LOOP: dict[str, Loss] = {
    "GaussianNLLLoss": (lambda p, y: nn.GaussianNLLLoss()(p, y, p.exp()), numbers),
}
"""Losses that look at values, which differ from task to task."""


HOWS = ("loop", "vmap", "learner")


def meta_gradient(maml: Any, loss: Any, tasks: Any, how: str) -> tuple[float, dict[str, Tensor]]:
    """The cost and its gradient by name, computed in one of `HOWS`; all leave no other trace."""
    if how != "learner":
        result = maml.meta_value_and_grad(loss, tasks, task_map=how)
        return float(result.cost), result.grads
    costs = []
    for task in tasks:
        parts = (task.support_x, task.support_y, task.query_x, task.query_y)
        x, y, query_x, query_y = map(torch.as_tensor, parts)
        learner = maml.clone().adapt_on(loss, x, y)
        costs.append(loss(learner(query_x), query_y))
    cost = torch.stack(costs).mean()
    cost.backward()
    live = {n: p for n, p in maml.module.named_parameters() if p.requires_grad}
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in live.items()}
    maml.module.zero_grad()
    return float(cost.detach()), grads
