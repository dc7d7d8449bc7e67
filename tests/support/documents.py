"""Code blocks of the README and of docs/, as tests run them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def pages() -> list[str]:
    """Every document, by its path in the repository."""
    docs = sorted((ROOT / "docs").rglob("*.md"))
    return [str(p.relative_to(ROOT)) for p in (*sorted(ROOT.glob("*.md")), *docs)]


def blocks(path: str, language: str = "python") -> list[str]:
    """The fenced blocks of that language in a document, in order."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / path).read_text(), flags=re.DOTALL)


def prose(path: str) -> str:
    """A document without its code."""
    text = re.sub(r"^```.*?^```", "", (ROOT / path).read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "", text)


def run(code: str, path: str, names: dict[str, object] | None = None) -> dict[str, object]:
    """Execute a block; the names it leaves."""
    names = {} if names is None else names
    exec(compile(code, path, "exec"), names)
    return names
