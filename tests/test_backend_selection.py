"""Which backend a call runs on: the arrays decide, a selection decides, errors name the fix."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from frameworks import BACKENDS, REQUIRED, require
from metaframe.backend import (
    Backend,
    available_backends,
    current_backend,
    load_backend,
    registry,
    selection,
    set_backend,
    unset_backend,
    use_backend,
)
from metaframe.backend.selection import backend_of, convert_neutral
from metaframe.backend.tables import NNTable
from metaframe.errors import (
    BackendError,
    BackendNotInstalledError,
    InputTypeError,
    MetaframeError,
    UnknownKeyError,
)

PAIRS = list(permutations(BACKENDS, 2))


@pytest.fixture
def pair(request: pytest.FixtureRequest) -> tuple[Backend, Backend]:
    """Two backends; parametrise with PAIRS."""
    for name in request.param:
        require(name)
    return load_backend(request.param[0]), load_backend(request.param[1])


@pytest.mark.parametrize("name", sorted(REQUIRED))
def test_every_promised_backend_loads(name: str) -> None:
    assert load_backend(name).name == name


# -- the arrays decide -------------------------------------------------------------------


def test_arrays_decide(backend_name: str) -> None:
    backend = load_backend(backend_name)
    x = backend.asarray([1.0, 2.0])
    assert current_backend(x) is backend
    assert backend_of(x, x, 3.0, np.ones(2)) is backend


def test_neutral_inputs_decide_nothing() -> None:
    with pytest.raises(BackendError, match="set_backend"):
        backend_of(np.ones(2), 1.0, 2, True, np.float32(3))


def test_nothing_is_selected_at_first() -> None:
    with pytest.raises(BackendError, match="no backend is selected"):
        current_backend()


def test_what_is_no_array_says_how_to_make_it_a_node(backend_name: str) -> None:
    class Batch:
        pass

    x = load_backend(backend_name).asarray(1.0)
    with pytest.raises(InputTypeError, match=r"Batch is neither an array.*register_dataclass"):
        backend_of(x, Batch())


@pytest.mark.parametrize("pair", PAIRS, indirect=True, ids="-".join)
def test_arrays_of_two_frameworks(pair: tuple[Backend, Backend]) -> None:
    first, second = pair
    with pytest.raises(TypeError, match=f"two frameworks.*'{first.name}' and '{second.name}'"):
        backend_of(first.asarray(1.0), second.asarray(1.0))


# -- a selection decides -----------------------------------------------------------------


def test_set_and_unset(backend_name: str) -> None:
    set_backend(backend_name)
    assert current_backend().name == backend_name
    assert current_backend(np.ones(2), 1.0).name == backend_name
    unset_backend()
    with pytest.raises(BackendError):
        current_backend()


def test_the_backend_fixture_selects_in_the_test(backend: Backend) -> None:
    assert current_backend() is backend
    (x,) = convert_neutral((1.5,), backend)
    assert backend.dtype_name(x) == "float64"


@pytest.mark.parametrize("pair", PAIRS, indirect=True, ids="-".join)
def test_scopes_nest_and_win_over_the_process(pair: tuple[Backend, Backend]) -> None:
    outer, inner = pair
    set_backend(outer.name)
    with use_backend(inner.name) as yielded:
        assert current_backend() is yielded is inner
        with use_backend(outer.name):
            assert current_backend() is outer
        assert current_backend() is inner
    assert current_backend() is outer


@pytest.mark.parametrize("pair", PAIRS, indirect=True, ids="-".join)
def test_within_a_scope_the_later_one_counts(pair: tuple[Backend, Backend]) -> None:
    outer, inner = pair
    with use_backend(outer.name):
        set_backend(inner.name)
        assert current_backend() is inner
        unset_backend()
        assert selection.current_selection() is None
        set_backend(inner.name)
    assert current_backend() is inner


def test_a_scope_ends_when_its_block_raises(backend_name: str) -> None:
    with pytest.raises(KeyError), use_backend(backend_name):
        raise KeyError
    with pytest.raises(BackendError):
        current_backend()


@pytest.mark.parametrize("pair", PAIRS, indirect=True, ids="-".join)
def test_array_of_another_framework_than_selected(pair: tuple[Backend, Backend]) -> None:
    selected, other = pair
    with (
        use_backend(selected.name),
        pytest.raises(TypeError, match=f"'{selected.name}' is selected.*of '{other.name}'"),
    ):
        backend_of(other.asarray(1.0))


@pytest.mark.parametrize(
    ("neutral", "dtype"),
    [
        (1.5, "selected"),
        (np.float16(1.5), "selected"),
        (np.ones((2, 3)), "selected"),
        (np.arange(3, dtype=np.int32), "int32"),
        (np.array([True, False]), "bool"),
    ],
    ids=["number", "numpy-scalar", "float-array", "int-array", "bool-array"],
)
@pytest.mark.parametrize("selected", ["float32", "float64"])
def test_neutral_inputs_are_converted_as_selected(
    backend_name: str, neutral: Any, dtype: str, selected: str
) -> None:
    with use_backend(backend_name, dtype=selected) as backend:
        (x,) = convert_neutral((neutral,), backend)
        assert backend.owns(x)
        assert backend.dtype_name(x) == (selected if dtype == "selected" else dtype)
        np.testing.assert_array_equal(backend.to_numpy(x), neutral)


def test_float64_survives_conversion_exactly(backend_name: str) -> None:
    with use_backend(backend_name, dtype="float64") as backend:
        (x,) = convert_neutral((0.1,), backend)
        assert float(backend.to_numpy(x)) == 0.1


def test_own_arrays_are_left_alone(backend_name: str) -> None:
    with use_backend(backend_name, dtype="float64") as backend:
        own = backend.asarray([1.0], "float32")
        assert convert_neutral((own,), backend)[0] is own


def test_neutral_input_without_a_selection(backend_name: str) -> None:
    backend = load_backend(backend_name)
    with pytest.raises(TypeError, match=f'received ndarray.*set_backend."{backend_name}"'):
        convert_neutral((backend.asarray(1.0), np.ones(2)), backend)


def test_device(backend_name: str) -> None:
    device = load_backend(backend_name).devices()[0]
    with use_backend(backend_name, device=device) as backend:
        (x,) = convert_neutral((np.ones(2),), backend)
        np.testing.assert_array_equal(backend.to_numpy(x), np.ones(2))


@pytest.mark.parametrize("device", ["abacus", "abacus:7"])
def test_unknown_device_fails_when_selected(backend_name: str, device: str) -> None:
    with pytest.raises(BackendError, match=f"no device '{device}'"):
        set_backend(backend_name, device=device)
    with pytest.raises(BackendError, match="no backend is selected"):
        current_backend()


@pytest.mark.parametrize("dtype", ["float99", "int32", np.float32])
def test_what_is_no_floating_dtype_fails_when_selected(backend_name: str, dtype: Any) -> None:
    with pytest.raises(ValueError, match="one of float16, bfloat16, float32, float64; received"):
        set_backend(backend_name, dtype=dtype)


def test_jax_refuses_float64_while_it_is_switched_off() -> None:
    require("jax")
    import jax

    enabled = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", False)
    try:
        with pytest.raises(BackendError, match="jax_enable_x64"):
            set_backend("jax", dtype="float64")
    finally:
        jax.config.update("jax_enable_x64", enabled)


@pytest.mark.parametrize("pair", PAIRS[:1], indirect=True, ids="-".join)
def test_a_failed_selection_keeps_the_previous_one(pair: tuple[Backend, Backend]) -> None:
    set_backend(pair[0].name)
    with pytest.raises(BackendError):
        set_backend(pair[1].name, device="abacus")
    assert current_backend() is pair[0]


# -- threads and tasks -------------------------------------------------------------------


def in_thread(work: Any) -> Any:
    result: list[Any] = []

    def target() -> None:
        try:
            result.append(work())
        except MetaframeError as error:
            result.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    return result[0]


def test_set_backend_holds_in_every_thread(backend_name: str) -> None:
    set_backend(backend_name)
    assert in_thread(current_backend).name == backend_name


def test_use_backend_holds_in_its_own_thread_only(backend_name: str) -> None:
    with use_backend(backend_name):
        assert isinstance(in_thread(current_backend), BackendError)


@pytest.mark.parametrize("pair", PAIRS[::2], indirect=True, ids="-".join)
def test_threads_select_at_the_same_time(pair: tuple[Backend, Backend]) -> None:
    both_selected = threading.Barrier(2, timeout=60)
    seen: dict[str, Backend] = {}

    def work(name: str) -> None:
        with use_backend(name):
            both_selected.wait()
            seen[name] = current_backend()

    threads = [threading.Thread(target=work, args=(backend.name,)) for backend in pair]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {backend.name: backend for backend in pair}


@pytest.mark.parametrize("pair", PAIRS[::2], indirect=True, ids="-".join)
def test_tasks_interleave(pair: tuple[Backend, Backend]) -> None:
    async def work(backend: Backend) -> bool:
        held = []
        with use_backend(backend.name):
            for _ in range(3):
                await asyncio.sleep(0)
                held.append(current_backend() is backend)
        return all(held)

    async def main() -> list[bool]:
        return await asyncio.gather(*(work(backend) for backend in pair))

    assert asyncio.run(main()) == [True, True]


# -- which backends there are ------------------------------------------------------------


def test_unknown_backend_names_the_nearest() -> None:
    with pytest.raises(UnknownKeyError, match=r"'pytorch'\. Did you mean 'torch'"):
        set_backend("pytorch")
    with pytest.raises(KeyError, match="Known: jax, tensorflow, torch"):
        load_backend("zzz")


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """A backend whose framework cannot be imported; parametrise with its name."""
    name: str = request.param
    monkeypatch.delitem(registry._loaded, name, raising=False)
    monkeypatch.setattr(registry, "_by_type", {})
    monkeypatch.setattr(registry, "_in_use", {})
    monkeypatch.setitem(sys.modules, name, None)
    return name


@pytest.mark.parametrize("without", BACKENDS, indirect=True)
def test_backend_not_installed_gives_the_command(without: str) -> None:
    with pytest.raises(BackendNotInstalledError) as caught:
        set_backend(without)
    assert f"Run: pip install {without}" in str(caught.value)
    assert isinstance(caught.value, ImportError)


@pytest.mark.parametrize("without", BACKENDS, indirect=True)
def test_a_missing_framework_stops_nobody_else(without: str) -> None:
    other = next(name for name in BACKENDS if name != without)
    require(other)
    x = load_backend(other).asarray(1.0)
    assert current_backend(x).name == other
    (row,) = (info for info in available_backends() if info.name == without)
    assert row.version is None
    assert row.devices == ()
    assert row.install == f"pip install {without}"


def test_available_backends(backend_name: str) -> None:
    (row,) = (info for info in available_backends() if info.name == backend_name)
    assert row.version == sys.modules[backend_name].__version__
    assert row.devices == load_backend(backend_name).devices() != ()


FRAMEWORK = """
__version__ = "3.1"

