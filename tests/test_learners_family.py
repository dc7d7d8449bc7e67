"""Every relative of MAML against its paper's formula, written out in NumPy float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import metaframe
import zoo
from frameworks import hardly_depends_on_the_backend, slow
from metaframe import (
    CAVIA,
    MAML,
    ImplicitMAML,
    MAMLPlusPlus,
    MetaCurvature,
    ProtoMAML,
    ProtoNet,
    Reptile,
    nn,
)
from metaframe.backend import Backend, load_backend
from metaframe.core.implicit import conjugate_gradient
from metaframe.errors import InputError
from metaframe.learners.maml_pp import multi_step_weights
from metaframe.learners.meta_curvature import transformed
from metaframe.tasks import Task

LR, STEPS = 0.1, 2
RATES = dict.fromkeys(zoo.NAMES, LR)
Check = Callable[..., None]


@pytest.fixture(params=["default", pytest.param("other", marks=pytest.mark.slow)])
def compiled(request: pytest.FixtureRequest, backend: Backend) -> bool:
    """Compiled where that is the default, eager where that is; as a slow test the other way."""
    return backend.compiles_quickly == (request.param == "default")


@pytest.fixture
def model(backend: Backend) -> Any:
    return zoo.built(zoo.PAIRS[backend.name])


@pytest.fixture
def check(backend: Backend, compiled: bool) -> Check:
    """`check(maml, cost, v, learned={})`: `cost` in NumPy, its gradient by finite differences."""
    library = zoo.PAIRS[backend.name]

    def close(
        maml: Any,
        cost: Callable[..., float],
        learned: zoo.Values | None = None,
        tasks: list[Task] | None = None,
        loss_fn: Any = nn.mse,
        v: zoo.Values | None = None,
    ) -> None:
        v = zoo.weights() if v is None else v
        theirs = dict(zip(zoo.NAMES, library.names, strict=True))
        if learned:
            maml.assign({f"learned/{rename(n)}": backend.asarray(x) for n, x in learned.items()})
        batch = zoo.tasks() if tasks is None else tasks
        result = maml.meta_value_and_grad(loss_fn, batch, compiled=compiled)
        np.testing.assert_allclose(backend.to_numpy(result.cost), cost(v, learned), rtol=1e-12)
        expected = {theirs[n]: g for n, g in zoo.differences(lambda v: cost(v, learned), v).items()}
        if learned:
            found = zoo.differences(lambda learned: cost(v, learned), learned)
            expected |= {f"learned/{rename(n)}": g for n, g in found.items()}
        agree({n: backend.to_numpy(g) for n, g in result.grads.items()}, expected)

    def rename(name: str) -> str:
        ours, slash, mode = name.partition("/")
        return dict(zip(zoo.NAMES, library.names, strict=True))[ours] + slash + mode

    return close


def agree(found: zoo.Values, expected: zoo.Values, tolerance: float = 1e-10) -> None:
    assert sorted(found) == sorted(expected)
    scale = max(np.abs(g).max() for g in expected.values())
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=tolerance * scale, err_msg=name)


def mean(cost: Callable[[Task], float]) -> float:
    return float(np.mean([cost(task) for task in zoo.tasks()]))


def random_like(values: zoo.Values, scale: float, seed: int = 5) -> zoo.Values:
    rng = np.random.default_rng(seed)
    return {name: x + scale * rng.normal(size=x.shape) for name, x in values.items()}


def points(v: zoo.Values, task: Task, rates: zoo.Values) -> list[zoo.Values]:
    def step(k: int, v: zoo.Values, g: zoo.Values) -> zoo.Values:
        return {name: v[name] - rates[name][k] * g[name] for name in v}

    found: list[zoo.Values] = zoo.path(v, task, 3, step)
    return found


def test_rates_of_every_step_and_the_multi_step_loss(model: Any, check: Check) -> None:
    maml = MAMLPlusPlus(model, LR, 3, multi_step_epochs=10)
    maml.epoch = 4
    weights = (0.2, 0.2, 0.6)

    def cost(v: zoo.Values, rates: zoo.Values) -> float:
        def of_task(task: Task) -> float:
            visited = points(v, task, rates)[1:]
            losses = [zoo.loss(p, task.query_x, task.query_y) for p in visited]
            return float(np.dot(weights, losses))

        return mean(of_task)

    check(maml, cost, random_like({name: np.full(3, LR) for name in zoo.NAMES}, 0.03))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["reverse", "remat", "mixed"])
def test_after_the_annealing_the_last_step_counts(model: Any, backend: Backend, mode: Any) -> None:
    maml = MAMLPlusPlus(model, LR, STEPS, multi_step_epochs=10)
    maml.epoch = 10
    found = maml.meta_value_and_grad(nn.mse, zoo.tasks(), task_map="loop", mode=mode)
    expected = MAML(model, LR, STEPS).meta_value_and_grad(nn.mse, zoo.tasks(), task_map="loop")
    for name, grad in expected.grads.items():
        np.testing.assert_allclose(
            backend.to_numpy(found.grads[name]), backend.to_numpy(grad), rtol=0, atol=1e-14
        )


@pytest.mark.slow
def test_first_order_before_its_epoch(model: Any, backend: Backend) -> None:
    maml = MAMLPlusPlus(model, LR, STEPS, learn_rates=False, second_order_from=1)
    for epoch, first_order in ((0, True), (1, False), (0, True)):
        maml.epoch = epoch
        found = maml.meta_value_and_grad(nn.mse, zoo.tasks())
        plain = MAML(model, LR, STEPS, first_order)
        expected = plain.meta_value_and_grad(nn.mse, zoo.tasks())
        for name, grad in expected.grads.items():
            np.testing.assert_allclose(
                backend.to_numpy(found.grads[name]), backend.to_numpy(grad), rtol=0, atol=1e-15
            )


@hardly_depends_on_the_backend
def test_reptile_without_steps(model: Any) -> None:
    with pytest.raises(InputError, match="take one step or more"):
        Reptile(model, LR).meta_value_and_grad(nn.mse, zoo.tasks(), steps=0)


@hardly_depends_on_the_backend
def test_more_steps_than_rates_take_the_last(model: Any, backend: Backend) -> None:
    maml = MAMLPlusPlus(model, LR, 1, multi_step_epochs=10)
    task = metaframe.tree.map(backend.asarray, zoo.tasks()[0])
    learner = maml.clone().adapt_on(nn.mse, task.support_x, task.support_y, steps=STEPS)
    expected = zoo.adapted(zoo.weights(), zoo.tasks()[0], RATES, STEPS)
    agree(zoo.PAIRS[backend.name].canonical(learner.params, backend), expected, 1e-14)
    result = maml.meta_value_and_grad(nn.mse, zoo.tasks(), steps=STEPS)
    expected_cost = zoo.meta_cost(zoo.weights(), RATES, STEPS, zoo.tasks())
    np.testing.assert_allclose(backend.to_numpy(result.cost), expected_cost, rtol=1e-13)


def test_weights_move_to_the_last_step() -> None:
    rows = np.array([multi_step_weights(5, epoch, 10) for epoch in range(12)])
    np.testing.assert_allclose(rows.sum(1), 1.0, rtol=1e-15)
    np.testing.assert_allclose(rows[0], 0.2)
    np.testing.assert_allclose(rows[5], [0.1, 0.1, 0.1, 0.1, 0.6])
    np.testing.assert_array_equal(rows[10:], [[0, 0, 0, 0, 1]] * 2)
    assert (np.diff(rows[:, -1]) >= 0).all()
    np.testing.assert_allclose(multi_step_weights(5, 99, 100)[0], 0.03 / 5)


def test_learned_curvature(model: Any, check: Check) -> None:
    shapes = {"w1/in": 3, "w1/out": 4, "b1/out": 4, "w2/in": 4, "w2/out": 2, "b2/out": 2}

    def cost(v: zoo.Values, m: zoo.Values) -> float:
        def step(k: int, v: zoo.Values, g: zoo.Values) -> zoo.Values:
            curved = {
                n: m[f"{n}/in"] @ g[n] @ m[f"{n}/out"].T if g[n].ndim == 2 else m[f"{n}/out"] @ g[n]
                for n in v
            }
            return {n: v[n] - LR * curved[n] for n in v}

        return mean(lambda t: zoo.loss(zoo.path(v, t, STEPS, step)[-1], t.query_x, t.query_y))

    matrices = random_like({name: np.eye(size) for name, size in shapes.items()}, 0.2)
    check(MetaCurvature(model, LR, STEPS), cost, matrices)


def test_curvature_of_a_bias(arr: Any, to_np: Any) -> None:
    """The paper's product over modes, of which a bias has the outputs alone: (G x_1 M)_j."""
    rng = np.random.default_rng(0)
    g, m = rng.normal(size=5), rng.normal(size=(5, 5))
    expected = np.array([sum(m[j, i] * g[i] for i in range(5)) for j in range(5)])
    for output_first in (True, False):
        found = transformed(arr(g), "b", {"b/out": arr(m)}, output_first)
        np.testing.assert_allclose(to_np(found), expected, rtol=0, atol=1e-12)


