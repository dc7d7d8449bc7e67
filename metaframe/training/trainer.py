"""MetaTrainer: meta-training of any learner, on any backend, with any kind of optimizer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np

from metaframe import arguments, tree
from metaframe.backend.workers import Workers
from metaframe.core import checks as core_checks
from metaframe.distributed.agreement import agree
from metaframe.errors import CheckpointError, InputError
from metaframe.learners.learner import LossFn
from metaframe.learners.meta_learner import MetaLearner
from metaframe.learners.task_loss import TaskLoss
from metaframe.tasks import Task, TaskSampler, stack_tasks
from metaframe.training import checks
from metaframe.training.batches import is_restorable, warn_of_position
from metaframe.training.blocks import Validation
from metaframe.training.callbacks import Callback, History, Run, watched, watchers_of
from metaframe.training.ending import Ending, ends_alone
from metaframe.training.evaluation import Evaluation, Evaluator, rows_of
from metaframe.training.evaluation import source as source_of
from metaframe.training.finite import REMEDIES, check_finite, remedy, task_to_blame
from metaframe.training.fitting import Fitting
from metaframe.training.interrupt import held_interrupt
from metaframe.training.parameters import STATE, Arrays, checked, checked_parameters, group, streams
from metaframe.training.report import StepReport, on_host
from metaframe.training.step import OuterStep, Schedule, StepSettings, outer_step

STATISTICS_DECAY = 0.9
"""The part that running statistics keep in a step with norm="per-step"; torch's momentum of 0.1."""


