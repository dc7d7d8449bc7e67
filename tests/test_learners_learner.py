"""A learner answers like its model, with the adapted parameters, and leaves the model alone."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest

import policies
import zoo
from frameworks import require
from metaframe import MAML, Learner, MetaSGD, ProtoMAML, meta_value_and_grad, nn, ops, use_backend
from metaframe.errors import InputError
from metaframe.testing.conformance.cases import slope
from policies import WIDTH, Policy

X = np.random.default_rng(0).normal(size=(5, 3))


@pytest.fixture(params=policies.POLICIES, ids=lambda p: f"{p.backend}-{p.id}")
def policy(request: pytest.FixtureRequest) -> Any:
    require(request.param.backend)
    with use_backend(request.param.backend, dtype="float64"):
        yield request.param


@pytest.fixture
def maml(policy: Policy) -> MAML:
    wrapped: MAML = MAML(policies.built(policy), inner_lr=0.1)
    return wrapped


@pytest.fixture
def learner(maml: MAML) -> Learner:
    return maml.clone().adapt(energy)


def energy(learner: Any) -> Any:
    return learner.energy(ops.asarray(X))


def np_(x: Any) -> Any:
    return ops.to_numpy(ops.asarray(x))


def encoded(policy: Policy, params: Any) -> Any:
    """The body's output, by hand."""
    weight = np_(params[policy.body])
    bias = np_(params[policy.body.replace(policy.weight, "b" if policy.weight == "w" else "bias")])
    return X @ (weight.T if policy.transposed else weight) + bias


def test_methods_and_layers_compute_with_the_adapted_parameters(
    policy: Policy, maml: MAML, learner: Learner
) -> None:
    before = {name: np_(x).copy() for name, x in maml.meta_parameters().items()}
    x = ops.asarray(X)
    layer = learner.encoder
    if policy.one_by_one:
        found = np.stack([np_(layer(row)) for row in x])
    else:
        found = np_(layer(x))
    np.testing.assert_allclose(found, encoded(policy, learner.params), rtol=0, atol=1e-14)
    assert float(np_(learner.energy(x))) < float(np_(maml.clone().energy(x)))
    learner.adapt(energy)
    again = np.stack([np_(layer(row)) for row in x]) if policy.one_by_one else np_(layer(x))
    np.testing.assert_allclose(again, encoded(policy, learner.params), rtol=0, atol=1e-14)
    for name, value in maml.meta_parameters().items():
        np.testing.assert_array_equal(np_(value), before[name])


def test_attributes(policy: Policy, learner: Learner) -> None:
    assert learner.flag == WIDTH
    temperature = next(
        name for name in learner.params if "encoder" not in name and "head" not in name
    )
    np.testing.assert_array_equal(np_(learner.temperature), np_(learner.params[temperature]))
    assert np.abs(np_(learner.temperature)).max() > 1e-4
    np.testing.assert_allclose(np_(learner.scale), np.exp(np_(learner.temperature)), rtol=1e-15)
    if policy.id != "linen":  # whose layers have no weights as attributes
        weight = getattr(learner.encoder, policy.weight)
        np.testing.assert_array_equal(np_(weight), np_(learner.params[policy.body]))
        assert policy.weight in dir(learner.encoder)
    assert {"flag", "energy", "encoder", "adapt", "params"} <= set(dir(learner))
    assert hasattr(learner, "flag")
    assert not hasattr(learner, "no_such_name")
    with pytest.raises(AttributeError, match=r"no attribute 'enrgy'. Did you mean 'energy'"):
        _ = learner.enrgy
    with pytest.raises(AttributeError, match=rf"'encoder' has no attribute '{policy.weight}s'"):
        getattr(learner.encoder, policy.weight + "s")