def test_curvature_of_a_convolution(arr: Any, to_np: Any) -> None:
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(4, 3, 2, 5))  # outputs, inputs, height, width
    sizes = {"out": 4, "in": 3, "window": 10}
    m = {mode: rng.normal(size=(size, size)) for mode, size in sizes.items()}
    flat = np.einsum("oif,po,qi,gf->pqg", kernel.reshape(4, 3, 10), *m.values())
    expected = flat.reshape(kernel.shape)
    learned = {f"k/{mode}": arr(matrix) for mode, matrix in m.items()}
    found = to_np(transformed(arr(kernel), "k", learned, True))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    last = to_np(transformed(arr(kernel.transpose(2, 3, 1, 0).copy()), "k", learned, False))
    np.testing.assert_allclose(last, expected.transpose(2, 3, 1, 0), rtol=0, atol=1e-12)


@hardly_depends_on_the_backend
def test_curvature_starts_at_maml(model: Any, backend: Backend) -> None:
    found = MetaCurvature(model, LR, STEPS).meta_value_and_grad(nn.mse, zoo.tasks())
    expected = zoo.meta_cost(zoo.weights(), RATES, STEPS, zoo.tasks())
    np.testing.assert_allclose(backend.to_numpy(found.cost), expected, rtol=1e-13)


