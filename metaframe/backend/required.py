"""Required methods that are named, with what they promise, where a backend lacks them."""

from __future__ import annotations

import abc
import inspect
from typing import Any, Self

from metaframe.errors import BackendError


class Required(abc.ABC):  # noqa: B024 - its subclasses have the abstract methods
    """Refuses to be made while a method without a body is missing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Check the class.

        Raises:
            BackendError: which methods it lacks.
        """
        del args, kwargs
        missing = sorted(cls.__abstractmethods__)
        if missing:
            promises = "\nand ".join(map(cls._promise, missing))
            raise BackendError(f"{cls.described()} lacks {promises}")
        return super().__new__(cls)

    @classmethod
    def described(cls) -> str:
        """The class, as an error names it."""
        return cls.__qualname__

    @classmethod
    def _promise(cls, method: str) -> str:
        text = (inspect.getdoc(getattr(cls, method)) or "").partition("\n\n")[0]
        return f"`{method}`: {' '.join(text.split())}" if text else f"`{method}`"
