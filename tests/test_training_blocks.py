"""Steps in blocks, some of them in one program, are the steps one by one to the last bit."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from frameworks import hardly_depends_on_the_backend, require
from metaframe import MAML, MetaTrainer, nn, ops, optim, tree
from metaframe.backend import Backend, use_backend
from metaframe.errors import InputError, InputTypeError, NonFiniteError
from metaframe.tasks import SinusoidTaskSampler, Task
from metaframe.training import Callback, Checkpoints, Run, StepSettings, read_checkpoint

SIZE, MODEL = 3, nn.mlp([1, 4, 1], activation=ops.tanh)


class Blind(Callback):
    """Looks at reports alone; `act` is called with the run after every step."""

    def __init__(self, act: Any = lambda run: None) -> None:
        self._act = act
        self.losses: list[float] = []

    def is_due(self, step: int) -> bool:
        return False

    def on_step(self, run: Run) -> None:
        assert run.report is not None
        self.losses.append(run.report.loss)
        self._act(run)


def trainer(
    steps_per_call: int | None, sampler: Any = None, compiled: bool | None = None, **settings: Any
) -> MetaTrainer:
    return MetaTrainer(
        MAML((MODEL, MODEL.init(0)), 0.01),
        settings.pop("optimizer", None) or optim.adam(),
        nn.mse,
        sampler or SinusoidTaskSampler(seed=0),
        schedule=lambda step: 1e-2 / (1 + step),
        settings=StepSettings(steps_per_call=steps_per_call, compiled=compiled),
        **settings,
    )


def state(runner: MetaTrainer) -> tuple[dict[str, bytes], Any]:
    """All that a checkpoint would hold."""
    arrays, plain = runner.state()
    return {name: x.tobytes() for name, x in arrays.items()}, plain


def one_by_one(steps: int, **settings: Any) -> MetaTrainer:
    runner = trainer(1, **settings)
    runner.fit(steps, SIZE)
    return runner


def test_blocks_are_the_steps_one_by_one(backend: Backend) -> None:
    """Compiled, with lengths that are no divisors, and against steps on batches of its own."""
    runs = {length: trainer(length, compiled=True) for length in (1, 5, None)}
    found = {n: r.fit(13, SIZE).meta_loss for n, r in runs.items()}
    assert found[1] == found[5] == found[None]
    assert state(runs[1]) == state(runs[5]) == state(runs[None])
    assert runs[5].state()[1]["sampler"]["position"] == 13 * SIZE
    sampler, by_hand = SinusoidTaskSampler(seed=0), runs[5]
    sampler.restore({**sampler.state(), "position": 13 * SIZE})
    other = trainer(1, compiled=True)
    other.restore(*by_hand.state())
    assert by_hand.fit(2, SIZE).meta_loss == [other.meta_step(sampler.sample(SIZE)) for _ in "ab"]


@hardly_depends_on_the_backend
def test_a_long_run_is_a_run_in_parts(backend: Backend) -> None:
    """Long enough for a program of several steps where there are such."""
    whole, parts = trainer(None), trainer(1)
    history = whole.fit(150, SIZE)
    losses = parts.fit(70, SIZE).meta_loss
    resumed = trainer(7)
    resumed.restore(*parts.state())
    assert losses + resumed.fit(80, SIZE).meta_loss == history.meta_loss
    assert state(resumed) == state(whole)


@hardly_depends_on_the_backend
def test_evaluations_and_checkpoints_come_when_they_are_due(
    backend: Backend, tmp_path: Path
) -> None:
    tasks = SinusoidTaskSampler(seed=0, split="validation").sample(2)
    found = {}
    for length in (1, 8):
        folder = tmp_path / str(length)
        runner = trainer(length)
        keeper = Checkpoints(folder, every=3, keep=9)
        history = runner.fit(11, SIZE, eval_every=4, eval_tasks=tasks, callbacks=[keeper])
        files = sorted(folder.iterdir())
        arrays = [read_checkpoint(file).arrays for file in files]
        found[length] = (
            history.meta_loss,
            history.eval_loss,
            [file.name for file in files],
            [{name: x.tobytes() for name, x in part.items()} for part in arrays],
        )
    assert found[1] == found[8]


@hardly_depends_on_the_backend
def test_a_callback_that_may_look_sees_the_learner_after_each_step(backend: Backend) -> None:
    seen: dict[int, list[bytes]] = {}

    class Looks(Callback):
        def on_step(self, run: Run) -> None:
            values = run.trainer.maml.meta_parameters().values()
            seen[length].append(b"".join(backend.to_numpy(x).tobytes() for x in values))

    for length in (1, 8):
        seen[length] = []
        trainer(length).fit(5, SIZE, callbacks=[Looks()])
    assert seen[1] == seen[8]
    assert len(set(seen[8])) == 5


def test_who_is_asked_when() -> None:
    class Evaluates(Callback):
        def on_evaluation(self, run: Run) -> None:
            """Looks when the learner is what it should be anyway."""

    class Iterates(Callback):
        def on_iteration(self, run: Run) -> None:
            """May look."""

    assert [c.is_due(1) for c in (Callback(), Evaluates(), Iterates(), Blind())] == [
        False,
        False,
        True,
        False,
    ]


@hardly_depends_on_the_backend
@pytest.mark.parametrize("how", ["stop", "error", "interrupt"])
def test_a_run_that_ends_within_a_block(backend: Backend, how: str) -> None:
    """The learner, the optimizer and the sampler are those of the last step that counts."""

    def act(run: Run) -> None:
        if run.iteration == 5:
            if how == "error":
                raise OSError("disk full")
            if how == "interrupt":
                signal.raise_signal(signal.SIGINT)
            else:
                run.stop("enough")

    runner, watcher = trainer(8), Blind(act)
    if how == "stop":
        assert runner.fit(20, SIZE, callbacks=[watcher]).stopped == "enough"
    else:
        expected = OSError if how == "error" else KeyboardInterrupt
        with pytest.raises(expected):
            runner.fit(20, SIZE, callbacks=[watcher])
    assert len(watcher.losses) == runner.step == 6
    alone = one_by_one(6)
    assert state(runner) == state(alone)
    assert runner.fit(1, SIZE).meta_loss == alone.fit(1, SIZE).meta_loss


class Spoilt(SinusoidTaskSampler):
    """Task number 16 has a target that is no number."""

    def draw_batch(self, numbers: Any) -> Task:
        bad = np.isin(numbers[:, 0], SinusoidTaskSampler(seed=0).rng(16).random(1))
        task = super().draw_batch(numbers)
        query_y = np.where(bad[:, None, None], np.nan, task.query_y)
        return Task(task.support_x, task.support_y, task.query_x, query_y)


def test_a_loss_that_is_not_finite_within_a_block_names_its_step(backend: Backend) -> None:
    runner = trainer(8, Spoilt(seed=0))
    with pytest.raises(NonFiniteError, match="step 5: the loss of task 1 of the batch is nan"):
        runner.fit(20, SIZE)
    assert runner.step == 5
    assert state(runner) == state(one_by_one(5))


def test_random_numbers_of_a_block_are_drawn_once() -> None:
    """A step that is taken again draws what it drew before."""
    require("torch")
    import torch

    def dropping(length: int) -> MetaTrainer:
        torch.manual_seed(3)
        net = torch.nn.Sequential(
            torch.nn.Linear(1, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1)
        )
        maml = MAML(net.double(), 0.01)
        settings = StepSettings(steps_per_call=length, task_map="loop")
        sampler = SinusoidTaskSampler(seed=0)
        return MetaTrainer(maml, optim.adam(1e-2), nn.mse, sampler, settings=settings)

    with use_backend("torch", dtype="float64"):
        single, losses = dropping(1), []
        losses.append(single.fit(6, SIZE).meta_loss)
        after = state(single)
        block = dropping(8)
        stop = Blind(lambda run: run.stop("enough") if run.iteration == 5 else None)
        losses.append(block.fit(8, SIZE, callbacks=[stop]).meta_loss)
    assert losses[0] == losses[1]
    assert state(block) == after


@hardly_depends_on_the_backend
def test_an_algorithm_with_epochs_enters_them_in_time(backend: Backend) -> None:
    from metaframe.learners import MAMLPlusPlus

    losses = []
    for length in (1, 8):
        maml = MAMLPlusPlus((MODEL, MODEL.init(0)), 0.01, 2, second_order_from=1)
        settings = StepSettings(steps_per_call=length)
        sampler = SinusoidTaskSampler(seed=0)
        runner = MetaTrainer(
            maml, optim.adam(1e-2), nn.mse, sampler, steps_per_epoch=3, settings=settings
        )
        losses.append(runner.fit(8, SIZE).meta_loss)
        assert maml.epoch == 2
    assert losses[0] == losses[1]


@pytest.mark.parametrize(("value", "error"), [(0, InputError), (2.0, InputTypeError)])
def test_bad_lengths_are_named(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="steps_per_call must be"):
        StepSettings(steps_per_call=value)


def test_a_tree_of_reports_has_plain_numbers(backend: Backend) -> None:
    watcher = Blind(lambda run: reports.append(run.report))
    reports: list[Any] = []
    trainer(4, metric=nn.mse).fit(4, SIZE, callbacks=[watcher])
    for report in reports:
        assert isinstance(report.loss, float)
        assert report.task_losses.shape == report.task_scores.shape == (SIZE,)
        assert report.loss == pytest.approx(report.task_losses.mean())
    assert len(tree.leaves(reports[0].task_losses)) == 1
