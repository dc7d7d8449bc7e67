"""Every command as people meet it: in a terminal, and in a pipe, each a process of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from frameworks import require, slow
from metaframe.cli import main
from metaframe.cli.app import cli
from processes import Terminal, environment

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are POSIX's")

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
WIDTH = 150


class Said(NamedTuple):
    """How a command ended, and what it said; in a terminal both streams are one."""

    code: int
    out: str
    err: str
    coloured: bool


def in_a_terminal(cwd: Path, *args: str) -> Said:
    terminal = Terminal(*args, cwd=cwd)
    code = terminal.wait()
    plain = ESCAPE.sub("", terminal.shown).replace("\r\n", "\n")
    return Said(code, plain, plain, plain != terminal.shown.replace("\r\n", "\n"))


def in_a_pipe(cwd: Path, *args: str) -> Said:
    done = subprocess.run(
        [sys.executable, "-m", "metaframe.cli", *args],
        # What a terminal would be told, and no terminal.
        env={**environment({"COLUMNS": str(WIDTH), "TERM": "xterm"}), "NO_COLOR": ""},
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    return Said(done.returncode, done.stdout, done.stderr, "\x1b" in done.stdout + done.stderr)


Place = Callable[..., Said]
WHERE = {"terminal": in_a_terminal, "pipe": in_a_pipe}
both = pytest.mark.parametrize("where", WHERE)
in_a_pipe_slowly = pytest.mark.parametrize("where", ["terminal", slow("pipe")])
"""Both, the pipe not by default: for commands that load a framework, or for many alike."""


def succeeds(where: str, cwd: Path, *args: str) -> str:
    """The standard output of a command, which is all it said."""
    said = WHERE[where](cwd, *args)
    assert said.code == 0, said
    assert "Traceback" not in said.out + said.err
    if where == "pipe":
        assert not said.coloured
    return said.out


@both
def test_list(where: str, tmp_path: Path) -> None:
    shown = succeeds(where, tmp_path, "list")
    for name in ("data sets", "digits", "algorithms", "fomaml", "presets", "sinusoid-maml"):
        assert name in shown
    assert list(tmp_path.iterdir()) == []


HELP = sorted(cli.commands)


@pytest.mark.parametrize(
    ("name", "where"),
    [
        *((name, "terminal") for name in ("", *HELP)),
        *((name, "pipe") if name == "train" else slow(name, "pipe") for name in ("", *HELP)),
    ],
)
def test_help(name: str, where: str, tmp_path: Path) -> None:
    """The whole of it, wrapped between words, within the screen."""
    command = cli.commands[name] if name else cli
    said = WHERE[where](tmp_path, *filter(None, [name]), "--help")
    assert said.code == 0
    assert f"metaframe {name}".strip() in said.out
    assert max(map(len, said.out.splitlines())) <= WIDTH
    assert said.coloured == (where == "terminal")
    assert command.help is not None
    words = " ".join(re.sub(r"[│╭╮╰╯─]", " ", said.out).split())
    for sentence in re.split(r"(?<=[.:])\s+", " ".join(command.help.split())):
        assert sentence in words
    for parameter in command.params:
        assert all(f"{option}" in words for option in parameter.opts if option.startswith("--"))
    if not name:
        assert all(f" {other} " in words for other in HELP)


MISTAKES = {
    "a flag": (
        ["train", "--iner-lr", "1"],
        ["No such option '--iner-lr'", "Did you mean one of: '--inner-lr'"],
    ),
    "a data set": (
        ["train", "--dataset", "omniglt"],
        ["Did you mean 'omniglot'? There are digits"],
    ),
    "a preset": (
        ["reproduce", "sinusoid-mmal"],
        ["Did you mean 'sinusoid-maml'? `metaframe list`"],
    ),
    "a backend": (["train", "--backend", "tourch"], ["Did you mean 'torch'? There are jax, tens"]),
    "a command": (["evalute", "run"], ["No such command 'evalute'"]),
}


@both
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake: str, where: str, tmp_path: Path) -> None:
    args, expected = MISTAKES[mistake]
    said = WHERE[where](tmp_path, *args)
    assert said.code == 2
    assert "Traceback" not in said.err
    words = " ".join(re.sub(r"[│╭╮╰╯─]", " ", said.err).split())
    assert all(text in words for text in expected)
    if where == "pipe":
        assert said.out == ""
        assert not said.coloured
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was trained for two steps."""
    require("torch")
    folder = tmp_path_factory.mktemp("run") / "run"
    flags = [
        *("--backend", "torch", "--no-compiled", "--iterations", "2", "--meta-batch-size", "2"),
        *("--eval-every", "0", "--eval-tasks", "4", "--eval-steps", "2", "--width", "8"),
    ]
    assert main(["train", *flags, "--no-plots", "--quiet", "--out", str(folder)]) == 0
    return folder


