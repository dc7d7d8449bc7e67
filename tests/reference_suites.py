"""The reference libraries' own tests, from the package index, run against metaframe.

    python tests/reference_suites.py [ivy] [iteryne] [--backends torch,jax] [--every 6]

ivy's are those of its meta module, in the wheel of ivy 1.0.0.5: every combination of arguments that
they name, on each backend, with `maml_step`, `fomaml_step` and `reptile_step` replaced by ours. The
second-order ones run on TensorFlow too, where they are skipped for ivy. iteryne's are in the sdist
of iteryne 0.1.0 and run with the package replaced by metaframe, torch selected. Nothing of either
is kept.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import itertools
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import traceback
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
BACKENDS = ("torch", "jax", "tensorflow")
STEPS = ("maml_step", "fomaml_step", "reptile_step")
IVY_TESTS = "ivy_tests.test_ivy.test_functional.test_core.test_meta"
SHIM = """
import sys
import metaframe
metaframe.set_backend("torch")  # samplers give tensors
for name in ("", ".anil", ".datasets", ".functional", ".maml", ".metasgd", ".tasks", ".trainer"):
    sys.modules["iteryne" + name] = metaframe
"""


class Counts(NamedTuple):
    """How many passed, and what became of the others."""

    passed: int
    failed: int
    report: str

    def __str__(self) -> str:
        return f"{self.passed} passed, {self.failed} failed"


def download(requirement: str, folder: Path, *options: str) -> Path:
    """The one file of a release, from the package index that pip is set up for."""
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet")
    command = (*pip, "--no-deps", *options, "--dest", str(folder), requirement)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"pip could not get {requirement}:\n{done.stderr}")
    (found,) = folder.iterdir()
    return found


def iteryne() -> Counts:
    """Run iteryne's tests, with metaframe in the place of the package."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        archive = download("iteryne==0.1.0", folder / "sdist", "--no-binary=:all:")
        with tarfile.open(archive) as sdist:
            sdist.extractall(folder, filter="data")
        (tests,) = folder.glob("iteryne-*/tests")
        (folder / "shim").mkdir()
        (folder / "shim/iteryne.py").write_text(SHIM)
        (tests / "pytest.ini").write_text("[pytest]\n")
        pytest = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", ".")
        output = _run(pytest, tests, folder / "shim")
    passed, failed = (
        sum(map(int, re.findall(rf"(\d+) (?:{word})", output.splitlines()[-1])))
        for word in ("passed", "failed|error|skipped")
    )
    return Counts(passed, failed, output)


def ivy(backend: str, every: int = 1) -> Counts:
    """Run ivy's tests of its meta module on one backend; with `every`, one in so many of them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        archive = download("ivy==1.0.0.5", folder / "wheel", "--only-binary=:all:")
        with zipfile.ZipFile(archive) as wheel:
            tests = [name for name in wheel.namelist() if name.startswith("ivy_tests/")]
            wheel.extractall(folder, tests)
        this = (sys.executable, __file__, "--within", backend, "--every", str(every))
        output = _run(this, folder, folder)
    if not (summary := re.search(r"^(\d+) passed, (\d+) failed$", output, re.MULTILINE)):
        raise RuntimeError(f"ivy's tests did not run to their end:\n{output}")
    passed, failed = map(int, summary.groups())
    return Counts(passed, failed, output)


def _run(command: tuple[str, ...], folder: Path, first: Path) -> str:
    """The output of a command, with our sources and before them `first` on the path."""
    path = os.pathsep.join(map(str, (first, ROOT, ROOT / "backends", ROOT / "tests/support")))
    environment = {**os.environ, "PYTHONPATH": path, "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.stdout.strip()


def within(backend: str, every: int) -> int:
    """Run ivy's tests in this process, which has its package on the path."""
    from metaframe.interop import import_ivy
    from old_ivy import let_ivy_read_arrays

    let_ivy_read_arrays(backend)
    ivy = import_ivy()
    suite: Any = importlib.import_module(IVY_TESTS)
    assert Path(suite.__file__).is_relative_to(Path.cwd()), "the downloaded ones, not others"
    suite.BackendHandler = SimpleNamespace(update_backend=lambda name: _with_our_steps(ivy, name))
    # Those of second order skip TensorFlow, where ivy's own step is wrong.
    suite.pytest = SimpleNamespace(skip=lambda *reason: None)
    failures = []
    cases = list(_cases(suite))[::every]
    for name, test, arguments in cases:
        try:
            test(on_device="cpu", backend_fw=backend, **arguments)
        except Exception:  # noqa: BLE001  whatever a test raises is a failure
            failures.append(f"{name} {arguments}\n{traceback.format_exc()}")
    print(*failures, sep="\n")
    print(f"{len(cases) - len(failures)} passed, {len(failures)} failed")
    return len(failures)


@contextlib.contextmanager
def _with_our_steps(ivy: ModuleType, backend: str) -> Iterator[ModuleType]:
    import metaframe

    found = ivy.with_backend(backend)
    for name in STEPS:
        setattr(found, name, getattr(metaframe, name))
    yield found


def _cases(suite: Any) -> Iterator[tuple[str, Callable[..., None], dict[str, Any]]]:
    """Every test with every combination of the values that the suite gives its arguments.

    Some are given by Hypothesis, and draw from the same values that the others have as parameters.
    """
    marks = suite.test_maml_step_shared_vars.pytestmark
    values = {mark.args[0]: mark.args[1] for mark in marks if mark.name == "parametrize"}
    for name, test in sorted(vars(suite).items()):
        if name.startswith("test_"):
            plain = test.hypothesis.inner_test if hasattr(test, "hypothesis") else test
            names = [n for n in inspect.signature(plain).parameters if n in values]
            for row in itertools.product(*(values[n] for n in names)):
                yield name, plain, dict(zip(names, row, strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("suites", nargs="*", default=["iteryne", "ivy"])
    parser.add_argument("--backends", default=",".join(BACKENDS), help="for ivy's suite")
    parser.add_argument("--every", type=int, default=1, help="one in so many of ivy's cases")
    parser.add_argument("--within", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.suites) - {"iteryne", "ivy"}:
        parser.error(f"no suite called {sorted(unknown)}; there are iteryne and ivy")
    if options.within:
        return within(options.within, options.every)
    runs: dict[str, Callable[[], Counts]] = {}
    if "iteryne" in options.suites:
        runs["iteryne 0.1.0, torch"] = iteryne
    if "ivy" in options.suites:
        for backend in options.backends.split(","):
            runs[f"ivy 1.0.0.5, {backend}"] = partial(ivy, backend, options.every)
    failed = 0
    for suite, run in runs.items():
        counts = run()
        if counts.failed:
            print(counts.report)
        print(f"{suite}: {counts}", flush=True)
        failed += counts.failed
    return failed


if __name__ == "__main__":
    sys.exit(main() > 0)
