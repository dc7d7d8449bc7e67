"""What the README shows runs as it is written there."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import metaframe

README = Path(__file__).resolve().parent.parent / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), flags=re.DOTALL)


def test_commands_come_first() -> None:
    first = next(iter(re.findall(r"```(\w+)\n(.*?)```", README.read_text(), flags=re.DOTALL)))
    assert first[0] == "bash"
    assert [line.split("#")[0].strip() for line in first[1].splitlines()] == [
        "make demo",
        "make test",
    ]


def test_loop_is_short() -> None:
    (loop,) = blocks("python")
    assert len([line for line in loop.splitlines() if line.strip()]) < 25


@pytest.mark.usefixtures("backend_name")
def test_loop_learns(backend_name: str) -> None:
    (loop,) = blocks("python")
    loop = loop.replace('set_backend("jax")', f'set_backend("{backend_name}")')
    short = loop.replace("range(1000)", "range(60)")
    assert short != loop
    names: dict[str, object] = {}
    try:
        exec(
            compile(
                short.replace("for _ in", "history = []\nfor _ in")
                + "    history.append(float(mse))\n",
                str(README),
                "exec",
            ),
            names,
        )
    finally:
        metaframe.unset_backend()
    history = np.array(names["history"])
    assert np.isfinite(history).all()
    assert history[-15:].mean() < history[:15].mean()
