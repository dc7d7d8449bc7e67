"""Schemas of plain values: types, ranges and names, checked before anything is used.

A check takes a value and the words for its place, and raises `ValueError` with the place, what came
and what was expected. Checks of structures are made of checks of their parts:

>>> schema = record({"step": integer, "merits": many(number)})
>>> schema({"step": 3, "merits": [0.5, None]}, "the content")
Traceback (most recent call last):
ValueError: the content, merits[1] is None, expected a number
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from metaframe.files.read import shown

Check = Callable[[Any, str], None]

LARGEST = 2**63 - 1
"""Of integers."""


def refused(value: Any, where: str, expected: str) -> ValueError:
    """The error that says that `value` is not what was expected."""
    return ValueError(f"{where} is {shown(value)}, expected {expected}")


def anything(value: Any, where: str) -> None:
    """Whatever it is."""
    del value, where


def integer(value: Any, where: str) -> None:
    """A count: 0 to 2**63 - 1."""
    if type(value) is not int or not 0 <= value <= LARGEST:
        raise refused(value, where, "an integer from 0 to 2**63 - 1")


def number(value: Any, where: str) -> None:
    """An integer or a float, also one that is not finite, in the range of floats."""
    if type(value) not in (int, float):
        raise refused(value, where, "a number")
    if type(value) is int and abs(value) > sys.float_info.max:
        raise refused(value, where, "a number in the range of floats")


def boolean(value: Any, where: str) -> None:
    """True or false."""
    if type(value) is not bool:
        raise refused(value, where, "true or false")


def text(value: Any, where: str) -> None:
    """A string; of a file's name it may hold bytes that are no Unicode, as Python has them."""
    if type(value) is not str:
        raise refused(value, where, "a text")


def optional(check: Check) -> Check:
    """None, or what `check` takes."""

    def checked(value: Any, where: str) -> None:
        if value is not None:
            check(value, where)

    return checked


def many(check: Check, *, at_least: int = 0) -> Check:
    """A list of so many at least, each of which `check` takes."""

    def checked(value: Any, where: str) -> None:
        if type(value) is not list:
            raise refused(value, where, "a list")
        if len(value) < at_least:
            raise refused(value, where, f"at least {at_least}")
        for i, item in enumerate(value):
            check(item, f"{where}[{i}]")

    return checked


def table(check: Check) -> Check:
    """An object of any names, whose values `check` takes."""

    def checked(value: Any, where: str) -> None:
        if not isinstance(value, Mapping):
            raise refused(value, where, "an object")
        for name, item in value.items():
            text(name, f"a name in {where}")
            check(item, f"{where}, {shown(name)[1:-1]}")

    return checked


def record(required: Mapping[str, Check], extra: Mapping[str, Check] | None = None) -> Check:
    """An object with these names, and perhaps those of `extra`; others are not looked at."""
    extra = extra or {}

    def checked(value: Any, where: str) -> None:
        if not isinstance(value, Mapping):
            raise refused(value, where, "an object")
        if missing := sorted(set(required) - set(value)):
            raise ValueError(f"{where} lacks {', '.join(missing)}")
        for name, check in {**required, **extra}.items():
            if name in value:
                check(value[name], f"{where}, {name}")

    return checked
