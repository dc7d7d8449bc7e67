"""Structures that change from one inner step to the next.

`per_step(x)` marks a structure whose arrays have a leading step axis, in a batch or a learning
rate, whole or in part. Step k of an inner loop gets their k-th rows; what is not marked stays the
same for all steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from metaframe import arguments, tree
from metaframe.backend.contract import Backend
from metaframe.backend.types import Array, Arrays
from metaframe.errors import InputError


class PerStep:
    """A structure of which every inner step gets its own rows. Made by `per_step`."""

    def __init__(self, rows: tree.Tree) -> None:
        self.rows = rows

    def __repr__(self) -> str:
        return f"per_step({self.rows!r})"


tree.register(PerStep, lambda x: ((x.rows,), None, ("per_step",)), lambda _, xs: PerStep(*xs))


def per_step(rows: tree.Tree) -> Any:
    """Mark a structure of which every inner step gets its own rows.

    Args:
        rows: a structure of arrays with a leading step axis of the same length K.

    Returns:
        The marked structure, for `batch` or `lr` of `unroll` and `inner_loop`, or for a part of
        them. In a batch of the steps, such as `maml_step`, the step axis comes after the task axis.

    >>> import torch
    >>> from metaframe import inner_loop, per_step
    >>> def cost(batch, v):
    ...     return (v - batch["target"]) ** 2
    >>> batch = {"target": per_step(torch.tensor([1.0, 3.0]))}
    >>> inner_loop(cost, torch.tensor(0.0), batch, steps=2, lr=0.5)
    tensor(3.)
    """
    return PerStep(rows)


def is_marked(x: object) -> bool:
    """True if `x` was made by `per_step`."""
    return isinstance(x, PerStep)


def contains_marks(spec: tree.TreeSpec) -> bool:
    """True if any part of a structure was made by `per_step`."""
    return PerStep in tree.node_types(spec)


def step_axis_first(structure: tree.Tree, backend: Backend) -> tree.Tree:
    """`structure` with the step axis of what is marked, which came after a task axis, moved ahead.

    So that the rows of every step have the task axis.
    """
    parts, spec = tree.flatten(structure, is_leaf=is_marked)

    def moved(x: Array) -> Array:
        if len(x.shape) < 2:
            raise InputError(
                f"batch: per_step marks an array of shape {tuple(x.shape)}, which has no step axis "
                "after the task axis."
            )
        return backend.ops.transpose(x, (1, 0, *range(2, len(x.shape))))

    return tree.unflatten(
        spec, [PerStep(tree.map(moved, part.rows)) if is_marked(part) else part for part in parts]
    )


def unmarked(structure: tree.Tree) -> tuple[tree.Tree, tuple[bool, ...]]:
    """The structure without its marks, and for each of its leaves whether it was marked.

    >>> unmarked({"x": per_step([1, 2]), "y": 3})
    ({'x': [1, 2], 'y': 3}, (True, True, False))
    """
    parts, spec = tree.flatten(structure, is_leaf=is_marked)
    flags: list[bool] = []
    for part in parts:
        flags += [True] * len(tree.leaves(part)) if is_marked(part) else [False]
    if any(is_marked(part) and contains_marks(tree.structure(part.rows)) for part in parts):
        raise InputError("per_step marks something within what it marks already. Mark it once.")
    contents = [part.rows if is_marked(part) else part for part in parts]
    return tree.unflatten(spec, contents), tuple(flags)


def refuse_marks(structure: tree.Tree, name: str, advice: str) -> None:
    """Raise `InputError` where the argument `name` is marked by per_step, whole or in part."""
    if contains_marks(tree.structure(structure)):
        raise InputError(f"{name} is marked by per_step, which it cannot be. {advice}")


@dataclass(frozen=True)
class Stepwise:
    """A structure of arrays, some of which have a row for each step.

    Attributes:
        data: the structure, without marks.
        part: which of its arrays have rows.
        steps: how many rows they have; None without any.
    """

    data: tree.Packed
    part: tree.Part
    steps: int | None

    @staticmethod
    def of(structure: tree.Tree, owns: Callable[[Any], bool], name: str) -> Stepwise:
        """`structure` taken apart.

        Args:
            structure: with marks or without.
            owns: whether a leaf is an array.
            name: the argument that it is, for errors.

        Raises:
            InputError: what is marked holds no array with a step axis, or of different lengths.
        """
        content, flags = unmarked(structure)
        data = tree.Packed(content, owns)
        chosen = [flags[place] for place in data.places]
        steps = None
        if any(flags):
            steps = _length(content, flags, name)
        return Stepwise(data, tree.Part(tree.structure(data.arrays), chosen), steps)

    @staticmethod
    def plain(data: tree.Packed) -> Stepwise:
        """A structure without marks."""
        return Stepwise(data, tree.Part(data.spec, [False] * len(data.arrays)), None)

    @property
    def fixed(self) -> Arrays:
        """The arrays that stay."""
        return self.part.divide(self.data.arrays)[1]

    @property
    def rows(self) -> Arrays:
        """The arrays that change, with a leading step axis."""
        return self.part.divide(self.data.arrays)[0]

    def at(self, row: Iterable[Array], fixed: Iterable[Array]) -> Arrays:
        """The arrays of one step, in order."""
        return self.part.merge(row, fixed)


def _length(content: tree.Tree, flags: tuple[bool, ...], name: str) -> int:
    found: dict[str, int] = {}
    chains = tree.key_chains(content)
    for chain, leaf, flag in zip(chains, tree.leaves(content), flags, strict=True):
        if not flag:
            continue
        label = f"{name}[{chain!r}]" if chain else name
        length = arguments.leading_axis(leaf, label, "step")
        if length is None:
            raise InputError(
                f"{label} is marked by per_step and has no step axis. A list is a structure: for "
                "an array of its numbers write numpy.array(...)."
            )
        found[label] = length
    if len(set(found.values())) > 1:
        raise InputError(f"the step axis of what per_step marks differs: {found}.")
    return next(iter(found.values()), 0)


def number_of_steps(steps: int | None, given: dict[str, int | None], name: str = "steps") -> int:
    """The number of steps that an argument gives, or the length of what is marked.

    Args:
        steps: the argument `name`.
        given: the lengths of other arguments; None where nothing is marked.
        name: the argument, for errors.

    Raises:
        InputError: none of them says it, or two disagree.

    >>> number_of_steps(None, {"batch": 3, "lr": None})
    3
    """
    known = {what: length for what, length in {name: steps, **given}.items() if length is not None}
    if not known:
        raise InputError(f"{name} is missing, and nothing is marked by per_step to count.")
    if len(set(known.values())) > 1:
        raise InputError(
            f"the number of steps differs: {known}. What per_step marks has one row a step."
        )
    return next(iter(known.values()))