def test_context_starts_at_zero(model: Any, check: Check) -> None:
    maml = CAVIA(model, "layer1/b", inner_lr=LR, inner_steps=STEPS)
    shared = {name: x for name, x in zoo.weights().items() if name != "b1"}
    rates = {**dict.fromkeys(zoo.NAMES, 0.0), "b1": LR}

    def cost(v: zoo.Values, _: Any) -> float:
        return zoo.meta_cost({**v, "b1": np.zeros(4)}, rates, STEPS, zoo.tasks())

    check(maml, cost, v=shared)
    assert "layer1/b" not in maml.meta_parameters()


def ridge(v: zoo.Values, x: Any, y: Any, strength: float) -> zoo.Values:
    """The head that minimises the mean squared error plus strength / 2 of its squared change."""
    hidden = np.hstack([np.tanh(x @ v["w1"] + v["b1"]), np.ones((len(x), 1))])
    start, scale = np.vstack([v["w2"], v["b2"]]), 2 / y.size
    system = scale * hidden.T @ hidden + strength * np.eye(len(start))
    head = np.linalg.solve(system, scale * hidden.T @ y + strength * start)
    return {**v, "w2": head[:-1], "b2": head[-1]}


def test_implicit_gradient_at_the_solution(model: Any, check: Check) -> None:
    """In the head the support loss is quadratic: the solution has a closed form."""
    maml = ImplicitMAML(model, 0.06, 14, 16.0, 8, ["head/w", "head/b"])

    def cost(v: zoo.Values, _: Any) -> float:
        return mean(
            lambda t: zoo.loss(ridge(v, t.support_x, t.support_y, 16.0), t.query_x, t.query_y)
        )

    check(maml, cost)


