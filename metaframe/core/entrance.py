"""The entrance of public functions, at which frameworks that translate Python code stop.

TensorFlow's AutoGraph and torch's compiler read the source of a user's function and of whatever it
calls. From ours they would learn nothing, print that they do not understand it, or run it in
another way. A call from C has no source, so AutoGraph lets it be; what else a framework needs to
be told is `Backend.opaque`.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from metaframe.backend.registry import backends_in_use

P = ParamSpec("P")
R = TypeVar("R")


def entrance(fn: Callable[P, R]) -> Callable[P, R]:
    """`fn`, a public function, as something that no framework looks into.

    >>> @entrance
    ... def double(x):
    ...     return 2 * x
    >>> double(3)
    6
    """

    @functools.wraps(fn)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        result: R = operator.call(operator.call(_opaque, fn), *args, **kwargs)
        return result

    return call


def _opaque(fn: Callable[..., Any]) -> Callable[..., Any]:
    for backend in backends_in_use():
        fn = backend.opaque(fn)
    return fn
