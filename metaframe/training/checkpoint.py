"""Checkpoints of a trainer: one file, whole or refused, the same on every backend.

`metaframe.training.array_file` is the form of the file.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from metaframe import arguments
from metaframe.errors import CheckpointError, InputError
from metaframe.files.lock import locked
from metaframe.files.schema import Check, anything, integer, number, record, table, text
from metaframe.files.write import clear_unfinished, write_atomically
from metaframe.training.array_file import decoded, encoded, read_file
from metaframe.training.callbacks import Callback, Run, Trainer, merit
from metaframe.training.parameters import checked_parameters

if TYPE_CHECKING:
    from metaframe.learners.meta_learner import MetaLearner

FORMAT = 1
SUFFIX = ".safetensors"
BEST = f"best{SUFFIX}"

_CONTENT = record(
    {
        "format": integer,
        "backend": text,
        "plain": record({"step": integer}),
        "config": table(anything),
        "arrays": table(anything),
    }
)
_BEST = record({"merit": number})


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The content of a checkpoint file.

    Attributes:
        arrays: by name: "params/...", "statistics/...", "optimizer/...", "rng.<backend>/...".
        plain: what else the trainer needs: step, dtypes, optimizer settings, sampler position.
        config: the run's resolved configuration, as its writer gave it.
        backend: the backend it was written on.

    >>> checkpoint = Checkpoint({"w": np.zeros(2)}, {"step": 7}, {"note": "x"}, "torch")
    >>> checkpoint.step
    7
    """

    arrays: Mapping[str, np.ndarray[Any, Any]]
    plain: Mapping[str, Any]
    config: Mapping[str, Any] = field(default_factory=dict)
    backend: str = ""

    @property
    def step(self) -> int:
        """Outer steps taken."""
        return int(self.plain["step"])


def save_checkpoint(
    path: str | Path, trainer: Trainer, config: Mapping[str, Any] | None = None
) -> None:
    """Write where `trainer` is to `path`, atomically.

    Args:
        path: the file; its directory exists.
        trainer: the trainer.
        config: plain values to keep with it, such as the settings of the run.

    Raises:
        InputError: `config` cannot be written as JSON.
        OSError: the file cannot be written.

    >>> import tempfile
    >>> import torch
    >>> from metaframe import MAML, MetaTrainer, optim
    >>> from metaframe.tasks import SinusoidTaskSampler
    >>> def trainer():
    ...     maml = MAML(torch.nn.Linear(1, 1), inner_lr=0.01)
    ...     loss_fn = torch.nn.functional.mse_loss
    ...     return MetaTrainer(maml, optim.adam(1e-3), loss_fn, SinusoidTaskSampler(seed=0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_checkpoint(f"{folder}/run.safetensors", trainer(), {"note": "before training"})
    ...     read_checkpoint(f"{folder}/run.safetensors").config
    {'note': 'before training'}
    """
    arrays, plain = trainer.state()
    checkpoint = Checkpoint(arrays, plain, dict(config or {}), trainer.maml.backend.name)
    write_atomically(Path(path), encode(checkpoint))


def load_checkpoint(path: str | Path, trainer: Trainer) -> Checkpoint:
    """Continue `trainer` from the checkpoint at `path`, whichever backend wrote it.

    Args:
        path: a file that `save_checkpoint` or `Checkpoints` wrote.
        trainer: a trainer with the same model, algorithm, optimizer and sampler settings.

    Returns:
        What the file holds.

    Raises:
        CheckpointError: a damaged file, or one of another model, algorithm or optimizer.
        InputError: the sampler has another seed or split.

    >>> import tempfile
    >>> import torch
    >>> from metaframe import MAML, MetaTrainer, optim
    >>> from metaframe.tasks import SinusoidTaskSampler
    >>> def trainer():
    ...     maml = MAML(torch.nn.Linear(1, 1), inner_lr=0.01)
    ...     loss_fn = torch.nn.functional.mse_loss
    ...     return MetaTrainer(maml, optim.adam(1e-3), loss_fn, SinusoidTaskSampler(seed=0))
    >>> first, second = trainer(), trainer()
    >>> _ = first.fit(2, meta_batch_size=4)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_checkpoint(f"{folder}/run.safetensors", first)
    ...     checkpoint = load_checkpoint(f"{folder}/run.safetensors", second)
    >>> second.step, checkpoint.backend
    (2, 'torch')
    """
    checkpoint = read_checkpoint(path)
    trainer.restore(checkpoint.arrays, checkpoint.plain)
    return checkpoint


