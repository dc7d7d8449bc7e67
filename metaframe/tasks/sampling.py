"""Tasks as pure functions of (seed, split, index).

Task number `index` is drawn from its own stream of NumPy's counter-based generator Philox, whose
key is (seed, split) and whose counter starts at `index`. Nothing else enters: the same task comes
out on every backend, machine and worker, in any order, and streams of different splits or
indices never meet. A sampler's only state is the index of its next task, so a checkpoint holds
one number and a resumed run goes on with exactly the tasks it would have seen.

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
from metaframe.tasks.task import Task, stack_tasks

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

_WORD = 2**64


def task_rng(seed: int, split: Split, index: int) -> np.random.Generator:
    """The random generator of one task.

    Args:
        seed: 0 <= seed < 2**64.
        split: "train", "validation" or "test".
        index: which task, 0 <= index < 2**64.

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


def permutation(rng: np.random.Generator, n: int) -> np.ndarray[Any, np.dtype[np.intp]]:
    """A uniformly random order of `range(n)`.

    >>> sorted(permutation(task_rng(0, "train", 0), 4).tolist())
    [0, 1, 2, 3]
    """
    return np.argsort(rng.random(n), kind="stable")


def uniform(
    rng: np.random.Generator, bounds: tuple[float, float], shape: tuple[int, ...] = ()
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Numbers uniform in [low, high), float64.

    >>> uniform(task_rng(0, "train", 0), (-5.0, 5.0), (10, 1)).shape
    (10, 1)
    """
    low, high = bounds
    return np.asarray(low + (high - low) * rng.random(shape))


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

    A subclass writes one method, `draw(rng) -> Task`, in NumPy and using nothing but `rng` and
    its own settings. `task` and `sample` are not overridden: training draws whole batches, and
    would pass them by.

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
        """One task of NumPy arrays, from the random numbers of `rng` alone."""

    @property
    def position(self) -> int:
        """The index of the task that `sample` returns next."""
        return self._position

    def task(self, index: int) -> Task:
        """Task number `index`, whatever was sampled before. Does not move `position`."""
        return self._place(self.draw(task_rng(self.seed, self.split, index)))

    def sample(self, meta_batch_size: int) -> list[Task]:
        """Tasks number `position` to `position + meta_batch_size - 1`; moves `position` on."""
        count = arguments.integer(meta_batch_size, "meta_batch_size", at_least=1)
        tasks = [self.task(self._position + i) for i in range(count)]
        self._position += count
        return tasks

    def sample_batch(self, meta_batch_size: int, share: Sequence[int] | None = None) -> Task:
        """The tasks of `sample` as one stacked Task: stacked in NumPy, then placed at once.

        Args:
            meta_batch_size: tasks in the batch.
            share: the numbers, from 0, of those to draw of them; default: all. `position` moves on
                by the whole batch all the same.
        """
        count = arguments.integer(meta_batch_size, "meta_batch_size", at_least=1)
        start = self._position
        numbers = range(count) if share is None else share
        drawn = [self.draw(task_rng(self.seed, self.split, start + i)) for i in numbers]
        batch = self._place(stack_tasks(drawn))
        self._position += count
        return batch

    def state(self) -> dict[str, int | str]:
        """What `restore` needs, as plain values for a checkpoint."""
        return {"seed": self.seed, "split": self.split, "position": self._position}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`, taken from a sampler with the same settings.

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
            arrays = [x.astype(dtype) if x.dtype.kind == "f" else x for x in leaves]
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
            x = x if self.dtype is None else x.astype(self.dtype)
        return backend.asarray(x, dtype, self.device or selection.device)
