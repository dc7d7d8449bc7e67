"""The public surface of metaframe, in lines. Run as a program, it records them.

Public is what the `__all__` of a face lists, or without one what it hands on
(`from ... import name as name`). Of classes, public methods and properties count too.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from typing import Any

from documents import ROOT
from imports import parsed

FACES = (
    "metaframe",
    *(f"metaframe.{name}" for name in ("backend", "cli", "distributed", "errors", "interop")),
    *(f"metaframe.{name}" for name in ("learners", "models", "nn", "ops", "optim", "tasks")),
    *(f"metaframe.{name}" for name in ("testing", "testing.conformance", "training")),
    *(f"metaframe.{name}" for name in ("training.schedules", "tree")),
)
SNAPSHOT = ROOT / "tests" / "public_surface.txt"


def names(face: str) -> list[str]:
    """The public names of a module."""
    if listed := getattr(importlib.import_module(face), "__all__", None):
        return sorted(listed)
    handed, own = set(), set()
    for node in ast.walk(parsed(face)):
        if isinstance(node, ast.ImportFrom):
            handed.update(a.name for a in node.names if a.asname == a.name)
    for node in parsed(face).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            own.add(node.name)
    return sorted(name for name in handed | own if not name.startswith("_"))


def described(path: str, value: Any, public: dict[int, str]) -> Iterator[str]:
    """A line for a name, and one for each public member of a class that is new there.

    `public` has the path under which an object was described already, by its `id`.
    """
    if inspect.ismodule(value):
        yield f"{path}: module"
    elif not callable(value) or value is Any:
        yield f"{path}: value"
    elif id(value) in public:
        yield f"{path}: {public[id(value)]}"
    elif inspect.isclass(value):
        yield f"{path}{signature(value)}: class"
        for name, member in sorted(members(value, public)):
            kind = signature(member) if inspect.isfunction(member) else ": attribute"
            yield f"{path}.{name}{kind}"
    else:
        yield f"{path}{signature(value)}"


def members(cls: type, public: dict[int, str]) -> Iterator[tuple[str, Any]]:
    """The public members of a class, without those of a base that is described itself."""
    found: dict[str, Any] = {}
    for base in cls.__mro__:
        if base is not cls and id(base) in public:
            break  # with all that it inherits itself
        if base.__module__.startswith("metaframe"):
            found = {**dict.fromkeys(inspect.get_annotations(base)), **vars(base), **found}
    for name, member in found.items():
        if not name.startswith("_"):
            plain = isinstance(member, staticmethod | classmethod)
            yield name, member.__func__ if plain else member


def signature(value: Any) -> str:
    """The parameters and their defaults, without annotations."""
    try:
        found = inspect.signature(value)
    except ValueError:
        return "(...)"
    kept = found.parameters.values()
    plain = [p.replace(annotation=p.empty, default=shown(p.default)) for p in kept]
    return str(inspect.Signature(plain))


class _Shown:
    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def shown(default: Any) -> Any:
    """A default as it is written, the same in every process and on every backend."""
    if default is inspect.Parameter.empty:
        return default
    if "FACTORY" in type(default).__name__:
        return _Shown("...")
    if callable(default) and hasattr(default, "__name__"):
        return _Shown(default.__name__)
    plain = isinstance(default, int | float | str | bool | tuple | list | type(None))
    return default if plain else _Shown(type(default).__name__)


def surface() -> list[str]:
    """Every line of the snapshot."""
    found = [
        (f"{face}.{name}", getattr(importlib.import_module(face), name))
        for face in FACES
        for name in names(face)
    ]
    paths = {id(value): path for path, value in reversed(found) if callable(value)}
    lines = []
    for path, value in found:
        others = {key: first for key, first in paths.items() if first != path}
        lines += described(path, value, others)
    return lines


if __name__ == "__main__":
    SNAPSHOT.write_text("\n".join(surface()) + "\n", encoding="utf-8")
