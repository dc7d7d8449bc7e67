"""Code in torch modules that adaptation has to allow for, or to refuse."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import metaframe
import zoo
from frameworks import require, slow
from metaframe import MAML, functional_forward
from metaframe.backend import Inputs
from metaframe.errors import BackendError, InputError
from metaframe.models import functional
from metaframe.models.lookup import adapter_of
from metaframe.tasks import Task

require("torch")
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.autograd import forward_ad  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

import zoo_torch  # noqa: E402

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


class Attending(nn.Module):
    """A query, a key and a value for each of the examples, with a scale of its own."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 12).double(), nn.Linear(4, 2).double()
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.body(x).split(4, -1)
        hidden = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=0.3, dropout_p=self.dropout
        )
        output: Tensor = self.head(hidden)
        return output


@pytest.mark.parametrize("how", zoo_torch.HOWS)
@pytest.mark.parametrize("first_order", [False, True])
def test_attention_by_blocks_and_by_another_kernel(
    how: Any, first_order: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    maml = MAML(Attending(), 0.1, 2, first_order=first_order)
    _, expected = zoo_torch.meta_gradient(maml, F.mse_loss, TASKS, how)
    calls = []

    def kernel(query: Tensor, key: Tensor, value: Tensor, *, mask: Any, causal: bool) -> Tensor:
        calls.append(mask is None and causal)
        scores = query @ key.mT / query.shape[-1] ** 0.5
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value

    with metaframe.nn.use_attention_kernel(kernel):
        _, by_kernel = zoo_torch.meta_gradient(maml, F.mse_loss, TASKS, how)
    assert calls
    assert all(calls)
    monkeypatch.setattr("metaframe.nn.blocks.LONG", 4)
    monkeypatch.setattr("metaframe.nn.attend.BLOCK", 2)
    _, by_blocks = zoo_torch.meta_gradient(maml, F.mse_loss, TASKS, how)
    for found in (by_kernel, by_blocks):
        for name, g in expected.items():
            torch.testing.assert_close(found[name], g, rtol=1e-12, atol=1e-14)


def test_a_kernel_takes_no_dropout() -> None:
    maml = MAML(Attending(dropout=0.5), 0.1)
    refused = pytest.raises(InputError, match=r"use_attention_kernel: .* with dropout")
    with metaframe.nn.use_attention_kernel(lambda query, key, value, mask, causal: value), refused:
        maml.meta_value_and_grad(F.mse_loss, TASKS)


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


class Layer(nn.Module):
    """A linear layer, and what a test makes of it."""

    def __init__(self, forward: Callable[[Any, Tensor], Any] = lambda module, x: module.layer(x)):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.act = self.double().layer.weight.new_zeros(2)
        self.code = forward

    def forward(self, x: Tensor) -> Any:
        return self.code(self, x)


def clamped(module: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        module.layer.weight.clamp_(-0.1, 0.1)
    return module.layer(x)  # type: ignore[no-any-return]


def clamped_data(module: Any, x: Tensor) -> Tensor:
    module.layer.weight.data.clamp_(-0.1, 0.1)
    return module.layer(x)  # type: ignore[no-any-return]


def new_data(module: Any, x: Tensor) -> Tensor:
    module.layer.weight.data = module.layer.weight.data.clamp(-0.1, 0.1)
    return module.layer(x)  # type: ignore[no-any-return]


def one_row(module: Any, x: Tensor) -> Tensor:
    module.layer.weight.detach()[0] = 0.0
    return module.layer(x)  # type: ignore[no-any-return]


def into(module: Any, x: Tensor) -> Tensor:
    torch.clamp(module.layer.weight.detach(), -0.1, 0.1, out=module.layer.weight.detach())
    return module.layer(x)  # type: ignore[no-any-return]


def replaced(module: Any, x: Tensor) -> Tensor:
    module.layer.bias = nn.Parameter(torch.zeros(2).double())
    return module.layer(x)  # type: ignore[no-any-return]


def new_layer(module: Any, x: Tensor) -> Tensor:
    module.layer = nn.Identity()
    return module.layer(x)  # type: ignore[no-any-return]


def late(module: Any, x: Tensor) -> Tensor:
    module.late = nn.Parameter(torch.ones(2).double())
    return module.layer(x) * module.late  # type: ignore[no-any-return]


def carried(module: Any, x: Tensor) -> Tensor:
    module.act = torch.tanh(module.layer(x).mean(0) + module.act)
    return module.layer(x) + module.act  # type: ignore[no-any-return]


def counted(module: Any, x: Tensor) -> Tensor:
    module.act += 1
    return module.layer(x)  # type: ignore[no-any-return]


WRITERS = {
    clamped: r"writes to its parameter 'layer\.weight'",
    clamped_data: r"writes to its parameter 'layer\.weight'",
    new_data: r"writes to its parameter 'layer\.weight'",
    one_row: r"writes to its parameter 'layer\.weight'",
    into: r"writes to its parameter 'layer\.weight'",
    replaced: r"replaces its parameter 'layer\.bias'",
    new_layer: r"replaces layers among",
    late: r"registers or removes \['late'\]",
    carried: r"keeps a tensor from one call to the next in the attribute 'act'",
    counted: r"keeps a tensor from one call to the next in the attribute 'act'",
}


@pytest.mark.parametrize("forward", WRITERS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("how", [*zoo_torch.HOWS, "as it is"])
def test_a_model_that_changes_itself_is_refused_and_left_as_it_was(forward: Any, how: str) -> None:
    model = Layer(forward)
    before, bits = state_of(model), {n: p.detach().clone() for n, p in model.named_parameters()}
    maml = MAML(model, 0.1, 2)
    with pytest.raises(InputError, match=WRITERS[forward]):
        maml(X) if how == "as it is" else zoo_torch.meta_gradient(maml, F.mse_loss, TASKS, how)
    assert state_of(model) == before
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), bits[name], rtol=0, atol=0)


def state_of(model: nn.Module) -> dict[str, int]:
    """Everything that a model holds, by identity."""
    return {
        f"{path}.{name}.{key}": id(x)
        for path, module in model.named_modules()
        for name, held in vars(module).items()
        for key, x in (held.items() if isinstance(held, dict) else [("", held)])
    }


def test_a_model_may_leave_activations_for_the_loss() -> None:
    """Those of the call, and not of an earlier one."""

    def forward(module: Any, x: Tensor) -> Tensor:
        module.act = module.layer(x)
        return module.act  # type: ignore[no-any-return]

    model, plain = Layer(forward), Layer()
    plain.load_state_dict(model.state_dict())
    model(X)
    for how in ("loop", "vmap"):
        found = MAML(model, 0.1, 2).meta_value_and_grad(
            lambda y, t: F.mse_loss(y, t) + model.act.square().mean(), TASKS, task_map=how
        )
        expected = MAML(plain, 0.1, 2).meta_value_and_grad(
            lambda y, t: F.mse_loss(y, t) + y.square().mean(), TASKS, task_map=how
        )
        for name, g in expected.grads.items():
            torch.testing.assert_close(found.grads[name], g, rtol=0, atol=0)


def test_a_part_in_inference_mode() -> None:
    """Right in a loop; in `vmap` torch has an error about its own bookkeeping."""

    def forward(module: Any, x: Tensor) -> Tensor:
        with torch.inference_mode():
            best = module.layer(x).argmax(1)
        return module.layer(x) * (1 + best[:, None])  # type: ignore[no-any-return]

    maml = MAML(Layer(forward), 0.1, 1)
    how: dict[str, Any] = {"task_map": "loop", "compiled": False}
    zoo.check_along_a_line(maml, F.mse_loss, TASKS, [how])
    with pytest.raises(BackendError, match=r'inference tensor.* task_map="loop"'):
        maml.meta_value_and_grad(F.mse_loss, TASKS, task_map="vmap", compiled=False)


def attribute(module: Any, x: Tensor) -> Tensor:
    if module.kept is None:
        module.kept = 1 + x.detach().mean(0)
    return module.layer(x * module.kept)  # type: ignore[no-any-return]


def entry(module: Any, x: Tensor) -> Tensor:
    scale = module.tables.setdefault(len(x), 1 + x.detach().mean(0))
    return module.layer(x * scale)  # type: ignore[no-any-return]


def item(module: Any, x: Tensor) -> Tensor:
    if not module.items:
        module.items.append(1 + x.detach().mean(0))
    return module.layer(x * module.items[0])  # type: ignore[no-any-return]


@pytest.mark.parametrize("forward", [attribute, entry, item])
@pytest.mark.parametrize("compiled", [False, slow(True)])
def test_tensors_of_a_transform_do_not_stay_in_a_model(forward: Any, compiled: bool) -> None:
    model = Layer(forward)
    model.kept, model.tables, model.items = None, {}, []
    before, maml = state_of(model), MAML(model, 0.1, 1)
    how: dict[str, Any] = {"task_map": "vmap", "compiled": compiled}
    costs = [maml.meta_value_and_grad(F.mse_loss, TASKS, **how).cost for _ in range(2)]
    assert state_of(model) == before
    assert costs[0] == costs[1]
    assert torch.isfinite(model(X)).all()


@pytest.mark.parametrize("how", ["vmap", "loop"])
def test_an_exception_in_a_model_leaves_it_as_it_was(how: Any) -> None:
    def forward(module: Any, x: Tensor) -> Tensor:
        module.act = module.layer(x).mean(0) + module.act
        raise KeyError("lost")

    model = nn.Sequential(Layer(forward), nn.LSTM(2, 2))
    before = state_of(model)
    with pytest.raises(KeyError, match="lost"):
        MAML(model, 0.1, 1).meta_value_and_grad(F.mse_loss, TASKS, task_map=how)
    assert state_of(model) == before


def test_recurrent_layers_keep_their_lists_of_weights() -> None:
    """A copy of a layer that held tensors of an adaptation could not be made."""
    layer = nn.LSTM(3, 2).double()
    model = nn.Sequential(layer)
    before = state_of(model)
    for how in ("loop", "vmap"):
        MAML(model, 0.1, 1).meta_value_and_grad(
            lambda y, t: F.mse_loss(y[0], t), TASKS, task_map=how
        )
    assert state_of(model) == before
    copy.deepcopy(model)(X)


class Once(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**2

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * g * x


@pytest.mark.parametrize("how", zoo_torch.HOWS)
def test_get_parameter_is_refused(how: Any) -> None:
    maml = MAML(Layer(lambda module, x: x @ module.get_parameter("layer.weight").T), 0.1)
    with pytest.raises(BackendError, match=r"get_parameter\(\) finds .*as an attribute"):
        zoo_torch.meta_gradient(maml, F.mse_loss, TASKS, how)


@pytest.mark.parametrize("how", zoo_torch.HOWS)
def test_a_function_that_is_differentiable_once_is_refused(how: Any) -> None:
    """The second derivative is dropped by torch, without an error."""
    model = Layer(lambda module, x: Once.apply(module.layer(x)))
    maml, first = MAML(model, 0.1, 2), MAML(model, 0.1, 2, first_order=True)
    with pytest.raises(BackendError, match="Once is marked with once_differentiable"):
        zoo_torch.meta_gradient(maml, F.mse_loss, TASKS, how)
    plain = Layer(lambda module, x: module.layer(x) ** 2)
    plain.load_state_dict(model.state_dict())
    expected = MAML(plain, 0.1, 2, first_order=True).meta_value_and_grad(F.mse_loss, TASKS)
    found = first.meta_value_and_grad(
        F.mse_loss, TASKS, task_map="loop" if how == "loop" else "vmap"
    )
    for name, g in expected.grads.items():
        torch.testing.assert_close(found.grads[name], g)


BACKWARD_HOOKS: dict[str, Any] = {
    "full": lambda layer, f: layer.register_full_backward_hook(lambda m, gi, go: f()),
    "before": lambda layer, f: layer.register_full_backward_pre_hook(lambda m, go: f()),
    "old": lambda layer, f: layer.register_backward_hook(lambda m, gi, go: f()),
}


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.filterwarnings("ignore:Using a non-full backward hook:FutureWarning")
@pytest.mark.parametrize("kind", BACKWARD_HOOKS)
def test_backward_hooks_run_in_a_loop_and_are_refused_by_vmap(kind: str) -> None:
    calls: list[None] = []
    model = Layer()
    maml = MAML(model, 0.1, 2)
    expected = maml.meta_value_and_grad(F.mse_loss, TASKS, task_map="loop")
    BACKWARD_HOOKS[kind](model.layer, lambda: calls.append(None))
    found = maml.meta_value_and_grad(F.mse_loss, TASKS, task_map="loop")
    assert len(calls) >= 3
    torch.testing.assert_close(found.grads, expected.grads)
    with pytest.raises(InputError, match=r'\(Linear\) has a backward hook.*task_map="loop"'):
        maml.meta_value_and_grad(F.mse_loss, TASKS, task_map="vmap")


def test_parametrizations_that_a_caller_caches() -> None:
    model = nn.Sequential(nn.utils.parametrizations.orthogonal(nn.Linear(3, 3)), nn.Linear(3, 2))
    maml = MAML(model.double(), 0.1, 2)
    expected = maml.meta_value_and_grad(F.mse_loss, TASKS, task_map="loop")
    with nn.utils.parametrize.cached():
        weight = model[0].weight
        found = maml.meta_value_and_grad(F.mse_loss, TASKS, task_map="loop")
        assert model[0].weight is weight
    torch.testing.assert_close(found.grads, expected.grads, rtol=0, atol=0)


def test_another_method_of_a_model() -> None:
    class Policy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.scale = nn.Linear(3, 2), nn.Parameter(torch.ones(2))
            self.double()

        def log_prob(self, x: Tensor, a: Tensor, *, sign: float = 1.0) -> Tensor:
            return sign * (self.body(x) * self.scale * a).sum(-1)

    model = Policy()
    adapter = adapter_of(model)
    params = {name: p.detach() + 1 for name, p in adapter.params().items()}
    call = Inputs((X, Y), {"sign": -1.0}, call=Policy.log_prob)
    found = adapter.call(params, {}, call)[0]
    twin = copy.deepcopy(model)
    twin.load_state_dict(params)
    torch.testing.assert_close(found, twin.log_prob(X, Y, sign=-1.0), rtol=0, atol=0)
    assert not torch.equal(found, model.log_prob(X, Y, sign=-1.0))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_the_state_that_a_model_leaves_is_that_of_its_own_call(momentum: Any) -> None:
    """With norm=None, which leaves everything to the model."""
    model = nn.Sequential(nn.BatchNorm1d(3, momentum=momentum), zoo_torch.Averaging()).double()
    twin = copy.deepcopy(model)
    apply, params, state = functional(model)
    for _ in range(2):
        output, state = apply(params, state, X)
        torch.testing.assert_close(output, twin(X), rtol=1e-13, atol=1e-13)
        for name, buffer in twin.named_buffers():
            torch.testing.assert_close(state[name], buffer, rtol=1e-13, atol=1e-13)
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, dict(Clean().named_buffers())[name], rtol=0, atol=0)


class Rows(nn.Module):
    """Statistics in one row of several for each step, as in MAML++, and an extra normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.register_buffer("mean", torch.zeros(2, 3))
        self.register_buffer("var", torch.ones(2, 3))
        self.apart = torch.zeros(3).double(), torch.ones(3).double()

    def forward(self, x: Tensor) -> Tensor:
        y = F.batch_norm(x, self.mean[1], self.var[1], self.scale, None, training=True)
        return F.batch_norm(y, *self.apart, training=True)


class Twice(nn.Module):
    """A layer that is used twice, and its statistics in between."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(2 * self.norm(x) + self.norm.running_mean)


OF_A_SERIES = {
    "rows": Rows,
    "twice": Twice,
    "instances": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 3)), nn.InstanceNorm1d(1, affine=True, track_running_stats=True)
    ),
}


