"""Container: a nested mapping with attribute access and arithmetic over its leaves.

It is a `dict` with string keys, so everything that takes a dict takes a Container. Nested plain
dicts become Containers when they are put in. Attribute access is a look-up and nothing else: it
never calls anything on the leaves, and an unknown name raises with the nearest key. A key that
is also a method name (`mean`, `shape`, ...) is reached as `c["mean"]`. A subclass is as much a node
as Container itself, and what is computed from one is one again.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from metaframe import ops, tree
from metaframe.backend.registry import register_with_frameworks
from metaframe.backend.selection import backend_of, refuse_mixed
from metaframe.errors import InputError, UnknownAttributeError, UnknownKeyError, nearest

_INDENT = "    "
_MISSING = object()


class Container(dict[str, Any]):
    """A nested mapping of arrays.

    Args:
        *args: as for `dict`; keys are strings without `/`, and nested dicts are converted.
        **kwargs: entries by key.

    >>> import numpy as np
    >>> v = Container(layer={"w": np.ones((2, 3)), "b": np.zeros(3)})
    >>> v.layer.w.shape
    (2, 3)
    >>> v["layer/b"] is v.layer.b
    True
    >>> v.layr
    Traceback (most recent call last):
    metaframe.errors.UnknownAttributeError: Container has no key 'layr'. Did you mean 'layer'?
    """

    __slots__ = ()

    # NumPy leaves `array * container` to us instead of making an array of objects.
    __array_ufunc__ = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        cls = type(self)
        register_with_frameworks(cls, _flatten, functools.partial(_unflatten, cls))
        self.update(*args, **kwargs)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        tree.register(cls, _flatten, functools.partial(_unflatten, cls))

    # -- mapping -------------------------------------------------------------------------

    def __setitem__(self, key: str, value: Any) -> None:
        if not isinstance(key, str) or not key or "/" in key:
            raise InputError(f"Container keys are non-empty strings without '/', received {key!r}.")
        super().__setitem__(key, _wrap(value))

    def __getitem__(self, key: Any) -> Any:
        """`c["a"]`, `c["a/b"]` (a key chain), or `c[0:1]` (index every leaf)."""
        if not isinstance(key, str):
            return self.map(lambda leaf: leaf[key])
        found = _find(self, key)
        if found is _MISSING:
            raise UnknownKeyError(f"no key {key!r}. {nearest(key, _all_chains(self))}")
        return found

    def __delitem__(self, key: str) -> None:
        """`del c["a"]`, `del c["a/b"]` (a key chain)."""
        above, _, name = key.rpartition("/")
        holder = self[above] if above else self
        if not isinstance(holder, Container):
            raise InputError(
                f"{key!r} cannot be deleted: {above!r} is a {type(holder).__name__} and no "
                f"Container. Replace {above!r} as a whole."
            )
        if name not in holder:
            raise UnknownKeyError(f"no key {key!r}. {nearest(key, _all_chains(self))}")
        dict.__delitem__(holder, name)

    def pop(self, key: str, *default: Any) -> Any:
        """Take out what is at `key`, which may be a key chain; where nothing is, `default`."""
        if default and key not in self:
            return default[0]
        found = self[key]
        del self[key]
        return found

    def __contains__(self, key: object) -> bool:
        """True if there is something at this key or key chain."""
        return isinstance(key, str) and _find(self, key) is not _MISSING

    def get(self, key: str, default: Any = None) -> Any:
        """The value at `key`, which may be a key chain, or `default`."""
        found = _find(self, key)
        return default if found is _MISSING else found

    def __getattr__(self, name: str) -> Any:
        try:
            return dict.__getitem__(self, name)
        except KeyError:
            raise UnknownAttributeError(
                f"Container has no key {name!r}. {nearest(name, self)}"
            ) from None

    def __setattr__(self, name: str, value: Any) -> None:
        if hasattr(type(self), name):
            raise UnknownAttributeError(
                f"{name!r} is a Container method; set the key as container[{name!r}] = value."
            )
        self[name] = value

    def __delattr__(self, name: str) -> None:
        if name not in self:
            raise UnknownAttributeError(f"Container has no key {name!r}. {nearest(name, self)}")
        del self[name]

    def __dir__(self) -> Iterable[str]:
        return [*super().__dir__(), *self]

    def update(self, *args: Any, **kwargs: Any) -> None:
        """As `dict.update`, converting nested dicts."""
        tree.bounded(self._put, "the Container")(dict(*args, **kwargs))

    def _put(self, entries: Mapping[str, Any]) -> None:
        for key, value in entries.items():
            self[key] = value

    def setdefault(self, key: str, default: Any = None) -> Any:
        """As `dict.setdefault`: the value at `key`, or else `default`, which is put there."""
        if key not in self:
            self[key] = default
        return self[key]

    def copy(self) -> Container:
        """A new Container, nested ones copied too, with the same leaves."""
        return type(self)(self)

    def __or__(self, other: Any) -> Container:  # type: ignore[override]
        return type(self)({**self, **other})

    def __ior__(self, other: Any) -> Container:  # type: ignore[override]
        self.update(other)
        return self

    def to_dict(self) -> dict[str, Any]:
        """The same nesting in plain dicts."""
        return {k: v.to_dict() if isinstance(v, Container) else v for k, v in self.items()}

    # -- leaves --------------------------------------------------------------------------

    def map(self, fn: Callable[[Any], Any]) -> Container:
        """`fn` applied to every leaf."""
        result: Container = tree.map(fn, self)
        return result

    @staticmethod
    def multi_map(fn: Callable[..., Any], containers: Sequence[Container]) -> Container:
        """`fn` applied to corresponding leaves of `containers`, which have the same structure."""
        if not containers:
            raise InputError("multi_map needs at least one Container, received none.")
        result: Container = tree.map(fn, *containers)
        return result

    def to_iterator(self) -> Iterator[tuple[str, Any]]:
        """(key chain, leaf) pairs in canonical order.

        >>> list(Container(b=2, a={"w": 1}).to_iterator())
        [('a/w', 1), ('b', 2)]
        """
        return zip(tree.key_chains(self), tree.leaves(self), strict=True)

    def at_key_chains(self, key_chains: Any) -> Container:
        """The part of the Container that `key_chains` choose (see `tree.chosen`).

        >>> Container(a={"w": 1, "b": 2}, c=3).at_key_chains(["a/w", "c"])
        {
            a: {
                w: 1
            },
            c: 3
        }
        """
        result: Container = tree.prune(self, tree.chosen(self, key_chains))
        return result

    def prune_key_chains(self, key_chains: Any) -> Container:
        """The Container without the part that `key_chains` choose; `None` prunes nothing."""
        result: Container = tree.prune(self, tree.chosen(self, key_chains, keep=False))
        return result

    def set_at_key_chains(self, values: Mapping[str, Any]) -> Container:
        """A copy with values replaced or added.

        Args:
            values: key chains to values, `{"a/w": x}`, or a nested mapping, `{"a": {"w": x}}`.
        """
        result = self.copy()
        for chain, value in values.items():
            _set(result, chain.split("/"), value)
        return result

    # -- arrays --------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int | None, ...]:
        """The shape the leaves share, `None` where they differ.

        >>> import numpy as np
        >>> Container(x=np.ones((5, 2)), y=np.ones((5, 3, 1))).shape
        (5, None)
        """
        shapes = [tuple(getattr(leaf, "shape", ())) for leaf in tree.leaves(self)]
        columns = zip(*shapes, strict=False)
        return tuple(dims[0] if len(set(dims)) == 1 else None for dims in columns)

    def mean(self, axis: Any = None, keepdims: bool = False) -> Container:
        """The mean of every leaf, with `axis` and `keepdims` as for `ops.mean`."""
        return self.map(lambda leaf: ops.mean(leaf, axis, keepdims))

    def sum(self, axis: Any = None, keepdims: bool = False) -> Container:
        """The sum of every leaf, with `axis` and `keepdims` as for `ops.sum`."""
        return self.map(lambda leaf: ops.sum(leaf, axis, keepdims))

    def max(self, axis: Any = None, keepdims: bool = False) -> Container:
        """The maximum of every leaf, with `axis` and `keepdims` as for `ops.max`."""
        return self.map(lambda leaf: ops.max(leaf, axis, keepdims))

    def min(self, axis: Any = None, keepdims: bool = False) -> Container:
        """The minimum of every leaf, with `axis` and `keepdims` as for `ops.min`."""
        return self.map(lambda leaf: ops.min(leaf, axis, keepdims))

    @staticmethod
    def stack(containers: Sequence[Container], axis: int = 0) -> Container:
        """Corresponding leaves of `containers`, at least one, stacked along a new `axis`."""
        return Container.multi_map(lambda *leaves: ops.stack(leaves, axis), containers)

    def unstack(self, axis: int = 0, keepdims: bool = False) -> list[Container]:
        """One Container for each index along `axis`, which must be as long in every leaf.

        With `keepdims` the axis stays, with size 1.
        """
        shapes = {chain: tuple(getattr(leaf, "shape", ())) for chain, leaf in self.to_iterator()}
        sizes: set[Any] = {
            shape[axis] if -len(shape) <= axis < len(shape) else None for shape in shapes.values()
        }
        if len(sizes) != 1 or None in sizes:
            raise InputError(
                f"unstack needs leaves of one size along axis {axis}, received shapes {shapes}."
            )

        def at(i: int) -> Container:
            index = slice(i, i + 1) if keepdims else i
            return self.map(lambda leaf: leaf[(slice(None),) * (axis % len(leaf.shape)) + (index,)])

        return [at(i) for i in range(next(iter(sizes)))]

    # -- arithmetic: with a Container leaf by leaf, with anything else on every leaf -------

    def _binary(self, other: Any, op: Callable[[Any, Any], Any]) -> Container:
        def apply(a: Any, b: Any) -> Any:
            refuse_mixed(a, b)  # JAX and TensorFlow would convert
            return op(a, b)

        if isinstance(other, Mapping):
            result: Container = tree.map(apply, self, type(self)(other))
            return result
        return self.map(lambda leaf: apply(leaf, other))

    def __add__(self, other: Any) -> Container:
        return self._binary(other, operator.add)

    def __radd__(self, other: Any) -> Container:
        return self._binary(other, lambda a, b: b + a)

    def __sub__(self, other: Any) -> Container:
        return self._binary(other, operator.sub)

    def __rsub__(self, other: Any) -> Container:
        return self._binary(other, lambda a, b: b - a)

    def __mul__(self, other: Any) -> Container:
        return self._binary(other, operator.mul)

    def __rmul__(self, other: Any) -> Container:
        return self._binary(other, lambda a, b: b * a)

    def __truediv__(self, other: Any) -> Container:
        return self._binary(other, operator.truediv)

    def __rtruediv__(self, other: Any) -> Container:
        return self._binary(other, lambda a, b: b / a)

    def __pow__(self, other: Any) -> Container:
        return self._binary(other, operator.pow)

    def __neg__(self) -> Container:
        return self.map(operator.neg)

    def __abs__(self) -> Container:
        return self.map(abs)

    # -- text ----------------------------------------------------------------------------

    def __repr__(self) -> str:
        return _show(self, "")


def _wrap(value: Any) -> Any:
    if isinstance(value, Container):
        return value.copy()
    return Container(value) if isinstance(value, dict) else value


def _find(container: Container, chain: str) -> Any:
    """The value at a key chain, or _MISSING."""
    node: Any = container
    for part in chain.split("/"):
        below = node if isinstance(node, Container) else tree.children(node)
        node = dict.get(below, part, _MISSING)
        if node is _MISSING:
            break
    return node


def _all_chains(container: Container) -> list[str]:
    """Every key chain of the Container, inner nodes included."""
    found = []
    for key, value in container.items():
        found.append(key)
        if isinstance(value, Container):
            found += [f"{key}/{rest}" for rest in _all_chains(value)]
    return found


def _set(node: Container, path: list[str], value: Any) -> None:
    head, *rest = path
    if rest:
        inner = node.setdefault(head, {})
        if not isinstance(inner, Container):
            raise InputError(
                f"{'/'.join(rest)!r} cannot be set below {head!r}, which is a "
                f"{type(inner).__name__} and no Container. Replace {head!r} as a whole."
            )
        _set(inner, rest, value)
    elif isinstance(value, Mapping) and isinstance(node.get(head), Container):
        for key, part in value.items():
            _set(node[head], key.split("/"), part)
    else:
        node[head] = value


def _show(value: Any, indent: str) -> str:
    if not isinstance(value, Container):
        return _show_leaf(value).replace("\n", "\n" + indent)
    if not value:
        return "{}"
    inner = indent + _INDENT
    rows = [f"{inner}{key}: {_show(value[key], inner)}" for key in sorted(value)]
    return "{\n" + ",\n".join(rows) + f"\n{indent}}}"


def _show_leaf(leaf: Any) -> str:
    """`float32[2] [1. 2.]`, alike on every backend; large arrays without their values."""
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        return repr(leaf)
    shape = list(map(int, leaf.shape))
    if isinstance(leaf, np.ndarray | np.generic):
        head, values = f"{leaf.dtype}{shape}", leaf
    else:
        backend = backend_of(leaf)
        head = f"{backend.dtype_name(leaf)}{shape}"
        if backend.is_traced(leaf):
            return f"{head} traced"
        values = backend.to_numpy(leaf)
    return head if values.size > 20 else f"{head} {' '.join(str(values).split())}"


def _flatten(node: Container) -> tuple[list[Any], tuple[str, ...], tuple[str, ...]]:
    keys = tuple(sorted(node))
    get = dict.__getitem__
    return [get(node, key) for key in keys], keys, keys


def _unflatten(cls: type[Container], keys: Iterable[str], children: Iterable[Any]) -> Container:
    # Frameworks rebuild structures around placeholders, so children are stored as they come.
    node = cls.__new__(cls)
    dict.update(node, zip(keys, children, strict=True))
    return node


tree.register(Container, _flatten, functools.partial(_unflatten, Container))