@pytest.mark.parametrize(
    "library",
    [library if library.id == "keras" else slow(library) for library in zoo.LIBRARIES],
    ids=lambda library: library.id,
)
def test_implicit_gradient_of_every_library(library: zoo.Library) -> None:
    """In the head alone, as above, by the names and in the layout of each."""
    maml = ImplicitMAML(zoo.built(library), 0.06, 14, 16.0, 8, library.names[2:])
    result = maml.meta_value_and_grad(nn.mse, zoo.tasks())
    found = library.canonical(result.grads, load_backend(library.backend))

    def cost(v: zoo.Values) -> float:
        return mean(
            lambda t: zoo.loss(ridge(v, t.support_x, t.support_y, 16.0), t.query_x, t.query_y)
        )

    agree(found, zoo.differences(cost, zoo.weights()))


@pytest.mark.slow
def test_implicit_gradient_after_a_few_steps(model: Any, backend: Backend) -> None:
    """Away from the solution it is the same formula, and not the derivative of the path."""
    strength, v = 8.0, zoo.weights()

    def flat(values: zoo.Values) -> Any:
        return np.concatenate([values[name].ravel() for name in zoo.NAMES])

    def of_task(task: Task) -> Any:
        def step(k: int, at: zoo.Values, g: zoo.Values) -> zoo.Values:
            return {n: at[n] - LR * (g[n] + strength * (at[n] - v[n])) for n in at}

        phi = zoo.path(v, task, 3, step)[-1]
        columns = []
        for name in zoo.NAMES:
            for index in np.ndindex(v[name].shape):

                def along(t: float, name: str = name, index: Any = index) -> Any:
                    moved = {**phi, name: phi[name].copy()}
                    moved[name][index] += t
                    return flat(zoo.gradient(moved, task.support_x, task.support_y))

                columns.append(zoo.slope(along))
        system = np.eye(len(columns)) + np.array(columns) / strength
        return np.linalg.solve(system, flat(zoo.gradient(phi, task.query_x, task.query_y)))

    expected = np.mean([of_task(task) for task in zoo.tasks()], axis=0)
    maml = ImplicitMAML(model, LR, 3, strength, cg_steps=12)
    result = maml.meta_value_and_grad(nn.mse, zoo.tasks())
    found = flat(zoo.PAIRS[backend.name].canonical(result.grads, backend))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10 * np.abs(expected).max())


def test_conjugate_gradient(backend: Backend, arr: Any, to_np: Any) -> None:
    rng = np.random.default_rng(0)
    root = rng.normal(size=(6, 6))
    system, right = root @ root.T + np.eye(6), rng.normal(size=6)
    matrix = arr(system)

    def apply(x: Any) -> Any:
        whole = metaframe.ops.matmul(matrix, metaframe.ops.concat(x))
        return whole[:2], whole[2:]

    for steps in (6, 20):  # more steps than numbers do no harm
        found = conjugate_gradient(backend, apply, (arr(right[:2]), arr(right[2:])), steps=steps)
        np.testing.assert_allclose(
            np.concatenate(to_np(found)), np.linalg.solve(system, right), rtol=0, atol=1e-10
        )
    zero = conjugate_gradient(backend, apply, (arr(np.zeros(2)), arr(np.zeros(4))), steps=2)
    np.testing.assert_array_equal(np.concatenate(to_np(zero)), np.zeros(6))


def test_displacement(model: Any, backend: Backend, compiled: bool) -> None:
    v, tasks = zoo.weights(), zoo.tasks()
    maml = Reptile(model, LR, 4)
    result = maml.meta_value_and_grad(nn.mse, tasks, compiled=compiled)
    ends = [zoo.adapted(v, task, RATES, 4) for task in tasks]
    expected = {n: (v[n] - np.mean([end[n] for end in ends], axis=0)) / LR for n in v}
    agree(zoo.PAIRS[backend.name].canonical(result.grads, backend), expected, 1e-13)
    cost = zoo.meta_cost(v, RATES, 4, tasks)
    np.testing.assert_allclose(backend.to_numpy(result.cost), cost, rtol=1e-13)