@pytest.mark.parametrize(
    "policy", [p for p in policies.POLICIES if p.listed], ids=lambda p: p.id, indirect=True
)
def test_structures_of_layers_and_generators(policy: Policy, learner: Learner) -> None:
    x = ops.asarray(X)
    assert len(learner.layers) >= 2
    first = next(iter(learner.layers))
    for layer in (first, learner.layers[0]):
        np.testing.assert_allclose(np_(layer(x)), encoded(policy, learner.params), atol=1e-14)
    found = learner.kernels() if policy.id == "keras" else learner.weights()
    weights = [np_(w) for w in found]
    assert len(weights) == 2
    np.testing.assert_array_equal(weights[0], np_(learner.params[policy.body]))


def test_the_meta_gradient_goes_through_a_method(policy: Policy, maml: MAML) -> None:
    """Against finite differences of the query energy after one step, along a line."""
    x, query = ops.asarray(X), ops.asarray(X[::-1] + 0.5)
    rng = np.random.default_rng(1)
    start = {name: np_(v).copy() for name, v in maml.meta_parameters().items()}
    line = {name: rng.normal(size=v.shape) for name, v in start.items()}

    def cost(v: Any, task: Any) -> Any:
        del task
        return maml.clone(v).adapt(lambda learner: learner.energy(x)).energy(query)

    def along(t: float) -> float:
        moved = {n: ops.asarray(start[n] + t * line[n]) for n in start}
        return float(np_(cost(moved, None)))

    meta = {name: ops.asarray(v) for name, v in start.items()}
    grads = meta_value_and_grad(cost, task_map="loop")(meta, ops.asarray(X[None])).grads
    expected = slope(along, 1e-3)
    found = sum(float((np_(grads[n]) * line[n]).sum()) for n in line)
    assert abs(found - expected) < 1e-9 * max(1.0, abs(expected))


def test_what_it_holds(policy: Policy, maml: MAML, learner: Learner) -> None:
    assert list(dict(learner.named_parameters())) == list(learner.params)
    assert all(a is b for a, b in zip(learner.parameters(), learner.params.values(), strict=True))
    assert set(dict(learner.named_parameters())) == set(maml.meta_parameters())
    saved = learner.state_dict()
    for name, x in learner.params.items():
        np.testing.assert_array_equal(np_(saved[name]), np_(x))
    names = [name for name, _ in learner.named_buffers()]
    assert len(list(learner.buffers())) == len(names)
    tied = {name for name in saved if name.startswith("layers.")}
    assert set(saved) - tied == {*learner.params, *names}


def test_clones_go_on_by_themselves(policy: Policy, learner: Learner) -> None:
    other = learner.clone()
    assert type(other) is Learner
    before = {name: np_(x).copy() for name, x in learner.params.items()}
    other.adapt(energy)
    for name, x in learner.params.items():
        np.testing.assert_array_equal(np_(x), before[name])
    assert any(np.abs(np_(other.params[n]) - before[n]).max() > 1e-6 for n in before)
    kinds = (copy.copy, copy.deepcopy)
    for kind in kinds[: 1 if policy.id == "keras" else 2]:  # which copies by saving and loading
        fresh = kind(MAML(policies.built(policy)).clone())
        assert fresh.flag == WIDTH


def test_its_own_training_mode(policy: Policy, maml: MAML) -> None:
    learner, x = maml.clone(), X
    if not policy.switchable:
        with pytest.raises(InputError, match="no training mode"):
            learner.eval()
        assert not hasattr(learner, "training")
        return
    own = learner.training if hasattr(learner, "training") else None
    modes = {mode: np_(maml.clone().train(mode)(x)) for mode in (True, False)}
    assert np.abs(modes[True] - modes[False]).max() > 1e-6
    hidden = ops.asarray(np.tanh(encoded(policy, learner.params)))
    head = learner.eval().head
    expected = np.stack([np_(head(h)) for h in hidden]) if policy.one_by_one else np_(head(hidden))
    np.testing.assert_allclose(modes[False], expected, rtol=0, atol=1e-14)
    assert learner.eval() is learner
    assert learner.training is False
    assert learner.train().training is True
    fresh = maml.clone()
    assert (fresh.training if hasattr(fresh, "training") else None) == own
    with pytest.raises(InputError, match="mode must be one of True, False"):
        learner.train("yes")  # type: ignore[arg-type]


