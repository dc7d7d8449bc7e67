"""The exceptions metaframe raises on purpose.

Each one is a `MetaframeError` and also the builtin a user would catch, so both
`except MetaframeError` and `except ValueError` work.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MetaframeError(Exception):
    """Base class of every error raised by metaframe."""


class InputError(MetaframeError, ValueError):
    """An argument has the right type and an unusable value, shape or structure."""


class UnusedParameterError(InputError, RuntimeError):
    """A parameter to adapt has no influence on the loss, and that was not allowed."""


class InputTypeError(MetaframeError, TypeError):
    """An argument has the wrong type, or arrays of two frameworks were mixed."""


class UnknownKeyError(MetaframeError, KeyError):
    """A key chain names nothing in the structure it was used on."""

    def __str__(self) -> str:
        # KeyError shows the repr of its argument, which garbles a sentence.
        return str(self.args[0]) if self.args else ""


class UnknownAttributeError(MetaframeError, AttributeError):
    """Attribute access on a Container for a key it does not have."""


class BackendError(MetaframeError, RuntimeError):
    """No backend could be chosen, or the chosen one cannot do what was asked."""


class BackendNotInstalledError(BackendError, ImportError):
    """The backend exists, its framework is not installed."""


class CompileError(MetaframeError, RuntimeError):
    """A function could not be traced or compiled as a whole."""


class DistributedError(MetaframeError, RuntimeError):
    """Another process failed, is gone, does not answer, or does not run the same program."""


class CheckpointError(MetaframeError, ValueError):
    """A checkpoint is damaged, of another format, or of another model, optimizer or sampler."""


class NonFiniteError(MetaframeError, FloatingPointError):
    """A cost or gradient is NaN or infinite (checked only on request)."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence that names the closest known name, or lists what exists.

    >>> nearest("laten", ["latent", "bias"])
    "Did you mean 'latent'?"
    >>> nearest("zzz", ["latent", "bias"])
    'Known: bias, latent.'
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f"Did you mean {close[0]!r}?"
    return f"Known: {', '.join(names) or 'none'}."
