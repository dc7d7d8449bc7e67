"""Docstrings name every argument of a public callable, and say what a function returns.

An argument is named where it has an entry (`name: ...`) or stands in code (`` `name` ``): in the
callable's own docstring, or in one that goes with it. With a method go those of the base classes
whose method it overrides, and what their classes say of "every method"; with a class, those of its
fields.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

from public_surface import FACES, members, names

PASSED_ON = ("self", "cls", "args", "kwargs")
NOTHING = ("None", "Iterator[None]", "NoReturn")
CONVENTIONS = re.compile(r"^In every method .*?(?=\n\n|\Z)", re.MULTILINE | re.DOTALL)


def callables() -> Iterator[tuple[str, Callable[..., Any], str]]:
    """Every public function, class and method: its path, itself, and what describes it."""
    for face in FACES:
        for name in names(face):
            value, path = getattr(importlib.import_module(face), name), f"{face}.{name}"
            if not getattr(value, "__module__", "").startswith("metaframe"):
                continue
            if inspect.isclass(value):
                yield path, value, text_of_class(value)
                for method, function in methods(value):
                    yield f"{path}.{method}", function, text_of_method(value, method)
            elif inspect.isroutine(value):
                yield path, value, inspect.getdoc(value) or ""


def methods(cls: type) -> Iterator[tuple[str, Callable[..., Any]]]:
    for name, member in members(cls, {}):
        if inspect.isfunction(member):
            yield name, member
    call = vars(cls).get("__call__")
    if inspect.isfunction(call) and call.__module__.startswith("metaframe"):
        yield "__call__", call


def text_of_class(cls: type) -> str:
    docs = [inspect.getdoc(cls) or "", inspect.getdoc(vars(cls).get("__init__")) or ""]
    return "\n\n".join([*docs, *(f"{name}: described" for name in fields_with_docstrings(cls))])


def fields_with_docstrings(cls: type) -> list[str]:
    """The fields of a dataclass or a named tuple that a docstring follows."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    return [
        field.target.id
        for field, after in zip(body.body, body.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(after, ast.Expr)
        and isinstance(after.value, ast.Constant)
    ]


def text_of_method(cls: type, name: str) -> str:
    bases = [base for base in cls.__mro__ if name in vars(base) and base is not object]
    docs = [inspect.getdoc(getattr(base, name)) or "" for base in bases]
    shared = [text for base in bases for text in CONVENTIONS.findall(inspect.getdoc(base) or "")]
    return "\n\n".join([*docs, *shared])


def parameters(value: Callable[..., Any]) -> list[str]:
    try:
        return list(inspect.signature(value).parameters)
    except ValueError:
        return []  # an exception, which takes its message


def unnamed(value: Callable[..., Any], text: str) -> list[str]:
    code = " ".join(re.findall(r"`([^`]+)`", text))
    entries = set(re.findall(r"^\s*\**(\w+): ", text, re.MULTILINE))
    named = [p for p in parameters(value) if p not in PASSED_ON and not p.startswith("_")]
    return [p for p in named if p not in entries and not re.search(rf"\b{p}\b", code)]


def test_every_argument_is_named() -> None:
    found = {id(value): (path, unnamed(value, text)) for path, value, text in callables()}
    assert len(found) > 400
    missing = [f"{path}: {', '.join(lacking)}" for path, lacking in found.values() if lacking]
    assert not missing, "\n".join(["docstrings that do not name an argument:", *missing])


def test_every_result_is_described() -> None:
    """That of functions; a method's first line may say what it returns."""
    functions = [found for found in callables() if inspect.isfunction(found[1])]
    missing = [
        path
        for path, value, text in functions
        if path.rpartition(".")[0] in FACES
        and inspect.get_annotations(value).get("return") not in NOTHING
        and not re.search(r"^(Returns|Yields):$", text, re.MULTILINE)
    ]
    assert not missing, f"no Returns: or Yields: in the docstrings of {missing}"


def test_a_name_in_prose_is_not_enough() -> None:
    def scale(x: float, factor: float) -> float:
        """`x` times a factor."""
        return factor * x

    assert unnamed(scale, inspect.getdoc(scale) or "") == ["factor"]
