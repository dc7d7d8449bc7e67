"""Task: the examples a learner adapts on, and the examples it is then judged by.

A Task is a node for `metaframe.tree`, and for the frameworks' own `jit` and `vmap`. Tasks can be
mapped over, and stacked into one Task whose arrays carry a leading task axis: the `batch` of the
steps.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, cast, overload, runtime_checkable

import numpy as np

from metaframe import tree
from metaframe.backend.registry import register_with_frameworks
from metaframe.backend.selection import backend_of, is_neutral
from metaframe.errors import InputError, InputTypeError

Array = Any
Shape = tuple[Any, ...]


# Comparing arrays field by field has no truth value, so tasks compare by identity.
@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """One few-shot task.

    Fields are arrays whose leading axis counts examples, or nested structures of such arrays.
    In a stacked task (`stack_tasks`) a task axis comes first.

    Args:
        support_x: inputs to adapt on, `(k_support, ...)`.
        support_y: their targets, `(k_support, ...)`.
        query_x: inputs to evaluate the adapted model on, `(k_query, ...)`.
        query_y: their targets, `(k_query, ...)`.

    Raises:
        InputError: inputs and targets of different length, no examples at all, or support and
            query that differ in more than their length. Only plain arrays are checked.

    >>> import numpy as np
    >>> Task(np.zeros((10, 1)), np.zeros((10, 1)), np.zeros((5, 1)), np.zeros((5, 1)))
    Task(support_x=(10, 1), support_y=(10, 1), query_x=(5, 1), query_y=(5, 1))
    >>> Task(np.zeros(10), np.zeros(9), np.zeros(5), np.zeros(5))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    metaframe.errors.InputError: support_x has 10 examples and support_y has 9; ...
    """

    support_x: Array
    support_y: Array
    query_x: Array
    query_y: Array

    def __post_init__(self) -> None:
        register_with_frameworks(Task, _flatten, _unflatten)
        _check_lengths("support_x", self.support_x, "support_y", self.support_y)
        _check_lengths("query_x", self.query_x, "query_y", self.query_y)
        shapes = {name: _shape(getattr(self, name)) for name in _FIELDS}
        _check_axes("support_x", "query_x", shapes)
        _check_axes("support_y", "query_y", shapes)

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={_describe(getattr(self, name))}" for name in _FIELDS)
        return f"Task({fields})"


_FIELDS = tuple(field.name for field in dataclasses.fields(Task))


def _shape(x: Array) -> Shape | None:
    """The shape of a plain array with at least one axis, otherwise None."""
    shape = getattr(x, "shape", None)
    return tuple(shape) if shape else None


def _check_lengths(x_name: str, x: Array, y_name: str, y: Array) -> None:
    x_shape, y_shape = _shape(x), _shape(y)
    for name, shape in ((x_name, x_shape), (y_name, y_shape)):
        if shape and shape[0] == 0:
            raise InputError(f"{name} has no examples: its shape is {shape}. Give at least one.")
    if x_shape and y_shape and x_shape[0] != y_shape[0]:
        raise InputError(
            f"{x_name} has {x_shape[0]} examples and {y_name} has {y_shape[0]}; they must have as "
            f"many. Received shapes {x_shape} and {y_shape}."
        )


def _check_axes(support_name: str, query_name: str, shapes: Mapping[str, Shape | None]) -> None:
    support, query = shapes[support_name], shapes[query_name]
    if not (support and query):
        return
    counted = 1 if _is_stacked(**shapes) else 0
    differ = len(support) != len(query) or any(
        i != counted and not _same(*lengths)
        for i, lengths in enumerate(zip(support, query, strict=True))
    )
    if differ:
        raise InputError(
            f"{support_name} has shape {support} and {query_name} has shape {query}; they must "
            "have the same number of axes and may differ in length only."
        )


def _is_stacked(
    support_x: Shape | None, support_y: Shape | None, query_x: Shape | None, query_y: Shape | None
) -> bool:
    """True if these may be shapes of a stacked task, with its examples along the second axis."""
    known = [shape for shape in (support_x, support_y, query_x, query_y) if shape]
    pairs = [(x, y) for x, y in ((support_x, support_y), (query_x, query_y)) if x and y]
    return all(len(shape) > 1 and _same(shape[0], known[0][0]) for shape in known) and all(
        _same(x[1], y[1]) for x, y in pairs
    )


def _same(a: int | None, b: int | None) -> bool:
    """True if axes have the same length, as far as that is known. TensorFlow may not know it."""
    return a is None or b is None or a == b


def _describe(x: Array) -> str:
    shape = _shape(x)
    return repr(x) if shape is None else str(shape)


def _flatten(task: Task) -> tuple[list[Array], tuple[str, ...], tuple[str, ...]]:
    return [getattr(task, name) for name in _FIELDS], _FIELDS, _FIELDS


def _unflatten(_: tuple[str, ...], children: Iterable[Array]) -> Task:
    # Not through __init__: structures are rebuilt around shapes, means and placeholders too,
    # for which the checks on examples have no meaning.
    task = object.__new__(Task)
    for name, child in zip(_FIELDS, children, strict=True):
        object.__setattr__(task, name, child)
    return task


tree.register(Task, _flatten, _unflatten)


class TaskBatch(Task, Sequence[Task]):
    """Several tasks: a sequence of them, and one stacked Task of the same arrays.

    `batch[3]` and iteration give tasks, as views of the stacked arrays where the framework has
    views; `batch[:3]` is a batch. Whatever takes a stacked Task takes a batch. In structures and
    transforms it is a plain stacked Task.

    Args:
        support_x: as for `Task`, with a leading task axis.
        support_y: as for `Task`, with a leading task axis.
        query_x: as for `Task`, with a leading task axis.
        query_y: as for `Task`, with a leading task axis.

    >>> import numpy as np
    >>> x, y = np.zeros((25, 10, 1)), np.ones((25, 10, 1))
    >>> batch = TaskBatch(x, y, x, y)
    >>> len(batch), batch[24], batch.support_x.shape
    (25, Task(support_x=(10, 1), support_y=(10, 1), query_x=(10, 1), query_y=(10, 1)), (25, 10, 1))
    >>> batch[:2]
    TaskBatch of 2: Task(support_x=(10, 1), support_y=(10, 1), query_x=(10, 1), query_y=(10, 1))
    """

    @classmethod
    def of(cls, stacked: Task) -> TaskBatch:
        """The tasks of a stacked Task, which has been checked.

        Args:
            stacked: a Task whose arrays have a leading task axis.

        Returns:
            A batch of the same arrays.
        """
        register_with_frameworks(TaskBatch, _flatten, _unflatten)
        register_with_frameworks(Task, _flatten, _unflatten)
        batch = object.__new__(cls)
        batch.__dict__.update(stacked.__dict__)
        return batch

    def __post_init__(self) -> None:
        register_with_frameworks(TaskBatch, _flatten, _unflatten)
        super().__post_init__()

    def __len__(self) -> int:
        return int(tree.leaves(self.support_x)[0].shape[0])

    @overload
    def __getitem__(self, index: int) -> Task: ...

    @overload
    def __getitem__(self, index: slice) -> TaskBatch: ...

    def __getitem__(self, index: int | slice) -> Task:
        if isinstance(index, slice):
            return TaskBatch.of(tree.map(lambda x: x[index], self))
        at, count = operator.index(index), len(self)
        if not -count <= at < count:  # JAX would take the last one
            raise IndexError(f"task {at} of a batch of {count}")
        task: Task = tree.map(lambda x: x[at], self)
        return task

    def __iter__(self) -> Iterator[Task]:
        return (self[i] for i in range(len(self)))

    def __add__(self, other: Iterable[Task]) -> list[Task]:
        """The tasks of both, as adding lists of tasks gives them."""
        return [*self, *other]

    def __radd__(self, other: Iterable[Task]) -> list[Task]:
        return [*other, *self]

    def __repr__(self) -> str:
        return f"TaskBatch of {len(self)}: {self[0]!r}" if len(self) else "TaskBatch of 0"


tree.register(cast(type[Task], TaskBatch), _flatten, _unflatten)


def plain(batch: Task) -> Task:
    """A batch as a Task and nothing else, of the same arrays."""
    return batch if type(batch) is Task else _unflatten((), (getattr(batch, n) for n in _FIELDS))


def alike(tasks: Sequence[Task]) -> bool:
    """True if tasks of plain arrays have the same structure and shapes, so that they stack."""
    forms = [(tree.structure(t), [np.shape(x) for x in tree.leaves(t)]) for t in tasks]
    return all(form == forms[0] for form in forms)


def first_of(stacked: Task) -> Task:
    """The first task of a stacked Task."""
    task: Task = tree.map(lambda x: x[0], stacked)
    return task


@runtime_checkable
class TaskSampler(Protocol):
    """Anything that samples tasks: what training and evaluation ask for.

    `sample` is all that it has to have. What it may have besides, and what that is good for:

    - `state()`, plain JSON values that say where it stands, and `restore(state)`, which goes back
      there. With both, training samples ahead in a thread, a checkpoint holds the position, and a
      resumed run goes on with the tasks that would have come next. Without, its tasks are those
      that the sampler happens to give, and `load_checkpoint` warns.
    - `sample_batch(meta_batch_size)`, the same tasks stacked in one `Task`. Training then calls it
      and not `sample`, which would place each task alone. Override both or neither.
    - `task(index)`, for which see `evaluate`.

    `IndexedSampler` has all of them.

    >>> class Fixed:
    ...     def sample(self, meta_batch_size):
    ...         return [Task(1.0, 2.0, 3.0, 4.0)] * meta_batch_size
    >>> isinstance(Fixed(), TaskSampler)
    True
    """

    def sample(self, meta_batch_size: int) -> Sequence[Task]:
        """The next tasks.

        Args:
            meta_batch_size: how many, at least 1.

        Returns:
            A sequence of that many tasks.
        """
        ...


def stack_tasks(tasks: Sequence[Task]) -> Task:
    """One Task whose arrays have a leading task axis.

    Args:
        tasks: at least one task; all with the same structure and shapes, and with arrays of one
            framework (NumPy arrays stay NumPy arrays).

    Returns:
        a Task with fields `(len(tasks), k, ...)`; of a `TaskBatch` its own arrays, not copied.

    Raises:
        InputError: no tasks, or tasks of different structure or shape, naming the field.
        InputTypeError: an element that is not a Task, or arrays of two frameworks.

    >>> import numpy as np
    >>> x = np.zeros((10, 1))
    >>> stack_tasks([Task(x, x, x, x)] * 25)
    Task(support_x=(25, 10, 1), support_y=(25, 10, 1), query_x=(25, 10, 1), query_y=(25, 10, 1))
    """
    if isinstance(tasks, TaskBatch) and len(tasks):
        return plain(tasks)
    tasks = list(tasks)
    if not tasks:
        raise InputError("stack_tasks needs at least one task, received none.")
    for i, task in enumerate(tasks):
        if not isinstance(task, Task):
            raise InputTypeError(f"task {i} is a {type(task).__qualname__}, expected a Task.")
    register_with_frameworks(Task, _flatten, _unflatten)
    spec, chains = tree.structure(tasks[0]), tree.key_chains(tasks[0])
    rows = [tree.same_structure(task, spec, what=f"task {i}") for i, task in enumerate(tasks)]
    columns = [
        _stack(chain, column) for chain, column in zip(chains, zip(*rows, strict=True), strict=True)
    ]
    stacked: Task = tree.unflatten(spec, columns)
    return stacked


def _stack(chain: str, column: tuple[Array, ...]) -> Array:
    shapes = [tuple(getattr(x, "shape", ())) for x in column]
    for i, shape in enumerate(shapes):
        if shape != shapes[0]:
            raise InputError(
                f"tasks of different shapes cannot be stacked: {chain} is {shapes[0]} in task 0 "
                f"and {shape} in task {i}. Sample tasks of one size, or run them one at a time."
            )
    if all(is_neutral(x) for x in column):
        return np.stack([np.asarray(x) for x in column])
    return backend_of(*column).ops.stack(column, axis=0)
