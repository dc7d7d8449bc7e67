"""The README's code runs as it is written there."""

from __future__ import annotations

import numpy as np

import metaframe
from documents import ROOT, blocks, run
from frameworks import compiles_on_torch

README = "README.md"


def test_commands_come_first() -> None:
    text = (ROOT / README).read_text()
    assert text.index("```bash") == text.index("```")
    assert [line.split("#")[0].strip() for line in blocks(README, "bash")[0].splitlines()] == [
        "make demo",
        "make test",
    ]


def test_loop_is_short() -> None:
    (loop,) = blocks(README)
    assert len([line for line in loop.splitlines() if line.strip()]) < 25


@compiles_on_torch
def test_loop_learns(backend_name: str) -> None:
    (loop,) = blocks(README)
    loop = loop.replace('set_backend("jax")', f'set_backend("{backend_name}")')
    short = loop.replace("range(1000)", "range(60)")
    assert short != loop
    try:
        recording = short.replace("for _ in", "history = []\nfor _ in")
        names = run(recording + "    history.append(float(mse))\n", README)
    finally:
        metaframe.unset_backend()
    history = np.array(names["history"])
    assert np.isfinite(history).all()
    assert history[-15:].mean() < history[:15].mean()
