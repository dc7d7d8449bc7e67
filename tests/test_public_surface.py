"""The public surface: every name of every face, with its signature, against `public_surface.txt`.

A change of that file is a change for users, to be meant and to be told in CHANGELOG.md. After one,
`python tests/support/public_surface.py` writes the file anew.
"""

from __future__ import annotations

import re
from difflib import unified_diff

import pytest

from documents import ROOT, pages
from imports import sources
from public_surface import FACES, SNAPSHOT, names, surface

IMPORT = r"^\s*from (metaframe(?:\.[\w.]+)?) import ([\w, ]+)$"


def test_the_public_surface_is_as_recorded() -> None:
    there, recorded = surface(), SNAPSHOT.read_text(encoding="utf-8").splitlines()
    changes = list(unified_diff(recorded, there, "recorded", "now", lineterm="", n=0))
    assert not changes, "\n".join(
        [*changes, "If this is meant: python tests/support/public_surface.py"]
    )


def test_every_face_is_looked_at() -> None:
    """Packages are faces; the modules below them are imported by metaframe alone."""
    packages = {name for name, path in sources().items() if path.name == "__init__.py"}
    ours = {name for name in packages if name.partition(".")[0] == "metaframe"}
    inner = {"metaframe.core", "metaframe.files"}  # handed on by metaframe itself, and by nobody
    assert ours - inner <= set(FACES)


@pytest.mark.parametrize("page", [p for p in pages() if p.startswith(("docs/", "README"))])
def test_documents_use_public_names_alone(page: str) -> None:
    """Names that documents import come from a face; those of a backend's own package aside."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for module, imported in re.findall(
        r"^\s*from (metaframe(?:\.[\w.]+)?) import ([\w, ]+)$", text, re.M
    ):
        for name in imported.split(", "):
            known = module in FACES and name.split(" ")[0] in names(module)
            assert known or f"{module}.{name}" in FACES, f"{page}: {module}.{name}"