class Array(list):
    pass
"""

BACKEND = """
import abacus
from metaframe.backend import Backend

class AbacusBackend(Backend):
    name = "abacus"

    def owns(self, x):
        return isinstance(x, abacus.Array)

    def asarray(self, x, dtype=None, device=None):
        return abacus.Array([x])

    def devices(self):
        return ("frame",)

# Selection needs no more than this of a backend.
AbacusBackend.__abstractmethods__ = frozenset()
"""


@pytest.fixture
def abacus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package installed next to its framework that registers a backend for it."""
    info = tmp_path / "metaframe_abacus-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: metaframe-abacus\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[metaframe.backends]\nabacus = metaframe_abacus:AbacusBackend\n"
    )
    (tmp_path / "metaframe_abacus.py").write_text(BACKEND)
    (tmp_path / "abacus.py").write_text(FRAMEWORK)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_known", None)
    monkeypatch.setattr(registry, "_by_type", {})
    monkeypatch.setattr(registry, "_in_use", {})
    yield tmp_path
    for known in (registry._loaded, sys.modules):
        known.pop("abacus", None)
    sys.modules.pop("metaframe_abacus", None)


@pytest.mark.usefixtures("abacus")
def test_a_registered_backend_is_selected_by_name() -> None:
    set_backend("abacus")
    assert type(current_backend()).__qualname__ == "AbacusBackend"
    assert "abacus" in [info.name for info in available_backends() if info.version == "3.1"]


