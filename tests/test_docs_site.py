"""The site: every public name has its place and an example, every link leads somewhere."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from documents import ROOT, pages, prose
from metaframe.cli.app import cli
from metaframe.learners import algorithms

REFERENCE = ROOT / "docs" / "reference"
PUBLIC = (
    "metaframe",
    *(f"metaframe.{name}" for name in ("distributed", "errors", "interop", "learners", "models")),
    *(f"metaframe.{name}" for name in ("nn", "ops", "optim", "tasks", "testing", "training")),
    *(f"metaframe.{name}" for name in ("testing.conformance", "tree")),
)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
DIRECTIVE = re.compile(r"^::: (\S+)$", re.MULTILINE)


def resolve(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def documented(page: Path) -> list[str]:
    return DIRECTIVE.findall(page.read_text())


def public(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """Functions and classes of ours that a module offers."""
    own = hasattr(module, "__path__")  # a package offers what it imports
    names = getattr(module, "__all__", None) or [n for n in dir(module) if not n.startswith("_")]
    for name in names:
        value = getattr(module, name)
        if not (inspect.isfunction(value) or inspect.isclass(value)):
            continue
        if value.__module__.startswith("metaframe") and (
            own or value.__module__ == module.__name__
        ):
            yield name, value


def examples(value: Any) -> bool:
    """Whether there is an example in the docstring, or in that of a class's own method."""
    methods = vars(value).values() if inspect.isclass(value) else ()
    return any(">>>" in (getattr(x, "__doc__", None) or "") for x in (value, *methods))


@pytest.mark.parametrize("module_name", PUBLIC)
def test_public_names_are_documented(module_name: str) -> None:
    there = [resolve(path) for page in REFERENCE.glob("*.md") for path in documented(page)]
    names = list(public(importlib.import_module(module_name)))
    assert names
    missing = [name for name, value in names if not any(value is x for x in there)]
    assert not missing, f"no `::: {module_name}.NAME` in docs/reference for {missing}"


@pytest.mark.parametrize("module_name", PUBLIC)
def test_public_names_have_an_example(module_name: str) -> None:
    without = [n for n, v in public(importlib.import_module(module_name)) if not examples(v)]
    assert not without, f"no >>> example in the docstrings of {without}"


def test_no_name_is_documented_twice() -> None:
    paths = [path for page in REFERENCE.glob("*.md") for path in documented(page)]
    assert len(paths) == len(set(paths))


@pytest.mark.parametrize("page", pages())
def test_links(page: str) -> None:
    """Within the repository; where to outside of it is not asked."""
    for target in LINK.findall(prose(page)):
        if target.startswith(("https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors(file), f"{page}: {target}"


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in headings}
    return slugs | set(documented(page))


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r"([\w/]+\.md)", (ROOT / "mkdocs.yml").read_text()))
    there = {page.removeprefix("docs/") for page in pages() if page.startswith("docs/")}
    assert listed == there


@pytest.fixture
def hooks(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("latex2mathml")
    monkeypatch.syspath_prepend(ROOT / "docs" / "tools")
    return importlib.import_module("hooks")


def test_the_command_line_is_described_by_itself(hooks: ModuleType) -> None:
    text = hooks.on_page_markdown((REFERENCE / "cli.md").read_text())
    _, *parts = re.split(r"^## metaframe (\S+)$", text, flags=re.MULTILINE)
    sections = dict(zip(parts[::2], parts[1::2], strict=True))
    assert sections.keys() == cli.commands.keys()
    for name, command in cli.commands.items():
        assert command.help
        for option in (o for p in command.params for o in p.opts if o.startswith("--")):
            assert f"`{option}" in sections[name]


def test_the_algorithms_are_listed_from_their_registrations(hooks: ModuleType) -> None:
    text = hooks.on_page_markdown((REFERENCE / "learners.md").read_text())
    for name, entry in algorithms().items():
        assert f"| `{name}` | {entry.about} |" in text


def test_formulas_become_mathml(hooks: ModuleType) -> None:
    text = hooks.on_page_markdown("`$x$` and $x^2$\n\n$$\n\\frac{1}{N}\n$$\n\n```\n$y$ $z$\n```\n")
    assert text.count("<math") == 2
    assert "`$x$`" in text
    assert "$y$ $z$" in text
    assert "<mfrac>" in text


@pytest.mark.slow
def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    core = (tmp_path / "reference" / "core" / "index.html").read_text()
    assert 'id="metaframe.maml_step"' in core
    assert "&gt;&gt;&gt;" in core
    assert "<blockquote>" not in core


def messages() -> str:
    """Every text in the sources that is no docstring, without what is filled in."""
    found = []
    for path in (*(ROOT / "metaframe").rglob("*.py"), *(ROOT / "backends").rglob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if isinstance(node, ast.JoinedStr):
                texts = (part.value for part in node.values if isinstance(part, ast.Constant))
                found.append("".join(map(str, texts)))
            elif isinstance(node, ast.Constant) and id(node) not in docstrings:
                found.append(str(node.value))
    return "\n".join(found)


def test_the_messages_of_the_troubleshooting_page_exist() -> None:
    page = (ROOT / "docs/troubleshooting.md").read_text()
    told = re.findall(r"^\| `(.*?)`", page[page.index("## By message") :], re.MULTILINE)
    known = messages()
    parts = {part.strip() for message in told for part in message.split("...") if part.strip()}
    assert len(told) > 10
    assert [part for part in parts if part not in known] == []
