"""The code of docs/ runs as it is written there."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any, get_args

import pytest

import metaframe
from documents import ROOT, blocks, pages, run
from frameworks import BACKENDS, require
from metaframe.backend.contract import Backend
from metaframe.learners import registry
from metaframe.testing.conformance import CLAUSES
from metaframe.testing.conformance.report import gaps
from metaframe.testing.report import Kind
from nested_pytest import run_pytest

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


ELSEWHERE = {
    "README.md": "test_readme.py",
    "docs/training_loop.md": "test_training_loop",
    "docs/testing.md": "test_testing",
    "docs/porting/ivy.md": "with_ivy/test_porting_page.py",
}
"""Pages whose code takes more than running it, and where that is."""
RUN_AS_IT_IS = [page for page in pages() if blocks(page) and page not in ELSEWHERE]


@pytest.mark.parametrize("page", RUN_AS_IT_IS)
def test_code_of_a_page(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From top to bottom, in one session; a page about several frameworks needs all of them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_registered", dict(registry.algorithms()))
    require("torch")
    for name in ("jax", "tensorflow"):
        if f"import {name}" in "".join(blocks(page)):
            require(name)
    names: dict[str, object] = {}
    try:
        for block in blocks(page):
            run(block.replace("fit(1000,", "fit(3,"), page, names)
    finally:
        metaframe.unset_backend()


def plain_gradients(names: dict[str, Any], *, adam: bool) -> dict[str, Any]:
    """The meta-gradient of five inner steps in plain torch, by descent or by Adam's formula."""
    import torch

    model, loss_fn = names["model"], names["loss_fn"]
    start = dict(model.named_parameters())
    at, mean, square = dict(start), dict.fromkeys(start, 0.0), dict.fromkeys(start, 0.0)

    def loss(params: dict[str, Any], x: Any, y: Any) -> Any:
        return loss_fn(torch.func.functional_call(model, params, (x,)), y)

    for k in range(1, 6):
        cost = loss(at, names["sx"], names["sy"])
        grads = torch.autograd.grad(cost, list(at.values()), create_graph=True)
        for name, g in zip(start, grads, strict=True):
            if adam:
                mean[name] = 0.9 * mean[name] + 0.1 * g
                square[name] = 0.999 * square[name] + 0.001 * g * g
                root = (square[name] / (1 - 0.999**k)).sqrt()
                at[name] = at[name] - 0.01 * mean[name] / (1 - 0.9**k) / (root + 1e-8)
            else:
                at[name] = at[name] - 0.1 * g
    found = torch.autograd.grad(loss(at, names["qx"], names["qy"]), list(start.values()))
    return dict(zip(start, found, strict=True))


@pytest.mark.parametrize("page", ["learn2learn", "higher", "torchopt", "iteryne"])
def test_porting(page: str) -> None:
    """Each idiom gives the model the meta-gradient that plain torch gives."""
    require("torch")
    path = f"docs/porting/{page}.md"
    names: dict[str, Any] = {}
    start, idiom, *further = blocks(path)
    run(start, path, names)
    model = names["model"]
    model.zero_grad()
    expected = plain_gradients(names, adam=page == "higher")
    run(idiom, path, names)
    for name, parameter in model.named_parameters():
        scale = expected[name].abs().max()
        assert (parameter.grad - expected[name]).abs().max() <= 1e-4 * scale, name
    for block in further:
        run(block, path, names)


def test_backends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The class says what it lacks, the suite runs, and the project file is the example's."""
    require("torch")
    pytest.importorskip("mlx.core")
    start, lacking, suite, check, declared = blocks("docs/backends.md")
    names: dict[str, object] = {}
    for block in (start, lacking, check, declared):
        run(block, "docs/backends.md", names)
    (said,) = blocks("docs/backends.md", "text")
    assert capsys.readouterr().out.startswith(said.strip().removesuffix("..."))
    assert {"dtype/float64", "ops/sin-2x3x4/derivatives"} == set(gaps(names["WithGaps"]()))
    (tmp_path / "test_backend.py").write_text(suite)
    exit_code, output = run_pytest(tmp_path)
    assert exit_code == 0, output
    assert re.search(r"\d+ passed", output)
    (project,) = blocks("docs/backends.md", "toml")
    example = (ROOT / "examples/third_party/metaframe_mlx/pyproject.toml").read_text()
    key = "entry-points"
    assert tomllib.loads(project)["project"][key] == tomllib.loads(example)["project"][key]


def test_the_guide_to_backends_lists_every_method_and_chapter() -> None:
    text = (ROOT / "docs/backends.md").read_text()
    methods = {name for name in vars(Backend) if not name.startswith("_")}
    told = {"name", "described", "module_base", "compiles_quickly", "conformance_gaps"}
    assert methods - told <= set(re.findall(r"`(\w+)(?: = \w+)?`", text))
    chapters = {clause.id.partition("/")[0] for clause in CLAUSES}
    assert chapters <= set(re.findall(r"`(\w+)`", text))


def test_testing(tmp_path: Path) -> None:
    """The doctor finds what the document says; the tests in it are run by pytest."""
    for name in BACKENDS:
        require(name)
    *code, matrix, conversion = blocks("docs/testing.md")
    names: dict[str, object] = {}
    for block in [*code, conversion]:
        run(block, "docs/testing.md", names)
    (said,) = blocks("docs/testing.md", "text")
    printed = str(names["report"]).splitlines()
    for line, expected in zip(printed, said.splitlines(), strict=False):
        assert line.startswith(expected.removesuffix("..."))
    (tmp_path / "test_matrix.py").write_text(matrix)
    exit_code, output = run_pytest(tmp_path, "--metaframe-backends=torch,jax")
    assert exit_code == 0, output
    assert "3 passed, 1 xfailed" in output
    kinds = set(get_args(Kind)) - {"cannot be vectorised"}
    table = set(
        re.findall(r"^\| ([a-z -]+) \|", (ROOT / "docs/testing.md").read_text(), re.MULTILINE)
    )
    assert table - {"finding", "---"} == kinds
