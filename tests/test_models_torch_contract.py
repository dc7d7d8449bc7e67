"""One contract for every torch module: as it is, unchanged, and with an exact meta-gradient.

(a) The output under a policy equals that of the model's own call under that policy. (b) Afterwards
every parameter and buffer is the same object with the same bits, and so are its hooks and
registrations. (c) The meta-gradient equals finite differences: in a loop, vectorised, and through
`Learner`.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest

from frameworks import require, slow
from metaframe import MAML, MetaframeError
from metaframe.backend import Forward, Inputs
from metaframe.models.lookup import adapter_of
from metaframe.tasks import Task
from metaframe.testing.conformance.cases import slope

require("torch")
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

import zoo_torch  # noqa: E402
import zoo_torch_layers as layers  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*(weight_norm|spectral_norm).* is deprecated"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated"),
    # Of torch about its own kernels, which are slower than others and right.
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype"),
]


class Probe(nn.Module):
    """A layer between a scale of each of its inputs and a smooth head."""

    def __init__(self, layer: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.words = shape == layers.TOKENS
        self.scale = nn.Parameter(torch.randn(1 if self.words else shape))
        self.layer = layer
        with torch.no_grad():
            size = apart(layer.double())(inputs(shape)).flatten(1).shape[1]
        self.head = nn.Linear(size, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x) * self.scale if self.words else self.layer(torch.tanh(x) * self.scale)
        return self.head(torch.tanh(y.flatten(1)))


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if shape == layers.TOKENS:
        return torch.randint(layers.WORDS, (zoo_torch.BATCH, 3), generator=generator)
    return torch.randn(zoo_torch.BATCH, *shape, generator=generator, dtype=torch.float64).to(dtype)


def tasks(shape: tuple[int, ...] = (3,), dtype: torch.dtype = torch.float64) -> list[Task]:
    seeds = iter(range(100))
    return [
        Task(*[inputs(s, dtype, next(seeds)) for s in (shape, (2,), shape, (2,))]) for _ in range(2)
    ]


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Check (b) around a block."""
    before = registered(model)
    yield
    after = registered(model)
    assert list(before) == list(after)
    for key, (thing, bits, requires_grad) in before.items():
        assert after[key][0] is thing, key
        if isinstance(thing, Tensor):
            assert thing.requires_grad == requires_grad, key
            assert torch.equal(thing, bits), key


def registered(model: nn.Module) -> dict[tuple[Any, ...], tuple[Any, Any, Any]]:
    """Everything that is registered in a model, and its hooks, by place."""
    found: dict[tuple[Any, ...], tuple[Any, Any, Any]] = {}
    for path, module in model.named_modules():
        kinds = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")
        for kind in kinds:
            for key, thing in vars(module)[kind].items():
                tensor = isinstance(thing, Tensor)
                bits = thing.detach().clone() if tensor else None
                found[path, kind, key] = thing, bits, tensor and thing.requires_grad
    return found


def own_call(model: nn.Module, x: Any, norm: str | None) -> Any:
    """The model's output, its batch normalisation in the mode of a policy."""
    twin = apart(model)
    modes = {layer: layer.training for layer in twin.modules()}
    for layer in modes:
        if norm is not None and isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.train(norm != "frozen")
    with torch.set_grad_enabled(twin is not model):
        output = twin(x)
    for layer, mode in modes.items():
        layer.training = mode
    return output


def apart(module: nn.Module) -> nn.Module:
    """A copy; the module itself if it keeps what it computed, of which torch makes no copy."""
    try:
        return copy.deepcopy(module)
    except RuntimeError:
        return module


def check_outputs(model: nn.Module, x: Any) -> None:
    """Check (a), eagerly and vectorised."""
    adapter = adapter_of(model)
    names = set(adapter.state())
    for norm in (None, "batch", "frozen", "record") if adapter.batch_norms() else (None,):
        expected = own_call(model, x, norm)
        with unchanged(model):
            call = Inputs((x,), forward=Forward(norm))
            output, state = adapter.call(adapter.params(), adapter.state(), call)
        torch.testing.assert_close(output, expected, rtol=1e-13, atol=1e-13)
        assert set(state) == names

    def called(params: Any, x: Any) -> Any:
        return adapter.call(params, adapter.state(), Inputs((x,)))[0]

    params = {n: torch.stack([p.detach(), p.detach() + 0.1]) for n, p in adapter.params().items()}
    with unchanged(model):
        outputs = torch.func.vmap(called, randomness="error")(params, torch.stack([x, x]))
    torch.testing.assert_close(outputs[0], own_call(model, x, None), rtol=1e-12, atol=1e-12)