def load_parameters(path: str | Path, maml: MetaLearner) -> Checkpoint:
    """Set the meta-parameters of `maml` to those of the checkpoint at `path`.

    With norm="per-step" the running statistics too, without which the parameters mean little; and
    nothing else. A new trainer over `maml` starts at step 0, and its first step replaces the
    statistics.

    Args:
        path: a file that `save_checkpoint` or `Checkpoints` wrote.
        maml: a learner with the same model and algorithm.

    Returns:
        What the file holds.

    Raises:
        CheckpointError: a damaged file, or one of another model or algorithm.

    >>> import tempfile
    >>> import torch
    >>> from metaframe import MAML, MetaTrainer, optim
    >>> from metaframe.tasks import SinusoidTaskSampler
    >>> def trainer():
    ...     maml = MAML(torch.nn.Linear(1, 1), inner_lr=0.01)
    ...     loss_fn = torch.nn.functional.mse_loss
    ...     return MetaTrainer(maml, optim.adam(1e-3), loss_fn, SinusoidTaskSampler(seed=0))
    >>> trained, other = trainer(), trainer().maml
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_checkpoint(f"{folder}/run.safetensors", trained)
    ...     _ = load_parameters(f"{folder}/run.safetensors", other)
    >>> torch.equal(other.module.weight, trained.maml.module.weight)
    True
    """
    checkpoint = read_checkpoint(path)
    checked_parameters(maml, checkpoint.arrays, checkpoint.plain)()
    return checkpoint


