"""The exceptions metaframe raises on purpose.

Each one is a `MetaframeError` and also the builtin a user would catch, so both
`except MetaframeError` and `except ValueError` work.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "BackendError",
    "BackendNotInstalledError",
    "CheckpointError",
    "CompileError",
    "DistributedError",
    "InputError",
    "InputTypeError",
    "MetaframeError",
    "MissingDependencyError",
    "NonFiniteError",
    "UnknownAttributeError",
    "UnknownKeyError",
    "UnusedParameterError",
]


class MetaframeError(Exception):
    """Base class of every error raised by metaframe.

    >>> import metaframe
    >>> try:
    ...     metaframe.set_backend("pytorch")
    ... except MetaframeError as error:
    ...     print(type(error).__name__, isinstance(error, KeyError))
    UnknownKeyError True
    """


class InputError(MetaframeError, ValueError):
    """An argument has the right type and an unusable value, shape or structure.

    >>> from metaframe import tree
    >>> tree.prune({"w": 1.0}, keep=())
    Traceback (most recent call last):
    metaframe.errors.InputError: keep has 0 flags for 1 leaves.
    """


class UnusedParameterError(InputError, RuntimeError):
    """A parameter to adapt has no influence on the loss, and that was not allowed.

    >>> issubclass(UnusedParameterError, InputError)
    True
    """


class InputTypeError(MetaframeError, TypeError):
    """An argument has the wrong type, or arrays of two frameworks were mixed.

    >>> import metaframe
    >>> metaframe.map_tasks(3)
    Traceback (most recent call last):
    metaframe.errors.InputTypeError: fn must be a function, received int.
    """


class UnknownKeyError(MetaframeError, KeyError):
    """A key chain names nothing in the structure it was used on.

    >>> import metaframe
    >>> metaframe.set_backend("pytorch")
    Traceback (most recent call last):
    metaframe.errors.UnknownKeyError: no backend called 'pytorch'. Did you mean 'torch'?
    """

    def __str__(self) -> str:
        # KeyError shows the repr of its argument, which garbles a sentence.
        return str(self.args[0]) if self.args else ""


class UnknownAttributeError(MetaframeError, AttributeError):
    """Attribute access on a Container for a key it does not have.

    >>> from metaframe import Container
    >>> Container(weight=1.0).wieght
    Traceback (most recent call last):
    metaframe.errors.UnknownAttributeError: Container has no key 'wieght'. Did you mean 'weight'?
    """


class BackendError(MetaframeError, RuntimeError):
    """No backend could be chosen, or the chosen one cannot do what was asked.

    >>> import numpy as np
    >>> from metaframe import ops
    >>> try:
    ...     ops.mean(np.ones(3))
    ... except BackendError as error:
    ...     print(str(error)[:63])
    these inputs belong to no framework and no backend is selected.
    """


class BackendNotInstalledError(BackendError, ImportError):
    """The backend exists, its framework is not installed.

    >>> issubclass(BackendNotInstalledError, ImportError)
    True
    """


class MissingDependencyError(MetaframeError, ImportError):
    """Something optional, such as a data set or a log, needs a package that is not installed.

    Args:
        what: what needs the package, such as "Omniglot".
        package: the name of the package.
        install: the command that installs it.

    >>> str(MissingDependencyError("Omniglot", "Pillow", "pip install pillow"))
    'Omniglot needs Pillow, which is not installed. Run: pip install pillow'
    """

    def __init__(self, what: str, package: str, install: str) -> None:
        super().__init__(f"{what} needs {package}, which is not installed. Run: {install}")


class CompileError(MetaframeError, RuntimeError):
    """A function could not be traced or compiled as a whole.

    >>> import torch
    >>> import metaframe
    >>> @metaframe.compile
    ... def relu(x):
    ...     return x if x > 0 else 0 * x
    >>> try:
    ...     relu(torch.tensor(1.0))
    ... except CompileError as error:
    ...     print(str(error)[:23])
    relu cannot be compiled
    """


class DistributedError(MetaframeError, RuntimeError):
    """Another process failed, is gone, does not answer, or does not run the same program.

    >>> isinstance(DistributedError("process 1 failed"), RuntimeError)
    True
    """


class CheckpointError(MetaframeError, ValueError):
    """A checkpoint is damaged, of another format, or of another model, optimizer or sampler.

    >>> from metaframe.training import read_checkpoint
    >>> read_checkpoint("nowhere")
    Traceback (most recent call last):
    metaframe.errors.CheckpointError: cannot read checkpoint nowhere: No such file or directory.
    """


class NonFiniteError(MetaframeError, FloatingPointError):
    """A cost or gradient is NaN or infinite (checked only on request).

    >>> import torch
    >>> import metaframe
    >>> step = metaframe.meta_value_and_grad(lambda v, task: (v * task).log(), check_finite=True)
    >>> step(torch.tensor(1.0), torch.tensor([2.0, -1.0]))
    Traceback (most recent call last):
    metaframe.errors.NonFiniteError: the cost of task 1 is nan.
    """


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
