"""The only door to nested structures.

The rules, for every backend alike:

- dict, `Container`, list, tuple, namedtuple, OrderedDict, deque and registered classes are
  nodes, and so are classes that JAX takes apart, such as Equinox modules, `FrozenDict` and
  `nnx.State`; anything else is a leaf;
- dict and `Container` entries are visited in sorted key order;
- `None` is an empty subtree, never a leaf;
- another library's array wrapper is a leaf to read and to choose, and the array in it is what
  functions of leaves see (`register_wrapper`);
- a leaf's *key chain* joins the keys, field names and indices on the way to it with `/`.

The work is done by optree in the namespace "metaframe", so a user's own registrations in
optree's global namespace are seen, and ours leak nowhere. Backends never see a structure:
public functions flatten once and hand them flat tuples of arrays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, TypeVar

import optree

from metaframe.errors import InputError
from metaframe.tree.foreign import NAMESPACE as NAMESPACE
from metaframe.tree.foreign import (
    Inside,
    adapt_imported_libraries,
    adapters,
    is_wrapper,
    learn_nodes,
    register_class,
)
from metaframe.tree.foreign import register_wrapper as register_wrapper
from metaframe.tree.foreign import unwrapped as unwrapped
from metaframe.tree.foreign import wrapped_as as wrapped_as

Tree = Any
Leaves = tuple[Any, ...]
TreeSpec = optree.PyTreeSpec
T = TypeVar("T")


def bounded(fn: Callable[..., T], name: str) -> Callable[..., T]:
    """`fn`, a walk through the structure `name`, with an error of ours where that has no end.

    Raises:
        InputError: it is nested too deeply, or holds itself.

    >>> inside = {}
    >>> inside["a"] = inside
    >>> leaves(inside)
    Traceback (most recent call last):
    metaframe.errors.InputError: the structure holds itself, or is nested too deeply: more than ...
    """

    def call(*args: Any, **kwargs: Any) -> T:
        try:
            return fn(*args, **kwargs)
        except RecursionError:
            raise InputError(
                f"{name} holds itself, or is nested too deeply: more than "
                f"{optree.MAX_RECURSION_DEPTH} levels, or fewer where Python code walks through "
                "it. Flatten it, or stack what repeats into one array."
            ) from None

    return call


def flatten(tree: Tree, is_leaf: Callable[[Any], bool] | None = None) -> tuple[Leaves, TreeSpec]:
    """The leaves of a structure in canonical order, and the structure that `unflatten` needs.

    Args:
        tree: nested dicts, lists, tuples, named tuples, Containers and registered classes, with
            anything as leaves. None is a structure without leaves.
        is_leaf: `is_leaf(node) -> bool`, true for a node to be taken as a leaf. Default: none is.

    Returns:
        `(leaves, spec)`: a tuple, and a structure that can be compared and hashed.

    Raises:
        InputError: a structure that holds itself, or is nested too deeply.

    >>> leaves, spec = flatten({"b": 2, "a": [1, None]})
    >>> leaves
    (1, 2)
    >>> unflatten(spec, leaves)
    {'b': 2, 'a': [1, None]}
    """
    return flatten_argument(tree, "the structure", is_leaf)


def flatten_argument(
    tree: Tree, name: str, is_leaf: Callable[[Any], bool] | None = None
) -> tuple[Leaves, TreeSpec]:
    """`flatten`, of the argument `name`."""
    if adapters:
        adapt_imported_libraries()
    walk = bounded(optree.tree_flatten, name)
    leaves, spec = walk(tree, is_leaf, namespace=NAMESPACE)
    while learn_nodes(leaves):
        leaves, spec = walk(tree, is_leaf, namespace=NAMESPACE)
    return tuple(leaves), spec


def unflatten(spec: TreeSpec, leaves: Iterable[Any]) -> Tree:
    """Build a structure from its leaves: the inverse of `flatten`.

    Args:
        spec: the structure, as `flatten` or `structure` returned it.
        leaves: as many leaves, in canonical order.

    Returns:
        The structure with these leaves.

    >>> leaves, spec = flatten({"a": 1, "b": (2, 3)})
    >>> unflatten(spec, [10 * leaf for leaf in leaves])
    {'a': 10, 'b': (20, 30)}
    """
    return optree.tree_unflatten(spec, leaves)


def leaves(tree: Tree) -> Leaves:
    """The leaves of `tree` in canonical order.

    Args:
        tree: any structure.

    Returns:
        A tuple.

    >>> leaves({"b": 2, "a": [1, None]})
    (1, 2)
    """
    return flatten(tree)[0]


def structure(tree: Tree) -> TreeSpec:
    """The structure of `tree`; two trees match when these compare equal.

    Args:
        tree: any structure.

    Returns:
        What `unflatten` needs; it can be compared and hashed.

    >>> structure({"a": 1, "b": [2]}) == structure({"b": [0], "a": 0})
    True
    """
    return flatten(tree)[1]


def is_leaf(node: Tree) -> bool:
    """True if it is a leaf or an array in another library's wrapper, and no structure.

    >>> is_leaf(1.0), is_leaf({"w": 1.0}), is_leaf(None)
    (True, False, False)
    """
    if adapters:
        adapt_imported_libraries()
    if is_wrapper(node):
        return True
    return optree.tree_is_leaf(node, namespace=NAMESPACE) and not learn_nodes((node,))


def map(fn: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """Apply a function to corresponding leaves.

    Args:
        fn: a function of one leaf of every structure.
        tree: any structure.
        rest: further structures, each with the structure of `tree`.

    Returns:
        What `fn` returned, in the structure of `tree`.

    Raises:
        InputError: a structure that differs from the first.

    >>> map(lambda a, b: a + b, {"w": 1, "b": (2, 3)}, {"w": 10, "b": (20, 30)})
    {'w': 11, 'b': (22, 33)}
    """
    first, spec = flatten(tree)
    columns = [first] + [same_structure(other, spec, what="tree") for other in rest]
    return unflatten(spec, [fn(*row) for row in zip(*columns, strict=True)])


def same_structure(tree: Tree, spec: TreeSpec, *, what: str) -> Leaves:
    """The leaves of `tree`, after checking that it has structure `spec`.

    Raises:
        InputError: naming the key chains that are missing or unexpected.

    >>> same_structure({"w": 1}, structure({"w": 0}), what="grads")
    (1,)
    """
    found, found_spec = flatten_argument(tree, what)
    if found_spec == spec:
        return found
    if not _dicts.isdisjoint(node_types(found_spec, spec)):
        found, found_spec = flatten(bounded(_with_dicts, what)(tree))
        if found_spec == structure(_with_dicts(unflatten(spec, range(spec.num_leaves)))):
            return found
    want, have = set(chains(spec)), set(chains(found_spec))
    missing, extra = sorted(want - have), sorted(have - want)
    parts = [f"missing {missing}"] if missing else []
    parts += [f"unexpected {extra}"] if extra else []
    detail = "; ".join(parts) or _other_nodes(found_spec, spec)
    raise InputError(f"{what} has another structure: {detail}. Return the same keys and nesting.")


def _other_nodes(found: TreeSpec, expected: TreeSpec) -> str:
    have, want = ({cls.__name__ for cls in node_types(spec)} for spec in (found, expected))
    return f"the keys agree, but it is made of {sorted(have)} and not of {sorted(want)}"


def key_chains(tree: Tree) -> tuple[str, ...]:
    """The key chain of every leaf, in the order of `leaves`.

    Args:
        tree: any structure.

    Returns:
        One text a leaf: its keys and positions joined by "/", and "" for a leaf by itself.

    >>> key_chains({"b": {"w": 1}, "a": [2, 3]})
    ('a/0', 'a/1', 'b/w')
    """
    return chains(structure(tree))


def chains(spec: TreeSpec) -> tuple[str, ...]:
    """The key chain of every leaf of a structure, in order.

    Raises:
        InputError: two leaves have one key chain: a key with "/", or the keys 1 and "1".

    >>> chains(structure({"b": {"w": 1}, "a": [2, 3]}))
    ('a/0', 'a/1', 'b/w')
    """
    found = tuple(
        "/".join(_entry_name(entry) for entry in accessor if not isinstance(entry, Inside))
        for accessor in spec.accessors()
    )
    if len(set(found)) < len(found):
        twice = next(chain for i, chain in enumerate(found) if chain in found[:i])
        raise InputError(
            f"two leaves have the key chain {twice!r}: a key contains '/' or is a number beside "
            "its text. Rename one of them."
        )
    return found


def places(spec: TreeSpec) -> tuple[tuple[tuple[str, tuple[Any, ...]], ...], ...]:
    """For each leaf the key chains of the nodes on the way to it and its own, each with its keys.

    >>> places(structure({"a": [0]}))
    ((('a', ('a',)), ('a/0', ('a', 0))),)
    """
    found = []
    for accessor in spec.accessors():
        steps = [entry for entry in accessor if not isinstance(entry, Inside)]
        names, keys = [_entry_name(e) for e in steps], [e.entry for e in steps]
        sizes = range(1, len(steps) + 1) if steps else (0,)
        found.append(tuple(("/".join(names[:n]), tuple(keys[:n])) for n in sizes))
    return tuple(found)


def children(node: Tree) -> dict[str, Tree]:
    """The children of a node, by the names key chains use; empty for a leaf.

    >>> children({"b": {"w": 1}, "a": None})
    {'a': None, 'b': {'w': 1}}
    """
    if is_leaf(node):
        return {}
    below, spec = _one_level(node)
    return dict(zip(chains(spec), below, strict=True))


def _one_level(node: Tree) -> tuple[Leaves, TreeSpec]:
    return flatten(node, is_leaf=lambda inner: inner is not node)


def _entry_name(entry: optree.PyTreeEntry) -> str:
    # A namedtuple or dataclass entry has a field name, which reads better than its index.
    for attribute in ("field", "name"):
        label = getattr(entry, attribute, None)
        if isinstance(label, str):
            return label
    return str(entry.entry)


def prune(tree: Tree, keep: Sequence[bool]) -> Tree:
    """Drop the leaves whose flag is False.

    Mappings lose the key (and empty sub-mappings disappear); in any other node, which cannot
    lose a field, the place becomes `None`, the empty subtree.

    Args:
        tree: any structure.
        keep: one flag a leaf, in the order of `leaves`.

    Returns:
        The structure with the leaves that are kept.

    Raises:
        InputError: another number of flags than of leaves.

    >>> prune({"a": {"w": 1, "b": 2}, "c": [3, 4]}, (False, False, True, False))
    {'c': [3, None]}
    """
    total = len(leaves(tree))
    if len(keep) != total:
        raise InputError(f"keep has {len(keep)} flags for {total} leaves.")
    if all(keep):
        return tree
    pruned = bounded(_prune, "the structure")(tree, iter(keep))
    return type(tree)() if pruned is None and isinstance(tree, Mapping) else pruned


def _prune(node: Tree, flags: Iterator[bool]) -> Tree:
    if node is None:
        return None
    if is_leaf(node):
        return node if next(flags) else None
    below, spec = _one_level(node)
    kept = [_prune(child, flags) for child in below]
    if all(child is None for child in kept):
        return None
    result = unflatten(spec, kept)
    if not isinstance(result, Mapping):
        return result
    dropped = [key for key, child in zip(spec.entries(), kept, strict=True) if child is None]
    if not isinstance(result, MutableMapping):
        frozen: Any = type(result)
        return frozen({key: value for key, value in result.items() if key not in dropped})
    for key in dropped:
        del result[key]
    return result


def register(
    cls: type[T],
    flatten_fn: Callable[[T], tuple[Sequence[Any], Any, tuple[Any, ...]]],
    unflatten_fn: Callable[[Any, Iterable[Any]], T],
) -> None:
    """Make a class a node of structures.

    Args:
        cls: the class.
        flatten_fn: `flatten_fn(x) -> (children, metadata, keys)`: what the node holds, what else it
            takes to rebuild it, which is compared and hashed, and a key for each child.
        unflatten_fn: `unflatten_fn(metadata, children) -> x`, the inverse. The children may be
            placeholders, so it does not check them.

    >>> class Pair:
    ...     def __init__(self, a, b):
    ...         self.a, self.b = a, b
    >>> keys = ("a", "b")
    >>> register(Pair, lambda p: ((p.a, p.b), None, keys), lambda _, values: Pair(*values))
    >>> key_chains({"p": Pair(1, 2)})
    ('p/a', 'p/b')
    """
    register_class(cls, flatten_fn, unflatten_fn, optree.MappingEntry)


_dicts: set[type] = set()


def register_dict(
    cls: type[T],
    flatten_fn: Callable[[T], tuple[Sequence[Any], Any, tuple[Any, ...]]],
    unflatten_fn: Callable[[Any, Iterable[Any]], T],
) -> None:
    """`register` a subclass of dict that matches a dict with its keys, in the order of these.

    Args:
        cls: the subclass of dict.
        flatten_fn: as for `register`.
        unflatten_fn: as for `register`.

    >>> class Named(dict):
    ...     pass
    >>> def flatten_fn(named):
    ...     keys = tuple(sorted(named))
    ...     return [named[key] for key in keys], keys, keys
    >>> register_dict(Named, flatten_fn, lambda keys, values: Named(zip(keys, values)))
    >>> map(lambda a, b: a - b, {"w": 3}, Named(w=1))
    {'w': 2}
    """
    _dicts.add(cls)
    register(cls, flatten_fn, unflatten_fn)


def _with_dicts(node: Tree) -> Tree:
    """The same with plain dicts in the places of nodes of `register_dict`."""
    if type(node) in _dicts:
        return {key: _with_dicts(value) for key, value in node.items()}
    if node is None or is_leaf(node):
        return node
    below, spec = _one_level(node)
    return unflatten(spec, [_with_dicts(child) for child in below])


def node_types(*specs: TreeSpec) -> Iterator[type]:
    """The classes of the nodes, some more than once.

    >>> list(node_types(structure({"a": [1, 2]})))
    [<class 'dict'>, <class 'list'>]
    """
    for spec in specs:
        if spec.type is not None:  # no leaf
            yield spec.type
            yield from node_types(*spec.children())


def keyed_by_names(spec: TreeSpec) -> bool:
    """True if the keys of all mappings are strings. Structures with the keys 1 and True are equal.

    >>> keyed_by_names(structure({"a": [0, 0]})), keyed_by_names(structure({1: 0}))
    (True, False)
    """
    return all(
        isinstance(entry.entry, str)
        for accessor in spec.accessors()
        for entry in accessor
        if isinstance(entry, optree.MappingEntry)
    )


def register_dataclass(cls: type[T]) -> type[T]:
    """Make a dataclass a node whose fields are its children. Usable as a decorator.

    Fields with `init=False` are not children: the class computes them anew.

    Args:
        cls: the dataclass.

    Returns:
        The class itself.

    Raises:
        InputError: `cls` is not a dataclass.

    >>> @register_dataclass
    ... @dataclasses.dataclass
    ... class Batch:
    ...     x: object
    ...     y: object
    >>> key_chains(Batch(1, {"t": 2}))
    ('x', 'y/t')
    """
    checked: Any = cls
    if not dataclasses.is_dataclass(checked):
        raise InputError(f"{cls.__qualname__} is not a dataclass.")
    names = tuple(field.name for field in dataclasses.fields(checked) if field.init)

    def flatten_fn(node: T) -> tuple[Sequence[Any], Any, tuple[Any, ...]]:
        return [getattr(node, name) for name in names], None, names

    def unflatten_fn(_: Any, values: Iterable[Any]) -> T:
        return cls(**dict(zip(names, values, strict=True)))

    register(cls, flatten_fn, unflatten_fn)
    return cls