def test_numpy_examples_are_converted(policy: Policy, maml: MAML) -> None:
    target = np.zeros((5, 2))
    learner, expected = (
        maml.clone().eval() if policy.switchable else maml.clone() for _ in range(2)
    )
    learner.adapt_on(nn.mse, X, target)
    expected.adapt_on(nn.mse, ops.asarray(X), ops.asarray(target))
    for name, x in learner.params.items():
        np.testing.assert_array_equal(np_(x), np_(expected.params[name]))
    assert np_(learner(X)).shape == (5, 2)


WITHHELD = {
    "torch": ("double", "load_state_dict", "requires_grad_", "apply"),
    "keras": ("fit", "set_weights"),
    "tf_module": ("trainable_variables",),
}


def test_what_would_change_the_model_is_withheld(policy: Policy, learner: Learner) -> None:
    for name in WITHHELD.get(policy.id, ()):
        for owner in (learner, learner.encoder):
            if policy.id != "keras" or name in dir(owner):
                with pytest.raises(AttributeError, match="would change the model"):
                    getattr(owner, name)


def test_errors_from_inside_a_method_are_its_own(policy: Policy, learner: Learner) -> None:
    with pytest.raises(Exception) as raised:  # noqa: PT011  each framework's own
        learner.energy(ops.asarray(X[:, :2]))
    assert "has no attribute" not in str(raised.value)


def test_a_head_that_the_algorithm_added_is_no_part_of_the_model() -> None:
    require("torch")
    import torch

    maml = ProtoMAML(policies.built(policies.POLICIES[0]), 2)
    x, y = torch.from_numpy(X), torch.tensor([0, 1, 0, 1, 0])
    learner = maml.clone().adapt_on(torch.nn.functional.cross_entropy, x, y)
    assert learner.encoder(x).shape == (5, WIDTH)
    assert learner.flag == WIDTH


def torch_learner(**options: Any) -> Any:
    require("torch")
    return MAML(policies.built(policies.POLICIES[0]), **options).clone()


