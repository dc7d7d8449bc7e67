"""What a torch module's own code does that adaptation has to allow for, or to refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import metaframe
import zoo
from frameworks import require
from metaframe import MAML, functional_forward
from metaframe.errors import InputError
from metaframe.models import functional
from metaframe.tasks import Task

require("torch")
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.autograd import forward_ad  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

TASKS = zoo.tasks(2)
X, Y = (torch.from_numpy(x) for x in (TASKS[0].support_x, TASKS[0].support_y))


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(lambda x: torch.tanh(self.body(x)), x, use_reentrant=False)
        output: Tensor = self.head(hidden)
        return output


@pytest.mark.parametrize("task_map", ["vmap", "loop"])
def test_activation_checkpointing_is_refused(task_map: Any) -> None:
    """It computes again after the module has got its own parameters back."""
    module = Checkpointed()
    maml = MAML(module, 0.5, 2)
    with pytest.raises(InputError, match=r"checkpoints activations.*mode='remat'"):
        maml.meta_value_and_grad(F.mse_loss, TASKS, task_map=task_map)
    with pytest.raises(InputError, match="checkpoints activations"):
        maml.clone().adapt_on(F.mse_loss, X, Y)
    with torch.no_grad():
        assert torch.equal(functional_forward(module, {}, X), module(X))
    module(X).sum().backward()  # elsewhere it works as before


BATCH_NORM = nn.Sequential(nn.BatchNorm1d(3)).double()
BAD_INPUTS = [
    pytest.param((1, 3), {}, "more than 1 value per channel", id="batch of one"),
    *(
        pytest.param((4, 3), {"0.weight": (n,)}, "weight|broadcast|size", id=f"scale of {n}")
        for n in (2, 4)
    ),
]


@pytest.mark.parametrize(("shape", "sizes", "message"), BAD_INPUTS)
def test_batch_norm_is_as_strict_as_torchs(shape: Any, sizes: Any, message: str) -> None:
    params = {name: torch.ones(size).double() for name, size in sizes.items()}
    with pytest.raises((ValueError, RuntimeError), match=message):
        functional_forward(BATCH_NORM, params, torch.randn(shape).double())


@pytest.mark.parametrize("sizes", [(2, 3), (1, 3), (4, 3), (3, 2), (3, 1)])
def test_portable_batch_norm_looks_at_sizes(sizes: Any) -> None:
    x, scale, shift = torch.randn(4, 3), *map(torch.ones, sizes)
    with pytest.raises(RuntimeError, match="should contain 3 elements"):
        metaframe.nn.batch_norm(x, scale, shift)


def test_batch_norm_takes_no_examples() -> None:
    assert functional_forward(BATCH_NORM, {}, torch.ones(0, 3).double()).shape == (0, 3)


def test_batch_norm_in_forward_mode() -> None:
    x, t = torch.randn(2, 5, 3, dtype=torch.float64)
    _, expected = torch.func.jvp(lambda x: functional_forward(BATCH_NORM, {}, x), (x,), (t,))
    with forward_ad.dual_level():
        y = functional_forward(BATCH_NORM, {}, forward_ad.make_dual(x, t))
        torch.testing.assert_close(forward_ad.unpack_dual(y).tangent, expected)


def test_hooks_on_saved_tensors_around_an_adaptation() -> None:
    """They give back what they were given, so the gradient is the same."""
    maml = MAML(zoo.built(zoo.LIBRARIES[0]), 0.1, 2)
    with torch.autograd.graph.save_on_cpu():
        loss = F.mse_loss(maml.clone().adapt_on(F.mse_loss, X, Y)(X), Y)
    loss.backward()
    plain = F.mse_loss(maml.clone().adapt_on(F.mse_loss, X, Y)(X), Y)
    expected = torch.autograd.grad(plain, list(maml.parameters()))
    for parameter, grad in zip(maml.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=0, atol=1e-14)


def normalised(layer: nn.Module, **how: Any) -> nn.Module:
    normalise = nn.utils.parametrizations.weight_norm
    return normalise(layer, **how)  # type: ignore[no-any-return]


WEIGHT_NORMS: dict[str, Any] = {
    "outputs": lambda: normalised(nn.Linear(3, 4)),
    "inputs": lambda: normalised(nn.Linear(3, 4), dim=1),
    "whole": lambda: normalised(nn.Linear(3, 4), dim=None),
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 3)), normalised(nn.Conv1d(1, 4, 3)), nn.Flatten()
    ),
    "old": lambda: nn.utils.weight_norm(nn.Linear(3, 4)),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("name", WEIGHT_NORMS)
def test_weight_norm_has_an_exact_second_derivative(name: str) -> None:
    """That of `torch._weight_norm` is wrong."""
    torch.manual_seed(0)
    module = nn.Sequential(WEIGHT_NORMS[name](), nn.Tanh(), nn.Linear(4, 2)).double()
    hows = [{"task_map": "loop"}, {"task_map": "vmap"}]
    zoo.check_along_a_line(MAML(module, 0.1, 2), F.mse_loss, TASKS, hows)
    expected = module(X)
    found = functional_forward(module, {}, X)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_a_weight_that_a_hook_computes_stays_the_modules_own() -> None:
    layer = nn.utils.weight_norm(nn.Linear(3, 2).double())
    weight = layer.weight
    maml = MAML(nn.Sequential(layer))
    maml.meta_value_and_grad(F.mse_loss, TASKS, task_map="vmap")
    maml.clone().adapt_on(F.mse_loss, X, Y)(X)
    assert layer.weight is weight


class Embedding(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.embed = kind(6, 3, max_norm=1.0, norm_type=3.0)
        self.head = nn.Linear(3, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        embedded = self.embed(tokens)
        output: Tensor = self.head(torch.tanh(embedded if embedded.dim() == 2 else embedded.sum(1)))
        return output


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_an_embedding_that_limits_its_rows_leaves_the_models_alone(kind: Any) -> None:
    torch.manual_seed(0)
    module, rng = Embedding(kind).double(), np.random.default_rng(0)
    with torch.no_grad():
        module.embed.weight[0] = 0.0  # as a padding row is
    weight = module.embed.weight.detach().clone()
    sets = [(rng.integers(0, 6, (5, 4)), rng.normal(size=(5, 2))) for _ in range(2)]
    tasks = [Task(*sets[0], *sets[1])] * 2
    if kind is nn.Embedding:  # torch has no second derivative of the other
        hows = [{"task_map": "loop"}, {"task_map": "vmap"}]
        zoo.check_along_a_line(MAML(module, 0.1, 2), F.mse_loss, tasks, hows)
    else:
        fomaml = MAML(module, 0.1, 2, first_order=True)
        fomaml.meta_value_and_grad(F.mse_loss, tasks, task_map="loop")
    tokens = torch.from_numpy(sets[0][0])
    found = functional_forward(module, {}, tokens)
    torch.testing.assert_close(module.embed.weight, weight)
    torch.testing.assert_close(found, module(tokens), rtol=1e-13, atol=0)
    assert not torch.equal(module.embed.weight, weight)  # torch itself does write


READ: dict[str, Callable[[Tensor, list[Tensor]], Tensor]] = {
    "operator": lambda x, ws: x @ ws[0].T,
    "keyword": lambda x, ws: F.linear(x, weight=ws[0]),
    "list": lambda x, ws: F.linear(x, torch.cat(ws)),
    "tuple": lambda x, ws: F.linear(x, torch.stack(tensors=tuple(ws))[0]),
    "nested": lambda x, ws: torch.einsum("ni,oi->no", [x, *ws]),
    "several results": lambda x, ws: F.linear(x, torch.stack(ws[0].unbind())),
}


class Aliased(nn.Module):
    def __init__(self, read: str) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2).double()
        self.weights, self.read = [self.layer.weight], read

    def forward(self, x: Tensor) -> Tensor:
        assert self.weights[0].shape == (2, 3)  # what is no value may be looked at
        return READ[self.read](x, self.weights) + self.layer.bias


@pytest.mark.parametrize("read", READ)
@pytest.mark.parametrize("task_map", ["vmap", "loop"])
def test_a_parameter_that_is_not_read_from_its_module_is_refused(read: str, task_map: Any) -> None:
    """Its gradient was zero in one way and not in another."""
    maml = MAML(Aliased(read), 0.1, 2)
    with pytest.raises(InputError, match=r"reads its parameter 'layer\.weight' from somewhere"):
        maml.meta_value_and_grad(F.mse_loss, TASKS, task_map=task_map)
    with pytest.raises(InputError, match="reads its parameter"):
        maml.clone().adapt_on(F.mse_loss, X, Y)(X)
    assert maml(X).shape == (6, 2)  # with the parameters it has


@pytest.mark.parametrize("layer", [nn.LazyLinear(2), nn.LazyBatchNorm1d(affine=False)])
def test_a_model_without_weights_yet_is_refused(layer: nn.Module) -> None:
    for use in (MAML, functional):
        with pytest.raises(InputError, match=r"Sequential has no weights yet.*Call it once"):
            use(nn.Sequential(nn.Linear(3, 3), layer))
