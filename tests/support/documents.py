"""Code blocks of the README and of docs/, as tests run them."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def pages() -> list[str]:
    """Every document, by its path in the repository."""
    docs = sorted((ROOT / "docs").rglob("*.md"))
    return [str(p.relative_to(ROOT)) for p in (*sorted(ROOT.glob("*.md")), *docs)]


def blocks(path: str, language: str = "python") -> list[str]:
    """The fenced blocks of that language in a document, in order."""
    text = (ROOT / path).read_text()
    found = re.findall(rf"^ *```{language}\n(.*?)```", text, flags=re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(block) for block in found]  # those in tabs are indented


def prose(path: str) -> str:
    """A document without its code."""
    text = re.sub(r"^ *```.*?^ *```", "", (ROOT / path).read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "", text)


def run(code: str, path: str, names: dict[str, object] | None = None) -> dict[str, object]:
    """Execute a block; the names it leaves."""
    names = {} if names is None else names
    exec(compile(code, path, "exec"), names)
    return names
