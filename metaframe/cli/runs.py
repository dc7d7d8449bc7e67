"""Runs: trained in a folder, continued there, evaluated and drawn."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metaframe.backend.registry import load_backend
from metaframe.cli import datasets
from metaframe.cli.applicable import in_words
from metaframe.cli.classes import check_classes
from metaframe.cli.errors import UsageError
from metaframe.cli.experiment import Experiment, selected
from metaframe.cli.extension import check_extension, extended
from metaframe.cli.output import Output, finite
from metaframe.cli.run_config import RunConfig
from metaframe.cli.run_folder import (
    CHECKPOINTS,
    CONFIG,
    begin,
    check_free,
    in_use,
    is_of,
    opened,
    write_result,
)
from metaframe.distributed import Workers
from metaframe.distributed.agreement import agree
from metaframe.distributed.session import is_restarted
from metaframe.errors import CheckpointError, MissingDependencyError, nearest
from metaframe.files.write import write_atomically
from metaframe.training.callbacks import Callback, EarlyStopping
from metaframe.training.checkpoint import (
    BEST,
    Checkpoint,
    Checkpoints,
    checkpoint_files,
    latest_checkpoint,
    load_parameters,
    read_checkpoint,
)
from metaframe.training.metrics import MetricsLog
from metaframe.training.progress import ProgressBar


@dataclass(frozen=True)
class Extras:
    """Side effects of a run, none of which is part of its settings."""

    plots: bool = True
    tensorboard: bool = False


Start = Callable[[Experiment, Workers], None]
"""Prepares the folder, or the trainer, for the first step. Called when nothing else can fail."""


def train(
    config: RunConfig, folder: Path, output: Output, extras: Extras, *, overwrite: bool = False
) -> dict[str, Any]:
    """Begin a run in `folder`, train, evaluate, and return the result.

    What fails before the first step leaves the folder as it was. Processes that torchrun has
    started again go on with the run that they began.

    Raises:
        UsageError: there is a run in it already.
    """
    if is_restarted() and is_of(config, folder):
        return go_on(config, folder, output, extras)
    check_free(folder, overwrite=overwrite)

    def start(experiment: Experiment, workers: Workers) -> None:
        del experiment
        if workers.is_first:
            begin(config, folder, overwrite=overwrite)
        workers.tell("begun")  # and nobody looks at what was there before

    return _trained(config, folder, output, extras, start)


def go_on(config: RunConfig, folder: Path, output: Output, extras: Extras) -> dict[str, Any]:
    """Train on from the last checkpoint in `folder`, evaluate, and return the result.

    Another number of outer steps than the run has so far, or another patience, is recorded there;
    other changes are for this time.

    Raises:
        UsageError: more steps than that were taken already, the run would stop early at once, or
            the data has other classes.
        CheckpointError: the last checkpoint or the best one is damaged.
    """
    before = opened(folder, {})
    check_classes(config, folder)

    def start(experiment: Experiment, workers: Workers) -> None:
        _restore(experiment, folder, output)
        after = extended(before, config)
        if after == before:
            return
        check_extension(experiment, before, output)
        if workers.is_first:
            write_atomically(folder / CONFIG, after.to_toml().encode())

    return _trained(config, folder, output, extras, start)


def _trained(
    config: RunConfig, folder: Path, output: Output, extras: Extras, start: Start
) -> dict[str, Any]:
    started = time.perf_counter()
    datasets.check_tasks(config)
    if extras.tensorboard and importlib.util.find_spec("tensorboardX") is None:
        raise MissingDependencyError("TensorBoard", "tensorboardX", "pip install tensorboardX")
    with selected(config) as workers:
        backend = load_backend(config.backend or "")
        agree(backend, config=config.as_dict())
        experiment = Experiment(config)
        agree(backend, first_tasks=experiment.check())
        with in_use(folder) if workers.is_first else nullcontext():
            start(experiment, workers)
            output.remark(f"settings: {in_words(config)}")
            stopped = _fit(experiment, folder, output, extras)
            workers.tell("trained")  # and the first one has written its last checkpoint
            chosen = _choose(experiment, folder)
            result = {
                "stopped": stopped,
                "steps": experiment.trainer.step,
                "seconds": round(time.perf_counter() - started, 1),
                **_measured(experiment, chosen, output),
            }
            if workers.is_first:
                write_result(folder, result)
            if extras.plots and workers.is_first:
                draw(experiment, folder, output)
    return result


def _restore(experiment: Experiment, folder: Path, output: Output) -> None:
    found, best = checkpoint_files(folder / CHECKPOINTS), folder / CHECKPOINTS / BEST
    if not found:
        return
    earlier = f"from {found[-2].name}" if found[1:] else "from the beginning"
    latest = _whole(found[-1], f"go on {earlier}")
    if best.exists():
        _whole(best, "go on without it")
    experiment.trainer.restore(latest.arrays, latest.plain)
    output.remark(f"continuing after {experiment.trainer.step} steps")


def _whole(file: Path, without: str) -> Checkpoint:
    try:
        return read_checkpoint(file)
    except CheckpointError as error:
        raise CheckpointError(f"{error} Or move the file away, to {without}.") from error


def evaluate(
    folder: Path, config: RunConfig, checkpoint: str | None, output: Output
) -> dict[str, Any]:
    """Evaluate a checkpoint of the run in `folder`: "best", "latest", a file, or the usual one.

    Raises:
        UsageError: no such checkpoint, or the data has other classes to test on.
    """
    check_classes(config, folder, ["test"])
    with selected(config):
        experiment = Experiment(config)
        chosen = _choose(experiment, folder, checkpoint)
        return _measured(experiment, chosen, output)


def plot(folder: Path, config: RunConfig, output: Output) -> list[str]:
    """Draw the plots of the run in `folder`; returns the files.

    Raises:
        UsageError: the data has other classes to test on.
    """
    check_classes(config, folder, ["test"])
    with selected(config):
        experiment = Experiment(config)
        _choose(experiment, folder)
        return draw(experiment, folder, output)


def draw(experiment: Experiment, folder: Path, output: Output) -> list[str]:
    """All plots there is data for."""
    if importlib.util.find_spec("matplotlib") is None:
        output.remark("no plots without matplotlib: pip install matplotlib")
        return []
    from metaframe.cli import plots

    return plots.draw_all(experiment, folder)


def _fit(experiment: Experiment, folder: Path, output: Output, extras: Extras) -> str | None:
    config, trainer = experiment.config, experiment.trainer
    remaining = config.iterations - trainer.step
    if remaining <= 0:
        return None
    callbacks: list[Callback] = [
        Checkpoints(folder / CHECKPOINTS, config.checkpoint_every, config.keep, config.as_dict()),
        MetricsLog(folder, tensorboard=extras.tensorboard),
    ]
    if config.patience:
        callbacks.append(EarlyStopping(config.patience))
    if not output.quiet:
        callbacks.append(ProgressBar(output.stderr))
    history = trainer.fit(
        remaining,
        config.meta_batch_size,
        eval_every=config.eval_every or None,
        eval_tasks=_validation(experiment),
        callbacks=callbacks,
        prefetch=config.precision != "float64",  # JAX has float64 switched on in this thread alone
    )
    return history.stopped


def _validation(experiment: Experiment) -> Any:
    config = experiment.config
    if not config.eval_every:
        return None
    sampler = experiment.sampler("validation")
    return [sampler.task(i) for i in range(config.validation_tasks)]


def _choose(experiment: Experiment, folder: Path, wanted: str | None = None) -> str:
    """Load the parameters to evaluate: those that validation chose, otherwise the last."""
    if wanted is None:
        wanted = "best" if (folder / CHECKPOINTS / BEST).exists() else "latest"
    file = latest_checkpoint(folder / CHECKPOINTS) if wanted == "latest" else _named(folder, wanted)
    step = load_parameters(file, experiment.learner).step
    return f"{file.name} (step {step})"


def _named(folder: Path, name: str) -> Path:
    """The checkpoint with this name in the run folder, or this file.

    Raises:
        UsageError: there is neither, with the nearest name.
    """
    inside = folder / CHECKPOINTS
    places = [Path(name), inside / name, folder / name]
    if name == "best":
        places = [inside / BEST]
    for file in places:
        if file.is_file():
            return file
    known = {"latest", *(file.name for file in inside.glob("*.safetensors"))}
    if BEST in known:
        known.add("best")
    raise UsageError(
        f"{folder} has no checkpoint {name!r}, nor is it a file. {nearest(name, known)}"
    )


def _measured(experiment: Experiment, checkpoint: str, output: Output) -> dict[str, Any]:
    config = experiment.config
    output.remark(f"evaluating {checkpoint} on held-out tasks")
    return {
        "checkpoint": checkpoint,
        "metric": "mse" if experiment.dataset.regression else "accuracy",
        "config": config.as_dict(),
        "evaluation": finite(experiment.evaluate().as_dict()),
    }
