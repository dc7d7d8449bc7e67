"""The metaframe command: what it does, what it says, and how it ends."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from frameworks import hardly_depends_on_the_backend, slow
from metaframe import MetaTrainer, nn, ops, optim
from metaframe.cli import main, plots
from metaframe.cli.datasets import DATASETS
from metaframe.cli.errors import UsageError
from metaframe.cli.experiment import Experiment, resolve, selected
from metaframe.cli.presets import PRESETS, judge
from metaframe.cli.run_config import RunConfig, known_keys, read_toml
from metaframe.cli.run_folder import opened, read_result
from metaframe.learners import algorithms
from metaframe.training.checkpoint import latest_checkpoint, read_checkpoint
from metaframe.training.metrics import read_metrics
from processes import Terminal

QUICK = [
    *("--iterations", "4", "--meta-batch-size", "2", "--eval-every", "2"),
    *("--validation-tasks", "3", "--eval-tasks", "5", "--eval-steps", "2"),
    *("--width", "8", "--checkpoint-every", "2"),
]
PLAIN = {**os.environ, "NO_COLOR": "1", "COLUMNS": "200", "TERM": "dumb"}


def execution(backend_name: str) -> list[str]:
    """Flags for a few steps: torch takes longer to compile than to run them."""
    return ["--backend", backend_name, *(["--no-compiled"] if backend_name == "torch" else [])]


def as_json(capsys: pytest.CaptureFixture[str], *args: str) -> Any:
    capsys.readouterr()
    assert main([*args, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@hardly_depends_on_the_backend
def test_train_leaves_a_run_folder(
    backend_name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    result = as_json(
        *(capsys, "train", *QUICK, *execution(backend_name)),
        *("--dataset", "digits", "--out", str(out)),
    )
    assert result["steps"] == 4
    assert result["config"]["backend"] == backend_name
    evaluation = result["evaluation"]
    assert len(evaluation["curve"]) == 3
    assert evaluation["inductive"]["mean"] == pytest.approx(evaluation["transductive"]["mean"])
    found = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert found == {
        *("config.toml", "metrics.jsonl", "metrics.csv", "result.json"),
        *("learning_curve.png", "adaptation.png", "predictions.png"),
        *(f"checkpoints/{name}.safetensors" for name in ("best", "step-00000002", "step-00000004")),
    }
    saved = json.loads((out / "result.json").read_text())
    assert saved["evaluation"] == evaluation
    assert resolve(read_toml(out / "config.toml")).as_dict() == result["config"]
    assert read_checkpoint(latest_checkpoint(out / "checkpoints")).config == result["config"]
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [1, 2, 2, 3, 4, 4]
    again = as_json(capsys, "evaluate", str(out))
    assert again["evaluation"] == evaluation


def test_plots_of_a_regression(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Curves before and after adaptation in a picture, and the picture again from the folder."""
    out = tmp_path / "run"
    as_json(capsys, "train", *QUICK, *execution("torch"), "--out", str(out))
    names = ["learning_curve.png", "adaptation.png", "predictions.png"]
    for name in names:
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    (out / "predictions.png").unlink()
    assert as_json(capsys, "plot", str(out)) == [str(out / name) for name in names]
    with selected(config := resolve(read_toml(out / "config.toml"))):
        figure = plots.predictions(Experiment(config))
    assert len(figure.axes) == 4
    for axes in figure.axes:
        labels = [line.get_label() for line in axes.lines]
        assert labels == ["before adaptation", "after 2 steps", "query", "support"]
        before, after = (line.get_ydata() for line in axes.lines[:2])
        assert np.abs(np.subtract(before, after)).max() > 0


def test_a_picture_of_a_task_with_predictions() -> None:
    """Support and query images are those of the first test task; colours say what is right."""
    flags = {"dataset": "digits", "backend": "torch", "queries": 3, "eval_steps": 0}
    with selected(config := resolve(flags)):
        experiment = Experiment(config)
        task = experiment.sampler("test").task(0)
        figure = plots.predictions(experiment)
        said = ops.to_numpy(experiment.learner(task.query_x)).argmax(1)
    support, query = figure.subfigs
    shown = [axes for axes in support.axes if axes.images]
    assert [axes.get_title() for axes in shown] == ["0", "1", "2", "3", "4"]
    for axes in shown:
        (row,) = np.flatnonzero(ops.to_numpy(task.support_y) == int(axes.get_title()))
        image = ops.to_numpy(task.support_x)[row, ..., 0]
        np.testing.assert_array_equal(axes.images[0].get_array(), image)
    shown = [axes for axes in query.axes if axes.images]
    assert len(shown) == 15
    pictures = {ops.to_numpy(x)[..., 0].tobytes(): i for i, x in enumerate(task.query_x)}
    for axes in shown:
        row = pictures[np.asarray(axes.images[0].get_array()).tobytes()]
        right = said[row] == int(task.query_y[row])
        assert axes.get_title() == str(said[row])
        assert axes.title.get_color() == plots.COLOURS["right" if right else "wrong"]


