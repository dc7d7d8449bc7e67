"""MetaTrainer and evaluate: against NumPy, against each other, and what the reference documents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import zoo
from frameworks import BACKENDS, hardly_depends_on_the_backend, require, slow
from metaframe import MAML, MetaSGD, nn, ops, optim
from metaframe.backend import Backend, use_backend
from metaframe.errors import InputError, InputTypeError, NonFiniteError
from metaframe.learners import CAVIA, ImplicitMAML, MAMLPlusPlus, MetaCurvature, ProtoMAML, Reptile
from metaframe.learners.meta_learner import MetaLearner
from metaframe.tasks import SinusoidTaskSampler, Task, stack_tasks
from metaframe.training import (
    Callback,
    EarlyStopping,
    Evaluation,
    Evaluator,
    History,
    MetaTrainer,
    Run,
    StepSettings,
    evaluate,
)

RATE = 0.1
OUTER = 0.5


def learner(backend: Backend, steps: int = 2, **settings: Any) -> MAML:
    return MAML(zoo.pair(zoo.weights(), backend.name), RATE, steps, **settings)


def trainer(maml: MAML, optimizer: Any = None, **settings: Any) -> MetaTrainer:
    sampler = settings.pop("sampler", None) or zoo.Fixed()
    return MetaTrainer(maml, optimizer or optim.sgd(OUTER), nn.mse, sampler, **settings)


def numbers(maml: MAML, backend: Backend) -> dict[str, np.ndarray[Any, Any]]:
    return {n: backend.to_numpy(x).copy() for n, x in maml.meta_parameters().items()}


def rates() -> dict[str, float]:
    return dict.fromkeys(zoo.NAMES, RATE)


@pytest.mark.parametrize(
    ("backend_name", "compiled"),
    [
        *(slow(name, False) if name == "jax" else (name, False) for name in BACKENDS),
        *(slow(name, True) if name == "torch" else (name, True) for name in BACKENDS),
    ],
    indirect=["backend_name"],
)
def test_a_step_is_gradient_descent_on_the_meta_cost(backend: Backend, compiled: bool) -> None:
    maml = learner(backend)
    loss = trainer(maml, settings=StepSettings(compiled=compiled)).meta_step(zoo.tasks())
    v = zoo.weights()
    assert loss == pytest.approx(zoo.meta_cost(v, rates(), 2, zoo.tasks()), rel=1e-12)
    slopes = zoo.differences(lambda at: zoo.meta_cost(at, rates(), 2, zoo.tasks()), v)
    found = zoo.PAIRS[backend.name].canonical(maml.meta_parameters(), backend)
    scale = np.sqrt(sum((g**2).sum() for g in slopes.values()))
    for name, value in v.items():
        assert np.abs(found[name] - (value - OUTER * slopes[name])).max() <= OUTER * scale * 1e-10


def by_hand(grads: zoo.Values, norm: float | None, value: float | None) -> zoo.Values:
    """Elements first, then the norm of all of them together."""
    if value is not None:
        grads = {n: np.minimum(np.maximum(g, -value), value) for n, g in grads.items()}
    length = np.sqrt(sum((g**2).sum() for g in grads.values()))
    if norm is not None and length > norm:
        grads = {n: g * (norm / length) for n, g in grads.items()}
    return grads


@pytest.mark.parametrize("settings", [{"norm": 0.05}, {"norm": 50.0}, {"value": 0.02}, "both"])
def test_clipping_of_the_outer_gradient(backend: Backend, settings: Any) -> None:
    """The trainer subtracts the clipped gradient of the meta-cost."""
    limits = {"norm": 0.05, "value": 0.02} if settings == "both" else settings
    v, maml = zoo.weights(), learner(backend)
    slopes = zoo.differences(lambda at: zoo.meta_cost(at, rates(), 2, zoo.tasks()), v)
    clipped = by_hand(slopes, limits.get("norm"), limits.get("value"))
    changed = max(np.abs(clipped[n] - slopes[n]).max() for n in v)
    assert (changed > 1e-2) == (limits.get("norm") != 50.0)
    optimizer = optim.clipped(optim.sgd(OUTER), **limits)
    loss = trainer(maml, optimizer, settings=StepSettings(compiled=False)).meta_step(zoo.tasks())
    assert loss == pytest.approx(zoo.meta_cost(v, rates(), 2, zoo.tasks()), rel=1e-12)
    found = zoo.PAIRS[backend.name].canonical(maml.meta_parameters(), backend)
    for name, value in v.items():
        np.testing.assert_allclose(found[name], value - OUTER * clipped[name], atol=1e-10)


TASKS = 7
CHUNKS = [1, 2, 3, 6, 7, 100]


@pytest.mark.parametrize(
    ("backend_name", "chunk_size", "compiled"),
    [
        *(("torch", size, False) for size in CHUNKS),
        slow("torch", 3, True),
        *(slow(name, size, True) for name in ("jax", "tensorflow") for size in CHUNKS),
        *(slow(name, 3, False) for name in ("jax", "tensorflow")),
    ],
    indirect=["backend_name"],
)
def test_tasks_in_chunks_change_nothing(backend: Backend, chunk_size: int, compiled: bool) -> None:
    """Beyond rounding: neither what is trained nor what is measured."""
    found, calls = [], []
    for chunk in (None, chunk_size):
        count = 0

        def counted(prediction: Any, target: Any) -> Any:
            nonlocal count
            count += 1
            return nn.mse(prediction, target)

        how = StepSettings(task_map="vmap", chunk_size=chunk, compiled=compiled)
        maml = learner(backend)
        runner = MetaTrainer(maml, optim.adam(1e-2), counted, zoo.Fixed(), settings=how)
        history = runner.fit(3, TASKS)
        calls.append(count)
        measured = evaluate(maml, nn.mse, zoo.tasks(TASKS), steps=2, settings=how)
        found.append({**numbers(maml, backend), "measured": measured.losses})
        found[-1]["meta_loss"] = np.array(history.meta_loss)
    whole, parted = found
    for name, value in whole.items():
        np.testing.assert_allclose(parted[name], value, rtol=1e-12, atol=1e-14, err_msg=name)
    # The cost is called for every chunk; in compiled form perhaps only for those of each size.
    if not compiled or TASKS % chunk_size:
        assert (calls[1] > calls[0]) == (chunk_size < TASKS)


def test_evaluation_follows_the_adaptation(backend: Backend) -> None:
    tasks = zoo.tasks(5)
    found = evaluate(learner(backend), nn.mse, tasks, steps=3)
    expected = [
        [
            zoo.loss(zoo.adapted(zoo.weights(), t, rates(), k), t.query_x, t.query_y)
            for k in range(4)
        ]
        for t in tasks
    ]
    np.testing.assert_allclose(found.losses, expected, rtol=1e-12)
    # No example looks at another in this model.
    assert found.inductive is not None
    np.testing.assert_allclose(found.inductive, found.losses[:, -1], rtol=1e-12)
    assert found.loss.mean == pytest.approx(np.mean(expected, axis=0)[-1], rel=1e-12)


@hardly_depends_on_the_backend
def test_evaluation_with_an_inner_optimizer_that_has_state(backend: Backend) -> None:
    """Every point of the curve is where a whole inner loop of as many steps ends."""
    maml = learner(backend, update=optim.momentum())
    curve = evaluate(maml, nn.mse, zoo.tasks(), steps=3, inductive=False).losses.mean(axis=0)
    for k in range(4):
        cost, _, _ = maml.meta_value_and_grad(nn.mse, zoo.tasks(), steps=k)
        assert curve[k] == pytest.approx(float(backend.to_numpy(cost)), rel=1e-12)


FAMILY: dict[str, Callable[[Any], MetaLearner]] = {
    "reptile": lambda m: Reptile(m, RATE, 2),
    "maml++": lambda m: MAMLPlusPlus(m, RATE, 2),
    "curvature": lambda m: MetaCurvature(m, RATE, 2),
    "cavia": lambda m: CAVIA(m, "head", inner_lr=RATE, inner_steps=2),
    "implicit": lambda m: ImplicitMAML(m, RATE, 2, proximal=1.0),
    "proto-maml": lambda m: ProtoMAML(m, 2, RATE, 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILY)
def test_the_whole_family_is_evaluated_and_trained(backend: Backend, name: str) -> None:
    maml, loss_fn, tasks = FAMILY[name](zoo.pair(zoo.weights(), backend.name)), nn.mse, zoo.tasks()
    if name == "proto-maml":
        loss_fn, labels = nn.cross_entropy, np.array([0, 1, 1, 0, 1, 0])
        tasks = [Task(t.support_x, labels, t.query_x, labels[:5]) for t in tasks]
    curve = evaluate(maml, loss_fn, tasks, steps=2, inductive=False).losses.mean(axis=0)
    fewest = 1 if name == "reptile" else 0  # no step, no direction
    for k in range(fewest, 3):
        cost, _, _ = maml.meta_value_and_grad(loss_fn, tasks, steps=k, compiled=False)
        assert curve[k] == pytest.approx(float(backend.to_numpy(cost)), rel=1e-12)
    runner = MetaTrainer(maml, optim.sgd(0.01), loss_fn, zoo.Fixed(), metric=loss_fn)
    loss = runner.meta_step(tasks)
    assert loss == pytest.approx(curve[2], rel=1e-12)
    assert runner.meta_step(tasks) != loss


@hardly_depends_on_the_backend
@pytest.mark.parametrize("count", [1, 49, 50, 51, 120])
def test_batches_of_an_evaluation_do_not_show(backend: Backend, count: int) -> None:
    sampler = SinusoidTaskSampler(seed=3, split="test")
    model = nn.mlp([1, 4, 1], activation=ops.tanh)
    maml = MAML((model, model.init(0)), 0.01)
    found = evaluate(maml, nn.mse, sampler, count, inductive=False)
    assert found.losses.shape == (count, 2)
    alone = evaluate(maml, nn.mse, [sampler.task(count - 1)], inductive=False)
    np.testing.assert_allclose(found.losses[-1], alone.losses[0], rtol=1e-12)


def test_inductive_and_transductive_differ_by_what_a_prediction_sees(backend: Backend) -> None:
    """A model that subtracts the mean of its batch, which can be worked out by hand."""

    def centred(params: Any, x: Any) -> Any:
        return params["w"] * (x - ops.mean(x))

    maml = MAML((centred, {"w": ops.asarray(2.0)}), 0.1)
    support, query = np.array([0.0, 3.0]), np.array([6.0, 9.0, 12.0])
    task = Task(support, np.zeros(2), query, np.zeros(3))
    found = evaluate(maml, nn.mse, [task], steps=0)
    assert found.losses[0, 0] == pytest.approx(np.mean((2 * (query - query.mean())) ** 2))
    together = [q - np.mean([*support, q]) for q in query]
    assert found.inductive is not None
    assert found.inductive[0] == pytest.approx(np.mean((2 * np.array(together)) ** 2))


@pytest.mark.parametrize(
    ("backend_name", "task_map", "compiled"),
    [
        *(("torch", how, False) for how in ("vmap", "scan", "loop")),
        slow("torch", "vmap", True),
        *(slow(name, how, True) for name in ("jax", "tensorflow") for how in ("vmap", "scan")),
    ],
    indirect=["backend_name"],
)
@pytest.mark.parametrize(
    ("support", "chunk_size", "at_once"), [(3, None, 11), (100, None, 2), (3, 4, 4), (400, None, 1)]
)
def test_few_queries_at_once_are_predicted_alone(
    backend: Backend,
    task_map: Any,
    compiled: bool,
    support: int,
    chunk_size: int | None,
    at_once: int,
) -> None:
    """A support set comes with each of them; how many go together is bounded and does not show."""
    calls = 0

    def centred(params: Any, x: Any) -> Any:
        nonlocal calls
        calls += x.shape[0] == support + 1
        return params["w"] * (x - ops.mean(x))

    maml = MAML((centred, {"w": ops.asarray(2.0)}), 0.1)
    rng = np.random.default_rng(0)
    xs = [(rng.normal(size=support), rng.normal(size=11)) for _ in range(5)]
    tasks = [Task(s, np.zeros(support), q, np.zeros(11)) for s, q in xs]
    how = StepSettings(task_map=task_map, chunk_size=chunk_size, compiled=compiled)
    found = evaluate(maml, nn.mse, tasks, steps=0, settings=how).inductive
    expected = [np.mean([(2 * (q - np.mean([*s, q]))) ** 2 for q in queries]) for s, queries in xs]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    if not compiled:
        parts = {"vmap": 1 if chunk_size is None else 2, "scan": 5, "loop": 5}[task_map]
        assert calls == parts * (11 if task_map == "loop" else -(-11 // at_once))


def test_an_evaluator_compiles_once_and_measures_what_is() -> None:
    require("jax")
    calls = 0

    def counted(prediction: Any, target: Any) -> Any:
        nonlocal calls
        calls += 1
        return nn.mse(prediction, target)

    with use_backend("jax", dtype="float64") as backend:
        maml = learner(backend)
        measure = Evaluator(maml, counted)
        found = []
        for _ in range(2):
            found.append(measure(zoo.tasks(), steps=0, inductive=False).loss.mean)
            before, calls = calls, 0
            maml.assign({n: 2 * x for n, x in maml.meta_parameters().items()})
    assert before == 0
    assert found[0] == pytest.approx(zoo.meta_cost(zoo.weights(), rates(), 0, zoo.tasks()))
    doubled = {n: 2 * x for n, x in zoo.weights().items()}
    assert found[1] == pytest.approx(zoo.meta_cost(doubled, rates(), 0, zoo.tasks()))


@hardly_depends_on_the_backend
def test_metric_is_reported_next_to_the_loss(backend: Backend) -> None:
    def worst(prediction: Any, target: Any) -> Any:
        return ops.max(ops.abs(prediction - target))

    runner = trainer(learner(backend), metric=worst)
    history = runner.fit(2, 3, eval_every=1, eval_tasks=zoo.tasks())
    assert [i for i, _ in history.eval_score] == [0, 1]
    last = evaluate(runner.maml, nn.mse, zoo.tasks(), metric=worst)
    assert history.eval_score[-1][1] == pytest.approx(last.transductive.mean, rel=1e-12)
    assert history.eval_loss[-1][1] == pytest.approx(last.loss.mean, rel=1e-12)
    assert last.transductive.mean > last.loss.mean


def test_a_history_begins_empty() -> None:
    assert History().meta_loss == []
    assert History().eval_loss == []


@hardly_depends_on_the_backend
def test_fit_records_and_calls_back(backend: Backend) -> None:
    seen: list[tuple[int, float]] = []
    runner = trainer(learner(backend))
    history = runner.fit(
        5, 3, eval_every=2, eval_tasks=zoo.tasks(), callback=lambda i, loss: seen.append((i, loss))
    )
    assert seen == list(enumerate(history.meta_loss))
    assert [i for i, _ in history.eval_loss] == [1, 3]
    assert history.meta_loss == sorted(history.meta_loss, reverse=True)
    assert runner.evaluate(zoo.tasks()) < history.eval_loss[-1][1]
    assert runner.step == 5
    assert runner.fit(0, 3).meta_loss == []


BAD: list[tuple[str, Callable[[MetaTrainer], Any], type[Exception], str]] = [
    ("eval", lambda t: t.fit(3, 2, eval_every=1), InputError, "eval_every=1 needs eval_tasks"),
    ("never", lambda t: t.fit(3, 2, eval_every=0, eval_tasks=[]), InputError, "at least 1"),
    (
        "no-eval-tasks",
        lambda t: t.fit(4, 2, eval_every=4, eval_tasks=[]),
        InputError,
        "the list is empty",
    ),
    (
        "what-eval-tasks",
        lambda t: t.fit(4, 2, eval_every=4, eval_tasks=3),
        InputTypeError,
        "tasks must be a sampler",
    ),
    (
        "no-eval-task",
        lambda t: t.fit(4, 2, eval_every=4, eval_tasks=[*zoo.tasks(1), None]),
        InputTypeError,
        "task 1 is a NoneType",
    ),
    ("negative", lambda t: t.fit(-1, 2), InputError, "num_iterations must be at least 0"),
    ("empty", lambda t: t.fit(1, 0), InputError, "meta_batch_size must be at least 1"),
    ("no-tasks", lambda t: t.evaluate([]), InputError, "the list is empty"),
    ("what", lambda t: t.evaluate(3), InputTypeError, "tasks must be a sampler"),
]


@pytest.mark.parametrize(("call", "error", "says"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_calls_are_refused_before_any_step(
    backend: Backend, call: Callable[[MetaTrainer], Any], error: type[Exception], says: str
) -> None:
    runner = trainer(learner(backend))
    with pytest.raises(error, match=says):
        call(runner)
    assert runner.step == 0


def test_bad_arguments_are_refused(backend: Backend) -> None:
    with pytest.raises(InputTypeError, match="meta_optimizer is a str"):
        trainer(learner(backend), "adam")
    with pytest.raises(InputTypeError, match="loss_fn must be a function"):
        MetaTrainer(learner(backend), optim.sgd(1.0), None, zoo.Fixed())  # type: ignore[arg-type]
    with pytest.raises(InputError, match="given twice"):
        trainer(learner(backend), schedule=lambda step: 0.1)
    with pytest.raises(InputError, match="no learning rate"):
        trainer(learner(backend), optim.sgd())


WRONG: list[tuple[str, Callable[[MAML], Any], str]] = [
    ("schedule", lambda m: trainer(m, optim.sgd(), schedule=0.1), "schedule must be a function"),
    ("sampler", lambda m: trainer(m, sampler=zoo.tasks()), "task_sampler must have .* list"),
    ("learner", lambda m: trainer(nn.mse), "maml must be a learner, received function"),  # type: ignore[arg-type]
    ("metric", lambda m: trainer(m, metric="accuracy"), "metric must be a function"),
    (
        "evaluated",
        lambda m: evaluate(m.module, nn.mse, zoo.tasks()),
        "maml must be a learner, received",
    ),
    (
        "evaluated-by",
        lambda m: evaluate(m, nn.mse, zoo.tasks(), metric="accuracy"),  # type: ignore[arg-type]
        "metric must be a function",
    ),
    ("callbacks", lambda m: trainer(m).fit(1, 2, callbacks=EarlyStopping(2)), "must be a list of"),  # type: ignore[arg-type]
    (
        "callback",
        lambda m: trainer(m).fit(1, 2, callbacks=[Stop(), print]),  # type: ignore[list-item]
        r"callbacks\[1\] is a builtin",
    ),
    (
        "uninstantiated",
        lambda m: trainer(m).fit(1, 2, callbacks=[Stop]),  # type: ignore[list-item]
        r"callbacks\[0\] is a type",
    ),
]


@pytest.mark.parametrize(("call", "says"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_what_an_argument_is_not_is_found_at_the_door(
    call: Callable[[MAML], Any], says: str
) -> None:
    require("torch")
    with use_backend("torch", dtype="float64") as backend:
        maml = learner(backend)
        before = numbers(maml, backend)
        with pytest.raises(InputTypeError, match=says):
            call(maml)
        for name, value in numbers(maml, backend).items():
            np.testing.assert_array_equal(value, before[name])


@pytest.mark.parametrize("name", ["maml", "meta_optimizer", "loss_fn", "metric"])
def test_what_a_step_is_made_of_is_not_set_later(name: str) -> None:
    """It would change nothing, or half."""
    require("torch")
    with use_backend("torch", dtype="float64") as backend:
        runner = trainer(learner(backend), metric=nn.mse)
        with pytest.raises(AttributeError):
            setattr(runner, name, getattr(runner, name))


def test_a_score_is_recorded_where_an_evaluation_has_one() -> None:
    class Scored(MetaTrainer):
        def evaluated(self, tasks: Any) -> Evaluation:
            return Evaluation(np.array([[2.0]]), scores=np.array([[0.5]]))

    require("torch")
    with use_backend("torch", dtype="float64") as backend:
        runner = Scored(learner(backend), optim.sgd(0.1), nn.mse, zoo.Fixed())
        history = runner.fit(1, 2, eval_every=1, eval_tasks=zoo.tasks())
    assert (history.eval_loss, history.eval_score) == ([(0, 2.0)], [(0, 0.5)])


def each_error(prediction: Any, target: Any) -> Any:
    return ops.mean(ops.square(prediction - target), axis=1)


def test_a_metric_that_is_no_scalar_is_found_before_anything_changed(backend: Backend) -> None:
    runner = trainer(learner(backend), metric=each_error)
    before = numbers(runner.maml, backend)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"metric returned shape \(5,\), need a scalar"):
        runner.fit(2, 3, eval_every=2, eval_tasks=zoo.tasks())
    assert runner.step == 0
    for name, value in numbers(runner.maml, backend).items():  # type: ignore[arg-type]
        np.testing.assert_array_equal(value, before[name])
    for found in ({"metric": each_error}, {}):
        loss_fn = nn.mse if found else each_error
        name = "metric" if found else "loss_fn"
        with pytest.raises(InputError, match=rf"{name} returned shape \(5,\), need a scalar"):
            evaluate(learner(backend), loss_fn, zoo.tasks(), steps=0, **found)


@hardly_depends_on_the_backend
def test_schedule_gives_each_step_its_rate(backend: Backend) -> None:
    scheduled, fixed = learner(backend), learner(backend)
    runner = trainer(scheduled, optim.sgd(), schedule=lambda s: (0.5, 0.25)[s])
    runner.fit(2, 3)
    for rate in (0.5, 0.25):
        trainer(fixed, optim.sgd(rate)).meta_step(zoo.tasks())
    for name, value in numbers(fixed, backend).items():
        np.testing.assert_allclose(numbers(scheduled, backend)[name], value, rtol=1e-13)


class Noted(Callback):
    """Writes down what is called, and fails where it is told to."""

    def __init__(self, name: str, notes: list[str], fails: str = "") -> None:
        self._name, self._notes, self._fails = name, notes, fails

    def _note(self, what: str) -> None:
        self._notes.append(f"{self._name} {what}")
        if what == self._fails:
            raise OSError(self._notes[-1])

    def on_start(self, run: Run) -> None:
        self._note("starts")

    def on_end(self, run: Run) -> None:
        self._note("ends")


def test_what_has_started_ends_whatever_others_raise() -> None:
    require("torch")
    with use_backend("torch", dtype="float64") as backend:
        runner = trainer(learner(backend))
        notes: list[str] = []
        third = Noted("c", notes)
        with pytest.raises(OSError, match="b starts"):
            runner.fit(1, 2, callbacks=[Noted("a", notes), Noted("b", notes, "starts"), third])
        assert notes == ["a starts", "b starts", "a ends"]
        assert runner.step == 0
        notes.clear()
        failing = [Noted("a", notes, "ends"), Noted("b", notes, "ends"), third]
        with pytest.raises(OSError, match="b ends"):
            runner.fit(1, 2, callbacks=failing)
        assert notes == ["a starts", "b starts", "c starts", "a ends", "b ends", "c ends"]


class Stop(Callback):
    def on_step(self, run: Run) -> None:
        if run.iteration == 3:
            run.stop("enough")


@hardly_depends_on_the_backend
@pytest.mark.parametrize("prefetch", [True, False])
def test_prefetching_changes_nothing(backend: Backend, prefetch: bool) -> None:
    """Neither the tasks, nor where the sampler stands after a run that was stopped."""
    sampler = SinusoidTaskSampler(seed=0)
    model = nn.mlp([1, 4, 1], activation=ops.tanh)
    runner = trainer(MAML((model, model.init(0)), 0.01), sampler=sampler)
    history = runner.fit(20, 5, callbacks=[Stop()], prefetch=prefetch)
    assert history.stopped == "enough"
    assert len(history.meta_loss) == 4
    assert sampler.position == 20
    again = SinusoidTaskSampler(seed=0)
    other = trainer(MAML((model, model.init(0)), 0.01), sampler=again)
    expected = [other.meta_step(again.sample(5)) for _ in range(4)]
    assert history.meta_loss == expected


def test_an_error_of_the_sampler_reaches_the_caller(backend: Backend) -> None:
    class Broken(SinusoidTaskSampler):
        def draw(self, rng: Any) -> Task:
            if self.position >= 10:
                raise OSError("disk full")
            return super().draw(rng)

    model = nn.mlp([1, 4, 1])
    runner = trainer(MAML((model, model.init(0)), 0.01), sampler=Broken(seed=0))
    with pytest.raises(OSError, match="disk full"):
        runner.fit(5, 5)
    assert runner.step == 2


def test_batches_in_one_piece_are_the_tasks_in_a_row(backend: Backend) -> None:
    one, other = SinusoidTaskSampler(seed=5), SinusoidTaskSampler(seed=5)
    for _ in range(2):
        batch, tasks = one.sample_batch(3), stack_tasks(other.sample(3))
        assert backend.owns(batch.support_x)
        for field in ("support_x", "support_y", "query_x", "query_y"):
            np.testing.assert_array_equal(
                backend.to_numpy(getattr(batch, field)), backend.to_numpy(getattr(tasks, field))
            )
    assert one.position == other.position == 6


def test_a_loss_that_is_not_finite_names_step_and_task(backend: Backend) -> None:
    good, bad = zoo.tasks(3), zoo.tasks(3)
    bad[1] = Task(bad[1].support_x, bad[1].support_y, bad[1].query_x, bad[1].query_y * np.nan)
    maml = learner(backend)
    runner = trainer(maml)
    runner.meta_step(good)
    before = numbers(maml, backend)
    with pytest.raises(NonFiniteError, match="step 1: the loss of task 1 of the batch is nan"):
        runner.meta_step(bad)
    assert runner.step == 1
    for name, value in numbers(maml, backend).items():
        np.testing.assert_array_equal(value, before[name])


@pytest.mark.parametrize(
    ("spoilt", "advice"),
    [
        ({"query_y": np.array([0, 7])}, r"query_y has labels from 0 to 7, .* 3 outputs"),
        ({"query_x": np.full((2, 4), np.inf)}, r"query_x has 8 values that are not finite"),
    ],
)
def test_the_advice_about_a_loss_is_of_its_cause(
    backend: Backend, spoilt: dict[str, Any], advice: str
) -> None:
    model = nn.mlp([4, 3])
    data = {"support_x": np.ones((2, 4)), "support_y": np.array([0, 2])}
    data |= {"query_x": np.ones((2, 4)), "query_y": np.array([1, 2])}
    maml = MAML((model.apply, model.init(0)), 0.1, 1)
    settings = StepSettings(compiled=False)
    runner = MetaTrainer(maml, optim.sgd(0.1), nn.cross_entropy, zoo.Fixed(), settings=settings)
    with pytest.raises(NonFiniteError, match=f"task 1 of the batch is .*{advice}") as caught:
        runner.meta_step([Task(**data), Task(**{**data, **spoilt})])
    assert "Lower" not in str(caught.value)


class SpoiltLater(SinusoidTaskSampler):
    """The third batch of three tasks, and all after it, have targets that are no numbers."""

    def sample_batch(self, meta_batch_size: int, share: Any = None) -> Task:
        batch = super().sample_batch(meta_batch_size, share)
        if self.position <= 6:
            return batch
        return Task(batch.support_x, batch.support_y, batch.query_x, batch.query_y * np.nan)


@hardly_depends_on_the_backend
@pytest.mark.parametrize("prefetch", [True, False])
def test_the_batch_of_a_failed_step_is_not_used_up(backend: Backend, prefetch: bool) -> None:
    """So that what is saved then goes on with it."""
    model = nn.mlp([1, 4, 1])
    maml = MAML((model, model.init(0)), 0.01)
    runner = MetaTrainer(maml, optim.sgd(0.01), nn.mse, SpoiltLater(seed=0))
    with pytest.raises(NonFiniteError, match="step 2"):
        runner.fit(5, 3, prefetch=prefetch)
    assert runner.step == 2
    assert runner.state()[1]["sampler"]["position"] == 6


def test_a_gradient_that_is_not_finite_names_step_and_task(backend: Backend) -> None:
    def root(prediction: Any, target: Any) -> Any:
        # Its slope at zero is infinite, and times the slope of the square there, 0, it is NaN.
        return ops.sqrt(ops.sum(ops.square(prediction - target)))

    def scaled(params: Any, x: Any) -> Any:
        return params["w"] * x

    maml = MAML((scaled, {"w": ops.asarray(0.0)}), 0.1)
    runner = MetaTrainer(maml, optim.sgd(0.1), root, zoo.Fixed())
    tasks = [Task(np.ones(2), np.ones(2), np.ones(2), np.ones(2)) for _ in range(3)]
    tasks[2] = Task(np.zeros(2), np.ones(2), np.ones(2), np.zeros(2))
    with pytest.raises(NonFiniteError, match="step 0: the meta-gradient of task 2 of the batch"):
        runner.meta_step(tasks)


@hardly_depends_on_the_backend
def test_early_stopping_waits_and_then_stops(backend: Backend) -> None:
    losses = iter([3.0, 2.0, 2.5, 2.4, 1.0])

    class Scripted(MetaTrainer):
        def evaluated(self, tasks: Any) -> Evaluation:
            return Evaluation(np.array([[next(losses)]]))

    runner = Scripted(learner(backend), optim.sgd(0.1), nn.mse, zoo.Fixed())
    history = runner.fit(
        10, 2, eval_every=1, eval_tasks=zoo.tasks(), callbacks=[EarlyStopping(patience=2)]
    )
    assert [loss for _, loss in history.eval_loss] == [3.0, 2.0, 2.5, 2.4]
    assert history.stopped == "no improvement in 2 evaluations"


def test_learned_rates_are_trained(backend: Backend) -> None:
    maml = MetaSGD(zoo.pair(zoo.weights(), backend.name), RATE)
    before = numbers(maml, backend)
    trainer(maml, optim.adam(0.01)).fit(3, 3)
    after = numbers(maml, backend)
    assert all((after[name] != before[name]).all() for name in before if name.startswith("learned"))


@zoo.every_library()
def test_every_library_trains(library: zoo.Library) -> None:
    """With an optimizer of pure functions, every framework's model takes the same step."""
    from metaframe.backend import load_backend

    module = zoo.built(library)
    backend = load_backend(library.backend)
    maml = MAML(module, RATE, 1)
    loss_fn = nn.mse
    runner = MetaTrainer(maml, optim.sgd(OUTER), loss_fn, zoo.Fixed())
    runner.fit(2, 3)
    v = zoo.weights()
    for _ in range(2):
        v = {
            n: v[n] - OUTER * g
            for n, g in zoo.differences(
                lambda at: zoo.meta_cost(at, rates(), 1, zoo.tasks()), v
            ).items()
        }
    found = library.canonical(maml.meta_parameters(), backend)
    for name, value in v.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-9)


