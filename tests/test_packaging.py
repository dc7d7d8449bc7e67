"""What is built and installed: four import packages, typed, and nothing else."""

from __future__ import annotations

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

import metaframe

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"metaframe", "metaframe_torch", "metaframe_jax", "metaframe_tensorflow"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_versions_agree() -> None:
    released = re.findall(r"^## \[(\d[^]]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert PROJECT["version"] == metaframe.__version__ == released[0]
    assert importlib.metadata.version("metaframe") == metaframe.__version__


def test_every_backend_has_an_extra() -> None:
    backends = {name.removeprefix("metaframe_") for name in PACKAGES - {"metaframe"}}
    assert backends <= PROJECT["optional-dependencies"].keys()


def test_the_package_pins_nothing_and_ci_pins_all() -> None:
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    requirements = [line.partition(";")[0] for group in groups for line in group]
    assert [line for line in requirements if re.search(r"==|<|~=", line)] == []
    pins = re.findall(r"^(\S+?)==", (ROOT / "constraints-test.txt").read_text(), re.MULTILINE)
    needed = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["test"]]
    names = {re.split(r"[>\[]", line)[0] for line in needed} - {"metaframe"}
    assert names <= set(pins)


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
    info = f"metaframe-{metaframe.__version__}.dist-info"
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
assert metaframe.__version__ == m.version("metaframe")
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
        (source,) = tmp_path.glob("metaframe-*")
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
