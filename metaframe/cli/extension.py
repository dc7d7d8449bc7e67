"""The settings that a continued run may change: more steps, another patience."""

from __future__ import annotations

import dataclasses

from metaframe.cli.errors import UsageError
from metaframe.cli.experiment import Experiment, schedule
from metaframe.cli.output import Output
from metaframe.cli.run_config import RunConfig
from metaframe.training.callbacks import EarlyStopping, Run


def extended(before: RunConfig, now: RunConfig) -> RunConfig:
    """The settings `before`, with what `now` changes for good and not for this time alone."""
    return dataclasses.replace(before, iterations=now.iterations, patience=now.patience)


def check_extension(experiment: Experiment, before: RunConfig, output: Output) -> None:
    """The run can go on from where it is with the settings of `experiment`.

    Raises:
        UsageError: it has taken more steps already, or would stop early at once.
    """
    config, step = experiment.config, experiment.trainer.step
    if config.iterations < step:
        raise UsageError(
            f"the run has taken {step} steps, received iterations={config.iterations}. Give as "
            "many or more."
        )
    if config.iterations > step and (reason := _stopped(experiment)):
        raise UsageError(
            f"the run stopped after {step} of {before.iterations} steps: {reason}. With "
            f"patience={config.patience} it would again at once. Give it more with --patience, "
            "or 0 for never."
        )
    if config.schedule == "cosine" and config.iterations != before.iterations:
        output.remark(
            f"the cosine schedule now ends after {config.iterations} steps: the next learning rate "
            f"is {schedule(config)(step):.2g}, and was to be {schedule(before)(step):.2g}"
        )


def _stopped(experiment: Experiment) -> str | None:
    """The reason for which early stopping ends the run before the next step, if it does."""
    if not experiment.config.patience:
        return None
    trainer = experiment.trainer
    run = Run(trainer, 0, 0, merits=trainer.state()[1]["merits"])
    EarlyStopping(experiment.config.patience).on_start(run)
    return run.history.stopped
