"""Choices among the leaves of a structure, by key chain.

A key chain names a place: a leaf, or a node with everything below it. A key may contain "/" itself,
as those of Haiku do, so a chain is compared with the places of a structure and never with the
beginnings of other chains. One that names two places is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from metaframe.errors import InputError, InputTypeError, UnknownKeyError, nearest
from metaframe.tree.foreign import unwrapped
from metaframe.tree.nodes import Tree, TreeSpec, bounded, chains, children, is_leaf, places
from metaframe.tree.nodes import structure as structure_of

_FORMS = (
    "None for all, a key chain 'a/b', a sequence of key chains, or a nested mapping of booleans"
)


def chosen(tree: Tree, choice: Any, keep: bool = True) -> tuple[bool, ...]:
    """One flag a leaf: whether `choice` selects it.

    Args:
        tree: the structure to choose from.
        choice: `None` (everything), a key chain `"a/b"` (a leaf or a whole subtree), a sequence
            of key chains, or a nested mapping of booleans (sequences inside it are entered
            too) where False and missing both mean not chosen.
        keep: False inverts the choice, except for `None`.

    Returns:
        A tuple of booleans, in the order of `leaves`.

    Raises:
        UnknownKeyError: a chain that names nothing, with the nearest one that exists.
        InputTypeError: a choice of another form.
        InputError: a chain that names two places.

    >>> chosen({"a": {"w": 0, "b": 0}, "c": 0}, {"a": {"w": True}})
    (False, True, False)
    >>> chosen({"a": {"w": 0, "b": 0}, "c": 0}, "a", keep=False)
    (False, False, True)
    """
    return flags(structure_of(tree), choice, keep)


def flags(
    spec: TreeSpec, choice: Any, keep: bool = True, *, name: str = "the choice"
) -> tuple[bool, ...]:
    """`chosen`, of a structure that was taken apart; `name` is the argument, for errors.

    >>> flags(structure_of({"a": 0, "b": 0}), "b")
    (False, True)
    """
    if choice is None:
        return (True,) * spec.num_leaves
    return bounded(_Choice(spec, name).flags, name)(choice, keep)


class _Choice:
    """The places of a structure, among which an argument chooses."""

    def __init__(self, spec: TreeSpec, name: str) -> None:
        self._name = name
        self._count = spec.num_leaves
        self._at: dict[str, dict[tuple[Any, ...], list[int]]] = {}
        for leaf, above in enumerate(places(spec)):
            for chain, place in above:
                self._at.setdefault(chain, {}).setdefault(place, []).append(leaf)
        self._known = tuple(above[-1][0] for above in places(spec))

    def flags(self, choice: Any, keep: bool) -> tuple[bool, ...]:
        wanted: Iterable[str]
        if isinstance(choice, str):
            wanted = (choice,)
        elif isinstance(choice, Mapping):
            wanted = self._true(choice, "")
        else:
            wanted = self._listed(choice)
        selected = {leaf for chain in wanted for leaf in self._matching(chain)}
        return tuple((leaf in selected) == keep for leaf in range(self._count))

    def _listed(self, choice: Any) -> list[str]:
        if not isinstance(choice, Iterable) or isinstance(choice, bytes):
            raise InputTypeError(
                f"{self._name} is {_FORMS}; received {choice!r:.60} ({type(choice).__name__})."
            )
        found = []
        for chain in choice:
            # The numbers are the names of the items of a list.
            if isinstance(chain, bool) or not isinstance(chain, (str, int, np.integer)):
                raise InputTypeError(
                    f"{self._name} has {chain!r:.60} ({type(chain).__name__}) among its key "
                    f"chains. It is {_FORMS}."
                )
            found.append(str(chain))
        return found

    def _matching(self, chain: str) -> list[int]:
        found = self._at.get(chain)
        if found is None:
            raise UnknownKeyError(
                f"no variable at key chain {chain!r}. {nearest(chain, self._known)}"
            )
        if len(found) > 1:
            raise InputError(
                f"{self._name}: the key chain {chain!r} names {len(found)} places, with the keys "
                f"{' and '.join(map(repr, found))}. Rename one of them."
            )
        return next(iter(found.values()))

    def _true(self, choice: Tree, prefix: str) -> list[str]:
        found: list[str] = []
        # A mapping that is no node for us, such as a frozen one, still says what it chooses.
        entries = choice if isinstance(choice, Mapping) else children(choice)
        for key, value in entries.items():
            chain = f"{prefix}{key}"
            self._matching(chain)
            if isinstance(value, Mapping) or not is_leaf(value):
                found += self._true(value, chain + "/")
            elif self._boolean(unwrapped(value), chain):
                found.append(chain)
        return found

    def _boolean(self, value: Any, chain: str) -> bool:
        plain = isinstance(value, (bool, np.bool_, int, np.integer)) and value in (0, 1)
        if plain or (getattr(value, "shape", None) == () and "bool" in str(value.dtype)):
            return bool(value)
        raise InputTypeError(
            f"{self._name}[{chain!r}] must be True or False, received {value!r:.60} "
            f"({type(value).__name__})."
        )


def parts(spec: TreeSpec) -> tuple[tuple[str, ...], ...]:
    """For each leaf its own key chain and those of all nodes that it is in, the nearest first.

    >>> parts(structure_of({"a": {"w": 0}, "a/b": 0}))
    (('a/w', 'a'), ('a/b',))
    """
    chains(spec)  # refuses two leaves of one name
    return tuple(tuple(chain for chain, _ in reversed(above)) for above in places(spec))