@pytest.mark.parametrize("name", OF_A_SERIES)
def test_statistics_move_as_in_the_models_own_call(name: str) -> None:
    model = OF_A_SERIES[name]().double()
    before, twin = copy.deepcopy(model.__dict__), copy.deepcopy(model)
    apply, params, state = functional(model)
    for _ in range(2):
        output, state = apply(params, state, X)
        torch.testing.assert_close(output, twin(X), rtol=1e-13, atol=1e-13)
        for buffer, own in twin.named_buffers():
            torch.testing.assert_close(state[buffer], own, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(model.__dict__.get("apart"), before.get("apart"), rtol=0, atol=0)
    if name == "twice":  # each task has statistics of its own
        rows = torch.stack([X, 2 * X])
        mapped = torch.func.vmap(lambda x: apply(params, functional(model).state, x)[1])(rows)
        for i, x in enumerate(rows):
            alone = apply(params, functional(model).state, x)[1]
            for buffer in ("norm.running_mean", "norm.running_var"):
                torch.testing.assert_close(mapped[buffer][i], alone[buffer])


def test_statistics_that_are_no_buffers_are_not_for_queries() -> None:
    maml = MAML(Rows().double(), 0.1, norm="support")
    with pytest.raises(InputError, match="in buffers of the model"):
        maml.meta_value_and_grad(F.mse_loss, [Task(X, X, X, X)], compiled=False, task_map="loop")


def Clean() -> nn.Module:
    return nn.Sequential(nn.BatchNorm1d(3), zoo_torch.Averaging()).double()


def test_modules_for_several_devices_are_refused() -> None:
    distributed = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(distributed)
    distributed.module = nn.Linear(3, 2)
    several = nn.DataParallel(nn.Linear(3, 2))
    several.device_ids = [0, 1]
    for model, name in ((distributed, "DistributedDataParallel"), (several, "DataParallel")):
        with pytest.raises(InputError, match=rf"\({name}\) cannot be adapted: .*Pass its `module`"):
            MAML(model)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_an_operation_without_a_second_derivative_is_named() -> None:
    """In a cost of one's own, of which torch says so only in the backward pass."""

    def cost(v: Any, task: Any) -> Tensor:
        def inner(w: Tensor) -> Tensor:
            return F.multi_margin_loss(task["x"] @ w, task["y"])

        adapted = metaframe.inner_loop(lambda batch, v: inner(v["w"]), v, None, steps=1, lr=0.1)
        return inner(adapted["w"])

    v = {"w": torch.randn(3, 4, dtype=torch.float64)}
    batch = {"x": torch.stack([X, X]), "y": torch.tensor([[0, 1, 2, 3, 0, 1]] * 2)}
    for how in ("loop", "vmap"):
        with pytest.raises(BackendError, match="second derivative of multi_margin_loss_backward"):
            metaframe.meta_value_and_grad(cost, task_map=how)(v, batch)  # type: ignore[arg-type]


def test_lengths_of_packed_sequences_that_differ_from_task_to_task() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.GRU(3, 2, batch_first=True)

        def forward(self, inputs: Any) -> Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(
                inputs["x"], inputs["lengths"], batch_first=True, enforce_sorted=False
            )
            return self.layer(packed)[1][0]  # type: ignore[no-any-return]

    rng = np.random.default_rng(0)
    tasks = [
        Task(
            *({"x": rng.normal(size=(3, 4, 3)), "lengths": np.array(n)}, rng.normal(size=(3, 2)))
            * 2
        )
        for n in ([4, 2, 1], [1, 3, 2])
    ]
    maml = MAML(Packed().double(), 0.1, 1)
    maml.meta_value_and_grad(F.mse_loss, tasks, task_map="loop")
    with pytest.raises(InputError, match=r'lengths of packed sequences.*task_map="loop"'):
        maml.meta_value_and_grad(F.mse_loss, tasks, task_map="vmap")
