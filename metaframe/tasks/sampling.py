"""Tasks as pure functions of (seed, split, index).

A task is made from random numbers of its own, which are a part of one stream of NumPy's
counter-based generator Philox: the key is (seed, split), and task `index` has the numbers from
`index * numbers` to `(index + 1) * numbers - 1`. A batch of tasks is therefore one call of the
generator, started at the batch's first task, and nothing else enters: the same task comes out on
every backend, machine and worker, in any order and in batches of any size. A sampler's only state
is the index of its next task, so a checkpoint holds one number and a resumed run goes on with
exactly the tasks it would have seen.

Samplers draw with `Generator.random` alone: it is the top 53 bits of Philox's output, whereas
NumPy reserves the right to change its other distributions between releases.
"""

from __future__ import annotations

import abc
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from metaframe import arguments, tree
from metaframe.backend.selection import Selection, current_selection, is_neutral
from metaframe.errors import InputError, InputTypeError, nearest
from metaframe.tasks.task import Task, TaskBatch, alike, first_of, stack_tasks

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

Numbers = np.ndarray[Any, np.dtype[np.float64]]
Order = np.ndarray[Any, np.dtype[np.intp]]

_WORD = 2**64
_BLOCK = 4
"""Numbers that Philox makes of one value of its counter."""
_AT_ONCE = 2**22
"""Numbers that a shuffle may hold at once."""
_BATCHED = 2**192
"""The first counter of the streams of whole batches; `task_rng` stays below."""


def task_rng(seed: int, split: Split, index: int) -> np.random.Generator:
    """The random generator of one task.

    Args:
        seed: 0 <= seed < 2**64.
        split: "train", "validation" or "test".
        index: which task, 0 <= index < 2**64.

    Returns:
        A NumPy generator, the same one for the same arguments.

    Raises:
        InputError: unknown split, or a number out of range.

    >>> float(task_rng(0, "train", 3).random()) == float(task_rng(0, "train", 3).random())
    True
    >>> float(task_rng(0, "train", 3).random()) == float(task_rng(0, "test", 3).random())
    False

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
    """
    key = [_word("seed", seed), SPLITS.index(check_split(split))]
    # Drawing advances the first word; the third leaves 2**128 numbers to every task.
    return _philox(key, [0, 0, _word("index", index), 0])


def division_rng(seed: int) -> np.random.Generator:
    """The random generator that divides classes among splits; no task's stream meets it."""
    return _philox([_word("seed", seed), len(SPLITS)], [0, 0, 0, 0])


def _philox(key: list[int], counter: list[int]) -> np.random.Generator:
    words = [np.array(values, dtype=np.uint64) for values in (key, counter)]
    return np.random.Generator(np.random.Philox(key=words[0], counter=words[1]))


