"""Checks on plain arguments, with one wording for all samplers."""

from __future__ import annotations

import math
import operator
from typing import Any

from metaframe.errors import InputError, InputTypeError, MetaframeError


def integer(name: str, value: Any, minimum: int) -> int:
    """`value` as an int that is at least `minimum`; booleans are not counts."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise InputTypeError(
            f"{name} must be an integer, received {name}={value!r} ({type(value).__name__})."
        )
    if number < minimum:
        raise InputError(f"{name} must be at least {minimum}, received {name}={number}.")
    return number


def interval(name: str, value: Any) -> tuple[float, float]:
    """`value` as (low, high), both finite and low <= high."""
    try:
        low, high = (float(end) for end in value)
    except (TypeError, ValueError):
        raise InputTypeError(
            f"{name} must be a pair of numbers (low, high), received {name}={value!r}."
        ) from None
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise InputError(
            f"{name} must be finite with low <= high, received {name}=({low}, {high})."
        )
    return low, high


class MissingDependencyError(MetaframeError, ImportError):
    """A data set needs a package that is not installed.

    >>> str(MissingDependencyError("Omniglot", "Pillow", "pip install pillow"))
    'Omniglot needs Pillow, which is not installed. Run: pip install pillow'
    """

    def __init__(self, what: str, package: str, install: str) -> None:
        super().__init__(f"{what} needs {package}, which is not installed. Run: {install}")
