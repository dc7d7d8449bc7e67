"""The class that makes a wrapper around a model an object of that model's framework.

`MAML(module)` around a torch module has to be an `nn.Module`, so that `parameters()`, `state_dict`
and `to(device)` work, and it has to be a `metaframe.MAML` too. So the class is chosen when the
object is made: the neutral class together with the base class its framework asks for.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from metaframe.models.lookup import adapter_of


class _Plain:
    """The base of a wrapper in frameworks that ask for none."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward: Any = getattr(self, "forward")  # noqa: B009
        return forward(*args, **kwargs)


@functools.cache
def _concrete(cls: Any, base: Any) -> Any:
    namespace = {"__doc__": cls.__doc__, "__module__": cls.__module__, "_parts": (cls, base)}
    return type(cls.__name__, (cls, base), namespace)


def _blank(cls: type, base: type) -> Any:
    return object.__new__(_concrete(cls, base))


class Wrapper:
    """Base class of `MAML` and its relatives; takes the wrapped model as first argument."""

    _parts: tuple[type, type] | None = None

    if TYPE_CHECKING:

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            """The forward pass, on every backend."""

    def __new__(cls, module: Any, *args: Any, **kwargs: Any) -> Any:
        """An object of the concrete class for the framework of `module`."""
        del args, kwargs
        base: Any = adapter_of(module).backend.module_base or _Plain
        neutral: Any = cls
        return object.__new__(neutral if issubclass(cls, base) else _concrete(neutral, base))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled by the two classes, since the one made of them has no importable name."""
        if self._parts is None:
            return super().__reduce_ex__(protocol)
        return _blank, self._parts, self.__getstate__()
