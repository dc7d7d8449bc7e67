"""A private name that a framework drops costs what its `_private.py` says, and nothing else."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from frameworks import require
from metaframe.backend.private import PrivateName
from metaframe.errors import BackendError
from private_uses import PLAIN, USES

ROOT = Path(__file__).resolve().parent.parent
MODULES = {f"metaframe_{n}": f"metaframe_{n}._private" for n in ("torch", "jax", "tensorflow")}


SLOW = {
    "DISPATCH_MODES",
    "FUNCTION_MODES",
    "INDUCTOR_CONFIG",
    "SHAPES",
    "TRACING",
    "TRACING_CONTEXT",
    "FAKE_TENSORS",
}
"""Those that take torch's compiler seconds; INDUCTOR, of their kind, is not among them."""


def marks_of(package: str, name: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.slow] if name in SLOW else []


def source_of(module: str) -> Path:
    path = Path(*module.split(".")).with_suffix(".py")
    return ROOT / (path if module.startswith("metaframe.") else "backends" / path)


def constants(module: str) -> list[str]:
    """The names that a module declares, read off its source: importing it needs the framework."""
    body = ast.parse(source_of(module).read_text()).body
    return [
        ast.unparse(node.targets[0])
        for node in body
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Call)
        and ast.unparse(node.value.func) in ("PrivateName", "OfModules")
    ]


DECLARED = [(package, name) for package, m in MODULES.items() for name in constants(m)]


def test_every_use_is_of_a_name() -> None:
    assert {(package, name) for package in USES for name in USES[package]} <= set(DECLARED)
    assert len(set(DECLARED)) == len(DECLARED) > 20


@pytest.fixture
def framework(request: pytest.FixtureRequest) -> str:
    name = str(request.getfixturevalue("package"))
    require(name.removeprefix("metaframe_"))
    return name


@pytest.mark.parametrize(
    ("package", "constant"),
    [pytest.param(*x, id="-".join(x), marks=marks_of(*x)) for x in DECLARED],
)
def test_a_name_that_is_missing(
    package: str, constant: str, framework: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name: PrivateName = getattr(importlib.import_module(MODULES[framework]), constant)
    use = USES[package][constant]
    if package == "metaframe_jax" and constant == "PROCESSES":
        monkeypatch.setattr("jax.process_count", lambda: 2)
    assert name.found is not None
    expected = None if name.without in ("error", "theirs") else use()

    monkeypatch.setitem(vars(name), "found", None)
    if name.without == "error":
        version = importlib.import_module(name.path.partition(":")[0].partition(".")[0]).__version__
        with pytest.raises(BackendError, match=re.escape(name.path)) as caught:
            use()
        assert version in str(caught.value)
        assert name.use in str(caught.value)
    elif name.without == "theirs":
        with pytest.raises((TypeError, ValueError, RuntimeError)):
            use()
    else:
        equal(use(), expected)
    if package in PLAIN:
        with_it = PLAIN[package]()
        monkeypatch.undo()
        equal(with_it, PLAIN[package]())


def equal(found: Any, expected: Any) -> None:
    if isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for x, y in zip(found, expected, strict=True):
            equal(x, y)
    elif isinstance(expected, str):
        assert found == expected
    else:
        np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=1e-12, atol=1e-13)


WITHOUT_ANY = """
import sys
from metaframe.backend.private import PrivateName

looked_up = []
PrivateName.found = property(lambda self: looked_up.append(self.path))
from metaframe.backend import load_backend
load_backend({name!r})
assert not looked_up, looked_up
parts = ("metaframe_{name}._compile", "metaframe_{name}._distributed", "torch._inductor.config")
assert not (loaded := [part for part in parts if part in sys.modules]), loaded

import private_uses
without = private_uses.PLAIN["metaframe_{name}"]()
print(without.tolist())
"""