def check_gradients(
    model: nn.Module,
    shape: tuple[int, ...] = (3,),
    loss: Callable[..., Tensor] = F.mse_loss,
    batch: list[Task] | None = None,
    hows: Any = zoo_torch.HOWS,
    steps: int = 1,
) -> None:
    """Check (c), along a random line."""
    batch, maml = tasks(shape) if batch is None else batch, MAML(model, 0.1, steps)
    live = {n: p for n, p in model.named_parameters() if p.requires_grad}
    start = {n: p.detach().clone() for n, p in live.items()}
    line = direction(model, start)

    def along(t: float) -> float:
        with torch.no_grad():
            for name, p in live.items():
                p.copy_(start[name] + t * line[name])
        return float(maml.meta_value_and_grad(loss, batch, task_map="loop").cost)

    found = {}
    for how in hows:
        with unchanged(model):
            found[how] = zoo_torch.meta_gradient(maml, loss, batch, how)
    slopes = {how: along_line(grads, line) for how, (_, grads) in found.items()}
    expected = slope(along, 2e-4)
    error = 1e-9
    if any(differs(x, expected, error) for x in slopes.values()):
        expected, error = slope(along, 2e-6), 3e-8  # a kink was in the stencil
    along(0.0)
    for how, (cost, _) in found.items():
        assert abs(cost - found[hows[0]][0]) < 1e-12 * max(1, abs(cost)), how
        assert not differs(slopes[how], expected, error), (how, slopes[how], expected)


def along_line(grads: dict[str, Tensor], line: dict[str, Tensor]) -> float:
    return sum(float((g * line[n]).sum()) for n, g in grads.items())


def differs(found: float, expected: float, error: float) -> bool:
    return abs(found - expected) > error * max(1.0, abs(expected))


def direction(model: nn.Module, start: dict[str, Tensor]) -> dict[str, Tensor]:
    """A random one, but for values that the model takes for constants."""
    generator = torch.Generator().manual_seed(1)
    line = {n: torch.randn(x.shape, generator=generator, dtype=x.dtype) for n, x in start.items()}
    names = {id(p): name for name, p in model.named_parameters() if name in line}
    for module in model.modules():
        if getattr(module, "padding_idx", None) is not None and id(module.weight) in names:
            line[names[id(module.weight)]][module.padding_idx] = 0
    for name, x in line.items():
        if name.endswith("parametrizations.weight.original") and any(
            map(householder, model.modules())
        ):
            x.diagonal().zero_()
    return line


def householder(module: nn.Module) -> bool:
    """Whether it is an orthogonal matrix whose diagonal is a sign."""
    return getattr(getattr(module, "orthogonal_map", None), "name", "") == "householder"


def built(build: zoo_torch.Build, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build().double()


# -- structures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", zoo_torch.STRUCTURES)
def test_structures(name: str) -> None:
    model = built(zoo_torch.STRUCTURES[name])
    check_outputs(model, inputs((3,)))
    check_gradients(model, steps=2)


@st.composite
def models(draw: Any) -> nn.Module:
    """Layers that keep a width of 3, put together at random: nested, repeated, shared and tied."""
    made: list[nn.Module] = []
    for kind in draw(st.lists(st.sampled_from(sorted(PARTS)), min_size=2, max_size=6)):
        build, count = PARTS[kind]
        some = st.sampled_from(made or [nn.Tanh()])
        part = build(*[draw(some) for _ in range(count)])
        if draw(st.booleans()) and isinstance(part, nn.Linear):
            others = [m for m in made if isinstance(m, nn.Linear)]
            if others and not nn.utils.parametrize.is_parametrized(part):
                part.bias = others[0].bias  # tied
        if draw(st.integers(0, 4)) == 0:
            part.register_forward_hook(lambda module, args, y: torch.sin(y))
        if draw(st.integers(0, 4)) == 0:
            part.eval()
        made.append(part)
    order = draw(st.lists(st.sampled_from(made), min_size=1, max_size=4))
    # A second path, or a layer that is not used.
    return Root(nn.Sequential(*order, nn.Linear(3, 2)), draw(st.sampled_from([None, *made])))


class Root(nn.Module):
    def __init__(self, net: nn.Module, again: nn.Module | None) -> None:
        super().__init__()
        self.again, self.net = again, net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.inner(x))


class Product(nn.Module):
    def __init__(self, left: nn.Module, right: nn.Module) -> None:
        super().__init__()
        self.sides = nn.ModuleList([left, right])

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.sides
        return torch.tanh(left(x)) * torch.sin(right(x))


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(5, 3, mode="mean", padding_idx=0)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bag(torch.tensor([[0, 1, 2]]).expand(len(x), 3))


