"""Draw the packages on their floors, from the import graph: `python docs/tools/house.py`.

Writes docs/images/house.svg. A package stands one floor above the highest that it imports.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "support"))

from imports import floors, room_graph  # noqa: E402

PICTURE = ROOT / "docs" / "images" / "house.svg"
ROOMS = {
    "metaframe.cli": "the command: runs, presets, plots",
    "metaframe": "the door: what `import metaframe` offers",
    "metaframe.training": "MetaTrainer, evaluation, callbacks, checkpoints",
    "metaframe.learners": "MAML and its relatives, one file each",
    "backends": "PyTorch, JAX, TensorFlow",
    "metaframe.models": "any model as pure functions",
    "metaframe.testing": "doctor, conformance, plugin",
    "metaframe.nn": "layers, losses, models",
    "metaframe.core": "steps, inner loop, task program, task map, update rules, compile",
    "metaframe.ops": "array functions",
    "metaframe.tasks": "data sets, samplers",
    "metaframe.distributed": "shares, processes",
    "metaframe.interop": "ivy",
    "metaframe.backend": "the contract, the registry, the selection",
    "metaframe.tree": "nested structures",
    "metaframe.files": "reading by schema, writing, locks",
    "metaframe.arguments": "checks of arguments",
    "metaframe.errors": "every error",
}
"""What is in each room, in its own words, in the order of a row."""
ROAD = ("metaframe", "metaframe.core", "metaframe.ops", "metaframe.backend", "metaframe.tree")
WIDTH, ROW, GAP, MARGIN, NUMBER = 780, 46, 12, 20, 34
STYLE = (
    "text{font:13px sans-serif;fill:#222}.s{font-size:11px;fill:#555}"
    ".r{fill:#eef1fb;stroke:#3f51b5;stroke-width:2}.g{fill:#f4f4f4;stroke:#999}.n{fill:#888}"
)


def plan() -> dict[int, list[str]]:
    """The rooms of each floor, the backends as one."""
    found: dict[int, list[str]] = {}
    for room, floor in floors(room_graph()).items():
        name = room if room.startswith("metaframe.") or room == "metaframe" else "backends"
        row = found.setdefault(floor, [])
        if name not in row:
            row.append(name)
    order = list(ROOMS)
    return {floor: sorted(row, key=order.index) for floor, row in found.items()}


def drawn() -> str:
    """The picture."""
    rows = plan()
    height = 2 * MARGIN + len(rows) * (ROW + GAP) - GAP
    told = "The packages of metaframe on their floors; each imports only from floors below its own"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{told}">',
        f"<title>{told}</title>",
        f"<style>{STYLE}</style>",
        f'<rect width="{WIDTH}" height="{height}" rx="8" fill="#fff"/>',
    ]
    for index, floor in enumerate(sorted(rows, reverse=True)):
        top = MARGIN + index * (ROW + GAP)
        parts.append(f'<text class="n" x="{MARGIN}" y="{top + ROW / 2 + 5}">{floor}</text>')
        parts += _row(rows[floor], top)
    return "\n".join([*parts, "</svg>", ""])


def _row(names: list[str], top: int) -> list[str]:
    left = MARGIN + NUMBER
    width = (WIDTH - left - MARGIN - GAP * (len(names) - 1)) / len(names)
    parts = []
    for place, name in enumerate(names):
        x = left + place * (width + GAP)
        middle = x + width / 2
        kind = "r" if name in (*ROAD, "backends") else "g"
        said = ROOMS[name].replace("`", "")
        title = name if name == "metaframe" else name.removeprefix("metaframe.")
        parts += [
            f'<rect class="{kind}" x="{x:.1f}" y="{top}" width="{width:.1f}" '
            f'height="{ROW}" rx="6"/>',
            f'<text x="{middle:.1f}" y="{top + 19}" text-anchor="middle">{title}</text>',
            f'<text class="s" x="{middle:.1f}" y="{top + 36}" text-anchor="middle">{said}</text>',
        ]
    return parts


if __name__ == "__main__":
    PICTURE.write_text(drawn(), encoding="utf-8")
