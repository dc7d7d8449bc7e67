"""Checkpoints: exact resume, damage refused, the same on every backend, nothing executed."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import random
import shutil
import signal
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis.extra import numpy as np_st

from frameworks import BACKENDS, hardly_depends_on_the_backend, require
from metaframe import MAML, MetaSGD, nn, ops, optim
from metaframe.backend import Backend, use_backend
from metaframe.errors import CheckpointError, InputError
from metaframe.tasks import SinusoidTaskSampler, Task
from metaframe.training import (
    Callback,
    Checkpoint,
    Checkpoints,
    EarlyStopping,
    Evaluation,
    History,
    MetaTrainer,
    Run,
    latest_checkpoint,
    load_checkpoint,
    load_parameters,
    read_checkpoint,
    save_checkpoint,
)
from metaframe.training.checkpoint import checkpoint_files, decode, encode
from metaframe.training.metrics import MetricsLog, read_metrics
from processes import run

SMALL = Checkpoint(
    {"params/w": np.arange(6.0).reshape(2, 3), "optimizer/count": np.array(3.0)},
    {"step": 3, "dtypes": {"w": "float64"}, "optimizer": {}, "sampler": {"position": 12}},
    {"note": 'a "quoted" word and "sha256":"0000'},
    "torch",
)


def trainer(seed: int = 0, sampler_seed: int = 0, wrapper: Any = MAML) -> MetaTrainer:
    model = nn.mlp([1, 6, 1], activation=ops.tanh)
    maml = wrapper((model, model.init(seed)), 0.01)
    return MetaTrainer(maml, optim.adam(1e-2), nn.mse, SinusoidTaskSampler(seed=sampler_seed))


def same(one: MetaTrainer, other: MetaTrainer) -> None:
    (arrays, plain), (arrays2, plain2) = one.state(), other.state()
    assert plain == plain2
    assert set(arrays) == set(arrays2)
    for name, value in arrays.items():
        np.testing.assert_array_equal(value, arrays2[name], err_msg=name)


@hardly_depends_on_the_backend
@pytest.mark.parametrize("wrapper", [MAML, MetaSGD])
def test_resume_is_exact(backend: Backend, tmp_path: Path, wrapper: Any) -> None:
    del backend
    whole, first = trainer(wrapper=wrapper), trainer(wrapper=wrapper)
    whole.fit(7, 3)
    first.fit(4, 3)
    save_checkpoint(tmp_path / "c", first, {"ways": 5})
    second = trainer(seed=9, wrapper=wrapper)
    found = load_checkpoint(tmp_path / "c", second)
    assert (found.step, found.config) == (4, {"ways": 5})
    history = second.fit(3, 3)
    assert len(history.meta_loss) == 3
    same(whole, second)


@hardly_depends_on_the_backend
def test_a_checkpoint_in_the_middle_of_a_run_knows_its_tasks(
    backend: Backend, tmp_path: Path
) -> None:
    """Batches are sampled ahead; what counts is which of them were trained on."""
    del backend
    whole, first = trainer(), trainer()
    whole.fit(12, 3)
    first.fit(10, 3, callbacks=[Checkpoints(tmp_path, every=4, keep=5)])
    assert [int(f.stem[5:]) for f in checkpoint_files(tmp_path)] == [4, 8, 10]
    second = trainer()
    load_checkpoint(checkpoint_files(tmp_path)[1], second)
    second.fit(4, 3)
    same(whole, second)


def held_out(count: int = 3) -> list[Task]:
    return SinusoidTaskSampler(seed=0, split="validation").sample(count)


@pytest.mark.parametrize("parts", [(2, 6), (5, 3), (3, 1, 4)])
def test_a_run_in_parts_validates_as_one_in_a_single_piece(
    parts: tuple[int, ...], tmp_path: Path
) -> None:
    """After the same steps, with the same figures, the same best and the same result."""

    def go_on(runner: MetaTrainer, steps: int, folder: str) -> list[tuple[int, float]]:
        before, saver = runner.step, Checkpoints(tmp_path / folder, every=100)
        history = runner.fit(steps, 3, eval_every=3, eval_tasks=tasks, callbacks=[saver])
        return [(before + i + 1, loss) for i, loss in history.eval_loss]

    require("torch")
    with use_backend("torch", dtype="float64"):
        tasks, whole, found = held_out(), trainer(), []
        expected = go_on(whole, 8, "whole")
        for steps in parts:
            runner = trainer(seed=9)
            if checkpoint_files(tmp_path / "parted"):
                load_checkpoint(latest_checkpoint(tmp_path / "parted"), runner)
            else:
                runner = trainer()
            found += go_on(runner, steps, "parted")
        assert found == expected
        assert [step for step, _ in found] == [3, 6]
        same(whole, runner)
        best = [tmp_path / folder / "best.safetensors" for folder in ("whole", "parted")]
        assert len({load_parameters(file, runner.maml).step for file in best}) == 1


class Failing(MetaTrainer):
    """Its validation after step 4 does not end; `left` is what a killed process would leave."""

    folder: Path
    left: Path

    def evaluated(self, tasks: Any) -> Evaluation:
        if self.step == 4:
            shutil.copytree(self.folder, self.left)
            raise MemoryError("no memory for an evaluation")
        return super().evaluated(tasks)


@pytest.mark.parametrize("ended", ["killed", "failed"])
def test_no_validation_is_lost(ended: str, tmp_path: Path) -> None:
    """Whatever ends a run within one: who goes on does it, and measures and keeps the same."""

    def go_on(runner: MetaTrainer, folder: Path) -> History:
        watchers = [MetricsLog(folder), Checkpoints(folder, every=2)]
        left = 8 - runner.step
        return runner.fit(left, 3, eval_every=2, eval_tasks=held_out(), callbacks=watchers)

    require("torch")
    with use_backend("torch", dtype="float64"):
        whole, again, other = trainer(), trainer(seed=9), trainer()
        go_on(whole, tmp_path / "whole")
        failing = Failing(other.maml, optim.adam(1e-2), nn.mse, other.task_sampler)
        failing.folder, failing.left = tmp_path / "failed", tmp_path / "killed"
        with pytest.raises(MemoryError):
            go_on(failing, tmp_path / "failed")
        step = load_checkpoint(latest_checkpoint(tmp_path / ended), again).step
        assert step == {"killed": 2, "failed": 4}[ended]
        history = go_on(again, tmp_path / ended)
    same(whole, again)
    assert [i + step + 1 for i, _ in history.eval_loss] == [4, 6, 8]
    records = [
        [{**record, "seconds": 0} for record in read_metrics(tmp_path / folder)]
        for folder in ("whole", ended)
    ]
    assert records[0] == records[1]
    assert [r["step"] for r in records[0] if "eval_loss" in r] == [2, 4, 6, 8]
    best = [read_checkpoint(tmp_path / folder / "best.safetensors") for folder in ("whole", ended)]
    assert best[0].step == best[1].step
    assert best[0].config == best[1].config
    assert not read_checkpoint(tmp_path / ended / "step-00000004.safetensors").plain[
        "owes_validation"
    ]


class Scripted(MetaTrainer):
    """Its validations find what was told."""

    def evaluated(self, tasks: Any) -> Evaluation:
        return Evaluation(np.array([[{1: 3.0, 2: 2.0, 3: 2.5, 4: 1.9}.get(self.step, 2.4)]]))


def scripted() -> Scripted:
    other = trainer()
    return Scripted(other.maml, optim.adam(1e-2), nn.mse, other.task_sampler)


def until(runner: MetaTrainer, steps: int, *watchers: Callback) -> History:
    left = steps - runner.step
    return runner.fit(left, 2, eval_every=1, eval_tasks=held_out(1), callbacks=watchers)


@pytest.mark.parametrize("cut", [2, 3, 5, 6])
@pytest.mark.parametrize("loaded", [True, False])
def test_early_stopping_of_a_run_in_parts(cut: int, loaded: bool, tmp_path: Path) -> None:
    """It waits for as long as in a single piece, 4 being the best, and what ended has ended."""
    require("torch")
    with use_backend("torch", dtype="float64"):
        runner = scripted()
        until(runner, cut, EarlyStopping(3))
        if loaded:
            save_checkpoint(tmp_path / "c", runner)
            load_checkpoint(tmp_path / "c", runner := scripted())
        assert until(runner, 20, EarlyStopping(3)).stopped == "no improvement in 3 evaluations"
        assert runner.step == 7
        over = until(runner, 20, EarlyStopping(3))
        assert (runner.step, over.stopped) == (7, "no improvement in 3 evaluations")
        assert over.meta_loss == []
        until(runner, 20, EarlyStopping(5))
        assert runner.step == 9


def test_a_callback_that_is_used_again_starts_anew(tmp_path: Path) -> None:
    require("torch")
    with use_backend("torch", dtype="float64"):
        stopping, saver = EarlyStopping(3), Checkpoints(tmp_path, every=100)
        for _ in range(2):
            runner = scripted()
            until(runner, 20, stopping, saver)
            assert runner.step == 7
            assert read_checkpoint(tmp_path / "best.safetensors").step == 4
            shutil.rmtree(tmp_path)
            tmp_path.mkdir()


def test_checkpoints_from_before_validations_were_kept_are_read() -> None:
    require("torch")
    with use_backend("torch", dtype="float64"):
        one, other = scripted(), scripted()
        until(one, 5)
        arrays, plain = one.state()
        assert plain.pop("merits") == [-3.0, -2.0, -2.5, -1.9, -2.4]
        assert plain.pop("owes_validation") is False
        other.restore(arrays, plain)
        assert other.step == 5
        until(other, 20, EarlyStopping(3))
        assert other.step == 9


class Unplaced:
    """A sampler that cannot say where it is."""

    def __init__(self) -> None:
        self._inner = SinusoidTaskSampler(seed=0)

    def sample(self, meta_batch_size: int) -> list[Task]:
        return self._inner.sample(meta_batch_size)


def test_tasks_that_may_come_again_are_warned_of(tmp_path: Path) -> None:
    def unplaced() -> MetaTrainer:
        return MetaTrainer(trainer().maml, optim.adam(1e-2), nn.mse, Unplaced())

    require("torch")
    with use_backend("torch", dtype="float64"):
        makers = (unplaced, trainer)
        for make in makers:
            one = make()
            one.fit(2, 3)
            save_checkpoint(tmp_path / make.__name__, one)
        save_checkpoint(tmp_path / "start", unplaced())
        load_checkpoint(tmp_path / "start", unplaced())
        load_checkpoint(tmp_path / "trainer", trainer())
        for written, read, which in (
            ("unplaced", unplaced, "this sampler"),
            ("trainer", unplaced, "this sampler"),
            ("unplaced", trainer, "the sampler that it was saved with"),
        ):
            other = read()
            with pytest.warns(UserWarning, match=f"after 2 steps, .* {which} has no state"):
                load_checkpoint(tmp_path / written, other)
            assert other.step == 2


@pytest.mark.parametrize("reader", BACKENDS)
@pytest.mark.parametrize("writer", BACKENDS)
def test_written_on_one_backend_read_on_another(writer: str, reader: str, tmp_path: Path) -> None:
    require(writer)
    require(reader)
    with use_backend(writer, dtype="float64"):
        one = trainer(wrapper=MetaSGD)
        one.fit(2, 3)
        save_checkpoint(tmp_path / "c", one)
        one.fit(2, 3)
    with use_backend(reader, dtype="float64"):
        other = trainer(seed=5, wrapper=MetaSGD)
        assert load_checkpoint(tmp_path / "c", other).backend == writer
        written = read_checkpoint(tmp_path / "c").arrays
        arrays, _ = other.state()
        for name, value in written.items():
            if not name.startswith("rng."):
                np.testing.assert_array_equal(arrays[name], value)
        other.fit(2, 3)
    (arrays, _), (arrays2, _) = one.state(), other.state()
    for name in written:
        if not name.startswith("rng."):
            np.testing.assert_allclose(arrays[name], arrays2[name], rtol=0, atol=1e-12)


def test_parameters_alone(backend: Backend, tmp_path: Path) -> None:
    one, other = trainer(), trainer(seed=3)
    one.fit(1, 3)
    save_checkpoint(tmp_path / "c", one)
    load_parameters(tmp_path / "c", other.maml)
    assert other.step == 0
    for name, value in one.maml.meta_parameters().items():
        np.testing.assert_array_equal(
            backend.to_numpy(other.maml.meta_parameters()[name]), backend.to_numpy(value)
        )


def test_torch_dropout_goes_on_where_it_was(tmp_path: Path) -> None:
    require("torch")
    import torch

    def with_dropout() -> MetaTrainer:
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(1, 16), torch.nn.Dropout(0.5), torch.nn.Linear(16, 1)
        )
        maml = MAML(model, 0.01)
        return MetaTrainer(maml, optim.adam(1e-2), nn.mse, SinusoidTaskSampler(seed=0))

    whole = with_dropout()
    whole.fit(3, 2)
    save_checkpoint(tmp_path / "c", whole)
    whole.fit(3, 2)
    second = with_dropout()
    load_checkpoint(tmp_path / "c", second)
    second.fit(3, 2)
    same(whole, second)


def test_every_truncation_is_refused() -> None:
    data = encode(SMALL)
    for length in range(len(data)):
        with pytest.raises(CheckpointError):
            decode(data[:length])


def test_every_bit_flip_is_refused() -> None:
    """In the length, in the header with its metadata, and in the numbers."""
    data = encode(SMALL)
    for i in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[i // 8] ^= 1 << (i % 8)
        with pytest.raises(CheckpointError):
            decode(bytes(damaged))


def test_whole_files_are_read() -> None:
    found = decode(encode(SMALL))
    assert found.config == SMALL.config
    assert found.plain == SMALL.plain
    assert found.backend == "torch"
    assert found.arrays["optimizer/count"].shape == ()
    np.testing.assert_array_equal(found.arrays["params/w"], SMALL.arrays["params/w"])


DTYPES = ("float16", "float32", "float64", "int8", "int32", "int64", "uint8", "uint32", "bool")


@hypothesis.given(
    x=st.sampled_from(DTYPES).flatmap(
        lambda dtype: np_st.arrays(dtype, np_st.array_shapes(min_dims=0, max_dims=4, min_side=0))
    ),
    layout=st.sampled_from(("as it is", "transposed", "reversed", "strided", "fortran")),
)
def test_every_layout_keeps_its_values(x: np.ndarray[Any, Any], layout: str) -> None:
    odd = {
        "as it is": lambda: x,
        "transposed": lambda: x.T,
        "reversed": lambda: np.flip(x),
        "strided": lambda: x[..., ::2] if x.ndim else x,
        "fortran": lambda: np.asfortranarray(x) if x.ndim else x,
    }[layout]()
    found = decode(encode(Checkpoint({"x": odd}, {"step": 0}))).arrays["x"]
    assert found.dtype == odd.dtype
    assert found.shape == odd.shape
    assert found.tobytes() == odd.tobytes()


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "executed"),)

    (tmp_path / "c").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(CheckpointError, match="no checkpoint of metaframe"):
        read_checkpoint(tmp_path / "c")
    assert not (tmp_path / "executed").exists()


def test_what_does_not_fit_is_refused(backend: Backend, tmp_path: Path) -> None:
    path = tmp_path / "c"
    save_checkpoint(path, trainer())
    with pytest.raises(CheckpointError, match=r"another model or algorithm: missing \['learned/"):
        load_checkpoint(path, trainer(wrapper=MetaSGD))
    with pytest.raises(InputError, match="seed=0, this sampler has seed=1"):
        load_checkpoint(path, trainer(sampler_seed=1))
    other = trainer()
    plain_gradient = MetaTrainer(other.maml, optim.sgd(0.1), nn.mse, other.task_sampler)
    with pytest.raises(CheckpointError, match="another optimizer"):
        load_checkpoint(path, plain_gradient)
    with (
        use_backend(backend.name, dtype="float32"),
        pytest.raises(CheckpointError, match="in the checkpoint and float32"),
    ):
        load_checkpoint(path, trainer())
    with pytest.raises(CheckpointError, match="No such file"):
        read_checkpoint(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="has no checkpoints"):
        latest_checkpoint(tmp_path)
    with pytest.raises(InputError, match="plain JSON values"):
        save_checkpoint(path, trainer(), {"model": object()})


@hardly_depends_on_the_backend
def test_what_is_refused_changes_nothing(backend: Backend, tmp_path: Path) -> None:
    def with_sgd(seed: int = 1, sampler_seed: int = 0) -> MetaTrainer:
        other = trainer(seed, sampler_seed)
        return MetaTrainer(other.maml, optim.momentum(0.1), nn.mse, other.task_sampler)

    def moved(runner: MetaTrainer) -> dict[str, Any]:
        arrays, plain = runner.state()
        return {**{name: x.tobytes() for name, x in arrays.items()}, "plain": str(plain)}

    del backend
    one = trainer()
    one.fit(2, 3)
    save_checkpoint(tmp_path / "c", one)
    one.fit(1, 3)
    for other, says in (
        (with_sgd(), "another optimizer"),
        (trainer(seed=1, sampler_seed=1), "this sampler has seed=1"),
    ):
        other.fit(1, 3)
        before = moved(other)
        with pytest.raises((CheckpointError, InputError), match=says):
            load_checkpoint(tmp_path / "c", other)
        assert moved(other) == before


def test_rules_that_keep_alike_arrays_are_told_apart(backend: Backend) -> None:
    """By what is written next to the arrays; a checkpoint from before that is read."""
    del backend

    def with_rule(optimizer: optim.Optimizer) -> MetaTrainer:
        other = trainer()
        return MetaTrainer(other.maml, optimizer, nn.mse, other.task_sampler)

    arrays, plain = with_rule(optim.momentum(0.1)).state()
    for other in (optim.rmsprop(0.1), optim.clipped(optim.adagrad(0.1), norm=1.0)):
        with pytest.raises(CheckpointError, match=r"of momentum, and this one is (rmsp|adag)"):
            with_rule(other).restore(arrays, plain)
        with_rule(other).restore(arrays, {**plain, "optimizer": {}})
    clipped = optim.clipped(optim.momentum(0.1, nesterov=True), norm=1.0)
    with_rule(clipped).restore(arrays, plain)


def test_a_checkpoint_says_what_it_cannot_hold(tmp_path: Path) -> None:
    class Odd(SinusoidTaskSampler):
        def state(self) -> dict[str, Any]:
            return {**super().state(), "seen": {1, 2}}

    require("torch")
    with use_backend("torch", dtype="float64"):
        other = trainer()
        odd = MetaTrainer(other.maml, optim.sgd(0.1), nn.mse, Odd(seed=0))
        with pytest.raises(InputError, match=r"the sampler's state\(\) must be plain JSON .* set"):
            save_checkpoint(tmp_path / "c", odd)
        with pytest.raises(InputError, match="a checkpoint's config must be plain JSON"):
            save_checkpoint(tmp_path / "c", other, {"model": object()})
        for runner, config, what in (
            (odd, {}, r"the sampler's state\(\)"),
            (other, {"model": object()}, "a checkpoint's config"),
        ):
            saver = Checkpoints(tmp_path, every=2, config=config)
            with pytest.raises(InputError, match=f"{what} must be plain JSON"):
                runner.fit(3, 2, callbacks=[saver])
            assert runner.step == 0
    with pytest.raises(InputError, match="the optimizer's settings must be plain JSON"):
        encode(Checkpoint({}, {"step": 0, "optimizer": {"lr": {0.1}}}))
    assert list(tmp_path.iterdir()) == []


def test_another_format_is_refused() -> None:
    data = encode(SMALL)
    other = data.replace(b'\\"format\\": 1', b'\\"format\\": 9')
    assert other != data
    from metaframe.training.array_file import _digest, _digest_at

    at = _digest_at(other)
    assert at is not None
    with pytest.raises(CheckpointError, match="has format 9"):
        decode(other[:at] + _digest(other, at) + other[at + 64 :])


@hardly_depends_on_the_backend
def test_last_and_best_are_kept(backend: Backend, tmp_path: Path) -> None:
    del backend
    tasks = SinusoidTaskSampler(seed=0, split="validation").sample(5)
    saver = Checkpoints(tmp_path, every=1, keep=2)
    runner = trainer()
    history = runner.fit(5, 3, eval_every=1, eval_tasks=tasks, callbacks=[saver])
    assert [int(f.stem[5:]) for f in checkpoint_files(tmp_path)] == [4, 5]
    assert latest_checkpoint(tmp_path) == checkpoint_files(tmp_path)[-1]
    best = min(loss for _, loss in history.eval_loss)
    load_parameters(tmp_path / "best.safetensors", runner.maml)
    assert runner.evaluate(tasks) == best


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def used(tmp_path: Path) -> Path:
    """A folder in which a run of six steps kept its last two checkpoints and its best one."""
    require("torch")
    tasks = SinusoidTaskSampler(seed=0, split="validation").sample(3)
    with use_backend("torch", dtype="float64"):
        saver = Checkpoints(tmp_path, every=2, keep=2)
        trainer().fit(6, 3, eval_every=3, eval_tasks=tasks, callbacks=[saver])
    assert len(contents(tmp_path)) == 3
    return tmp_path


def test_a_folder_with_later_checkpoints_is_refused(used: Path) -> None:
    before = contents(used)
    with use_backend("torch", dtype="float64"):
        runner = trainer()
        with pytest.raises(InputError, match=r"later steps, such as step-00000006\.safe.* step 0"):
            runner.fit(3, 3, callbacks=[Checkpoints(used, every=1, keep=1)])
        assert runner.step == 0
        assert contents(used) == before
        load_checkpoint(latest_checkpoint(used), runner)
        runner.fit(1, 3, callbacks=[Checkpoints(used, every=1, keep=2)])
    assert [int(f.stem[5:]) for f in checkpoint_files(used)] == [6, 7]
    assert contents(used)["best.safetensors"] == before["best.safetensors"]


def test_what_another_run_left_is_not_lost(used: Path) -> None:
    """Another run than the one that starts here after more steps than the folder knows."""
    before = contents(used)
    tasks = SinusoidTaskSampler(seed=0, split="validation").sample(3)
    with use_backend("torch", dtype="float64"):
        other = trainer(seed=1)
        other.fit(10, 3)
        saver = Checkpoints(used, every=1, keep=1)
        other.fit(3, 3, eval_every=1, eval_tasks=tasks, callbacks=[saver])
    after = contents(used)
    assert after["best.1.safetensors"] == before.pop("best.safetensors")
    assert {name: after[name] for name in before} == before
    assert [int(f.stem[5:]) for f in checkpoint_files(used)] == [4, 6, 13]
    assert read_checkpoint(used / "best.safetensors").step > 10


class Interrupted(Callback):
    def __init__(self, signum: int = signal.SIGINT) -> None:
        self._signum = signum

    def on_step(self, run: Run) -> None:
        if run.trainer.step == 3:
            os.kill(os.getpid(), self._signum)


@hardly_depends_on_the_backend
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_after_the_step_and_saves(
    backend: Backend, signum: signal.Signals, tmp_path: Path
) -> None:
    del backend
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    runner, whole = trainer(), trainer()
    with pytest.raises((KeyboardInterrupt, SystemExit)) as ended:
        runner.fit(10, 3, callbacks=[Interrupted(signum), Checkpoints(tmp_path, every=100)])
    assert isinstance(ended.value, SystemExit) == (signum == signal.SIGTERM)
    assert getattr(ended.value, "code", 143) == 143
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before
    resumed = trainer()
    assert load_checkpoint(latest_checkpoint(tmp_path), resumed).step == 3
    resumed.fit(7, 3)
    whole.fit(10, 3)
    same(whole, resumed)


@pytest.mark.parametrize(
    ("signum", "handler"),
    [(signal.SIGINT, signal.SIG_IGN), (signal.SIGTERM, lambda signum, frame: None)],
    ids=["ignored", "another's"],
)
def test_a_signal_that_is_not_ours_is_left_alone(signum: int, handler: Any) -> None:
    require("torch")
    before = signal.signal(signum, handler)
    try:
        with use_backend("torch", dtype="float64"):
            history = trainer().fit(4, 3, callbacks=[Interrupted(signum)])
    finally:
        signal.signal(signum, before)
    assert (len(history.meta_loss), history.stopped) == (4, None)


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kill -9 at 50 random moments, most of them in a save: every file is readable.

    A run that was killed again and again ends with the bits of one that was not.
    """
    require("torch")
    rng = random.Random(0)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # which the server does not take
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["killed_training"])

    def start(folder: str, steps: int) -> BaseProcess:
        """A process that trains, after its first step."""
        from killed_training import train

        here, there = processes.Pipe()
        process = processes.Process(target=train, args=(tmp_path / folder, steps, there))
        process.start()
        assert here.recv() == "ready"
        return process

    for kill in range(50):
        # More steps than there is time for, so that it is always killed at work.
        process = start("killed", 1_000 * (kill + 1))
        time.sleep(rng.uniform(0.0, 0.6))
        process.kill()
        process.join()
        for file in checkpoint_files(tmp_path / "killed"):
            read_checkpoint(file)
    reached = read_checkpoint(latest_checkpoint(tmp_path / "killed")).step
    for folder in ("killed", "whole"):
        start(folder, reached + 5).join()
    killed, whole = (
        read_checkpoint(latest_checkpoint(tmp_path / folder)) for folder in ("killed", "whole")
    )
    assert killed.step == whole.step == reached + 5
    assert killed.plain == whole.plain
    for name, value in whole.arrays.items():
        np.testing.assert_array_equal(killed.arrays[name], value, err_msg=name)


RESTORED_ON_ANOTHER_DEVICE = """
import sys, jax
from metaframe import MAML, nn, optim, set_backend
from metaframe.tasks import SinusoidTaskSampler
from metaframe.training import MetaTrainer, load_checkpoint, save_checkpoint

set_backend("jax")
first, second = jax.devices()
model = nn.mlp([1, 4, 1])
params = jax.device_put(model.init(0), second)
trainer = MetaTrainer(MAML((model, params)), optim.adam(1e-2), nn.mse, SinusoidTaskSampler())
trainer.fit(1, 2)
save_checkpoint(sys.argv[1], trainer)
load_checkpoint(sys.argv[1], trainer)
arrays = jax.tree.leaves((trainer.maml.meta_parameters(), trainer.outer._state))
print({device.id for x in arrays for device in x.devices()})
"""


def test_arrays_are_restored_where_they_were(tmp_path: Path) -> None:
    """On the device of the learner, and not on the default one."""
    require("jax")
    said = run(
        ["-c", RESTORED_ON_ANOTHER_DEVICE, str(tmp_path / "c")],
        XLA_FLAGS="--xla_force_host_platform_device_count=2",
        JAX_PLATFORMS="cpu",
    )
    assert said.strip() == "{1}"
