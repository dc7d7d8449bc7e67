"""The import graph of the source, read from the code without running it. Shared by tests.

Every import counts: those of a function and those of `TYPE_CHECKING` too. A package's `__init__`
that defines nothing is its face and no module of the graph: who imports a name from it imports the
module that the name comes from, and who imports the package imports all of those.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[2]
Graph = dict[str, set[str]]
"""Who imports whom, by name."""


@cache
def sources() -> dict[str, Path]:
    """Every module of the library and of the backends."""
    backends = [p for p in (ROOT / "backends").iterdir() if (p / "__init__.py").exists()]
    found = {}
    for package in (ROOT / "metaframe", *backends):
        for path in package.rglob("*.py"):
            parts = path.relative_to(package.parent).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def parsed(module: str) -> ast.Module:
    """The syntax of a module."""
    return ast.parse(sources()[module].read_text(encoding="utf-8"))


@cache
def is_face(module: str) -> bool:
    """Whether it is an `__init__` that only hands names on."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    return sources()[module].name == "__init__.py" and not any(
        isinstance(node, kinds) for node in parsed(module).body
    )


def imported(module: str) -> Iterable[tuple[str, str | None]]:
    """`(module of ours, name)` of every import in `module`; no name for a module as a whole."""
    for node in ast.walk(parsed(module)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names if alias.name in sources())
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                if whole in sources():
                    yield whole, None
                elif node.module in sources():
                    yield node.module, alias.name


def behind(module: str, name: str | None) -> set[str]:
    """The modules that an import is of, beyond any faces."""
    if not is_face(module):
        return {module}
    handed = [
        (source, given)
        for source, given in imported(module)
        if name is None or name in (given, source.rpartition(".")[2])
    ]
    return {found for source, given in handed for found in behind(source, given)}


@cache
def module_graph() -> Graph:
    """The imports between modules."""
    return {
        module: {m for found in imported(module) for m in behind(*found)} - {module}
        for module in sources()
        if not is_face(module)
    }


def room(module: str) -> str:
    """Where a module is: a package of `metaframe`, a module beside these, or a backend."""
    parts = module.split(".")
    return ".".join(parts[:2] if parts[0] == "metaframe" else parts[:1])


def room_graph() -> Graph:
    """The imports between packages."""
    graph: Graph = {}
    for module, targets in module_graph().items():
        own = room(module)
        graph.setdefault(own, set()).update({room(t) for t in targets} - {own})
    return graph


def inside(name: str) -> Graph:
    """The imports between the modules of one room."""
    graph = module_graph()
    within = {module for module in graph if room(module) == name}
    return {module: graph[module] & within for module in within}


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Modules that import each other in a loop, each the next; empty if there are none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found: list[str] = error.args[1]
        return found[::-1]
    return []


def floors(graph: Mapping[str, set[str]]) -> dict[str, int]:
    """The floor of each: 1 for who imports nobody, otherwise one above the highest it imports."""
    found: dict[str, int] = {}
    for name in TopologicalSorter(graph).static_order():
        found[name] = 1 + max((found[below] for below in graph[name]), default=0)
    return found
