"""`save_arrays` and `load_arrays`: what goes in comes out, whole or refused."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from metaframe import Container, load_arrays, ops, optim, save_arrays, unroll
from metaframe import compile as compile_whole
from metaframe.errors import CheckpointError, InputError, InputTypeError
from metaframe.files.write import HERE, UNFINISHED, clear_unfinished
from metaframe.training import read_checkpoint
from metaframe.training.array_file import encoded

Call = Callable[..., Any]


class Pair(NamedTuple):
    one: Any
    other: Any


def cost(x: Any, v: Any) -> Any:
    return ops.sum(ops.square(v["w"] - x))


def test_a_loop_goes_on_bit_for_bit(tmp_path: Path, arr: Call, to_np: Call) -> None:
    """Variables and the state of Adam, read into their framework and classes."""
    v, x, rule = {"w": arr(np.array([1.0, 2.0]))}, arr(np.array([0.5, 3.0])), optim.adam(0.1)
    whole = unroll(cost, v, x, steps=5, lr=None, update=rule)
    half = unroll(cost, v, x, steps=2, lr=None, update=rule)
    save_arrays(tmp_path / "half", (half.variables, half.state), {"step": 2})
    (v, state), plain = load_arrays(tmp_path / "half", like=(v, rule.init(v)))
    assert isinstance(state, optim.AdamState)
    rest = unroll(cost, v, x, steps=5 - plain["step"], lr=None, update=rule, state=state)
    assert np.array_equal(to_np(rest.variables["w"]), to_np(whole.variables["w"]))


def test_what_comes_out_without_like(tmp_path: Path, arr: Call) -> None:
    given = {
        "list": [arr(1.0), None, (arr(2), "text")],
        "pair": Pair(np.float32(3.0), True),
        "container": Container(a=arr(np.zeros((2, 0))), b=0.5),
        "a/b": {"c": 1},
        "a": {"b": {"c": 2}},
        "none": {},
    }
    plain = {"nested": [1, {"x": None}]}
    save_arrays(tmp_path / "file", given, plain)
    found, after = load_arrays(tmp_path / "file")
    assert after == plain
    assert found["list"][1] is None
    assert found["list"][2][1] == "text"
    assert isinstance(found["list"][2], tuple)
    assert found["pair"]["other"] is True
    assert found["pair"]["one"].dtype == np.float32
    assert found["container"]["a"].shape == (2, 0)
    assert (found["a/b"]["c"], found["a"]["b"]["c"], found["none"]) == (1, 2, {})


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "int32", "bool"])
def test_dtypes(backend: Any, tmp_path: Path, dtype: str) -> None:
    x = backend.asarray(np.array([0, 1, 3]), dtype)
    save_arrays(tmp_path / "file", x)
    found, _ = load_arrays(tmp_path / "file", like=x)
    assert backend.dtype_name(found) == dtype
    assert backend.owns(found)
    y, z = (backend.to_numpy(backend.ops.astype(a, "float32")) for a in (x, found))
    assert np.array_equal(y, z)


def test_the_memory_order_is_no_part_of_it(tmp_path: Path) -> None:
    x = np.arange(6.0).reshape(2, 3)
    save_arrays(tmp_path / "file", [x.T, x[:, ::2], x.astype(">f8")])
    a, b, c = load_arrays(tmp_path / "file")[0]
    assert np.array_equal(a, x.T)
    assert np.array_equal(b, x[:, ::2])
    assert np.array_equal(c, x)


def test_every_damaged_byte_is_found(tmp_path: Path) -> None:
    path = tmp_path / "file"
    save_arrays(path, {"w": np.arange(3.0)}, {"step": 1})
    data = path.read_bytes()
    for i in range(len(data)):
        path.write_bytes(data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :])
        with pytest.raises(CheckpointError):
            load_arrays(path)
    path.write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match="checksum does not match"):
        load_arrays(path)


def test_a_file_that_fails_to_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    save_arrays(path, {"w": np.ones(2)})

    def fails(descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", fails)
    with pytest.raises(OSError, match="no space left"):
        save_arrays(path, {"w": np.zeros(2)})
    assert np.array_equal(load_arrays(path)[0]["w"], np.ones(2))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_what_is_refused(backend: Any, arr: Call, tmp_path: Path) -> None:
    path = tmp_path / "file"
    for given, match in (
        ({"f": print}, r"the leaf 'f' of the structure is <built-in function print>"),
        ({"f": np.array(["text"])}, "the leaf 'f' of the structure"),
        ({1: arr(1.0)}, r"the keys of a structure to save are strings, received \[1\]"),
        (np.zeros(2, complex), r"dtypes \['complex128'\] cannot be written"),
    ):
        with pytest.raises(InputTypeError, match=match):
            save_arrays(path, given)
    with pytest.raises(InputError, match="plain must be JSON values"):
        save_arrays(path, {"w": arr(1.0)}, {"f": print})
    assert not path.exists()

    def saved(x: Any) -> Any:
        save_arrays(path, x)
        return x

    with pytest.raises(InputError, match="has no value yet"):
        compile_whole(saved)(arr(1.0))


def test_another_structure_is_refused(tmp_path: Path, arr: Call) -> None:
    path = tmp_path / "file"
    save_arrays(path, {"w": arr(np.ones(2)), "k": 1})
    for like, match in (
        ({"w": arr(np.ones(2))}, r"missing \[\], unexpected \['k'\]"),
        ({"v": arr(np.ones(2)), "k": 1}, r"missing \['v'\], unexpected \['w'\]"),
        ({"w": arr(np.ones(3)), "k": 1}, r"the leaf 'w' is float64 of shape \(2,\) in .* \(3,\)"),
        ({"w": np.ones(2, "float32"), "k": 1}, "the leaf 'w' is float64 .* float32"),
        ({"w": 1.0, "k": 1}, "the leaf 'w' is float64 .* and a plain value in like"),
        ({"w": arr(np.ones(2)), "k": arr(1.0)}, "the leaf 'k' is a plain value in .* and float64"),
    ):
        with pytest.raises(CheckpointError, match=match):
            load_arrays(path, like=like)


def test_files_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(CheckpointError, match=r"cannot read checkpoint .* No such file"):
        load_arrays(path)
    save_arrays(path, {"w": np.ones(2)})
    with pytest.raises(CheckpointError, match=r"no checkpoint of a trainer.*load_arrays"):
        read_checkpoint(path)
    for content, match in (
        ({"format": 1}, "was not written by save_arrays"),
        ([], "was not written by save_arrays"),
        ({"format": 2, "kind": "arrays"}, "has format 2, this version of metaframe reads 1"),
        ({"format": 1, "kind": "arrays"}, "not as save_arrays writes it"),
        (
            {"format": 1, "kind": "arrays", "plain": 0, "leaves": [], "tree": {"list": [7]}},
            "not as save_arrays writes it",
        ),
    ):
        path.write_bytes(encoded({}, content))
        with pytest.raises(CheckpointError, match=match):
            load_arrays(path)


# -- several threads and processes -------------------------------------------------------------


def test_threads_save_to_one_path(tmp_path: Path) -> None:
    path = tmp_path / "arrays.safetensors"
    written = [np.full(10_000, float(i)) for i in range(8)]

    def save(x: Any) -> None:
        for _ in range(5):
            save_arrays(path, {"x": x})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(save, written))
    found = load_arrays(path)[0]["x"]
    assert any(np.array_equal(found, x) for x in written)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_name_as_long_as_the_file_system_takes(tmp_path: Path) -> None:
    path = tmp_path / ("a" * 243 + ".safetensors")
    save_arrays(path, {"x": np.ones(2)})
    np.testing.assert_array_equal(load_arrays(path)[0]["x"], np.ones(2))


def test_what_a_dead_process_left_is_cleared_and_nothing_else(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    names = {n: f".{HERE}-{n}-0123{UNFINISHED}" for n in (dead.pid, os.getpid())}
    others = (f".00000000-{dead.pid}-0123{UNFINISHED}", ".notes.tmp", f".{HERE}-x{UNFINISHED}")
    for name in (*names.values(), *others):
        (tmp_path / name).write_bytes(b"")
    clear_unfinished(tmp_path)
    assert {f.name for f in tmp_path.iterdir()} == {names[os.getpid()], *others}