@in_a_pipe_slowly
def test_evaluate(where: str, run: Path, tmp_path: Path) -> None:
    shown = succeeds(where, tmp_path, "evaluate", str(run))
    assert re.search(r"mean squared error before adaptation: \d+\.\d+ ± \d+\.\d+$", shown, re.M)
    assert re.search(r"after 2 steps: \d+\.\d+ ± \d+\.\d+ \(4 tasks, 95% CI\)$", shown, re.M)
    assert ("evaluating step-00000002" in shown) == (where == "terminal"), "a remark is no result"


@in_a_pipe_slowly
def test_plot(where: str, run: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for picture in run.glob("*.png"):
        picture.unlink()
    shown = succeeds(where, tmp_path, "plot", str(run))
    assert (run / "predictions.png").exists()
    assert shown.splitlines() == [
        str(run / f"{name}.png") for name in ("learning_curve", "adaptation", "predictions")
    ]


CASE = """
import torch


def case():
    return {
        "cost": lambda task, v: (torch.tanh(v["w"] * task) ** 2).mean(),
        "variables": {"w": torch.ones(2)},
        "batch": torch.ones(2, 2),
        "executions": ("vmap",),
    }
"""


@in_a_pipe_slowly
def test_doctor(where: str, tmp_path: Path) -> None:
    require("torch")
    (tmp_path / "tiny_case.py").write_text(CASE)
    shown = succeeds(where, tmp_path, "doctor", "tiny_case:case", "--backend", "torch")
    assert "The meta-gradient is right." in shown


@pytest.mark.slow
@both
def test_backends(where: str, tmp_path: Path) -> None:
    """It loads all of them, for their devices."""
    shown = succeeds(where, tmp_path, "backends")
    for name in ("jax", "tensorflow", "torch"):
        assert name in shown


@pytest.mark.slow
@both
def test_bench(where: str, tmp_path: Path) -> None:
    require("torch")
    flags = ["--backend", "torch", "--no-compiled", "--width", "4", "--tasks", "2", "--steps", "2"]
    shown = succeeds(where, tmp_path, "bench", *flags)
    assert re.search(r"^torch, W1: \d+\.\d+ ms a step, \d+\.\d+ s first$", shown, re.M)


@pytest.mark.slow
@both
def test_reproduce_and_resume(where: str, tmp_path: Path) -> None:
    """Far too short a run: it says so, and the exit code is 1; then it goes on."""
    require("torch")
    flags = ["--backend", "torch", "--no-compiled", "--iterations", "2", "--eval-tasks", "4"]
    said = WHERE[where](tmp_path, "reproduce", "sinusoid-maml", *flags, "--no-plots")
    assert said.code == 1
    assert "NOT REACHED" in said.out
    folder = "runs/sinusoid-maml-torch"
    shown = succeeds(where, tmp_path, "resume", folder, "--iterations", "3", "--no-plots")
    assert f"everything is in {folder}" in shown


@pytest.mark.slow
@both
def test_launch(where: str, tmp_path: Path) -> None:
    require("jax")
    flags = ["--iterations", "2", "--meta-batch-size", "2", "--eval-tasks", "2", "--width", "4"]
    args = ["train", "--backend", "jax", *flags, "--eval-every", "0", "--no-plots", "--out", "run"]
    assert "everything is in run" in succeeds(where, tmp_path, "launch", "-n", "2", *args)