class MetaTrainer:
    """Drive meta-training over batches of tasks.

    Args:
        maml: the learner, `MAML` or a relative.
        meta_optimizer: one of `metaframe.optim` (a step is then one compiled program wherever
            compiling is quick), on JAX also an optax transformation, a `torch.optim` optimizer
            over `maml.parameters()`, or a Keras optimizer.
        loss_fn: `loss_fn(prediction, target) -> scalar`, pure.
        task_sampler: where training tasks come from.
        metric: `metric(prediction, target) -> scalar` of a task, reported besides the loss. The
            higher the better: by it `EarlyStopping` stops and `Checkpoints` keeps the best. Negate
            an error.
        schedule: from the number of steps taken to the learning rate of the next one; for an
            optimizer of `metaframe.optim` made without a rate. See `metaframe.training.schedules`.
        settings: how steps run.
        steps_per_epoch: outer steps in an epoch, by which `maml.epoch` is set before each step;
            only algorithms with a schedule of their own, such as `MAMLPlusPlus`, look at it. The
            authors of that take 500.
        support_loss: as for `MAML.meta_value_and_grad`; evaluations use it too.
        call: as for `MAML.meta_value_and_grad`; evaluations use it too.
        weights: `weights(task) -> scalar`, by which a task's loss is multiplied in the outer steps.

    Attributes:
        step: how many outer steps were taken.
        schedule: as given; a new one counts from the next step.
        task_sampler: as given; a new one counts from the next step.
        steps_per_epoch: as given; a new one counts from the next step.

    Raises:
        InputTypeError: an unknown kind of optimizer, or an argument that is not what it should be.
        InputError: no learning rate, or two of them.

    >>> import torch
    >>> from metaframe import MAML, optim
    >>> from metaframe.tasks import SinusoidTaskSampler
    >>> model = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    >>> trainer = MetaTrainer(
    ...     MAML(model, inner_lr=0.01),
    ...     optim.adam(1e-3),
    ...     torch.nn.functional.mse_loss,
    ...     SinusoidTaskSampler(seed=0),
    ... )
    >>> history = trainer.fit(3, meta_batch_size=4)
    >>> len(history.meta_loss), trainer.step
    (3, 3)
    """

    def __init__(
        self,
        maml: MetaLearner,
        meta_optimizer: Any,
        loss_fn: LossFn,
        task_sampler: TaskSampler,
        *,
        metric: LossFn | None = None,
        schedule: Schedule | None = None,
        settings: StepSettings | None = None,
        steps_per_epoch: int = 500,
        support_loss: LossFn | None = None,
        call: Callable[..., Any] | None = None,
        weights: Callable[..., Any] | None = None,
    ) -> None:
        checks.learner(maml, loss_fn, metric)
        if (support_loss, call, weights) != (None, None, None):
            loss_fn = TaskLoss.of(loss_fn, support_loss=support_loss, call=call, weights=weights)
        checks.sampler(task_sampler)
        arguments.integer(steps_per_epoch, "steps_per_epoch", at_least=1)
        if schedule is not None:
            arguments.function(schedule, "schedule")
        self._maml = maml
        self._meta_optimizer = meta_optimizer
        self._loss_fn = loss_fn
        self._metric = metric
        self.schedule = schedule
        self.task_sampler = task_sampler
        self.steps_per_epoch = steps_per_epoch
        self.step = 0
        self.settings = settings = settings or StepSettings()
        self._distributed = settings.distributed
        if settings.distributed and maml.statistics:
            raise InputError(
                "norm='per-step' collects statistics over the tasks of one process, and processes "
                "would drift apart: train without distributed=True, or with another norm."
            )
        scheduled = schedule is not None
        self.outer: OuterStep = outer_step(
            maml, meta_optimizer, loss_fn, metric, settings, scheduled=scheduled
        )
        self._evaluator = Evaluator(maml, loss_fn, metric=metric, settings=settings)
        self.ending: Callable[..., bool] = Ending(maml) if settings.distributed else ends_alone
        self.position: Mapping[str, Any] | None = None
        self.owes_validation = False  # one that came due after this step and is not done
        self.merits: list[float] = []

    @property
    def maml(self) -> MetaLearner:
        """The learner. Steps are made for it, as for the next three; for others, make a trainer."""
        return self._maml

    @property
    def meta_optimizer(self) -> Any:
        """The outer optimizer, as it was given."""
        return self._meta_optimizer

    @property
    def loss_fn(self) -> LossFn:
        """The loss."""
        return self._loss_fn

    @property
    def metric(self) -> LossFn | None:
        """The metric, if there is one."""
        return self._metric

    def rate(self, step: int) -> float | None:
        """The outer learning rate that the schedule gives.

        Args:
            step: the number of outer steps taken.

        Returns:
            The rate of the next step; None without a schedule.
        """
        return None if self.schedule is None else float(self.schedule(step))

    def meta_step(self, tasks: Task | Sequence[Task]) -> float:
        """Run one meta-update over `tasks` and return the mean query loss before it.

        Args:
            tasks: a stacked Task, or a sequence of tasks of one size.

        Returns:
            The mean query loss.

        Raises:
            NonFiniteError: a loss or the meta-gradient is not finite; the learner is then as it
                was before the step.
        """
        batch = tasks if isinstance(tasks, Task) else stack_tasks(tasks)
        if not self._distributed:
            return self.advance(batch).loss
        count = core_checks.tasks(tree.Flat.of(batch), None)
        share = self._workers().share(count)
        return self.advance(tree.map(lambda x: rows_of(x, share), batch), count).loss

    def fit(
        self,
        num_iterations: int,
        meta_batch_size: int,
        *,
        eval_every: int | None = None,
        eval_tasks: Any = None,
        callback: Callable[[int, float], None] | None = None,
        callbacks: Sequence[Callback] = (),
        prefetch: bool = True,
    ) -> History:
        """Meta-train for `num_iterations` outer steps.

        Args:
            num_iterations: meta-updates, 0 or more, on top of those taken before.
            meta_batch_size: tasks in each of them.
            eval_every: evaluate whenever `step` is a multiple of it, so that a run in parts
                evaluates after the same steps as one in a single piece. An evaluation that a
                failure cut short comes first when the run goes on.
            eval_tasks: held-out tasks for that, see `metaframe.training.evaluate`.
            callback: called with `(iteration, meta_loss)` after each step.
            callbacks: what else watches the run.
            prefetch: sample batches ahead in a background thread, from a sampler that can be put
                back and is not `quick`. It changes no result, as long as nothing else draws from
                the training sampler: with a callback that does, turn it off, or give the callback
                a sampler of its own.

        Returns:
            The loss of every iteration and of every evaluation.

        Raises:
            InputError, InputTypeError: `eval_every` without `eval_tasks` or with what is none, what
                is no callback, or a number out of range; before any step. A loss or metric that is
                no scalar; in the first step, before it changes anything.
            NonFiniteError: as `meta_step`, naming the step.
            KeyboardInterrupt: Ctrl-C, after the current step and after the callbacks' `on_end`.
                Processes that share a run agree on it, as on `Run.stop`, after every tenth
                iteration and every evaluation, and all of them raise.
            SystemExit: SIGTERM in the same way, with the exit code 143; not in processes that share
                a run, and not where the signal has a handler.
        """
        arguments.integer(num_iterations, "num_iterations", at_least=0)
        arguments.integer(meta_batch_size, "meta_batch_size", at_least=1)
        if eval_every is not None:
            arguments.integer(eval_every, "eval_every", at_least=1)
            if eval_tasks is None:
                raise InputError(f"eval_every={eval_every} needs eval_tasks, received None.")
            source_of(eval_tasks)  # and not when the first evaluation comes due
        watchers = watchers_of(callbacks, callback)
        share, num_tasks = None, None
        if self._distributed:
            self._agree(num_iterations, meta_batch_size, eval_every)
            share, num_tasks = self._workers().share(meta_batch_size), meta_batch_size
            watchers = [w for w in watchers if w.everywhere or self._workers().is_first]
        run = Run(self, num_iterations, meta_batch_size, merits=self.merits)
        validation = Validation(eval_tasks, eval_every)
        # Several processes leave SIGTERM as it is: JAX listens to it too.
        alone = not self._distributed or self._workers().processes == 1
        held = held_interrupt(run.stop, terminate=alone)
        with watched(run, watchers), held as interrupt, self._standing():
            fitting = Fitting(self, run, validation, watchers, interrupt)
            if not fitting.is_over_before():
                fitting.go(prefetch=prefetch, share=share, num_tasks=num_tasks)
        interrupt.raise_if_held()
        return run.history

    def evaluate(self, tasks: Any) -> float:
        """Adapt to each task and return the mean query loss after it; updates nothing.

        What was compiled is used again by later calls, and by the evaluations of `fit`.

        Args:
            tasks: a list of tasks, a stacked Task, or a sampler, see `metaframe.training.evaluate`.

        Returns:
            The mean over the tasks.
        """
        return self.evaluated(tasks).loss.mean

    def state(self) -> tuple[Arrays, dict[str, Any]]:
        """The state of the training, for a checkpoint. See `save_checkpoint`.

        Returns:
            `(arrays, plain)`: NumPy arrays by name, and plain values that can be written as JSON.
        """
        backend, meta = self.maml.backend, self.maml.meta_parameters()
        optimizer, plain = self.outer.state()
        arrays = {f"params/{name}": on_host(x, backend) for name, x in meta.items()}
        arrays |= {f"statistics/{n}": on_host(x, backend) for n, x in self.maml.statistics.items()}
        arrays |= {f"optimizer/{name}": x for name, x in optimizer.items()}
        random = backend.random_state().items()
        arrays |= {f"rng.{backend.name}/{name}": x for name, x in random}
        position = self.position
        if position is None and is_restorable(self.task_sampler):
            position = self.task_sampler.state()  # type: ignore[attr-defined]
        return arrays, {
            "step": self.step,
            "dtypes": {name: backend.dtype_name(x) for name, x in meta.items()},
            "optimizer": plain,
            "sampler": None if position is None else dict(position),
            "owes_validation": self.owes_validation,
            "merits": list(self.merits),
        }

    def restore(self, arrays: Arrays, plain: Mapping[str, Any]) -> None:
        """Go on from what `state` returned, on this or another backend.

        Hidden random streams, such as those of dropout in torch, go on exactly on the backend they
        come from, and are left as they are on another. A sampler that cannot be put back, for want
        of `state` and `restore`, stays where it is, with a warning. What is refused changes
        nothing.

        Args:
            arrays: the arrays by name that `state` returned, NumPy's or of any backend.
            plain: the plain values that `state` returned.

        Raises:
            CheckpointError: another model, algorithm or optimizer, or values that `state` does not
                return.
            InputError: a sampler with another seed or split.
        """
        checked(STATE, plain)
        step, backend, sampler = plain["step"], self.maml.backend, self.task_sampler
        assign = checked_parameters(self.maml, arrays, plain)
        with ExitStack() as undo:
            if plain["sampler"] is not None and is_restorable(sampler):
                undo.callback(sampler.restore, sampler.state())  # type: ignore[attr-defined]
                sampler.restore(plain["sampler"])  # type: ignore[attr-defined]
            if random := streams(arrays, backend):
                undo.callback(backend.restore_random_state, backend.random_state())
                try:
                    backend.restore_random_state(random)
                except (RuntimeError, TypeError, ValueError) as error:
                    raise CheckpointError(
                        f"{backend.name} refuses the checkpoint's random state: {error}."
                    ) from error
            self.outer.restore(group(arrays, "optimizer/"), plain["optimizer"])
            undo.pop_all()  # nothing can be refused any more
        assign()
        self.step = step
        if step and (plain["sampler"] is None or not is_restorable(sampler)):
            warn_of_position(step, sampler)
        # Checkpoints from before there were these have neither.
        self.owes_validation = bool(plain.get("owes_validation", False))
        self.merits = list(plain.get("merits", []))

    def _agree(self, num_iterations: int, meta_batch_size: int, eval_every: int | None) -> None:
        """All processes start from the same place, down to the values of the parameters."""
        arrays, plain = self.state()
        del plain["merits"]  # measured by each process for itself, perhaps to another last bit
        digests = {
            name: hashlib.sha256(np.ascontiguousarray(x).tobytes()).hexdigest()
            for name, x in arrays.items()
            if not name.startswith("rng.")
        }
        sizes = {"num_iterations": num_iterations, "meta_batch_size": meta_batch_size}
        agree(self.maml.backend, plain=plain, values=digests, eval_every=eval_every, **sizes)

    @contextmanager
    def _standing(self) -> Iterator[None]:
        """Batches are sampled ahead inside; outside the sampler itself says where training is.

        That is after the last step that was taken: the batch of one that failed comes again.
        """
        sampler: Any = self.task_sampler
        self.position = dict(sampler.state()) if is_restorable(sampler) else None
        try:
            yield
        finally:
            if self.position is not None:
                sampler.restore(self.position)
            self.position = None

    def _workers(self) -> Workers:
        return self.maml.backend.workers()

    def advance(self, batch: Task, num_tasks: int | None = None) -> StepReport:
        """Take one step on a stacked batch.

        Args:
            batch: a Task whose arrays have a leading task axis.
            num_tasks: how many tasks the whole step has, where `batch` is one process's share.
                Default: those of `batch`.

        Returns:
            The results before the update.

        Raises:
            NonFiniteError: a loss or the meta-gradient is not finite; the learner is then as it
                was before the step.
        """
        self.maml.epoch = self.step // self.steps_per_epoch
        statistics = self.maml.statistics
        try:
            if statistics:
                self._collect(batch)
            outcome = self.outer(batch, self.rate(self.step), num_tasks)
            check_finite(outcome.report, self.step, lambda task: self.blame(batch, task))
            outcome.apply()
        except BaseException:
            self.maml.assign_statistics(statistics)
            raise
        self.step += 1
        self.owes_validation = False
        return outcome.report

    def _collect(self, batch: Task) -> None:
        settings = self.settings
        self.maml.collect_statistics(
            self.loss_fn,
            batch,
            decay=STATISTICS_DECAY if self.step else 0.0,  # at first there are none to keep
            task_map=settings.task_map,
            chunk_size=settings.chunk_size,
            compiled=settings.compiled,
        )

    def blame(self, batch: Task, task: int | None = None) -> tuple[int | None, str]:
        """Find the task of a batch whose loss or gradient is not finite.

        Args:
            batch: a Task whose arrays have a leading task axis.
            task: its index, where the loss shows it. Default: found by the gradient of each task.

        Returns:
            The index, or None if no single task is to blame, and a remedy in words.
        """
        if self._distributed and self._workers().processes > 1:
            return task, REMEDIES  # a process that does not have the task could not tell
        if task is None:
            task = task_to_blame(self.maml, self.loss_fn, batch)
        return task, REMEDIES if task is None else remedy(self.maml, batch, task)

    def evaluated(self, tasks: Any) -> Evaluation:
        """Evaluate the learner by the settings of the trainer.

        Args:
            tasks: a stacked Task, or a sequence of tasks.

        Returns:
            The losses and scores after adaptation.
        """
        return self._evaluator(tasks, inductive=False, whole_curve=False)