PARTS: dict[str, tuple[Callable[..., nn.Module], int]] = {
    "linear": (lambda: nn.Linear(3, 3), 0),
    "tanh": (nn.Tanh, 0),
    "prelu": (lambda: nn.PReLU(3), 0),
    "softplus": (nn.Softplus, 0),
    "layer norm": (lambda: nn.LayerNorm(3), 0),
    "batch norm": (lambda: nn.BatchNorm1d(3), 0),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), 0),
    "spectral norm": (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)), 0),
    "orthogonal": (lambda: nn.utils.parametrizations.orthogonal(nn.Linear(3, 3)), 0),
    "cell": (lambda: nn.GRUCell(3, 3), 0),
    "bag": (Bag, 0),
    "averaging": (lambda: Averaging3(), 0),
    "residual": (Residual, 1),
    "product": (Product, 2),
    "sequence": (nn.Sequential, 2),
}


class Averaging3(zoo_torch.Averaging):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.mean = torch.zeros(3)


@hypothesis.settings(max_examples=max(10, hypothesis.settings.default.max_examples // 10))
@hypothesis.given(models(), st.integers(0, 3), st.integers(1, 2))
def test_random_structures(model: nn.Module, frozen: int, steps: int) -> None:
    generator = torch.Generator().manual_seed(frozen)
    model = model.double()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / 2)
            p.requires_grad_(i % 4 != frozen or i == 0)
    check_outputs(model, inputs((3,)))
    check_gradients(model, steps=steps)


# -- layers ---------------------------------------------------------------------------------------


SIMILAR = re.compile(r"[13]d$|, eval$|offsets|^Upsampl|no weights|^cdist, [13]|^Softm|shrink$")
"""Layers that are computed as others are, which are always looked at."""


@pytest.mark.parametrize(
    "name", [slow(n) if SIMILAR.search(n) else pytest.param(n) for n in layers.LAYERS]
)
def test_layers(name: str) -> None:
    build, shape = layers.LAYERS[name]
    model = built(lambda: Probe(build(), shape))
    check_outputs(model, inputs(shape))
    check_gradients(model, shape)


@pytest.mark.parametrize("name", ["LSTM, plain", "GRU, plain", "attention, padding"])
def test_layers_in_single_precision(name: str) -> None:
    """Torch has other kernels for it."""
    build, shape = layers.LAYERS[name]
    model = built(lambda: Probe(build(), shape))
    expected = zoo_torch.meta_gradient(MAML(model, 0.1, 1), F.mse_loss, tasks(shape), "loop")[1]
    for how in zoo_torch.HOWS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch casts masks
            found = zoo_torch.meta_gradient(
                MAML(model.float(), 0.1, 1), F.mse_loss, tasks(shape, torch.float32), how
            )[1]
        for n, g in found.items():
            torch.testing.assert_close(g.double(), expected[n], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", layers.EMBEDDINGS)
def test_embeddings_in_first_order(name: str) -> None:
    """With torch's own kernels in a loop, and ours under `vmap`."""
    model = built(lambda: Probe(layers.EMBEDDINGS[name].build(), layers.TOKENS))
    maml, batch = MAML(model, 0.1, 2, first_order=True), tasks(layers.TOKENS)
    expected, found = (
        zoo_torch.meta_gradient(maml, F.mse_loss, batch, how)[1] for how in ("loop", "vmap")
    )
    for n, g in found.items():
        torch.testing.assert_close(g, expected[n], rtol=1e-11, atol=1e-12)


def test_gradients_that_are_scaled_by_frequency() -> None:
    """They are those of no cost. One inner step, worked out by hand."""
    words = torch.tensor([[0, 1, 0], [2, 0, 1]])
    scale = (1 / torch.tensor([3.0, 2.0, 1.0, 1.0]).double()).unsqueeze(1)
    x = torch.tensor([[0, 1, 1], [1, 3, 3]])  # counts 1, 3, 0, 2

    def loss(y: Tensor, weights: Tensor) -> Tensor:
        return (y * weights).sum() ** 2

    rng = torch.Generator().manual_seed(0)
    a, b, start = (torch.randn(s, generator=rng).double() for s in ((2, 3, 2), (2, 3, 2), (4, 2)))
    for build in (nn.Embedding, lambda *args, **how: nn.EmbeddingBag(*args, mode="sum", **how)):
        layer = build(4, 2, scale_grad_by_freq=True, _weight=start.clone())
        bag = isinstance(layer, nn.EmbeddingBag)
        first, second = (a[:, 0], b[:, 0]) if bag else (a, b)
        weight, p = start.clone().requires_grad_(), layer.weight
        spread = torch.zeros(4, 2).double()
        again = torch.zeros(4, 2).double()
        for i, row in enumerate(words):
            for j, word in enumerate(row):
                spread[word] += first[i] if bag else first[i, j]
        for i, row in enumerate(x):
            for j, word in enumerate(row):
                again[word] += second[i] if bag else second[i, j]
        # loss = <w, spread>^2, whose gradient is scaled on its way into w.
        inner = 2 * (weight.detach() * spread).sum() * spread * scale
        adapted = weight.detach() - 0.1 * inner
        counts = torch.tensor([1.0, 3.0, 1.0, 2.0]).double().unsqueeze(1)
        outer = 2 * (adapted * again).sum() * again / counts
        hessian = 2 * (outer * spread * scale).sum() * spread * scale
        expected = outer - 0.1 * hessian
        for how in zoo_torch.HOWS:
            maml = MAML(nn.Sequential(layer), 0.1, 1)
            found = zoo_torch.meta_gradient(maml, loss, [Task(words, first, x, second)] * 2, how)[1]
            torch.testing.assert_close(found["0.weight"], expected, rtol=1e-12, atol=1e-12)
        assert p is layer.weight


@pytest.mark.parametrize("name", layers.REFUSED)
def test_modules_that_are_refused(name: str) -> None:
    build, message = layers.REFUSED[name]
    with pytest.raises(MetaframeError, match=message):
        MAML(nn.Sequential(nn.Linear(3, 3), build()))


def test_every_layer_of_torch_is_in_the_zoo() -> None:
    known = {type(m).__name__ for e in layers.LAYERS.values() for m in built(e.build).modules()}
    known |= {name.partition(",")[0] for name in (*zoo_torch.LOSSES, *layers.REFUSED)}
    known |= {m.__name__ for m in nn.__dict__.values() if isinstance(m, type) and m in WITHOUT_CODE}
    known |= layers.ONLY_IN_A_LOOP | set(zoo_torch.LOSSES_ONLY_IN_A_LOOP)
    classes = [c for c in vars(nn).values() if isinstance(c, type) and issubclass(c, nn.Module)]
    missing = {c.__name__ for c in classes if not c.__name__.startswith("Lazy")} - known
    assert not missing


WITHOUT_CODE = {
    *(nn.Module, nn.Container, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict),
    *(nn.Sequential, nn.RNNBase, nn.RNNCellBase, nn.DataParallel),
    nn.NLLLoss2d,  # another name of NLLLoss
    nn.SyncBatchNorm,  # on GPUs alone
}


class Slope(nn.Module):
    """A model that takes a gradient of its own on the tape."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        total = torch.tanh(self.inner(x)).sum()
        return self.head(torch.autograd.grad(total, x, create_graph=True)[0])


# The leaf that it makes looks like one that the loss closes over, so the cost stays on the tape.
@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True")
def test_a_model_that_uses_the_tape() -> None:
    model = built(Slope)
    check_gradients(model, hows=("loop", "learner"))
    with pytest.raises(MetaframeError, match=r'cannot vectorise.*task_map="loop"'):
        MAML(model).meta_value_and_grad(F.mse_loss, tasks(), task_map="vmap")


# -- losses ---------------------------------------------------------------------------------------


def tasks_of_loss(name: str, losses: Any) -> list[Task]:
    make, rng = losses[name][1], torch.Generator().manual_seed(3)
    return [
        Task(inputs((3,), seed=i), make(rng), inputs((3,), seed=i + 1), make(rng)) for i in (0, 2)
    ]


@pytest.mark.parametrize("name", zoo_torch.LOSSES)
def test_losses(name: str) -> None:
    model = built(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4)))
    batch = tasks_of_loss(name, zoo_torch.LOSSES)
    check_gradients(model, loss=zoo_torch.LOSSES[name][0], batch=batch)


@pytest.mark.parametrize("name", zoo_torch.LOSSES_ONLY_IN_A_LOOP)
def test_losses_that_look_at_values(name: str) -> None:
    model = built(lambda: nn.Linear(3, 4))
    loss = zoo_torch.LOSSES_ONLY_IN_A_LOOP[name][0]
    batch = tasks_of_loss(name, zoo_torch.LOSSES_ONLY_IN_A_LOOP)
    check_gradients(model, loss=loss, batch=batch, hows=("loop", "learner"))
    with pytest.raises(MetaframeError, match=r'the loss uses.*task_map="loop"'):
        MAML(model).meta_value_and_grad(loss, batch, task_map="vmap")