@pytest.mark.parametrize("package", PLAIN)
def test_a_backend_without_any_of_its_names(package: str, framework: str) -> None:
    """Importing it looks up none, and loads nothing of distributed or compiled steps."""
    name = framework.removeprefix("metaframe_")
    path = [str(ROOT / "tests" / "support"), str(ROOT), str(ROOT / "backends")]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_ANY.format(name=name)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    equal(ast.literal_eval(done.stdout.strip().splitlines()[-1]), PLAIN[package]().tolist())


# Nowhere else


FRAMEWORKS = frozenset(
    {"torch", "jax", "jaxlib", "tensorflow", "keras", "flax", "optax", "equinox", "haiku"}
)
INTERNAL = (
    *("torch.fx.experimental", "torch.ops", "torch.native_batch_norm", "torch.norm_except_dim"),
    *("jax.core", "jax.interpreters", "tensorflow.python", "tensorflow.__internal__"),
)
"""Names without an underscore that their framework does not document all the same."""
DOCUMENTED = {"_replace", "_fields", "_asdict", "_exit", "_initializing"}
"""Of namedtuple, of `os` and of import specifications."""


def modules() -> Iterator[Path]:
    for root in ("metaframe", "backends"):
        for path in sorted((ROOT / root).rglob("*.py")):
            if not path.name.endswith("_private.py"):
                yield path


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def private_uses_in(source: str, own: set[str]) -> list[str]:
    """The undocumented names of the frameworks in a file."""
    tree, roots, found = ast.parse(source), dict[str, str](), list[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                dotted = alias.name if alias.asname else alias.name.partition(".")[0]
                roots[alias.asname or dotted] = dotted
                found += _internal(alias.name)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                roots[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                found += _internal(f"{node.module}.{alias.name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            first, *rest = ast.unparse(node).split(".")
            if first in roots:
                found += _internal(".".join((roots[first], *rest)))
            if is_private(node.attr) and node.attr not in own:
                found.append(ast.unparse(node))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("attr"):
            names = [x.value for x in node.args[1:2] if isinstance(x, ast.Constant)]
            found += [ast.unparse(node) for x in names if is_private(str(x)) and x not in own]
    return found


def _internal(dotted: str) -> list[str]:
    parts = dotted.split(".")
    if parts[0] not in FRAMEWORKS:
        return []
    listed = dotted.startswith(INTERNAL)
    return [dotted] if listed or any(is_private(part) for part in parts[1:]) else []


def defined_in(package: Path) -> set[str]:
    """Attributes and functions with an underscore that a package defines itself."""
    names = set(DOCUMENTED)
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
    return names


def test_no_other_file_uses_a_private_name() -> None:
    roots = [ROOT / "metaframe", *sorted((ROOT / "backends").glob("metaframe_*"))]
    own = {root: defined_in(root) for root in roots}
    found = {}
    for path in modules():
        (root,) = (root for root in roots if path.is_relative_to(root))
        if uses := private_uses_in(path.read_text(), own[root] | own[roots[0]]):
            found[str(path.relative_to(ROOT))] = sorted(set(uses))
    assert found == {}


@pytest.mark.parametrize(
    "line",
    [
        "from torch._guards import tracing",
        "from torch import _VF",
        "import torch._inductor.config",
        "import torch\ntorch._C._functorch.peek_interpreter_stack()",
        "import torch\ntorch.native_batch_norm(x)",
        "import tensorflow as tf\ntf.__internal__.EagerTensor",
        "from tensorflow.python.eager import record",
        "from jax._src import core",
        "import jax\nisinstance(x, jax.core.Tracer)",
        "def f(module): return module._forward_pre_hooks",
        "getattr(x, '_trace', None)",
        "hasattr(x, '_flatten_layers')",
        "graph._omit_frequent_tracing_warning",
    ],
)
def test_such_a_use_is_found(line: str) -> None:
    assert private_uses_in(line, own={"_mine"})
    assert not private_uses_in("import torch\ntorch.nn.Linear; self._mine; x.__dict__", {"_mine"})
