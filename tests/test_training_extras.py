"""Schedules, mixed precision, metric files, the progress bar, and what importing costs."""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import metaframe
import zoo
from frameworks import hardly_depends_on_the_backend
from metaframe import MAML, nn, ops, optim
from metaframe.backend import Backend, use_backend
from metaframe.errors import InputError, MissingDependencyError
from metaframe.models.precision import mixed_precision
from metaframe.tasks import SinusoidTaskSampler
from metaframe.training import MetaTrainer, evaluate
from metaframe.training.metrics import MetricsLog, read_metrics
from metaframe.training.progress import ProgressBar
from metaframe.training.schedules import constant, cosine, warmup


def trainer(**settings: Any) -> MetaTrainer:
    model = nn.mlp([1, 6, 1], activation=ops.tanh)
    maml = MAML((model, model.init(0)), 0.01)
    return MetaTrainer(maml, optim.adam(1e-2), nn.mse, SinusoidTaskSampler(seed=0), **settings)


def test_schedules_are_their_formulas() -> None:
    half = cosine(0.5, 10, end=0.1)
    for step in range(15):
        expected = 0.1 + 0.4 * (1 + math.cos(math.pi * min(step, 10) / 10)) / 2
        assert half(step) == pytest.approx(expected, rel=1e-15)
    rising = warmup(constant(2.0), 4)
    assert [rising(i) for i in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert warmup(constant(2.0), 0)(0) == 2.0
    with pytest.raises(InputError, match="not negative"):
        constant(-1.0)
    with pytest.raises(InputError, match="steps must be at least 1"):
        cosine(0.1, 0)


def test_mixed_precision_rounds_the_model_and_nothing_else(backend: Backend) -> None:
    """The model computes on rounded numbers; parameters, gradients and updates stay float32."""
    seen: set[str] = set()

    def model(params: Any, x: Any) -> Any:
        seen.update(backend.dtype_name(v) for v in (params["w"], x))
        return params["w"] * x

    with use_backend(backend.name, dtype="float32"):
        # 1/3 and the inputs are no numbers of bfloat16, which has 8 bits of mantissa.
        maml = MAML(mixed_precision((model, {"w": ops.asarray(1 / 3)})), 0.1)
        task = {"x": np.array([1.001, 2.0], np.float32), "y": np.array([1.0, 0.0], np.float32)}
        tasks = [metaframe.tasks.Task(task["x"], task["y"], task["x"], task["y"])]
        cost, grads, _ = maml.meta_value_and_grad(nn.mse, tasks, steps=0)
    assert seen == {"bfloat16"}
    assert backend.dtype_name(cost) == backend.dtype_name(grads["w"]) == "float32"
    w, x = 0.333984375, np.array([1.0, 2.0])  # rounded to bfloat16
    prediction = np.array([0.333984375, 0.66796875])
    assert float(backend.to_numpy(cost)) == pytest.approx(
        np.mean((prediction - task["y"]) ** 2), rel=1e-6
    )
    assert np.allclose(prediction, w * x)


@hardly_depends_on_the_backend
def test_mixed_precision_trains_to_nearly_the_same(backend: Backend) -> None:
    with use_backend(backend.name, dtype="float32"):
        losses = []
        for narrow in (False, True):
            model: Any = zoo.pair(zoo.weights(), backend.name)
            maml = MAML(mixed_precision(model) if narrow else model, 0.1, 2)
            runner = MetaTrainer(maml, optim.sgd(0.1), nn.mse, zoo.Fixed())
            losses.append(runner.fit(3, 3).meta_loss)
    assert losses[1] != losses[0]
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.05)


