"""Other values in the places of a module's variables: a copy of its structure.

TensorFlow has no functional call. A module is run on other values by a copy of its objects in
which tensors stand in the places of the variables; the module itself is not touched.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Iterator, Mapping
from typing import Any

import tensorflow as tf

from metaframe.backend.types import Array

Path = tuple[str, ...]
_TRACKED = "_self_"
"""The beginning of the names of attributes that TensorFlow keeps, or makes, for checkpoints.

Under other names they would be copied with the rest, and name variables by what is in them.
"""


def walk(module: Any) -> Iterator[tuple[Path, Any]]:
    """The attributes, keys and items of a module by their paths, its own first.

    A module within is entered once, and what it holds comes after it.
    """
    seen: set[int] = set()

    def visit(module: Any, path: Path) -> Iterator[tuple[Path, Any]]:
        seen.add(id(module))
        inner = []
        for name, value in sorted(attributes(module).items()):
            for where, leaf in leaves(value, (*path, name)):
                yield where, leaf
                if isinstance(leaf, tf.Module):
                    inner.append((where, leaf))
        for where, leaf in inner:
            if id(leaf) not in seen:
                yield from visit(leaf, where)

    return visit(module, ())


def attributes(module: Any) -> dict[str, Any]:
    """The attributes of an instance, those in slots included, without TensorFlow's own."""
    found = {n: x for n, x in vars(module).items() if not n.startswith(_TRACKED)}
    return {**found, **{n: getattr(module, n) for n in _slots(type(module)) if hasattr(module, n)}}


def _slots(kind: type) -> tuple[str, ...]:
    found = []
    for base in kind.__mro__:
        names = vars(base).get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            private = name.startswith("__") and not name.endswith("__")
            found.append(f"_{base.__name__.lstrip('_')}{name}" if private else name)
    return tuple(name for name in found if name not in ("__dict__", "__weakref__"))


def leaves(node: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """The contents of containers that are no containers themselves."""
    for key, value in _items(node):
        yield from leaves(value, (*path, str(key)))
    if not isinstance(node, (Mapping, list, tuple)):
        yield path, node


def _items(node: Any) -> list[tuple[Any, Any]]:
    if isinstance(node, Mapping):
        try:
            return sorted(node.items(), key=lambda item: item[0])
        except TypeError:  # keys of several types
            return list(node.items())
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return list(zip(node._fields, node, strict=True))
    return list(enumerate(node)) if isinstance(node, (list, tuple)) else []


def _unwrapped(node: Any) -> Any:
    """The container without what TensorFlow wraps around one that is an attribute."""
    if type(node) is not node.__class__:  # a proxy, which says that it is what it wraps
        return node.__wrapped__
    return list(node) if type(node).__module__.startswith("tensorflow.") else node


class Substitution:
    """A copy of modules and containers, by identity, with other things in some places.

    Args:
        places: `id` of a variable to what stands in its place.
    """

    def __init__(self, places: Mapping[int, Any]) -> None:
        self._places = places
        self._copies: dict[int, Any] = {}

    def copy(self, node: Any) -> Any:
        """`node` with everything that can be reached from it copied; the same for the same."""
        if isinstance(node, tf.Variable):
            return self._places.get(id(node), node)
        if id(node) in self._copies:
            return self._copies[id(node)]
        if isinstance(node, tf.Module):
            return self._module(node)
        if isinstance(node, (Mapping, list)):
            return self._container(node)
        if isinstance(node, tuple):
            items = [self.copy(item) for item in node]
            kind = node.__class__
            return kind(*items) if hasattr(node, "_fields") else kind(items)
        return self._function(node)

    def _module(self, node: Any) -> Any:
        # Registered before its attributes are copied: a child may refer to its parent.
        self._copies[id(node)] = fresh = object.__new__(type(node))
        for name, value in attributes(node).items():
            object.__setattr__(fresh, name, self.copy(value))
        return fresh

    def _container(self, node: Any) -> Any:
        plain = _unwrapped(node)
        if isinstance(plain, Mapping):
            fresh: Any = copy.copy(plain) if isinstance(plain, dict) else dict(plain)
            self._copies[id(node)] = fresh
            for key, value in plain.items():
                dict.__setitem__(fresh, key, self.copy(value))
            return fresh
        fresh = copy.copy(plain)
        self._copies[id(node)] = fresh
        list.__setitem__(fresh, slice(None), [self.copy(item) for item in plain])
        return fresh

    def _function(self, node: Any) -> Any:
        """A method of a module as one of its copy, a `tf.function` or a partial of it included."""
        if isinstance(node, types.MethodType) and isinstance(node.__self__, tf.Module):
            return types.MethodType(node.__func__, self.copy(node.__self__))
        if isinstance(node, functools.partial):
            kwargs = {name: self.copy(x) for name, x in node.keywords.items()}
            return functools.partial(self.copy(node.func), *map(self.copy, node.args), **kwargs)
        if isinstance(node, tf.types.experimental.PolymorphicFunction):
            method = self.copy(node.python_function)
            return node if method is node.python_function else tf.function(method)
        return node


class Held:
    """A tensor in the place of a variable that nothing is learned of; assignments stay here."""

    __array_priority__ = 100  # as of tensors: NumPy leaves operators to them
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, variable: Any, tensor: Array) -> None:
        self.tensor = tensor
        self.name, self.trainable = variable.name, variable.trainable
        self._shape = variable.shape

    def __tf_tensor__(self, dtype: Any = None, name: str | None = None) -> Array:
        return tf.convert_to_tensor(self.tensor, dtype=dtype, name=name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tensor, name)

    def read_value(self) -> Array:
        """The present value."""
        return self.tensor

    value = read_value

    def assign(self, value: Any, *args: Any, **kwargs: Any) -> Held:
        """Be `value` from here on."""
        del args, kwargs  # locks, a name, and whether to return the value
        value = tf.convert_to_tensor(value, self.tensor.dtype)
        if not self._shape.is_compatible_with(value.shape):
            raise ValueError(
                f"variable {self.name!r} has shape {self._shape}, assigned was {value.shape}."
            )
        self.tensor = value
        return self

    def assign_add(self, delta: Any, *args: Any, **kwargs: Any) -> Held:
        """Be more by `delta`."""
        return self.assign(self.tensor + delta, *args, **kwargs)

    def assign_sub(self, delta: Any, *args: Any, **kwargs: Any) -> Held:
        """Be less by `delta`."""
        return self.assign(self.tensor - delta, *args, **kwargs)


def _forwarded(name: str) -> Any:
    def operator(self: Held, *args: Any) -> Any:
        return getattr(self.tensor, name)(*args)

    return operator


_CONVERSIONS = ("array", "bool", "float", "index", "int", "iter", "len")
for _name in (*tf.Tensor.OVERLOADABLE_OPERATORS, *(f"__{name}__" for name in _CONVERSIONS)):
    setattr(Held, _name, _forwarded(_name))