def test_torch_log_prob_trains_through_the_learner() -> None:
    import torch

    class Gaussian(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mean, self.log_std = torch.nn.Linear(3, 2), torch.nn.Parameter(torch.zeros(2))

        def forward(self, s: Any) -> Any:
            return torch.distributions.Normal(self.mean(s), self.log_std.exp())

        def log_prob(self, s: Any, a: Any) -> Any:
            return self(s).log_prob(a).sum(-1)

    maml = MAML(Gaussian().double(), inner_lr=0.1)
    s, a = torch.from_numpy(X), torch.from_numpy(X[:, :2])
    one = maml.clone().adapt(lambda learner: -learner.log_prob(s, a).mean())
    learner = maml.clone()
    learner.adapt(-learner.log_prob(s, a).mean())
    for name, x in one.params.items():
        torch.testing.assert_close(learner.params[name], x, rtol=0, atol=0)
    (-learner.log_prob(s, a).mean()).backward()
    found = [p.grad for p in maml.parameters()]
    # The same by hand, over plain tensors.
    p = [x.detach().clone().requires_grad_() for x in maml.parameters()]

    def loss(log_std: Any, w: Any, b: Any) -> Any:
        return -torch.distributions.Normal(s @ w.T + b, log_std.exp()).log_prob(a).sum(-1).mean()

    step = torch.autograd.grad(loss(*p), p, create_graph=True)
    loss(*(x - 0.1 * g for x, g in zip(p, step, strict=True))).backward()
    for grad, x in zip(found, p, strict=True):
        torch.testing.assert_close(grad, x.grad, rtol=0, atol=1e-14)


def test_torch_state_dict_goes_back_into_the_model() -> None:
    import torch

    learner = torch_learner()
    learner.adapt(lambda learner: learner.energy(torch.from_numpy(X)))
    model = policies.built(policies.POLICIES[0])
    assert str(model.load_state_dict(learner.state_dict())) == "<All keys matched successfully>"
    torch.testing.assert_close(model.encoder.weight.detach(), learner.encoder.weight.detach())
    assert not any(x.requires_grad for x in learner.state_dict().values())
    inside = dict(learner.encoder.named_parameters())
    assert inside["weight"] is learner.params["encoder.weight"]
    assert learner.get_submodule("encoder")(torch.from_numpy(X)).shape == (5, WIDTH)
    assert learner.forward(torch.from_numpy(X)).shape == (5, 2)


def test_torch_modes_and_registrations_stay() -> None:
    import torch

    learner = torch_learner()
    model = learner._adapter.model
    model.head.eval()
    before = [(m, m.training, dict(m._parameters)) for m in model.modules()]
    learner.train()(torch.from_numpy(X))
    learner.eval().energy(torch.from_numpy(X))
    with pytest.raises(TypeError):
        learner.energy(None)
    for module, training, parameters in before:
        assert module.training is training
        assert all(module._parameters[n] is p for n, p in parameters.items())


def test_torch_names_that_look_like_a_learners_own() -> None:
    """Attributes of the user's take the names of withheld methods; ours come first."""
    import torch

    class Net(torch.nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 2)
            self.config = "of the model"

        def half(self) -> Any:
            return self.weight / 2

        @property
        def rows(self) -> Any:
            return map(torch.sum, (self.weight, self.bias))

        @property
        def parts(self) -> Any:
            yield self
            yield self.weight

    learner = MAML(Net()).clone().adapt(lambda learner: learner.weight.square().sum())
    weight, bias = learner.params.values()
    assert [x.item() for x in learner.rows] == [weight.sum().item(), bias.sum().item()]
    part, again = learner.parts
    assert again is weight
    assert torch.equal(part(torch.eye(3)), learner(torch.eye(3)))
    assert torch.equal(learner.half(), learner.params["weight"] / 2)
    assert learner.config is not None
    assert learner.config != "of the model"


def test_settings_where_the_model_has_none_of_the_name(policy: Policy, maml: MAML) -> None:
    learner = maml.clone()
    assert learner.module is maml.module
    for name in ("inner_steps", "first_order", "adapt_names", "allow_unused"):
        assert getattr(learner, name) == getattr(maml, name)
    assert learner.lr == maml.inner_lr


def test_torch_settings_and_buffers() -> None:
    import torch

    class Net(torch.nn.BatchNorm1d):
        lr = "of the model"

    learner = MetaSGD(Net(3)).clone()
    assert learner.lr == "of the model"
    assert torch.equal(learner.buffers["running_var"], torch.ones(3))
    assert [x.shape for x in learner.buffers()] == [(3,), (3,), ()]
    maml = MetaSGD(torch.nn.Linear(3, 2))
    assert maml.clone().lr["weight"] is maml.lrs["weight"]


def test_torch_containers_by_index() -> None:
    import torch

    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    learner = MAML(model).clone()
    x = torch.ones(2, 3)
    torch.testing.assert_close(learner[2](learner[:2](x)), learner(x))
    assert len(list(learner)) == 3
    assert "Linear" in repr(learner[0])


def test_learners_can_be_pickled() -> None:
    plain = zoo.built(zoo.LIBRARIES[0])
    again = pickle.loads(pickle.dumps(MAML(plain).clone()))
    assert again.params.keys() == dict(plain.named_parameters()).keys()


def test_an_algorithms_checks_hold_for_methods_too() -> None:
    learner = torch_learner(norm="support")
    with pytest.raises(InputError, match="has not seen"):
        learner.energy(X)
    assert learner.flag == WIDTH
