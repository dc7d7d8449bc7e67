"""The built and installed files: four import packages, typed, and nothing else."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.version import Version

import metaframe

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"metaframe", "metaframe_torch", "metaframe_jax", "metaframe_tensorflow"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_versions_agree() -> None:
    released = re.findall(r"^## \[(\d[^]]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert PROJECT["version"] == metaframe.__version__ == released[0]
    assert importlib.metadata.version("metaframe-ml") == metaframe.__version__


def test_every_backend_has_an_extra() -> None:
    backends = {name.removeprefix("metaframe_") for name in PACKAGES - {"metaframe"}}
    assert backends <= PROJECT["optional-dependencies"].keys()


def requirements(*groups: str) -> list[str]:
    """The lines of the named extras, of all of them by default, and of the package itself."""
    extras = PROJECT["optional-dependencies"]
    lines = [line for group in groups or extras for line in extras[group]]
    return [line.partition(";")[0].strip() for line in (*PROJECT["dependencies"], *lines)]


def pins(name: str) -> dict[str, Version]:
    """The versions that a file of constraints lists."""
    found = re.findall(r"^(\S+?)==(\S+)$", (ROOT / f"constraints-{name}.txt").read_text(), re.M)
    return {ALIASES.get(package, package): Version(version) for package, version in found}


ALIASES = {"tensorflow-cpu": "tensorflow"}
FLOORS = ("floor-jax", "floor-tensorflow")
TESTED_ONCE = ("torch", "ivy")
"""What has one version that was tested, the one in constraints-test.txt."""


def test_the_package_pins_nothing_and_ci_pins_all() -> None:
    assert [line for line in requirements() if re.search(r"==|<|~=", line)] == []
    names = {re.split(r"[>\[]", line)[0] for line in requirements("test")} - {"metaframe-ml"}
    assert names <= pins("test").keys()


def test_every_lower_bound_is_a_version_that_ci_runs() -> None:
    bounds = dict(line.split(">=") for line in requirements() if ">=" in line)
    assert {"numpy", "optree", "safetensors", "torch", "jax", "tensorflow", "flax"} <= bounds.keys()
    for package, bound in bounds.items():
        where = ("test",) if package in TESTED_ONCE else FLOORS
        found = {pins(name)[package] for name in where if package in pins(name)}
        assert found == {Version(bound)}, (package, bound, found)
    for line in PROJECT["dependencies"]:
        assert all(re.split(">=", line)[0] in pins(name) for name in FLOORS)


def test_the_newest_are_no_older_than_what_the_other_tests_run_on() -> None:
    newest, others = pins("newest-jax"), pins("test")
    for package in ("jax", "flax", "optax", "equinox", "numpy", "optree", "safetensors", "rich"):
        assert newest[package] >= others[package]


def test_ci_runs_every_list_of_versions() -> None:
    assert re.search(r"^make .*test-matrix$", (ROOT / ".ci/run").read_text(), re.M)
    said = run("make", "--dry-run", "--always-make", "test-matrix", cwd=ROOT)
    for name in (*FLOORS, "newest-jax"):
        assert f"--requirement constraints-{name}.txt" in said
        assert f".venv-{name}/bin/python -m pytest" in said


def versions_run(package: str) -> list[Version]:
    """The oldest and the newest version that CI runs; one if they are the same."""
    lists = [pins(name) for name in ("test", *FLOORS, "newest-jax")]
    versions = sorted({found[package] for found in lists if package in found})
    return list(dict.fromkeys((versions[0], versions[-1])))


def test_the_documented_versions_are_those_that_ci_runs() -> None:
    page = (ROOT / "docs/installation.md").read_text()
    table = "".join(line for line in page.splitlines() if line.startswith("|"))
    for package in ("torch", "jax", "flax", "equinox", "optax", "tensorflow", "keras"):
        for version in versions_run(package):
            assert re.search(
                rf"(?<![\d.]){re.escape(str(version).removesuffix('.0'))}(?![\d.])", table
            )


@pytest.mark.parametrize("package", ["torch", "jax", "tensorflow"])
def test_private_names_say_the_versions_that_ci_runs(package: str) -> None:
    """The first and the last of those in which a name was seen."""
    source = ROOT / f"backends/metaframe_{package}/_private.py"
    seen = re.findall(r"^SEEN = (.*)$", source.read_text(), re.M)
    assert [Version(v) for v in ast.literal_eval(seen[0])] == versions_run(package)


class Distributions(NamedTuple):
    wheel: Path
    sdist: Path


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    """The sdist of the tracked files, and the wheel built from that sdist."""
    source, dist = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    tracked = run("git", "ls-files", "-z", cwd=ROOT).rstrip("\0").split("\0")
    for name in tracked:
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    run(sys.executable, "-m", "build", "--outdir", dist, source, cwd=source)
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    return Distributions(wheel, sdist)


@pytest.mark.slow
def test_wheel_holds_the_packages_and_nothing_else(built: Distributions) -> None:
    with zipfile.ZipFile(built.wheel) as archive:
        names = archive.namelist()
    info = f"metaframe_ml-{metaframe.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {*PACKAGES, info}
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(names)
    assert f"{info}/licenses/LICENSE" in names


@pytest.mark.slow
def test_wheel_has_every_module(built: Distributions) -> None:
    with zipfile.ZipFile(built.wheel) as archive:
        shipped = {name for name in archive.namelist() if name.endswith(".py")}
    tracked = run("git", "ls-files", "metaframe/*.py", "backends/*.py", cwd=ROOT).split()
    assert shipped == {name.removeprefix("backends/") for name in tracked}


@pytest.mark.slow
def test_sdist_names_no_account(built: Distributions) -> None:
    with tarfile.open(built.sdist) as archive:
        members = archive.getmembers()
    assert {(member.uname, member.gname) for member in members} == {("root", "root")}


INSTALLED = """
import importlib.metadata as m, importlib.util as u
import metaframe
assert metaframe.__version__ == m.version("metaframe-ml")
for name in ("metaframe", "metaframe_torch", "metaframe_jax", "metaframe_tensorflow"):
    print(u.find_spec(name).origin)
print([name for name in ("backends", "tests", "docs", "examples") if u.find_spec(name)])
"""


@pytest.mark.slow
@pytest.mark.parametrize("form", ["wheel", "sdist", "editable"])
def test_install(form: str, built: Distributions, tmp_path: Path) -> None:
    # Dependencies come from this environment, through a .pth file: what is under test is ours.
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv/bin/python"
    pip = (python, "-m", "pip", "install", "--quiet", "--no-deps")
    if form == "editable":
        with tarfile.open(built.sdist) as archive:
            archive.extractall(tmp_path, filter="data")
        (source,) = tmp_path.glob("metaframe_ml-*")
        run(*pip, "--editable", source, cwd=tmp_path)
    else:
        source = python.parent.parent
        run(*pip, getattr(built, form), cwd=tmp_path)
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path)
    here = importlib.metadata.distribution("numpy").locate_file("")
    # Appended last, so that an installation of metaframe over there cannot stand in for this one.
    (Path(site.strip()) / "zz_dependencies.pth").write_text(f"{here}\n")
    # Isolated: what PYTHONPATH names cannot stand in for it either.
    *origins, strays = run(python, "-I", "-c", INSTALLED, cwd=tmp_path).split("\n")[:-1]
    assert all(Path(origin).is_relative_to(source) for origin in origins), origins
    assert strays == "[]"