@hardly_depends_on_the_backend
def test_resume_ends_where_an_uninterrupted_run_does(
    backend_name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*QUICK, *execution(backend_name), "--no-plots", "--schedule", "constant"]
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    expected = as_json(capsys, "train", *flags, "--out", str(whole))
    as_json(capsys, "train", *flags, "--iterations", "3", "--out", str(parted))
    found = as_json(capsys, "resume", str(parted), "--iterations", "4")
    assert found["steps"] == 4
    assert found["config"] == expected["config"]
    one, other = (read_checkpoint(latest_checkpoint(f / "checkpoints")) for f in (whole, parted))
    for name, value in one.arrays.items():
        if not name.startswith("rng."):
            np.testing.assert_array_equal(other.arrays[name], value)
    losses = [
        [r["loss"] for r in read_metrics(folder) if "loss" in r] for folder in (whole, parted)
    ]
    assert losses[0] == losses[1]


def test_resume_does_not_train_on_what_stopped_early(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    flags = [*QUICK, *execution("torch"), "--no-plots", "--out", str(out)]
    flags += ["--outer-lr", "1e-12", "--patience", "2", "--eval-every", "1"]
    # The parameters hardly move, so that no validation is better than the first.
    assert main(["train", *flags, "--iterations", "9"]) == 0
    stopped = "stopped after 3 of 9 steps: no improvement in 2 evaluations"
    assert stopped in capsys.readouterr().out
    assert main(["resume", str(out), "--no-plots"]) == 0
    assert stopped in capsys.readouterr().out
    before = contents(out)
    for more in (["--iterations", "12"], ["--patience", "1"]):
        assert main(["resume", str(out), *more, "--no-plots"]) == 2
        said = capsys.readouterr().err
        assert f"{stopped}. With patience={'2' if '12' in more else '1'} it would again" in said
    assert contents(out) == before
    longer = as_json(capsys, "resume", str(out), "--iterations", "12", "--patience", "3")
    assert (longer["steps"], longer["stopped"]) == (4, "no improvement in 3 evaluations")
    recorded = read_toml(out / "config.toml")
    assert (recorded["iterations"], recorded["patience"]) == (12, 3)
    whole = as_json(capsys, "resume", str(out), "--patience", "0", "--no-plots")
    assert (whole["steps"], whole["stopped"]) == (12, None)


def test_resume_ends_early_where_an_uninterrupted_run_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*QUICK, *execution("torch"), "--no-plots", "--out", str(tmp_path / "run")]
    flags += ["--outer-lr", "1e-12", "--patience", "2", "--eval-every", "1"]
    first = as_json(capsys, "train", *flags, "--iterations", "2")
    assert (first["steps"], first["stopped"]) == (2, None)
    found = as_json(capsys, "resume", str(tmp_path / "run"), "--iterations", "9")
    assert (found["steps"], found["stopped"]) == (3, "no improvement in 2 evaluations")


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """The finished run, to change."""
    shutil.copytree(run, tmp_path / "copy")
    return tmp_path / "copy"