def by_the_authors_code(steps: int, epoch: int, epochs: int) -> list[float]:
    """The multi-step loss's weights, as MAML++'s code steps through them."""
    fall, least = 1.0 / steps / epochs, 0.03 / steps
    first = [max(1.0 / steps - epoch * fall, least) for _ in range(steps - 1)]
    return [*first, min(1.0 / steps + epoch * (steps - 1) * fall, 1.0 - (steps - 1) * least)]


@hardly_depends_on_the_backend
def test_training_anneals_the_multi_step_loss(backend: Backend) -> None:
    maml = MAMLPlusPlus(
        zoo.pair(zoo.weights(), backend.name), RATE, 3, learn_rates=False, multi_step_epochs=4
    )
    # With an outer rate of zero every step sees the same parameters.
    driver = trainer(maml, optim.sgd(0.0), steps_per_epoch=2)
    losses = driver.fit(10, 2).meta_loss
    v, tasks = zoo.weights(), zoo.tasks(2)
    after = [zoo.meta_cost(v, rates(), k, tasks) for k in (1, 2, 3)]
    for step, loss in enumerate(losses):
        epoch = step // 2
        weights = by_the_authors_code(3, epoch, 4) if epoch < 4 else [0.0, 0.0, 1.0]
        assert loss == pytest.approx(float(np.dot(weights, after)), rel=1e-12)
    assert len(set(np.round(losses, 12))) == 5


@hardly_depends_on_the_backend
def test_training_anneals_the_order_and_a_resumed_one_too(backend: Backend) -> None:
    def annealed() -> MAMLPlusPlus:
        pair = zoo.pair(zoo.weights(), backend.name)
        return MAMLPlusPlus(pair, RATE, 2, learn_rates=False, second_order_from=1)

    def after(driver: MetaTrainer, steps: int) -> dict[str, np.ndarray[Any, Any]]:
        driver.fit(steps, 2)
        return numbers(driver.maml, backend)  # type: ignore[arg-type]

    plain = {order: learner(backend, first_order=order == 1) for order in (1, 2)}
    driver = trainer(annealed(), steps_per_epoch=2)
    first = after(driver, 2)
    expected = after(trainer(plain[1]), 2)
    for name, value in expected.items():
        np.testing.assert_allclose(first[name], value, rtol=0, atol=1e-14)
    resumed = trainer(annealed(), steps_per_epoch=2)
    resumed.restore(*driver.state())
    plain[2].assign(plain[1].meta_parameters())
    expected = after(trainer(plain[2]), 1)
    for which in (driver, resumed):
        found = after(which, 1)
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-14)
    assert resumed.maml.epoch == 1
