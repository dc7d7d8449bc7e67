"""The code of docs/ runs as it is written there."""

from __future__ import annotations

import pytest

import metaframe
from documents import blocks, run
from frameworks import require

LOOPS = dict(
    zip(("torch", "jax", "tensorflow", "any"), blocks("docs/training_loop.md"), strict=True)
)


@pytest.mark.parametrize("name", LOOPS)
def test_training_loop(name: str) -> None:
    require("torch" if name == "any" else name)
    if name == "jax":
        pytest.importorskip("flax.nnx")
    if name == "tensorflow":
        pytest.importorskip("keras")
    short = LOOPS[name].replace("range(2000)", "range(3)")
    assert short != LOOPS[name]
    history: list[float] = []
    names: dict[str, object] = {
        "record": lambda x: history.append(metaframe.ops.to_numpy(x).item())
    }
    try:
        run(short + "    record(loss)\n", "docs/training_loop.md", names)
    finally:
        metaframe.unset_backend()
    assert len(set(history)) == 3
    assert all(0 < loss < 30 for loss in history)


def test_porting() -> None:
    """Each idiom gives the model a meta-gradient; the last cost is the one ivy documents."""
    require("torch")
    names: dict[str, object] = {}
    start, *idioms = blocks("docs/porting.md")
    run(start, "docs/porting.md", names)
    model = names["model"]
    for idiom in idioms[:-1]:
        model.zero_grad()  # type: ignore[attr-defined]
        run(idiom, "docs/porting.md", names)
        assert all(p.grad.abs().max() > 0 for p in model.parameters())  # type: ignore[attr-defined]
    run(idioms[-1], "docs/porting.md", names)
    assert round(float(names["cost"]), 4) == 1.4007  # type: ignore[arg-type]
