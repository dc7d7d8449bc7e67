"""The shape of the code: no import circles, and few floors.

A room is a package of `metaframe`, a module beside these, or a backend; it stands a floor above the
highest that it imports. `imports.py` says which imports count: all, late ones as well.
"""

from __future__ import annotations

import ast
import importlib
import re

import pytest

import imports
from imports import ROOT, circle, floors, inside, module_graph, room_graph, sources

FLOORS = 12
"""With the benchmarks on top."""


def test_modules_import_each_other_in_no_circle() -> None:
    assert circle(module_graph()) == []


def test_packages_import_each_other_in_no_circle() -> None:
    assert circle(room_graph()) == []


def test_the_house_has_few_floors() -> None:
    found = floors(room_graph())
    assert max(found.values()) < FLOORS, sorted(found.items(), key=lambda item: -item[1])


@pytest.mark.parametrize("name", sorted(room_graph()))
def test_a_room_has_few_floors(name: str) -> None:
    found = floors(inside(name))
    assert max(found.values()) <= FLOORS, sorted(found.items(), key=lambda item: -item[1])


def test_backends_stand_apart() -> None:
    """A backend knows the contract and the portable functions, and no algorithm."""
    graph = room_graph()
    above = {f"metaframe.{n}" for n in ("learners", "training", "tasks", "testing", "cli")}
    backends = {name for name in graph if not name.startswith("metaframe.")} - {"metaframe"}
    assert len(backends) == 3
    for name in backends:
        assert not graph[name] & (above | backends | {"metaframe"}), name
        assert not [room for room in graph if name in graph[room]], name


def test_late_and_type_checking_imports_count(monkeypatch: pytest.MonkeyPatch) -> None:
    code = {
        "metaframe.one": "def late():\n    from metaframe.face import name\n",
        "metaframe.face": "from metaframe.two import name as name\n",
        "metaframe.two": "if TYPE_CHECKING:\n    import metaframe.one\n",
    }
    parsed = {name: ast.parse(text) for name, text in code.items()}
    monkeypatch.setattr(imports, "sources", lambda: code)
    monkeypatch.setattr(imports, "parsed", parsed.__getitem__)
    monkeypatch.setattr(imports, "is_face", "metaframe.face".__eq__)
    graph = imports.module_graph.__wrapped__()
    assert graph == {"metaframe.one": {"metaframe.two"}, "metaframe.two": {"metaframe.one"}}
    assert sorted({*circle(graph)}) == ["metaframe.one", "metaframe.two"]


def test_floors_are_counted_from_the_ground() -> None:
    assert floors({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == {"a": 3, "b": 2, "c": 1}


def test_files_are_read() -> None:
    assert {"metaframe", "metaframe.core.steps", "metaframe_torch._backend"} <= sources().keys()


def test_the_picture_is_of_this_house(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a change of the imports between packages: `python docs/tools/house.py`."""
    monkeypatch.syspath_prepend(ROOT / "docs" / "tools")
    house = importlib.import_module("house")
    assert house.PICTURE.read_text(encoding="utf-8") == house.drawn()


def test_what_to_open_is_there() -> None:
    """Every path of the table in CONTRIBUTING.md."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) > 10
    paths = {path for row in rows for path in re.findall(r"`([\w.]+/[\w./]*)`", row)}
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


ELSEWHERE = {
    "callers": "test_program_cache.py and test_compile.py",
    "entrance": "test_autograph.py",
    "per_step": "test_unroll.py",
    "moments": "test_optim.py",
    "keras_settings": "test_compile_state.py",
    "task_program": "test_learners_registry.py and test_steps_crossed.py",
}
"""Modules of the core without a test module of their own, and what tests them."""


def test_a_module_of_the_core_has_a_test_module() -> None:
    core = {name.rpartition(".")[2] for name in sources() if name.startswith("metaframe.core.")}
    tests = {path.stem.removeprefix("test_") for path in (ROOT / "tests").glob("test_*.py")}
    without = {name for name in core if not any(f"{t}_".startswith(f"{name}_") for t in tests)}
    assert without == set(ELSEWHERE)


def test_what_is_listed_as_slow_exists() -> None:
    for line in (ROOT / "tests/slow.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
        path, *names = line.partition("[")[0].split("::")
        source = (ROOT / path).read_text()
        what = f"def {names[0]}(" if len(names) == 1 else f"class {names[0]}("
        assert what in source, line