def read_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint at `path`, after checking that it is whole.

    Args:
        path: a file that `save_checkpoint` or `Checkpoints` wrote.

    Returns:
        What the file holds: arrays by name, plain values, the config and the backend's name.

    Raises:
        CheckpointError: no such file, not a checkpoint, damaged, of a newer format, or with
            content that is not what `save_checkpoint` writes.

    >>> read_checkpoint("nowhere")
    Traceback (most recent call last):
    metaframe.errors.CheckpointError: cannot read checkpoint nowhere: No such file or directory.
    """
    return decode(read_file(path), str(path))


def check_plain(config: Mapping[str, Any], plain: Mapping[str, Any]) -> None:
    """Check that whatever is no array can be written as JSON.

    Raises:
        InputError: it cannot, naming what.
    """
    parts = {
        "a checkpoint's config": config,
        "the optimizer's settings": plain.get("optimizer"),
        "the sampler's state()": plain.get("sampler"),
    }
    for what, value in parts.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(
                f"{what} must be plain JSON values in a checkpoint: {error}."
            ) from error


def encode(checkpoint: Checkpoint) -> bytes:
    """The bytes of a checkpoint file."""
    check_plain(checkpoint.config, checkpoint.plain)
    content = {
        "format": FORMAT,
        "backend": checkpoint.backend,
        "plain": checkpoint.plain,
        "config": checkpoint.config,
        "arrays": _described(checkpoint.arrays),
    }
    return encoded(checkpoint.arrays, content)


def decode(data: bytes, name: str = "the checkpoint") -> Checkpoint:
    """The checkpoint in `data`; `name` is what errors call it."""
    content, arrays = decoded(data, name)
    if isinstance(content, dict) and "kind" in content:
        raise CheckpointError(
            f"{name} is no checkpoint of a trainer. Read it by metaframe.load_arrays."
        )
    _check(_CONTENT, content, name)
    if content["format"] != FORMAT:
        raise CheckpointError(
            f"{name} has format {content['format']}, this version of metaframe reads {FORMAT}."
        )
    if content["arrays"] != _described(arrays):
        raise CheckpointError(f"{name} holds other arrays than it says. {_FORGED}")
    return Checkpoint(arrays, content["plain"], content["config"], content["backend"])


_FORGED = "Its checksum is right, so that it was written like this; use another checkpoint."


def _check(schema: Check, content: Any, name: str) -> None:
    try:
        schema(content, "its content")
    except ValueError as error:
        raise CheckpointError(f"{name} is no checkpoint of a trainer: {error}. {_FORGED}") from None


def _described(arrays: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, list[Any]]:
    return {name: [str(x.dtype), *x.shape] for name, x in arrays.items()}


class Checkpoints(Callback):
    """Keeps the last few checkpoints of a run, and the best one, in a folder.

    Saved every so many steps, and at the end of a run, also of one that was interrupted or failed.
    The best is the one whose evaluation had the highest metric, without one the lowest loss, of the
    evaluations since the folder was this run's.

    A folder is of one run, which goes on in it from its last checkpoint, and of one process at a
    time, which holds a lock on it during `fit`. Another run's files stay:
    a run does not start next to checkpoints of later steps, removes only what it saved or goes on
    from, and renames a best one that it does not go on from to best.1.safetensors and so on.

    Args:
        folder: made if it does not exist.
        every: outer steps from one checkpoint to the next.
        keep: how many to keep, at least 1; the best one is kept besides.
        config: kept in each of them.

    Raises:
        InputError: a number out of range; in `fit`, before any step, a folder that another process
            trains in or with checkpoints of later steps, or a config or a sampler's state that
            cannot be written as JSON.

    >>> import tempfile
    >>> import torch
    >>> from metaframe import MAML, MetaTrainer, optim
    >>> from metaframe.tasks import SinusoidTaskSampler
    >>> def trainer():
    ...     maml = MAML(torch.nn.Linear(1, 1), inner_lr=0.01)
    ...     loss_fn = torch.nn.functional.mse_loss
    ...     return MetaTrainer(maml, optim.adam(1e-3), loss_fn, SinusoidTaskSampler(seed=0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     keeper = Checkpoints(folder, every=2, keep=2)
    ...     _ = trainer().fit(5, meta_batch_size=4, callbacks=[keeper])
    ...     [path.name for path in checkpoint_files(folder)]
    ['step-00000004.safetensors', 'step-00000005.safetensors']
    """

    everywhere = False

    def __init__(
        self,
        folder: str | Path,
        every: int,
        keep: int = 3,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        arguments.integer(every, "every", at_least=1)
        arguments.integer(keep, "keep", at_least=1)
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._every = every
        self._keep = keep
        self._config = dict(config or {})
        self._best = -np.inf
        self._own: set[Path] = set()
        self._trainer: Trainer | None = None
        self._lock = ExitStack()

    def is_due(self, step: int) -> bool:
        """True after every so many steps."""
        return step % self._every == 0

    def on_start(self, run: Run) -> None:
        """Lock the folder; find out whether this run goes on from its own and how good that is."""
        check_plain(self._config, run.trainer.state()[1])
        with ExitStack() as lock:
            lock.enter_context(locked(self.folder))
            self._look_around(run)
            self._lock = lock.pop_all()

    def _look_around(self, run: Run) -> None:
        found, step = checkpoint_files(self.folder), run.trainer.step
        if found and found[-1] > self._path(step):
            raise InputError(
                f"{self.folder} has checkpoints of later steps, such as {found[-1].name}, and this "
                f"run starts after step {step}. To go on from there, call "
                "load_checkpoint(latest_checkpoint(folder), trainer) before fit; otherwise name "
                "another folder, or move those files away."
            )
        clear_unfinished(self.folder)
        if run.trainer is not self._trainer:
            self._trainer, self._own = run.trainer, set()
        if self._path(step) in found:
            self._own.update(found)
        best, self._best = self.folder / BEST, -np.inf
        if best.exists() and self._own:
            config = read_checkpoint(best).config
            _check(_BEST, config, str(best))
            self._best = float(config["merit"])
        elif best.exists():
            taken = (best.with_name(f"{best.stem}.{i}{SUFFIX}") for i in itertools.count(1))
            best.rename(next(path for path in taken if not path.exists()))

    def on_evaluation(self, run: Run) -> None:
        """Save the best checkpoint if this evaluation is better than all before."""
        found = merit(run.evaluation)
        if found > self._best:
            self._best = found
            config = {**self._config, "merit": found}
            save_checkpoint(self.folder / BEST, run.trainer, config)

    def on_iteration(self, run: Run) -> None:
        """Save when it is time, or instead of what was saved before an evaluation that failed.

        Not before the step's evaluation, which a run that goes on from here would not come to.
        """
        if run.iteration < 0 or run.trainer.step % self._every == 0:
            self._save(run.trainer)

    def on_end(self, run: Run) -> None:
        """Save the end, unless that was saved already, and unlock the folder."""
        with self._lock:
            if not self._path(run.trainer.step).exists():
                self._save(run.trainer)

    def _save(self, trainer: Trainer) -> None:
        path = self._path(trainer.step)
        save_checkpoint(path, trainer, self._config)
        self._own.add(path)
        mine = [file for file in checkpoint_files(self.folder) if file in self._own]
        for old in mine[: -self._keep]:
            old.unlink(missing_ok=True)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}{SUFFIX}"


def checkpoint_files(folder: str | Path) -> list[Path]:
    """The checkpoints that `Checkpoints` left in `folder`, in the order of their steps."""
    return sorted(Path(folder).glob(f"step-*{SUFFIX}"))


def latest_checkpoint(folder: str | Path) -> Path:
    """The checkpoint with the most steps in `folder`.

    Args:
        folder: a folder that `Checkpoints` saves in.

    Returns:
        The path of the file.

    Raises:
        CheckpointError: there is none.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for step in (50, 100):
    ...         _ = (Path(folder) / f"step-{step:08d}.safetensors").write_bytes(b"")
    ...     latest_checkpoint(folder).name
    'step-00000100.safetensors'
    """
    found = checkpoint_files(folder)
    if not found:
        raise CheckpointError(f"{folder} has no checkpoints (files step-*{SUFFIX}).")
    return found[-1]
