"""Private names of a framework, looked up where they are needed.

A framework may drop a name that it does not document in any release. Each one that metaframe uses
is a `PrivateName` in the `_private.py` of its backend, so that a missing name costs what it says
there, and nothing else.
"""

from __future__ import annotations

import importlib
import operator
import sys
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from metaframe.errors import BackendError


@dataclass(frozen=True)
class PrivateName:
    """A name that a framework does not document.

    Args:
        path: the module and the attribute, written as in an entry point, "torch.utils:_pytree".
        use: what metaframe needs it for, to complete the sentence "... needs it".
        seen: the versions of the framework it was used with, the first and the last.
        without: the consequence where it is missing: the same result by a "public" way, the same
            but "slower", an "error" of ours at the call that needs it, or an error of "theirs".

    >>> name = PrivateName("torch:_secret", "`metaframe.secret`", ("2.13.0",), "error")
    >>> name.found is None
    True
    >>> name.required  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    metaframe.errors.BackendError: `metaframe.secret` needs torch:_secret, which torch ...
    """

    path: str
    use: str
    seen: tuple[str, ...]
    without: Literal["public", "slower", "error", "theirs"]

    @cached_property
    def found(self) -> Any:
        """The object of this name; None if there is none. Imports its module."""
        module, _, attribute = self.path.partition(":")
        try:
            return operator.attrgetter(attribute)(importlib.import_module(module))
        except (ImportError, AttributeError):
            return None

    @property
    def required(self) -> Any:
        """The object of this name, or an error.

        Raises:
            BackendError: nothing has; it names the installed version.
        """
        if self.found is not None:
            return self.found
        framework = self.path.partition(":")[0].partition(".")[0]
        version = getattr(sys.modules.get(framework), "__version__", "(not installed)")
        raise BackendError(
            f"{self.use} needs {self.path}, which {framework} {version} lacks. It is a private "
            f"name, last seen in {framework} {self.seen[-1]}: install that version, or a newer "
            "metaframe."
        )
