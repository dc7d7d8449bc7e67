"""A griffe extension: examples in docstrings become code blocks.

Markdown takes the `>>>` of a doctest for quotes in quotes.
"""

from __future__ import annotations

from typing import Any

import griffe


class Doctests(griffe.Extension):
    """Fence every doctest."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of a function, class, module or attribute."""
        del kwargs
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)


def fenced(text: str) -> str:
    """`text` with its examples, each of which ends at an empty line, as fenced blocks."""
    lines: list[str] = []
    inside = False
    for line in [*text.splitlines(), ""]:
        starts = not inside and line.lstrip().startswith(">>> ")
        ends = inside and not line.strip()
        indent = line[: len(line) - len(line.lstrip())]
        if starts:
            fence = indent + "```"
            lines.append(f"{fence}pycon")
        if ends:
            lines.append(fence)
        inside = (inside or starts) and not ends
        lines.append(line)
    return "\n".join(lines[:-1])