def test_resume_records_the_number_of_steps_and_nothing_else(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = read_toml(copy / "config.toml")
    longer = ["resume", str(copy), "--no-plots", "--iterations"]
    assert main([*longer, "5", "--device", "nonsense"]) != 0
    assert main([*longer, "3"]) == 2
    assert "has taken 4 steps, received iterations=3. Give as many" in capsys.readouterr().err
    assert read_toml(copy / "config.toml") == before
    assert as_json(capsys, *longer, "5", "--device", "cpu")["steps"] == 5
    assert read_toml(copy / "config.toml") == {**before, "iterations": 5}


def test_resume_says_where_a_longer_cosine_goes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cosine = ["--schedule", "cosine", "--outer-lr", "0.1"]
    out = str(tmp_path / "run")
    as_json(capsys, "train", *QUICK, *execution("torch"), *cosine, "--no-plots", "--out", out)
    assert main(["resume", out, "--iterations", "8", "--no-plots"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "now ends after 8 steps: the next learning rate is 0.05, and was to be 0" in said


@pytest.mark.parametrize(
    ("damaged", "way_out"),
    [
        ("best", "to go on without it."),
        ("step-00000004", "to go on from step-00000002.safetensors."),
    ],
)
def test_a_damaged_checkpoint_can_be_got_round(
    damaged: str, way_out: str, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = copy / "checkpoints" / f"{damaged}.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert main(["resume", str(copy), "--iterations", "5", "--no-plots"]) == 1
    said = capsys.readouterr().err
    assert f"{file} is damaged" in said
    assert way_out in said
    file.rename(copy / "away")
    assert as_json(capsys, "resume", str(copy), "--iterations", "5", "--no-plots")["steps"] == 5


def test_checkpoints_are_found_in_the_run_folder(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "step-00000002.safetensors"
    shutil.copy(run / "checkpoints" / name, tmp_path / "another")
    for wanted in (name, f"checkpoints/{name}", str(tmp_path / "another")):
        found = as_json(capsys, "evaluate", str(run), "--checkpoint", wanted)
        assert found["checkpoint"] == f"{Path(wanted).name} (step 2)"
    assert main(["evaluate", str(run), "--checkpoint", "lastest"]) == 2
    assert "has no checkpoint 'lastest'" in (said := capsys.readouterr().err)
    assert "Did you mean 'latest'?" in said


def test_a_damaged_result_is_one_message(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("{", "{}", "[]"):
        (copy / "result.json").write_text(text)
        assert main(["plot", str(copy)]) == 1
        said = capsys.readouterr().err
        assert f"{copy / 'result.json'} is damaged" in said
        assert f"`metaframe resume {copy}` writes it again" in said


def test_what_is_no_number_is_null(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    out = tmp_path / "run"
    flags = [*QUICK, "--eval-tasks", "1", *execution("torch"), "--out", str(out)]
    assert main(["train", *flags, "--json"]) == 0
    for text in (capsys.readouterr().out, (out / "result.json").read_text()):
        found = json.loads(text, parse_constant=refuse)["evaluation"]
        assert found["transductive"]["ci95"] is None
        assert found["transductive"] == found["curve"][-1]
    assert main(["evaluate", str(out)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"after 2 steps: \d+\.\d+ \(1 task\)$", said, re.M)


@pytest.mark.parametrize("backend_name", ["jax", slow("torch"), slow("tensorflow")], indirect=True)
def test_float64_from_the_command_line(
    backend_name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On JAX too, where it has to be switched on, and training samples in another thread."""
    flags = [*QUICK, *execution(backend_name), "--precision", "float64", "--no-plots"]
    out = tmp_path / "run"
    with without_x64(backend_name):
        expected = as_json(capsys, "train", *flags, "--out", str(out))
        assert as_json(capsys, "evaluate", str(out))["evaluation"] == expected["evaluation"]
        assert as_json(capsys, "resume", str(out), "--iterations", "5", "--no-plots")["steps"] == 5
    arrays = read_checkpoint(latest_checkpoint(out / "checkpoints")).arrays
    assert {x.dtype for n, x in arrays.items() if n.startswith("params/")} == {np.dtype("float64")}


@contextmanager
def without_x64(backend_name: str) -> Iterator[None]:
    """As JAX is outside of our tests, in every thread."""
    if backend_name != "jax":
        yield
        return
    import jax

    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


@hardly_depends_on_the_backend
@pytest.mark.parametrize("algorithm", sorted(algorithms()))
def test_every_algorithm_trains(
    algorithm: str, backend_name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = algorithms()[algorithm]
    flags = [*QUICK, "--algorithm", algorithm, *execution(backend_name), "--no-plots"]
    if "inner_steps" in chosen.ignores:
        at = flags.index("--eval-steps")
        del flags[at : at + 2]
    else:
        flags += ["--inner-steps", "2"]
    if chosen.classifies:
        flags += ["--dataset", "digits"]
    result = as_json(capsys, "train", *flags, "--out", str(tmp_path / "run"))
    again = as_json(capsys, "evaluate", str(tmp_path / "run"))
    assert again["evaluation"] == result["evaluation"]
    records = read_metrics(tmp_path / "run")
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 3, 4]
    assert len({r["loss"] for r in records if "loss" in r}) == 4


@hardly_depends_on_the_backend
def test_reptile_learns_to_adapt(
    backend_name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By its defaults, and not with one inner step, which is said."""
    losses = []
    for name, one in (("usual", []), ("one", ["--inner-steps", "1"])):
        out = tmp_path / name
        flags = ["--algorithm", "reptile", "--iterations", "400", "--eval-tasks", "200", *one]
        flags += ["--eval-every", "0", *execution(backend_name), "--no-plots", "--out", str(out)]
        assert main(["train", *flags]) == 0
        said = capsys.readouterr().err
        assert ("reptile with inner_steps=1 is ordinary training" in said) == bool(one)
        result = read_result(out)
        assert result is not None
        losses.append(result["evaluation"]["transductive"]["mean"])
    assert losses[0] < 0.8 * losses[1]


def test_context_of_a_convolutional_model() -> None:
    """Its model has the context that the algorithm adapts, and starts at the plain network."""
    config = resolve({"dataset": "omniglot", "algorithm": "cavia", "backend": "torch", "width": 4})
    with selected(config):
        model = DATASETS["omniglot"].model(config)
        params = model.init(0)
        learner = algorithms()["cavia"].build((model, params), config)
        x = ops.asarray(np.random.default_rng(0).random((6, 28, 28, 1), np.float32))
        plain = nn.conv4(5, channels=4, pooling="stride").apply(params, x)
        np.testing.assert_array_equal(ops.to_numpy(model.apply(params, x)), ops.to_numpy(plain))
        shifted = model.apply({**params, "context": params["context"] + 1}, x)
    assert learner.config.names == ("context",)
    assert "film/w" in learner.meta_parameters()
    assert np.abs(ops.to_numpy(shifted - plain)).max() > 1e-3


def test_the_flags_of_clipping_reach_the_optimizer() -> None:
    flags = {"backend": "torch", "compiled": False, "width": 4, "precision": "float64"}
    limits = {"clip_norm": 0.05, "clip_value": 0.01}
    found = []
    with selected(config := resolve({**flags, **limits})):
        by_hand = Experiment(resolve(flags))
        clipped = optim.clipped(optim.adam(config.outer_lr), norm=0.05, value=0.01)
        for trainer in (
            Experiment(config).trainer,
            MetaTrainer(by_hand.learner, clipped, nn.mse, by_hand.sampler("train")),
            Experiment(resolve(flags)).trainer,
        ):
            for _ in range(3):
                trainer.meta_step(by_hand.sampler("train").sample(4))
            values = trainer.maml.meta_parameters()
            found.append(np.concatenate([ops.to_numpy(x).ravel() for x in values.values()]))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-12)
    assert np.abs(found[0] - found[2]).max() > 1e-6


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, to look at."""
    folder = tmp_path_factory.mktemp("run") / "run"
    assert (
        main(["train", *QUICK, *execution("torch"), "--no-plots", "-q", "--out", str(folder)]) == 0
    )
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """The contents of every file below `folder`."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


PROTONET = ["train", "--dataset", "digits", "--algorithm", "protonet"]
RUNS = ["train", "--preset", "omniglot-oneshot-runs"]
PRESET = ["train", "--preset", "omniglot-20w1s-maml"]
MAMLPP = ["train", "--algorithm", "maml++"]
WRONG = [
    (["train", "--dataset", "sinusoidd"], "Did you mean 'sinusoid'? There are digits, folder"),
    (["train", "--algorithm", "mmal"], "Did you mean 'maml'? There are anil, cavia"),
    (["train", "--backend", "jaxx"], "Did you mean 'jax'? There are jax, tensorflow, torch"),
    (["train", "--iner-lr", "1"], "--inner-lr"),
    (["train", "--inner-lr", "much"], "not a valid float"),
    (["train", "--ways", "1"], "ways must be at least 2, received 1"),
    (["train", "--iterations", "0"], "iterations must be at least 1, received 0"),
    (["train", "--clip-norm", "0"], "clip_norm must be above 0, received 0.0"),
    (["train", "--clip-value", "-1"], "clip_value must be above 0, received -1.0"),
    (["train", "--schedule", "linear"], "'constant', 'cosine'"),
    (["train", "--preset", "sinusoid"], "Did you mean 'sinusoid-maml'?"),
    (["train", "--config", "/nowhere.toml"], "cannot read /nowhere.toml"),
    (["train", "--algorithm", "protonet"], "is for classification, received dataset=sinusoid"),
    (["train", "--proximal", "1"], "proximal is a setting of imaml, received algorithm=maml"),
    (["train", "--features", "8"], "a setting of protonet, protomaml, received algorithm=maml"),
    (["train", "--held-out", "Greek"], "a setting of omniglot, folder, received dataset=sinusoid"),
    (["train", "--ways", "20"], "ways is a setting of digits, omniglot, mini-imagenet, tiered"),
    (["train", "--protocol", "runs"], "is a setting of omniglot, received dataset=sinusoid"),
    (["train", "--dataset", "digits", "--data", "x"], "data is a setting of omniglot"),
    (["train", "--dataset", "digits", "--parts", "x"], "parts is a setting of omniglot"),
    (["train", "--dataset", "digits", "--patience", "2"], "patience=2 with eval_every=0, which"),
    ([*PROTONET, "--inner-lr", "5"], "inner_lr has no effect on algorithm protonet, received"),
    ([*PROTONET, "--inner-steps", "9"], "inner_steps has no effect on algorithm protonet"),
    ([*PROTONET, "--eval-steps", "9"], "eval_steps has no effect on algorithm protonet"),
    ([*PROTONET, "--mode", "remat"], "mode has no effect on algorithm protonet"),
    *(
        (
            ["train", "--algorithm", name, "--mode", "remat"],
            f"mode has no effect on algorithm {name}",
        )
        for name in ("fomaml", "reptile", "imaml")
    ),
    (
        ["train", "--eval-every", "0", "--validation-tasks", "9"],
        "validation_tasks is for validations, received validation_tasks=9 with eval_every=0",
    ),
    (
        [*MAMLPP, "--multi-step-epochs", "0", "--steps-per-epoch", "9"],
        "steps_per_epoch is for what counts epochs, received steps_per_epoch=9 with",
    ),
    ([*PRESET, "--algorithm", "protonet", "--inner-lr", "1"], "inner_lr has no effect on"),
    (["train", "--norm", "support"], "norm is a setting of omniglot, mini-imagenet, tiered"),
    ([*RUNS, "--parts", "background,evaluation"], "drawn from the alphabets of part evaluation"),
    ([*RUNS, "--held-out", "Greek"], "held_out has no effect with protocol=runs"),
    ([*RUNS, "--eval-tasks", "100"], "eval_tasks has no effect with protocol=runs: there are 20"),
    (["train", "--dataset", "omniglot"], "needs its files: --data FOLDER"),
    (["reproduce", "sinusoid-mmal"], "Did you mean 'sinusoid-maml'?"),
    (["resume", "/nowhere"], "no run folder: it has no config.toml"),
    (["evaluate", "/nowhere"], "no run folder"),
    (["trian"], "No such command 'trian'"),
]


@pytest.mark.parametrize(("args", "says"), WRONG, ids=[" ".join(w[0]) for w in WRONG])
def test_mistakes_say_what_is_meant_and_what_exists(
    args: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "run")] if args[0] == "train" else []
    assert main([*args, *out]) == 2
    captured = capsys.readouterr()
    assert says in " ".join(captured.err.split())
    assert captured.out == ""
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_made_is_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["train", *QUICK, "--out", str(tmp_path / "file" / "run")]) == 1
    said = "".join(capsys.readouterr().err.split("\n"))
    assert said.startswith(f"metaframe: {tmp_path / 'file'}")
    assert said.endswith(": Not a directory")


def test_a_run_is_not_overwritten_by_accident(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*QUICK, *execution("torch"), "--no-plots", "-q", "--out", str(tmp_path / "run")]
    assert main(["train", *flags]) == 0
    assert main(["train", *flags]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["train", *flags, "--overwrite"]) == 0


UNUSABLE = [
    ["--device", "cuda:7"],
    ["--algorithm", "imaml", "--proximal", "0"],
    ["--algorithm", "cavia", "--context", "0"],
    ["--norm", "per-step"],
    ["--algorithm", "maml++", "--learn-norms"],
    ["--seed", str(2**64)],
    ["--eval-seed", str(2**64)],
    ["--tensorboard"],
]


@pytest.mark.parametrize("unusable", UNUSABLE, ids=" ".join)
def test_settings_that_cannot_be_used_cost_no_run(
    unusable: list[str], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the one that would be overwritten, nor is there anything in a new folder."""
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    flags = [*QUICK, *execution("torch"), "-q", *unusable]
    before = contents(run)
    assert main(["train", *flags, "--overwrite", "--out", str(run)]) != 0
    assert contents(run) == before
    assert main(["train", *flags, "--out", str(tmp_path / "new" / "run")]) != 0
    assert list(tmp_path.iterdir()) == []


def test_starting_anew_removes_the_old_run_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorboardX")
    out, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    elsewhere.mkdir()
    out.mkdir()
    (out / "checkpoints").symlink_to(elsewhere, target_is_directory=True)
    (out / "notes.txt").write_text("mine")
    flags = [*QUICK, *execution("torch"), "--out", str(out)]
    as_json(capsys, "train", *flags, "--tensorboard")
    there = contents(elsewhere)
    assert there
    found = as_json(capsys, "train", *flags, "--iterations", "2", "--no-plots", "--overwrite")
    assert found["steps"] == 2
    assert contents(elsewhere) == there
    assert set(contents(out)) == {
        *("config.toml", "metrics.jsonl", "metrics.csv", "result.json", "notes.txt"),
        *("checkpoints/best.safetensors", "checkpoints/step-00000002.safetensors"),
    }
    assert [r["step"] for r in read_metrics(out)] == [1, 2, 2]


def test_a_run_that_cannot_be_removed_is_not_continued(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [*QUICK, *execution("torch"), "--no-plots", "-q", "--out", str(tmp_path / "run")]
    assert main(["train", *flags]) == 0
    unlink = os.unlink

    def busy(path: Any, **kwargs: Any) -> None:
        if str(path).endswith("step-00000004.safetensors"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        unlink(path, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", busy)
        assert main(["train", *flags, "--overwrite"]) == 1
    assert "step-00000004.safetensors: Permission denied" in capsys.readouterr().err
    assert main(["train", *flags]) == 2, "and what is left is no run of these settings"
    assert "is of another run, which has no config.toml" in capsys.readouterr().err


def test_processes_that_start_again_continue_no_other_run(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of torchrun that failed before they had begun anew."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    out = tmp_path / "run"
    shutil.copytree(run, out)
    flags = [*QUICK, *execution("torch"), "--no-plots", "--out", str(out)]
    old = read_checkpoint(latest_checkpoint(out / "checkpoints"))
    as_json(capsys, "train", *flags, "--seed", "1", "--overwrite")
    new = read_checkpoint(latest_checkpoint(out / "checkpoints"))
    assert (old.config["seed"], new.config["seed"]) == (0, 1)
    (out / "result.json").unlink()
    (out / "checkpoints" / "step-00000004.safetensors").unlink()
    assert main(["train", *flags, "--seed", "1"]) == 0
    assert "continuing after 2 steps" in capsys.readouterr().err


def test_settings_come_from_flags_then_file_then_preset_then_defaults(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("inner_lr = 0.2\nshots = 3\nclip_norm = 1\n")
    config = resolve({"inner_lr": 0.3, "backend": "torch"}, file, {"shots": 4, "queries": 7})
    assert (config.inner_lr, config.shots, config.queries) == (0.3, 3, 7)
    assert config.width == DATASETS["sinusoid"].defaults["width"] == 40
    assert config.outer_lr == RunConfig().outer_lr
    assert config.clip_norm == 1.0


def test_what_a_preset_says_of_no_use_is_left_out(tmp_path: Path) -> None:
    """And is refused where a file says it; but not in a folder from before that was so."""
    preset = PRESETS["omniglot-20w1s-maml"].settings
    for given in ({"algorithm": "protonet"}, {"dataset": "digits"}):
        config = resolve({**given, "backend": "torch"}, None, preset)
        usual = resolve({**given, "dataset": config.dataset, "backend": "torch"})
        names = ("inner_lr", "inner_steps", "eval_steps") if "algorithm" in given else ("parts",)
        assert [getattr(config, n) for n in names] == [getattr(usual, n) for n in names]
        assert config.ways == 20
    settings = 'algorithm = "fomaml"\nmode = "remat"\nbackend = "torch"\n'
    (tmp_path / "config.toml").write_text(settings)
    with pytest.raises(UsageError, match="mode has no effect on algorithm fomaml"):
        resolve({}, tmp_path / "config.toml")
    assert opened(tmp_path, {}).mode == "reverse"


def test_the_evaluation_takes_the_steps_of_training_at_least() -> None:
    omniglot = {"dataset": "omniglot", "backend": "torch"}
    for given, steps in (
        ({}, 3),
        ({"algorithm": "maml++"}, 5),
        ({"algorithm": "imaml"}, 16),
        ({"inner_steps": 7}, 7),
        ({"inner_steps": 7, "eval_steps": 2}, 2),
    ):
        config = resolve({**omniglot, **given})
        assert config.eval_steps == steps
        assert resolve(config.as_dict()) == config


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("iner_lr = 1", "'iner_lr', which is no setting. Did you mean 'inner_lr'?"),
        ("[inner]\nlr = 1", "'inner', which is no setting"),
        ("inner_lr = 'much'", "inner_lr must be a number, received 'much'"),
        ("ways = 2.5", "ways must be a whole number, received 2.5"),
        ("ways = true", "ways must be a whole number, received True"),
        ("mode = 'revers'", "Did you mean 'reverse'?"),
        ("parts = [1]", "parts must be a list of texts"),
        ("inner_lr = ", "is no TOML file"),
        ("inner_lr = nan", "inner_lr must be at least 0, received nan"),
    ],
)
def test_configuration_files_are_checked(text: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text(text)
    with pytest.raises(UsageError) as caught:
        resolve({"backend": "torch"}, file)
    assert says in str(caught.value)


def test_resolved_settings_survive_a_file(tmp_path: Path) -> None:
    texts = {"data": 'a "b" \\ c\n', "held_out": ["x, y", "z"]}
    config = resolve({"backend": "torch", "dataset": "folder", **texts})
    file = tmp_path / "c.toml"
    file.write_text(config.to_toml())
    assert resolve(read_toml(file)) == config


def test_a_data_folder_is_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    flags = {"backend": "torch", "dataset": "omniglot"}
    assert resolve({**flags, "data": "~/omniglot"}).data == str(tmp_path / "home" / "omniglot")
    assert resolve({**flags, "data": "omniglot"}).data == str(tmp_path / "omniglot")


def test_every_setting_is_a_flag_of_train(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    for key in known_keys():
        assert f"--{key.replace('_', '-')}" in shown


@pytest.mark.parametrize("data", sorted(DATASETS))
@pytest.mark.parametrize("algorithm", sorted(algorithms()))
def test_the_defaults_of_data_sets_and_algorithms_fit_each_other(algorithm: str, data: str) -> None:
    if algorithms()[algorithm].classifies and DATASETS[data].regression:
        return
    config = resolve({"dataset": data, "algorithm": algorithm, "backend": "torch"})
    assert resolve(config.as_dict()) == config, "as from the run's folder"


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_are_settings_that_exist(name: str) -> None:
    preset = PRESETS[name]
    config = resolve({"backend": "torch"}, None, preset.settings)
    assert preset.source
    assert (preset.step or 0) <= config.eval_steps
    assert (preset.expected < 1) == (
        not DATASETS[config.dataset].regression or name.startswith("sinusoid-maml")
    )


def test_presets_of_reptile_take_several_inner_steps() -> None:
    for name, preset in PRESETS.items():
        if preset.settings.get("algorithm") == "reptile":
            assert preset.settings["inner_steps"] >= 5, name


def test_reproduce_compares_with_the_expected_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*QUICK[:2], "--eval-tasks", "5", *execution("torch"), "--no-plots"]
    assert main(["reproduce", "sinusoid-maml", *flags, "--out", str(tmp_path / "run")]) == 1
    out = capsys.readouterr().out
    assert "expected at most 0.900" in out
    assert "NOT REACHED" in out


def test_reproduce_goes_on_with_its_own_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--eval-tasks", "5", *execution("torch"), "--no-plots", "--out", str(tmp_path / "run")]
    again = ["reproduce", "sinusoid-maml", "--iterations", "4", *flags]
    assert main(again) == 1
    (tmp_path / "run" / "result.json").unlink()  # as after Ctrl-C
    assert main(again) == 1
    captured = capsys.readouterr()
    assert "continuing after 4 steps" in captured.err
    assert captured.out.count("NOT REACHED") == 2
    assert main([*again, "--seed", "1"]) == 2
    assert "has a run already, with seed=0; received seed=1" in capsys.readouterr().err


def test_reproduce_reproduces_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["reproduce", "sinusoid-maml", "--out", str(tmp_path / "run")]
    for flag, value in (("dataset", "digits"), ("eval-steps", "0"), ("inner-lr", "1")):
        assert main([*command, f"--{flag}", value]) == 2
        assert f"--{flag} would change what is reproduced" in capsys.readouterr().err
    assert main([*command, "--no-learn-norms"]) == 2
    assert "--learn-norms would change" in capsys.readouterr().err
    assert main([*command, "--iterations", "2001"]) == 2
    assert "takes 2000 iterations, received 2001" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_figure_that_is_not_finite_is_not_reached(tmp_path: Path) -> None:
    point = {"mean": None, "ci95": None}
    found = {"tasks": 5, "curve": [point] * 11, "transductive": point, "inductive": None}
    (tmp_path / "result.json").write_text(json.dumps({"metric": "mse", "evaluation": found}))
    verdict = judge(PRESETS["sinusoid-maml"], tmp_path)
    assert not verdict.met
    assert verdict.lines()[-1] == "NOT REACHED: not finite"
    plots.adaptation(read_result(tmp_path))


def test_a_loss_that_is_not_finite_is_left_out_of_the_picture(tmp_path: Path) -> None:
    lines = ('{"step": 1, "loss": 2.0}', '{"step": 1, "eval_loss": null}')
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    figure = plots.learning_curve(read_metrics(tmp_path))
    assert figure is not None
    assert np.isnan(figure.axes[0].lines[1].get_ydata()).all()
    figure.canvas.draw()


def test_lists_for_machines(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(as_json(capsys, "list")["data sets"]) == set(DATASETS)
    assert {b["name"] for b in as_json(capsys, "backends")} >= {"jax", "tensorflow", "torch"}


@pytest.mark.parametrize(
    ("flags", "parameters"),
    [
        (["--width", "20"], 20 + 20 + 20 * 20 + 20 + 20 + 1),
        (["--workload", "W2", "--width", "4", "--tasks", "2"], 9 * 4 * 13 + 4 * 2 * 4 + 4 * 5 + 5),
    ],
    ids=["W1", "W2"],
)
def test_timings(flags: list[str], parameters: int, capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, "bench", *flags, *execution("torch"), "--steps", "2")
    assert found["step_ms"] > 0
    assert found["parameters"] == parameters
    assert found["task_map"] == ("scan" if "W2" in flags else "vmap")
    assert main(["bench", *flags, *execution("torch"), "--steps", "1"]) == 0
    assert "ms a step" in capsys.readouterr().out


def test_a_backend_is_checked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    check = ("backends", "--check", "torch", "--clauses", "arrays/owns,arrays/devices")
    assert as_json(capsys, *check)["kept"] == ["arrays/owns", "arrays/devices"]
    monkeypatch.setattr("metaframe_torch.TorchBackend.devices", lambda self: ())
    assert main([*check]) == 1
    assert "broken: arrays/devices" in capsys.readouterr().out


def test_in_a_pipe_the_result_alone_is_on_standard_output(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "metaframe.cli", "train", *QUICK, *execution("torch")]
    done = subprocess.run(
        [*command, "--no-plots", "--out", str(tmp_path / "run")],
        env=PLAIN,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("mean squared error before adaptation: ")
    assert "step 4: loss" in done.stderr
    assert "\x1b" not in done.stdout + done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are POSIX's")
@pytest.mark.parametrize(
    ("signum", "said", "code"),
    [(signal.SIGINT, "interrupted", 130), (signal.SIGTERM, "terminated", 143)],
    ids=["ctrl-c", "sigterm"],
)
def test_in_a_terminal_a_signal_saves_and_resume_goes_on(
    signum: signal.Signals, said: str, code: int, tmp_path: Path
) -> None:
    out = str(tmp_path / "my run")
    flags = ["--iterations", "100000", "--eval-every", "0", "--eval-tasks", "5", "--no-plots"]
    terminal = Terminal("train", *flags, *execution("torch"), "--out", out)
    terminal.expect("tasks/s")
    terminal.process.send_signal(signum)
    terminal.expect("saved; continue with: metaframe resume")
    assert terminal.wait() == code
    assert f"metaframe resume '{out}'" in "".join(terminal.shown.splitlines())
    assert said in terminal.shown
    step = read_checkpoint(latest_checkpoint(Path(out) / "checkpoints")).step
    assert step > 0
    assert main(["resume", out, "--iterations", str(step + 2), "--no-plots", "-q"]) == 0
    assert read_checkpoint(latest_checkpoint(Path(out) / "checkpoints")).step == step + 2