@hardly_depends_on_the_backend
def test_metrics_are_the_history(backend: Backend, tmp_path: Path) -> None:
    del backend
    runner = trainer(metric=lambda p, y: ops.max(ops.abs(p - y)))
    tasks = SinusoidTaskSampler(seed=0, split="validation").sample(3)
    history = runner.fit(4, 2, eval_every=2, eval_tasks=tasks, callbacks=[MetricsLog(tmp_path)])
    records = read_metrics(tmp_path)
    assert [r["loss"] for r in records if "loss" in r] == history.meta_loss
    assert [r["eval_loss"] for r in records if "eval_loss" in r] == [
        x for _, x in history.eval_loss
    ]
    assert [r["eval_score"] for r in records if "eval_score" in r] == [
        x for _, x in history.eval_score
    ]
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(r["loss"]) for r in rows if r["loss"]] == history.meta_loss
    # A run that goes on after step 2 takes steps 3 and 4 again.
    again = trainer()
    again.step = 2
    again.fit(1, 2, callbacks=[MetricsLog(tmp_path)])
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 2, 3]


def test_starting_again_never_leaves_less_than_there_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill at any write: what was measured before is in the file at every moment."""
    with use_backend("torch", dtype="float64"):
        trainer().fit(4, 2, callbacks=[MetricsLog(tmp_path)])
        before = read_metrics(tmp_path)[:3]
        seen = []
        original = Path.open

        def watched(self: Path, *args: Any, **kwargs: Any) -> Any:
            file = original(self, *args, **kwargs)
            if self.parent == tmp_path and "r" not in (*args, "r")[0]:
                seen.append([json.loads(x) for x in _text(tmp_path).splitlines()][:3])
            return file

        monkeypatch.setattr(Path, "open", watched)
        again = trainer()
        again.step = 3
        again.fit(1, 2, callbacks=[MetricsLog(tmp_path)])
    assert len(seen) >= 4
    assert seen == [before] * len(seen)
    with (tmp_path / "metrics.csv").open(newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1", "2", "3", "4"]


def _text(folder: Path) -> str:
    return (folder / "metrics.jsonl").read_bytes().decode()


def test_an_unfinished_last_line_is_ignored(tmp_path: Path) -> None:
    whole = json.dumps({"step": 1, "loss": 2.0})
    (tmp_path / "metrics.jsonl").write_text(f'{whole}\n{{"step": 2, "lo')
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]
    (tmp_path / "metrics.jsonl").write_text(f"garbage\n{whole}\n")
    with pytest.raises(InputError, match="line 1 is none that a run writes"):
        read_metrics(tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        b"\xff\xfe",
        b"[1, 2]",
        b"null",
        b"3",
        b"[" * 100_000,
        b'{"loss": 1.0}',
        b'{"step": "1"}',
        b'{"step": 1.5}',
        b'{"step": true}',
        b'{"step": -1}',
        b'{"step": 1, "loss": "0.5"}',
        b'{"step": 1, "loss": [0.5]}',
        b'{"step": 1, "other": 0.5}',
        b'{"step": 1, "loss": 1' + b"0" * 400 + b"}",
    ],
    ids=lambda line: line[:20].decode(errors="replace"),
)
def test_damaged_metrics_are_named(tmp_path: Path, line: bytes) -> None:
    whole = b'{"step": 1, "loss": 0.5, "seconds": 0.1}\n'
    (tmp_path / "metrics.jsonl").write_bytes(whole + line + b"\n" + whole)
    with pytest.raises(InputError, match=r"metrics\.jsonl, line 2 is none that a run writes"):
        read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_bytes(whole + line)  # not finished
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 0.5, "seconds": 0.1}]


def test_tensorboard_events_are_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    with use_backend("torch"):
        trainer().fit(2, 2, callbacks=[MetricsLog(tmp_path, tensorboard=True)])
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"grad_norm" in events.read_bytes()


def test_tensorboard_hides_steps_that_are_taken_again(tmp_path: Path) -> None:
    """By the mark that it looks for at the start of a file, of steps that others have too."""
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    with use_backend("torch"):
        for step in (0, 2):
            runner = trainer()
            runner.step = step
            runner.fit(3, 2, callbacks=[MetricsLog(tmp_path, tensorboard=True)])
    starts = []
    for file in sorted((tmp_path / "tensorboard").iterdir(), key=lambda file: file.suffix):
        data = file.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + size])
            if event.session_log.status == SessionLog.START:
                starts.append(event.step)
            data = data[16 + size :]
    assert starts == [1, 3]


def test_what_is_not_finite_is_null_in_a_file_and_no_number_in_python(tmp_path: Path) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    tasks = SinusoidTaskSampler(seed=0, split="validation").sample(2)
    with use_backend("torch"):
        runner = trainer(metric=lambda p, y: ops.sum(p) * math.nan)
        for step in (1, 2):  # and once more as it goes on
            log = MetricsLog(tmp_path)
            runner.fit(1, 2, eval_every=1, eval_tasks=tasks, callbacks=[log])
            read = [json.loads(x, parse_constant=refuse) for x in _text(tmp_path).splitlines()]
            assert [r["score"] for r in read if "score" in r] == [None] * step
    records = read_metrics(tmp_path)
    assert [math.isnan(r["eval_score"]) for r in records if "eval_score" in r] == [True, True]


def test_a_missing_tensorboard_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(MissingDependencyError, match=r"^TensorBoard needs tensorboardX, which is"):
        MetricsLog(tmp_path, tensorboard=True)


def test_progress_prints_lines_where_there_is_no_terminal() -> None:
    from rich.console import Console

    text = io.StringIO()
    tasks = SinusoidTaskSampler(seed=0, split="validation").sample(3)
    with use_backend("torch"):
        bar = ProgressBar(Console(file=text, width=120))
        trainer(metric=nn.mse).fit(3, 2, eval_every=3, eval_tasks=tasks, callbacks=[bar])
    lines = text.getvalue().splitlines()
    assert lines[0] == "compiling the first step"
    assert lines[1].startswith("step 1: loss ")
    assert "score" in lines[1]
    assert "step 3: validation loss" in lines[-1]


def test_a_score_is_shown_as_it_is() -> None:
    """Only its function knows whether 1.5 is a ratio."""
    from rich.console import Console

    text = io.StringIO()
    tasks = SinusoidTaskSampler(seed=0, split="validation").sample(3)
    with use_backend("torch"):
        bar = ProgressBar(Console(file=text, width=120))
        runner = trainer(metric=lambda p, y: 1.5 + 0 * nn.mse(p, y))
        runner.fit(1, 2, eval_every=1, eval_tasks=tasks, callbacks=[bar])
    assert text.getvalue().count("score 1.5") == 2
    assert "%" not in text.getvalue()


@hardly_depends_on_the_backend
def test_permuted_labels_leave_nothing_to_know_before_adaptation(
    backend: Backend,
) -> None:
    """Chance at step 0: nothing about a task's labels leaks into the model or the evaluation."""
    with use_backend(backend.name, dtype="float32"):
        model = nn.mlp([64, 16, 5])
        flat = nn.Model(model.init, lambda params, x: model.apply(params, ops.reshape(x, (-1, 64))))
        maml = MAML((flat, flat.init(0)), 0.5)
        sampler = metaframe.tasks.digits_sampler(ways=5, queries=5, split="test")
        found = evaluate(maml, nn.cross_entropy, sampler, 200, steps=5, metric=nn.accuracy)
    before, after = found.curve[0], found.transductive
    assert abs(before.mean - 0.2) < 2 * before.ci95
    assert after.mean - after.ci95 > 0.25


EXPORTS: list[Callable[[], Any]] = [
    lambda: metaframe.MetaTrainer,
    lambda: metaframe.History,
    lambda: metaframe.evaluate,
]


@pytest.mark.parametrize("export", EXPORTS)
def test_exports_are_those_of_training(export: Callable[[], Any]) -> None:
    assert export().__module__.startswith("metaframe.training")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        metaframe.nothing  # noqa: B018
