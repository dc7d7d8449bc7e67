"""Environments of their own for the libraries we compare with, with every version pinned."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

from benchmarks.harness import ROOT

FRAMEWORKS = ("jax==0.10.2", "tensorflow-cpu==2.21.0", "numpy==2.4.6")
TORCH = "torch==2.13.0"
# What metaframe and these benchmarks import besides a framework.
SUPPORT = ("optree==0.20.0", "rich==15.0.0", "safetensors==0.8.0", "matplotlib==3.11.2")


def environment(name: str, *groups: Sequence[str]) -> str:
    """The interpreter of `.venv-<name>`, made on first use.

    Each group of requirements (and pip options) is one call of pip. torch comes first and alone:
    resolved together with the rest, pip may look at several versions of it, gigabytes each.
    """
    folder = ROOT / f".venv-{name}"
    python = str(folder / "bin" / "python")
    stamp = folder / ".installed"
    wanted = repr([[TORCH], *map(list, groups)])
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    # Without our own path, or pip takes this checkout for an installed package.
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    for group in ((TORCH,), *groups):
        subprocess.run([python, "-m", "pip", "install", "--quiet", *group], check=True, env=clean)
    stamp.write_text(wanted)
    return python
