"""Code blocks of the README and of docs/, as tests run them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def blocks(path: str, language: str = "python") -> list[str]:
    """The fenced blocks of that language in a document, in order."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / path).read_text(), flags=re.DOTALL)


def run(code: str, path: str, names: dict[str, object] | None = None) -> dict[str, object]:
    """Execute a block; the names it leaves."""
    names = {} if names is None else names
    exec(compile(code, path, "exec"), names)
    return names
