"""Attributes, methods and parts of a model under values that are not its own.

A model holds other values only while an adapter calls it. So what is found on the model, and
computes with it later, is handed out as a `Part`, which finds it again at every call. What is a
value by then, such as a weight, a flag or a property, is handed out as it is.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, ItemsView, Iterator, Mapping, ValuesView
from types import GeneratorType
from typing import Any, Protocol

from metaframe.errors import nearest

Find = Callable[[Any], Any]
"""From the model to something of it."""
LAZY = (GeneratorType, map, filter, zip, enumerate, reversed, itertools.chain, itertools.islice)
"""Iterators whose items may be computed when they are asked for."""
_END = object()
_WITHHELD = object()


class Host(Protocol):
    """An object that evaluates functions of a model, with the values in place."""

    names: list[str]
    """Names of the values."""

    def withholds(self, owner: Any, name: str) -> bool:
        """True if an attribute would change the model, or list its own parameters."""

    def look(self, find: Find) -> Any:
        """`find(model)`."""

    def call(self, find: Find, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """`find(model)(*args, **kwargs)`."""


class Part:
    """A method, a layer or a structure of layers of a model, used under the learner's values.

    It is called, indexed, iterated over and looked into as the original is.
    """

    __slots__ = ("_find", "_host", "_label")

    def __init__(self, host: Host, find: Find, label: str) -> None:
        self._host = host
        self._find = find
        self._label = label

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The result of a call, under the values that the learner has now."""
        find, label = self._find, f"{self._label}(...)"
        found = self._host.call(find, args, kwargs)
        return _handed_out(self._host, found, lambda model: find(model)(*args, **kwargs), label)

    def __getattr__(self, name: str) -> Any:
        """The attribute of the original."""
        if name.startswith("__") or name in Part.__slots__:
            raise AttributeError(name)
        return attribute(self._host, self._find, name, self._label)

    def __getitem__(self, key: Any) -> Any:
        find = self._find
        return _reach(self._host, lambda model: find(model)[key], f"{self._label}[{key!r}]")

    def __iter__(self) -> Iterator[Any]:
        find = self._find
        for i, item in enumerate(self._host.look(lambda model: list(find(model)))):
            found = _nth(lambda model: iter(find(model)), i)
            yield _handed_out(self._host, item, found, f"{self._label}[{i}]")

    def __len__(self) -> int:
        return int(self._host.look(lambda model: len(self._find(model))))

    def __contains__(self, item: Any) -> bool:
        return bool(self._host.look(lambda model: item in self._find(model)))

    def __bool__(self) -> bool:
        return True

    def __dir__(self) -> list[str]:
        return list(self._host.look(lambda model: dir(self._find(model))))

    def __repr__(self) -> str:
        return f"<{self._label} of a learner: {self._host.look(lambda m: repr(self._find(m)))}>"


def attribute(host: Host, find: Find, name: str, label: str) -> Any:
    """The attribute called `name` of what `find` finds.

    Raises:
        AttributeError: there is none, with the nearest name; or the model withholds it.
    """

    def found(model: Any) -> Any:
        owner = find(model)
        return _WITHHELD if host.withholds(owner, name) else getattr(owner, name)

    try:
        value = host.look(found)
    except AttributeError as error:
        known = host.look(lambda model: dir(find(model)))
        if error.name != name or name in known:
            raise  # from inside of a property or a method
        public = [known_name for known_name in known if not known_name.startswith("_")]
        public += [] if label else host.names
        what = repr(label) if label else "the model of this learner"
        message = f"{what} has no attribute {name!r}. {nearest(name, public)}"
        raise AttributeError(message, name=name) from None
    if value is _WITHHELD:
        raise AttributeError(
            f"{name!r} would change the model, or look at its own parameters; a learner has others "
            f"in their places. Use model.{name}, or what the learner has: named_parameters(), "
            "state_dict(), train() and eval().",
            name=name,
        )
    return _handed_out(
        host, value, lambda model: getattr(find(model), name), f"{label}.{name}".strip(".")
    )


def _reach(host: Host, find: Find, label: str) -> Any:
    return _handed_out(host, host.look(find), find, label)


def _handed_out(host: Host, found: Any, find: Find, label: str) -> Any:
    if isinstance(found, LAZY):
        return _resumed(host, found, find, label)
    return Part(host, find, label) if _computes(found) else found


def _computes(found: Any) -> bool:
    """True if it computes with the model when it is used: a layer, a function, or some of them."""
    if isinstance(found, type) or (hasattr(found, "shape") and hasattr(found, "dtype")):
        return False
    if isinstance(found, Mapping):
        return callable(found) or any(map(_computes, found.values()))
    if isinstance(found, (list, tuple, set, frozenset, ItemsView, ValuesView)):
        return any(map(_computes, found))
    return callable(found)


def _resumed(host: Host, iterator: Any, find: Find, label: str) -> Iterator[Any]:
    """The items of an iterator, each computed with the values in place."""
    for i in itertools.count():
        item = host.look(lambda model: next(iterator, _END))
        if item is _END:
            return
        yield _handed_out(host, item, _nth(find, i), f"{label}[{i}]")


def _nth(find: Find, i: int) -> Find:
    return lambda model: next(itertools.islice(find(model), i, None))


class ModelOfLearner:
    """The model of a learner, for its parts."""

    def __init__(self, learner: Any) -> None:
        self._learner = learner
        self._adapter = learner._adapter
        self.names = list(learner.params)
        self.withholds = self._adapter.withholds

    def look(self, find: Find) -> Any:
        """`find(model)`, a value as the user has it outside of the call."""
        return self._learner._evaluate(lambda model: self._read(find(model)), (), {}, part=True)[0]

    def call(self, find: Find, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """`find(model)(*args, **kwargs)`, as a call of the learner."""

        def called(model: Any, *xs: Any, **named: Any) -> Any:
            return self._read(find(model)(*xs, **named))

        return self._learner._run(called, args, kwargs, part=True)

    def _read(self, value: Any) -> Any:
        if type(value) in (list, tuple):
            return type(value)(map(self._read, value))
        if type(value) is dict:
            return {key: self._read(item) for key, item in value.items()}
        return self._adapter.read(value)
