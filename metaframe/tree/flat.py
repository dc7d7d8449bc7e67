"""Structures as flat tuples of arrays: what goes through a backend's transforms."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from metaframe.tree.nodes import (
    Leaves,
    Tree,
    TreeSpec,
    flatten_argument,
    prune,
    structure,
    unflatten,
)


class Flat(NamedTuple):
    """A tree taken apart once, at the door of a public function.

    >>> flat = Flat.of({"a": 1, "b": 2})
    >>> flat.arrays, flat.build((10, 20))
    ((1, 2), {'a': 10, 'b': 20})
    """

    arrays: Leaves
    spec: TreeSpec

    @classmethod
    def of(cls, tree: Tree, name: str = "the structure") -> Flat:
        """`tree`, taken apart; `name` is the argument that it is, for errors."""
        return cls(*flatten_argument(tree, name))

    def build(self, arrays: Iterable[Any]) -> Tree:
        """The tree of these arrays."""
        return unflatten(self.spec, arrays)


class Packed:
    """Trees taken apart into one flat tuple of arrays, and the way back.

    Leaves that are no arrays (numbers, strings, functions) are kept aside as they are, so that a
    backend's transform sees arrays only.

    >>> packed = Packed(({"w": 1.5, "name": "a"}, [2.5]), is_array=lambda x: isinstance(x, float))
    >>> packed.arrays
    (1.5, 2.5)
    >>> packed.unpack((10, 20))
    ({'w': 10, 'name': 'a'}, [20])
    """

    def __init__(
        self, tree: Tree, is_array: Callable[[Any], bool], name: str = "the structure"
    ) -> None:
        leaves, self.spec = flatten_argument(tree, name)
        """The structure, arrays and others."""
        arrays, places = [], []
        aside = list(leaves)
        for i, leaf in enumerate(leaves):
            if is_array(leaf):
                arrays.append(leaf)
                places.append(i)
                aside[i] = None
        self.arrays: Leaves = tuple(arrays)
        """The leaves that are arrays."""
        self.places: tuple[int, ...] = tuple(places)
        """The places of the arrays among the leaves."""
        self._aside = aside

    @property
    def others(self) -> Leaves:
        """The leaves that are no arrays."""
        places = frozenset(self.places)
        return tuple(x for i, x in enumerate(self._aside) if i not in places)

    @classmethod
    def of(cls, spec: TreeSpec, arrays: Leaves) -> Packed:
        """A tree that was taken apart by `flatten`, all of whose leaves are arrays."""
        packed = cls.__new__(cls)
        packed.spec, packed._aside = spec, [None] * len(arrays)
        packed.arrays, packed.places = tuple(arrays), tuple(range(len(arrays)))
        return packed

    def template(self) -> Packed:
        """The structure alone, to keep without the arrays."""
        found = copy.copy(self)
        found.arrays = ()
        return found

    def leaves(self, arrays: Iterable[Any]) -> Leaves:
        """All leaves, with `arrays` in the places of `self.arrays`."""
        if len(self.places) == len(self._aside):  # of every call of a compiled function
            return tuple(arrays)
        leaves = list(self._aside)
        for i, array in zip(self.places, arrays, strict=True):
            leaves[i] = array
        return tuple(leaves)

    def unpack(self, arrays: Iterable[Any]) -> Tree:
        """The tree with `arrays` in the places of `self.arrays`."""
        leaves = self.leaves(arrays)
        return leaves[0] if self.spec.is_leaf() else unflatten(self.spec, leaves)


class Returned:
    """The structure of what a function returns, known once it has run.

    Inside of a transform the function hands flat arrays on, by `flatten`; outside `build` puts
    those of the transform's result together. With `is_array` other leaves are kept aside.

    >>> returned = Returned()
    >>> arrays = returned.flatten({"a": 1, "b": 2})
    >>> returned.build(10 * x for x in arrays)
    {'a': 10, 'b': 20}
    """

    def __init__(self, is_array: Callable[[Any], bool] = lambda leaf: True) -> None:
        self._is_array = is_array
        self._structure = Packed((), is_array)
        self.known = False
        """True if the function has run."""

    def flatten(self, tree: Tree) -> Leaves:
        """The leaves, after noting the structure."""
        packed = Packed(tree, self._is_array)
        self._structure, self.known = packed.template(), True
        return packed.arrays

    def build(self, arrays: Iterable[Any]) -> Tree:
        """A tree of the structure noted last."""
        return self._structure.unpack(arrays)


class Part:
    """Some of the leaves of a structure: taken out, and put back among the others.

    >>> from metaframe.tree.choice import flags
    >>> from metaframe.tree.nodes import flatten, structure
    >>> leaves, spec = flatten({"a": 1, "b": 2, "c": 3})
    >>> part = Part(spec, flags(spec, ["a", "c"]))
    >>> part.divide(leaves)
    ((1, 3), (2,))
    >>> part.merge((10, 30), (2,))
    (10, 2, 30)
    >>> part.structure(leaves) == structure({"a": 0, "c": 0})
    True
    """

    def __init__(self, spec: TreeSpec, flags: Sequence[bool]) -> None:
        self.spec = spec
        """The whole structure."""
        self.flags = tuple(flags)
        self._all = all(flags)

    def divide(self, leaves: Leaves) -> tuple[Leaves, Leaves]:
        """The chosen leaves, and the others."""
        if self._all:
            return tuple(leaves), ()
        flagged = list(zip(leaves, self.flags, strict=True))
        return tuple(x for x, flag in flagged if flag), tuple(x for x, flag in flagged if not flag)

    def merge(self, chosen: Iterable[Any], others: Iterable[Any]) -> Leaves:
        """All leaves, in order."""
        if self._all:
            return tuple(chosen)
        inside, outside = iter(chosen), iter(others)
        return tuple(next(inside if flag else outside) for flag in self.flags)

    def structure(self, leaves: Leaves) -> TreeSpec:
        """The structure without the other leaves, see `prune`."""
        return (
            self.spec if self._all else structure(prune(unflatten(self.spec, leaves), self.flags))
        )