@pytest.mark.usefixtures("abacus")
def test_a_registered_backend_is_inferred_and_not_loaded_before() -> None:
    with pytest.raises(BackendError):
        current_backend(1.0)
    assert "abacus" not in sys.modules
    import abacus

    assert current_backend(abacus.Array([1])).name == "abacus"


def test_a_registered_backend_that_is_broken(
    abacus: Path, backend_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It harms nobody who does not use it, and says where it comes from."""
    monkeypatch.setattr(registry, "_broken", set())
    (abacus / "metaframe_abacus.py").write_text("from abacus import Beads")
    import abacus as framework

    x = framework.Array([1])
    with pytest.warns(UserWarning, match="'abacus' cannot be loaded from metaframe_abacus"):
        assert registry.owner(x) is None
    assert current_backend(load_backend(backend_name).asarray(1.0)).name == backend_name
    (info,) = (info for info in available_backends() if info.name == "abacus")
    assert info.devices == ()
    with pytest.raises(BackendError, match=r"cannot import name 'Beads'.*metaframe-abacus"):
        set_backend("abacus")


@pytest.mark.usefixtures("abacus")
def test_a_registered_backend_takes_part_in_the_errors() -> None:
    with pytest.raises(UnknownKeyError, match="Did you mean 'abacus'"):
        load_backend("abakus")


def test_a_registered_backend_without_its_framework(abacus: Path) -> None:
    (abacus / "abacus.py").unlink()
    with pytest.raises(BackendNotInstalledError, match=r"needs abacus.*pip install"):
        load_backend("abacus")


@pytest.mark.usefixtures("abacus")
def test_a_built_in_name_cannot_be_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = registry.importlib.metadata
    hijack = metadata.EntryPoint("torch", "evil:Backend", registry.ENTRY_POINT_GROUP)
    monkeypatch.setattr(metadata, "entry_points", lambda group: [hijack])
    monkeypatch.setattr(registry, "_known", None)
    assert registry.known_backends()["torch"].target == "metaframe_torch:TorchBackend"


def test_a_backend_with_a_missing_method_cannot_be_made() -> None:
    class Incomplete(Backend):
        name = "incomplete"

    with pytest.raises(BackendError, match=r"(?s)'incomplete' lacks .*\nand `vmap`: `fn` over the"):
        Incomplete()  # type: ignore[abstract]


def test_a_table_with_a_missing_function_cannot_be_made() -> None:
    class Shapeless(NNTable):
        pass

    with pytest.raises(BackendError, match=r"Shapeless lacks `conv2d`: .*\nand `gelu`"):
        Shapeless()  # type: ignore[abstract]
