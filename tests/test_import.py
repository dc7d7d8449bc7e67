"""Importing metaframe loads no framework, changes no setting and touches no file.

Each test runs in a fresh interpreter, because in this one the frameworks are loaded already.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FRAMEWORKS = "{'torch', 'jax', 'jaxlib', 'tensorflow', 'keras', 'flax', 'equinox', 'optax', 'ivy'}"
SET_BY_CONFTEST = ("JAX_ENABLE_X64", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "XLA_FLAGS")


def run_python(code: str, directory: Path) -> str:
    """The output of `code`, run with `directory` as working and home directory."""
    environment = {k: v for k, v in os.environ.items() if k not in SET_BY_CONFTEST}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=directory,
        env={**environment, "HOME": str(directory)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_loads_no_framework(tmp_path: Path) -> None:
    code = f"import sys, metaframe; print(sorted({FRAMEWORKS} & set(sys.modules)))"
    assert run_python(code, tmp_path) == "[]"


def test_import_loads_only_what_the_steps_need(tmp_path: Path) -> None:
    """The rest, half of what there is to load, comes when it is asked for."""
    code = """
import sys, metaframe
print(sorted({"metaframe.learners", "metaframe.training", "metaframe.models"} & set(sys.modules)))
assert {"MAML", "MetaTrainer", "models", "maml_step"} <= set(dir(metaframe))
from metaframe import MAML, MetaTrainer
assert metaframe.models.functional and metaframe.training.MetaTrainer is MetaTrainer
assert not hasattr(metaframe, "no_such_name")
"""
    assert run_python(code, tmp_path) == "[]"


def test_no_module_of_the_core_loads_a_framework(tmp_path: Path) -> None:
    code = f"""
import importlib, pkgutil, sys, metaframe
names = [m.name for m in pkgutil.walk_packages(metaframe.__path__, "metaframe.")]
assert "metaframe.tree" in names
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
print(sorted({FRAMEWORKS} & set(sys.modules)))
"""
    assert run_python(code, tmp_path) == "[]"


def test_import_says_nothing_and_writes_nothing(tmp_path: Path) -> None:
    assert run_python("import metaframe", tmp_path) == ""
    assert list(tmp_path.iterdir()) == []


def test_what_is_loaded_when_it_is_asked_for(tmp_path: Path) -> None:
    code = """
import sys, metaframe
later = ("metaframe.interop", "metaframe.training")
assert not any(name in sys.modules for name in later)
assert callable(metaframe.interop.import_ivy)
assert callable(metaframe.MetaTrainer)
assert all(name in sys.modules for name in later)
assert not hasattr(metaframe, "interopp")
print("ivy" in sys.modules)
"""
    assert run_python(code, tmp_path) == "False"


SETTINGS = {
    "torch": (
        "torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(),"
        "torch.are_deterministic_algorithms_enabled(), torch.initial_seed()"
    ),
    "jax": "dict(jax.config.values)",
    "tensorflow": (
        "tensorflow.keras.config.floatx(), tensorflow.executing_eagerly(),"
        "tensorflow.config.threading.get_intra_op_parallelism_threads(),"
        "tensorflow.config.get_soft_device_placement()"
    ),
}


def test_selecting_a_backend_leaves_the_framework_as_it_was(
    backend_name: str, tmp_path: Path
) -> None:
    code = f"""
import {backend_name}
before = ({SETTINGS[backend_name]},)
import metaframe.backend
metaframe.backend.set_backend("{backend_name}")
metaframe.backend.unset_backend()
assert ({SETTINGS[backend_name]},) == before, ({SETTINGS[backend_name]},)
"""
    run_python(code, tmp_path)


def test_inference_imports_no_further_framework(backend_name: str, tmp_path: Path) -> None:
    # Compared with the framework alone, because TensorFlow imports JAX where it finds it.
    code = f"""
import sys, {backend_name}
before = {FRAMEWORKS} & set(sys.modules)
import metaframe.backend as mb
x = mb.load_backend("{backend_name}").asarray([1.0, 2.0])
assert mb.current_backend(x).name == "{backend_name}"
print(sorted(({FRAMEWORKS} & set(sys.modules)) - before))
"""
    assert run_python(code, tmp_path) == "[]"


@pytest.mark.parametrize("missing", ["torch", "jax", "tensorflow"])
def test_import_works_without_the_framework(missing: str, tmp_path: Path) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; import metaframe"
    code += "\nfrom metaframe.backend import registry"
    code += f"\nprint(registry.owner(object()), {missing!r} in registry.known_backends())"
    assert run_python(code, tmp_path) == "None True"


def test_ivy_is_looked_at_when_a_user_has_imported_it(tmp_path: Path) -> None:
    """Not before, not while its import goes on, and not if it is another module of that name."""
    code = """
import sys, types
import metaframe
from metaframe import tree
leaves = [tree.leaves({"w": 1.0})]
assert "metaframe.interop.ivy" not in sys.modules
ivy = sys.modules["ivy"] = types.ModuleType("ivy")
ivy.__spec__ = types.SimpleNamespace(_initializing=True)
leaves.append(tree.leaves({"w": 1.0}))
assert "metaframe.interop.ivy" not in sys.modules
ivy.__spec__._initializing = False
leaves.append(tree.leaves({"w": 1.0}))
assert "metaframe.interop.ivy" in sys.modules
print(set(leaves))
"""
    assert run_python(code, tmp_path) == "{(1.0,)}"