@pytest.mark.slow
def test_displacement_of_another_update_rule(model: Any, backend: Backend) -> None:
    """The update rule's own state counts: momentum moves further than its gradients."""
    v, task = zoo.weights(), zoo.tasks()[0]
    velocity = {name: np.zeros_like(x) for name, x in v.items()}

    def step(k: int, at: zoo.Values, g: zoo.Values) -> zoo.Values:
        velocity.update({n: 0.9 * velocity[n] + g[n] for n in at})
        return {n: at[n] - LR * velocity[n] for n in at}

    end = zoo.path(v, task, 3, step)[-1]
    maml = Reptile(model, LR, 3, update=metaframe.optim.momentum())
    result = maml.meta_value_and_grad(nn.mse, [task])
    expected = {n: (v[n] - end[n]) / LR for n in v}
    agree(zoo.PAIRS[backend.name].canonical(result.grads, backend), expected, 1e-13)


def classification(count: int = 3, classes: tuple[int, int, int] = (0, 1, 2)) -> list[Task]:
    labels = np.array(classes)[[0, 1, 2, 0, 2, 1]]
    rng = np.random.default_rng(3)
    return [
        Task(rng.normal(size=(6, 3)), labels, rng.normal(size=(6, 3)), rng.permutation(labels))
        for _ in range(count)
    ]


def softmax(logits: Any) -> Any:
    e = np.exp(logits - logits.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def cross_entropy(logits: Any, labels: Any) -> float:
    return float(-np.mean(np.log(softmax(logits)[np.arange(len(labels)), labels])))


def centres(v: zoo.Values, task: Task) -> Any:
    features = zoo.predict(v, task.support_x)
    return np.stack([features[task.support_y == k].mean(0) for k in range(3)])


# The reference knows of three classes alone, so the others must not count.
WAYS = pytest.mark.parametrize(("ways", "classes"), [(3, (0, 1, 2)), (6, (4, 1, 3))])


@WAYS
def test_prototypes(ways: int, classes: Any, model: Any, check: Check) -> None:
    tasks = classification()

    def cost(v: zoo.Values, _: Any) -> float:
        def of_task(task: Task) -> float:
            features = zoo.predict(v, task.query_x)
            distance = ((features[:, None] - centres(v, task)) ** 2).sum(-1)
            return cross_entropy(-distance, task.query_y)

        return float(np.mean([of_task(task) for task in tasks]))

    given = classification(classes=classes)
    check(ProtoNet(model, ways), cost, tasks=given, loss_fn=nn.cross_entropy)


@WAYS
def test_a_head_that_starts_at_prototypes(
    ways: int, classes: Any, model: Any, check: Check
) -> None:
    tasks = classification()

    def cost(v: zoo.Values, _: Any) -> float:
        def of_task(task: Task) -> float:
            c, body = centres(v, task), v
            w, b = 2 * c.T, -(c**2).sum(1)
            for _ in range(STEPS):
                features = zoo.predict(body, task.support_x)
                error = (softmax(features @ w + b) - np.eye(3)[task.support_y]) / 6
                grads = zoo.backward(body, task.support_x, error @ w.T)
                w, b = w - LR * features.T @ error, b - LR * error.sum(0)
                body = {n: body[n] - LR * grads[n] for n in body}
            return cross_entropy(zoo.predict(body, task.query_x) @ w + b, task.query_y)

        return float(np.mean([of_task(task) for task in tasks]))

    given = classification(classes=classes)
    check(ProtoMAML(model, ways, LR, STEPS), cost, tasks=given, loss_fn=nn.cross_entropy)


def test_labels_that_are_no_class(model: Any, backend: Backend, compiled: bool) -> None:
    """They used to be ignored."""
    for make in (ProtoNet, ProtoMAML):
        maml, task = make(model, 3), classification(1, (0, 3, 2))[0]
        x, y = map(backend.asarray, (task.support_x, task.support_y))
        with pytest.raises(InputError, match=r"0 to 2 with ways=3, received \[3\]"):
            maml.clone().adapt_on(nn.cross_entropy, x, y)
        result = maml.meta_value_and_grad(nn.cross_entropy, [task, task], task_map="vmap")
        assert np.isnan(backend.to_numpy(result.cost))


def test_a_query_of_a_class_without_support(model: Any, backend: Backend) -> None:
    x = zoo.tasks(1)[0].support_x
    task = Task(x, np.array([0, 1] * 3), x, np.array([0, 2] * 3))
    result = ProtoMAML(model, 3).meta_value_and_grad(nn.cross_entropy, [task])
    assert backend.to_numpy(result.cost) == np.inf
