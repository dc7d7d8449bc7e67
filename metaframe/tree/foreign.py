"""Other libraries' classes: those around one array, and those that hold a structure of arrays.

A wrapper is a node with one child, the array, so that functions of leaves see arrays and whatever
puts a structure together again wraps them. To a reader it is a leaf: the step into it has no name
in a key chain, and it is chosen or left out as a whole.

A class that a framework's own transforms take apart, such as an Equinox module or a `FrozenDict` of
Flax, is a node here too. It becomes one when the first of its instances is met.
"""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from types import FunctionType
from typing import Any, NamedTuple, TypeVar

import optree

NAMESPACE = "metaframe"
T = TypeVar("T")

adapters: dict[str, str | Callable[[], None]] = {"ivy": "metaframe.interop.ivy"}
"""Libraries, each with the module that makes its classes nodes once a user has imported it, and
from then on with what that module's `adapt` returned, if it has to look again."""


def adapt_imported_libraries() -> None:
    """Let the adapters of libraries that are imported by now do their work."""
    for name, adapter in tuple(adapters.items()):
        if not isinstance(adapter, str):
            adapter()
            continue
        library = sys.modules.get(name)
        # While it is being imported its classes are not there yet.
        if library is None or getattr(library.__spec__, "_initializing", False):
            continue
        if adapters.pop(name, None) is not None:  # no other thread was faster
            again = importlib.import_module(adapter).adapt(library)
            if again is not None:
                adapters[name] = again


class Node(NamedTuple):
    """The two functions of a framework that take an instance of a class apart and rebuild it."""

    flatten: Callable[[Any], tuple[Sequence[Any], Any, tuple[str, ...]]]
    """`node -> (children, metadata, names of the children)`."""
    unflatten: Callable[[Any, Iterable[Any]], Any]
    """`(metadata, children) -> node`."""


node_finders: list[Callable[[object], Node | None]] = []
"""Functions that say of a leaf which node it really is; None for a leaf."""
PLAIN: set[type] = {bool, int, float, complex, str, bytes, type(None), FunctionType}
"""Types whose instances are leaves, whatever libraries are imported."""
_learning = threading.Lock()


def learn_nodes(leaves: Collection[object]) -> bool:
    """Make the classes of `leaves` nodes that a framework takes apart; return whether any were."""
    if PLAIN.issuperset(map(type, leaves)):
        return False
    return any(_learn(leaf) for leaf in leaves if type(leaf) not in PLAIN)


def _learn(leaf: Any) -> bool:
    if not optree.tree_is_leaf(leaf, namespace=NAMESPACE):
        return False  # where a flattening stopped early
    node = next(filter(None, (find(leaf) for find in node_finders)), None)
    if node is None:
        return False
    with _learning:
        if optree.tree_is_leaf(leaf, namespace=NAMESPACE):  # no other thread was faster
            register_class(type(leaf), *node, optree.MappingEntry)
    return True


def register_class(
    cls: type, flatten: Any, unflatten: Any, entry: type[optree.PyTreeEntry]
) -> None:
    """Make `cls` a node of ours, each step into it an `entry`."""
    register_node: Any = optree.register_pytree_node  # typed for collections, takes any class
    register_node(cls, flatten, unflatten, path_entry_type=entry, namespace=NAMESPACE)


class Inside(optree.PyTreeEntry):
    """The step from a wrapper to its array."""


class _Wrapper(NamedTuple):
    unwrap: Callable[[Any], Any]
    wrap: Callable[[Any], Any]


_wrappers: dict[type, _Wrapper] = {}


def register_wrapper(
    cls: type[T], unwrap: Callable[[T], Any], wrap: Callable[[Any], T | Any]
) -> None:
    """Make `cls`, another library's class around one array of a framework, transparent.

    Args:
        unwrap: the array in a `cls`.
        wrap: the way back. What cannot be wrapped (a placeholder, a name) it returns as it is.

    >>> from metaframe import tree
    >>> class Quantity:
    ...     def __init__(self, value):
    ...         self.value = value
    >>> tree.register_wrapper(Quantity, lambda q: q.value, Quantity)
    >>> tree.leaves({"length": Quantity(2.0)}), tree.key_chains({"length": Quantity(2.0)})
    ((2.0,), ('length',))
    >>> tree.map(lambda x: 2 * x, Quantity(2.0)).value
    4.0
    """
    register_class(
        cls,
        lambda node: ((unwrap(node),), None, (0,)),
        lambda _, children: wrap(*children),
        Inside,
    )
    _wrappers[cls] = _Wrapper(unwrap, wrap)


def is_wrapper(x: object) -> bool:
    """True if `x` is of a registered class."""
    return type(x) in _wrappers


def unwrapped(x: Any) -> Any:
    """The array in another library's wrapper; anything else as it is.

    >>> unwrapped(2.0)
    2.0
    """
    wrapper = _wrappers.get(type(x))
    return x if wrapper is None else wrapper.unwrap(x)


def wrapped_as(spec: optree.PyTreeSpec, x: Any) -> Any:
    """`x` in the wrapper that the first leaf of `spec` is in, if it is in one.

    >>> from metaframe import tree
    >>> wrapped_as(tree.structure({"w": 0}), 2.0)
    2.0
    """
    if not _wrappers or not spec.num_leaves:
        return x
    first = tuple(spec.accessors()[0])
    return _wrappers[first[-1].type].wrap(x) if first and isinstance(first[-1], Inside) else x