def task_numbers(
    seed: int, split: Split, indices: Sequence[int], count: int
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """`count` random numbers in [0, 1) for each of some tasks, `(len(indices), count)`.

    They are the same however tasks are put together. Tasks that follow each other are one call of
    the generator.

    >>> numbers = task_numbers(0, "train", range(10), 6)
    >>> numbers.shape, bool((numbers[7:] == task_numbers(0, "train", (7, 8, 9), 6)).all())
    ((10, 6), True)
    """
    blocks = -(-count // _BLOCK)
    parts = []
    for start, length in _runs(indices):
        rng = _numbers_from(seed, split, start * blocks)
        parts.append(rng.random((length, blocks * _BLOCK))[:, :count])
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _numbers_from(seed: int, split: Split, block: int) -> np.random.Generator:
    counter = _BATCHED + block
    words = [counter >> shift & (_WORD - 1) for shift in (0, 64, 128, 192)]
    return _philox([seed, SPLITS.index(split)], words)


def _runs(indices: Sequence[int]) -> list[tuple[int, int]]:
    """`indices` as runs of numbers that follow each other: (first, how many)."""
    if isinstance(indices, range) and indices.step == 1:
        return [(indices.start, len(indices))]
    runs: list[tuple[int, int]] = []
    for index in indices:
        start, length = runs[-1] if runs else (index, 0)
        if index == start + length:
            runs[-1:] = [(start, length + 1)]
        else:
            runs.append((index, 1))
    return runs


def permutations(numbers: Numbers) -> Order:
    """Random orders, one from every row of random numbers.

    Args:
        numbers: (..., n), uniform in [0, 1).

    Returns:
        Integers (..., n): every row is a uniformly random order of `range(n)`.

    >>> permutations(np.array([[0.7, 0.1, 0.4], [0.2, 0.3, 0.9]])).tolist()
    [[1, 2, 0], [0, 1, 2]]
    """
    return np.argsort(numbers, axis=-1, kind="stable")


def choices(numbers: Numbers, sizes: Any) -> Order:
    """From every row of k random numbers, k different ones of `range(size)` in random order.

    Fisher and Yates' shuffle of all rows at once, ended after k exchanges.

    Args:
        numbers: `(rows, k)`, in [0, 1).
        sizes: `(rows,)` or one number for all, at least k.

    Returns:
        Integers (rows, k).

    >>> choices(np.array([[0.0, 0.0], [0.99, 0.99]]), 5).tolist()
    [[0, 1], [4, 0]]
    """
    rows, count = numbers.shape
    sizes = np.broadcast_to(sizes, rows)
    at_once = max(1, _AT_ONCE // int(sizes.max()))
    if rows > at_once:
        starts = range(0, rows, at_once)
        parts = [choices(numbers[i : i + at_once], sizes[i : i + at_once]) for i in starts]
        return np.concatenate(parts)
    taken = np.arange(count)
    picks = taken + (numbers * (sizes[:, None] - taken)).astype(np.intp)
    order = np.empty((rows, int(sizes.max())), np.intp)
    order[:] = np.arange(order.shape[1])
    row = np.arange(rows)
    for i in range(count):
        chosen = order[row, picks[:, i]]
        order[row, picks[:, i]] = order[:, i]
        order[:, i] = chosen
    return order[:, :count]


def scaled(numbers: Numbers, bounds: tuple[float, float]) -> Numbers:
    """Random numbers in [0, 1) as numbers in [low, high).

    >>> scaled(np.array([0.0, 0.5]), (-5.0, 5.0)).tolist()
    [-5.0, 0.0]
    """
    low, high = bounds
    return np.asarray(low + (high - low) * numbers)


def check_split(split: str) -> Split:
    """`split`, if it is the name of one."""
    for known in SPLITS:
        if split == known:
            return known
    raise InputError(f"no split called {split!r}. {nearest(str(split), SPLITS)}")


def resolve_seed(seed: int | None) -> int:
    """`seed`, or a fresh one from the operating system for None."""
    return secrets.randbits(63) if seed is None else _word("seed", seed)


def _word(name: str, value: int) -> int:
    number = arguments.integer(value, name, at_least=0)
    if number >= _WORD:
        raise InputError(f"{name} must be below 2**64, received {name}={number}.")
    return number


def _float_dtype(dtype: Any) -> str | None:
    """The NumPy name of a floating dtype, given by name or as any framework's dtype object."""
    if dtype is None:
        return None
    try:
        known = np.dtype(dtype)
    except TypeError:
        # torch.float32 and tf.float32 are no NumPy dtypes; their repr ends in the NumPy name.
        try:
            known = np.dtype(repr(dtype).rpartition(".")[2])
        except TypeError:
            raise InputTypeError(
                f"dtype must be a NumPy dtype name such as 'float32', received {dtype!r}."
            ) from None
    if known.kind != "f":
        raise InputError(f"dtype must be a floating dtype, received {known.name!r}.")
    return str(known.name)


class IndexedSampler(abc.ABC):
    """Base of samplers whose tasks are pure functions of (seed, split, index).

    A subclass writes one method, `draw(rng) -> Task`, in NumPy and using nothing but `rng` and its
    own settings. That is called once for every task, each with a generator of its own, and costs
    30 to 200 microseconds a task where the compiled step costs 20 or fewer: training then samples
    ahead in a thread, and on small models waits for it all the same. `BatchedSampler` draws all
    tasks of a batch at once; use it where the step is quick.

    `task` and `sample` are not overridden: training draws whole batches, and would pass them by.

    `task` and `sample` return NumPy arrays while no backend is selected, and arrays of the
    selected backend otherwise (`metaframe.set_backend`).

    Args:
        seed: default 0; None takes a fresh one, readable as `sampler.seed`.
        split: which of the three streams, default "train".
        device: where the arrays are placed, by the selected backend's name for it; default: as
            selected. Without a backend, arrays are NumPy's and only None and "cpu" make sense.
        dtype: floating dtype of the arrays, a NumPy name (a framework's dtype object works too);
            default: as selected, "float32" without a backend. Integers keep their dtype.

    >>> import numpy as np
    >>> class Lines(IndexedSampler):
    ...     def draw(self, rng):
    ...         slope, x = rng.random(), rng.random((20, 1))
    ...         return Task(x[:10], slope * x[:10], x[10:], slope * x[10:])
    >>> lines = Lines(seed=1)
    >>> first, second = lines.sample(2)
    >>> np.array_equal(second.support_x, lines.task(1).support_x)
    True
    >>> lines.position
    2
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in ("task", "sample"):
            if getattr(cls, name) is not getattr(IndexedSampler, name):
                raise InputTypeError(
                    f"{cls.__qualname__} overrides {name}(), which training does not call: it "
                    "draws whole batches. Override draw(rng) instead; to change what it returns, "
                    "change what super().draw(rng) returned."
                )

    def __init__(
        self,
        *,
        seed: int | None = 0,
        split: Split = "train",
        device: str | None = None,
        dtype: Any = None,
    ) -> None:
        self.seed = resolve_seed(seed)
        self.split = check_split(split)
        self.device = None if device is None else str(device)
        self.dtype = _float_dtype(dtype)
        self._position = 0

    @abc.abstractmethod
    def draw(self, rng: np.random.Generator) -> Task:
        """Make one task.

        Args:
            rng: the only source of random numbers; the same generator state makes the same task.

        Returns:
            A Task of NumPy arrays.
        """

    @property
    def quick(self) -> bool:
        """True if drawing takes microseconds, so that a thread for it gains nothing."""
        return False

    def rng(self, index: int) -> np.random.Generator:
        """The generator with which `draw` makes a task.

        Args:
            index: the number of the task, 0 <= index < 2**64.

        Returns:
            A NumPy generator.
        """
        return task_rng(self.seed, self.split, index)

    @property
    def position(self) -> int:
        """The index of the task that `sample` returns next."""
        return self._position

    def task(self, index: int) -> Task:
        """The task with a number, whatever was sampled before. Does not move `position`.

        Args:
            index: the number of the task, 0 <= index < 2**64.

        Returns:
            A Task.

        Raises:
            InputError: `index` is out of range.
        """
        return self._place(first_of(self._drawn([_word("index", index)])))

    def tasks(self, indices: Sequence[int]) -> TaskBatch:
        """The tasks with some numbers, as `sample` returns them. Does not move `position`.

        Args:
            indices: the numbers of the tasks, at least one.

        Returns:
            A `TaskBatch` in the order of `indices`.

        Raises:
            InputError: `indices` is empty.
        """
        if not len(indices):
            raise InputError("indices must name at least one task, received none.")
        return TaskBatch.of(self._place(self._drawn(indices)))

    def sample(self, meta_batch_size: int) -> TaskBatch:
        """Tasks number `position` to `position + meta_batch_size - 1`; moves `position` on.

        Args:
            meta_batch_size: how many tasks, at least 1.

        Returns:
            A `TaskBatch`: a sequence of tasks, and one stacked Task of the same arrays. Tasks of
            different sizes, as a `draw` of one's own may make them, come in a list.

        Raises:
            InputError: `meta_batch_size` is below 1.
        """
        if self._together:
            return TaskBatch.of(self.sample_batch(meta_batch_size))
        count = arguments.integer(meta_batch_size, "meta_batch_size", at_least=1)
        tasks = [self.draw(self.rng(self._position + i)) for i in range(count)]
        if alike(tasks):
            found = TaskBatch.of(self._place(stack_tasks(tasks)))
        else:
            found = [self._place(task) for task in tasks]  # type: ignore[assignment]
        self._position += count
        return found

    @property
    def _together(self) -> bool:
        """True if the tasks of a batch are drawn together, and so of one size."""
        return False

    def sample_batch(self, meta_batch_size: int, share: Sequence[int] | None = None) -> Task:
        """The tasks of `sample` as one stacked Task: stacked in NumPy, then placed at once.

        Args:
            meta_batch_size: tasks in the batch.
            share: the numbers, from 0, of those to draw of them; default: all. `position` moves on
                by the whole batch all the same.

        Returns:
            A Task whose arrays have a leading task axis.
        """
        count = arguments.integer(meta_batch_size, "meta_batch_size", at_least=1)
        start = self._position
        indices = range(start, start + count) if share is None else [start + i for i in share]
        batch = self._place(self._drawn(indices))
        self._position += count
        return batch

    def sample_batches(self, batches: int, meta_batch_size: int) -> Task:
        """Several calls of `sample_batch` in one, stacked.

        Args:
            batches: how many batches.
            meta_batch_size: tasks in each of them.

        Returns:
            A Task of arrays (batches, tasks, k, ...).
        """
        total = batches * meta_batch_size
        drawn = self._drawn(range(self._position, self._position + total))
        split = (batches, meta_batch_size)
        placed = self._place(tree.map(lambda x: x.reshape(*split, *x.shape[1:]), drawn))
        self._position += total
        return placed

    def _drawn(self, indices: Sequence[int]) -> Task:
        """Tasks as `draw` makes them, stacked."""
        return stack_tasks([self.draw(self.rng(i)) for i in indices])

    def state(self) -> dict[str, int | str]:
        """The position for `restore`, as plain values for a checkpoint.

        Returns:
            The "seed", the "split" and the "position".
        """
        return {"seed": self.seed, "split": self.split, "position": self._position}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from the state of a sampler with the same settings.

        Args:
            state: what its `state()` returned.

        Raises:
            InputError: the state belongs to another seed or split, or lacks an entry.
        """
        own = self.state()
        if missing := sorted(set(own) - set(state)):
            raise InputError(f"sampler state lacks {missing}; expected the keys {sorted(own)}.")
        for key in ("seed", "split"):
            if state[key] != own[key]:
                raise InputError(
                    f"the state was taken with {key}={state[key]!r}, this sampler has "
                    f"{key}={own[key]!r}. Build it with {key}={state[key]!r}."
                )
        self._position = _word("position", state["position"])

    def _place(self, task: Task) -> Task:
        """`task` with the dtype, framework and device that the settings and selection ask for."""
        leaves, spec = tree.flatten(task)
        selection = current_selection()
        if selection is None:
            if self.device not in (None, "cpu"):
                raise InputError(
                    f"device={self.device!r} needs a backend to place arrays there. Select one: "
                    'metaframe.set_backend("torch").'
                )
            dtype = self.dtype or "float32"
            arrays = [x.astype(dtype, copy=False) if x.dtype.kind == "f" else x for x in leaves]
        else:
            arrays = [self._to_backend(x, selection) for x in leaves]
        placed: Task = tree.unflatten(spec, arrays)
        return placed

    def _to_backend(self, x: Any, selection: Selection) -> Any:
        backend = selection.backend
        if not is_neutral(x):
            return backend.asarray(x, self.dtype if backend.is_floating(x) else None, self.device)
        x = np.asarray(x)
        dtype = None
        if x.dtype.kind == "f":
            dtype = self.dtype or selection.dtype
            # In NumPy, so that the values are the same on every backend and without any.
            x = x if self.dtype is None else x.astype(self.dtype, copy=False)
        return backend.asarray(x, dtype, self.device or selection.device)


class BatchedSampler(IndexedSampler):
    """Base of samplers that draw all tasks of a batch at once, in a few calls of NumPy.

    A subclass says how many random numbers a task takes, and makes tasks of them:
    `draw_batch(numbers) -> Task`, whose row i may depend on row i of `numbers` alone. On 25
    sinusoids that takes 2 microseconds a task, a small part of the time of a compiled step.

    Args:
        seed: as for `IndexedSampler`.
        split: as for `IndexedSampler`.
        device: as for `IndexedSampler`.
        dtype: as for `IndexedSampler`.

    >>> class Lines(BatchedSampler):
    ...     numbers = 21
    ...     def draw_batch(self, numbers):
    ...         slope, x = numbers[:, :1, None], numbers[:, 1:, None]
    ...         y = slope * x
    ...         return Task(x[:, :10], y[:, :10], x[:, 10:], y[:, 10:])
    >>> Lines(seed=1).sample(25)
    TaskBatch of 25: Task(support_x=(10, 1), support_y=(10, 1), query_x=(10, 1), query_y=(10, 1))
    """

    @property
    def quick(self) -> bool:
        """True unless a subclass makes its tasks one by one."""
        return self._together

    @property
    def _together(self) -> bool:
        return type(self).draw is BatchedSampler.draw

    @property
    @abc.abstractmethod
    def numbers(self) -> int:
        """The number of random numbers that a task takes."""

    @abc.abstractmethod
    def draw_batch(self, numbers: Numbers) -> Task:
        """Make the tasks of a batch.

        Args:
            numbers: (tasks, self.numbers), random numbers in [0, 1). Task i depends on row i
                alone.

        Returns:
            One Task of NumPy arrays (tasks, k, ...).
        """

    def draw(self, rng: np.random.Generator) -> Task:
        """Make one task. A subclass that overrides this draws its tasks one by one.

        Args:
            rng: the only source of random numbers.

        Returns:
            A Task of NumPy arrays.
        """
        return first_of(self.draw_batch(rng.random((1, self.numbers))))

    def rng(self, index: int) -> np.random.Generator:
        """The generator whose first numbers are those of a task.

        Args:
            index: the number of the task.

        Returns:
            A NumPy generator.
        """
        return _numbers_from(self.seed, self.split, index * -(-self.numbers // _BLOCK))

    def _drawn(self, indices: Sequence[int]) -> Task:
        if not self._together:  # what a subclass makes of one task
            return super()._drawn(indices)
        return self.draw_batch(task_numbers(self.seed, self.split, indices, self.numbers))
