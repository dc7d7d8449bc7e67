"""Mutated files, thousands of each kind: the right result or an error of metaframe's, and no more.

A raw exception, over 200 MB of memory or over 10 seconds for one input fails. Every input is made
from a seed and a number, which a failure names: `METAFRAME_FUZZ_SEED` sets the seed, and
`make(kind, seed, number)` makes the input again. By default some hundred inputs run; those marked
slow are over 20,000.
"""

from __future__ import annotations

import io
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

from corpus import (
    LIST,
    LISTED,
    RECORD,
    RESULT,
    STEM,
    archive,
    drawings,
    pictures,
    runs,
)
from frameworks import require
from metaframe import MAML, load_arrays, nn, optim, save_arrays
from metaframe.backend import use_backend
from metaframe.cli.classes import CLASSES, check_classes
from metaframe.cli.experiment import resolve
from metaframe.cli.run_config import RunConfig, read_toml
from metaframe.cli.run_folder import read_result
from metaframe.errors import MetaframeError
from metaframe.tasks import (
    SinusoidTaskSampler,
    load_image_folder,
    load_mini_imagenet,
    load_omniglot,
    load_tiered_imagenet,
    one_shot_runs,
)
from metaframe.tasks.image_folder import FORMATS
from metaframe.training import MetaTrainer, load_checkpoint, load_parameters, save_checkpoint
from metaframe.training.array_file import decoded
from metaframe.training.metrics import read_metrics
from mutations import mutated_bytes, mutated_value, resigned, right_checksums, signed

SEED = int(os.environ.get("METAFRAME_FUZZ_SEED", "1"))
MEMORY, SECONDS = 200_000_000, 10
BY_DEFAULT, SLOW = 20, 2100
"""Inputs of each kind."""


@cache
def _trainer(seed: int) -> MetaTrainer:
    model = nn.mlp([1, 2, 1])
    maml = MAML((model, model.init(seed)), 0.01)
    return MetaTrainer(maml, optim.adam(1e-2), nn.mse, SinusoidTaskSampler(seed=0))


@cache
def _written(kind: str, folder: Path) -> bytes:
    file = folder / f"{kind}-as-written"
    if kind == "checkpoint":
        save_checkpoint(file, _trainer(0), {"ways": 5})
    else:
        save_arrays(file, {"a": np.ones(2), "b": [1, "x", np.zeros(2, "int8")]}, {"step": 3})
    return file.read_bytes()


# -- the kinds: a mutated input is written into a folder, and read from there ----------------------


def _forged(rng: random.Random, data: bytes) -> bytes:
    """Bytes damaged, also under a right checksum, or other values or arrays."""
    how = rng.random()
    if how < 0.2:
        return mutated_bytes(rng, data)
    if how < 0.5:
        return resigned(mutated_bytes(rng, data))
    content, arrays = decoded(data, "it")
    if how < 0.6:
        words = mutated_bytes(rng, json.dumps(content).encode()).decode(errors="replace")
        return signed(arrays, words)
    if how < 0.75:
        name = rng.choice(sorted(arrays))
        dtype = rng.choice(("int8", "bool", "float16", "float32", "uint64"))
        changed = np.resize(arrays[name], rng.choice((0, 1, 7))).astype(dtype)
        return signed({**arrays, name: changed}, content)
    return signed(arrays, mutated_value(rng, content))


def _mutated(rng: random.Random, data: bytes, value: Any) -> bytes:
    """Bytes of `data`, or values in `value`, as JSON."""
    if rng.random() < 0.5:
        return mutated_bytes(rng, data)
    return json.dumps(mutated_value(rng, value)).encode()


def _picture(rng: random.Random, form: str) -> bytes:
    forms = pictures()
    other = rng.choice(forms[rng.choice(sorted(forms))])
    data = mutated_bytes(rng, rng.choice(forms[form]), other)
    return right_checksums(data) if form == "PNG" and rng.random() < 0.8 else data


def _archived(rng: random.Random, members: dict[str, bytes], form: str = "PNG") -> bytes:
    """The archive's own bytes damaged, or a member and the checksums made right, or a name."""
    how = rng.random()
    if how < 0.4:
        return mutated_bytes(rng, archive(members))
    name = rng.choice(sorted(members))
    changed = dict(members)
    data = changed.pop(name)
    if how < 0.8:
        changed[name] = _picture(rng, form) if name.endswith("g") else mutated_bytes(rng, data)
    else:
        name = mutated_bytes(rng, name.encode()).decode("latin-1")[:9999]
        changed[name.replace("\0", "/") or "x"] = data  # zipfile writes no other
    return archive(changed)


def _checkpoint(rng: random.Random, folder: Path) -> Callable[[], Any]:
    file = folder / "c"
    file.write_bytes(_forged(rng, _written("checkpoint", folder.parent)))
    runner = _trainer(1)
    before = [x.tobytes() for x in runner.state()[0].values()]

    def read() -> None:
        try:
            load_checkpoint(file, runner)
        except MetaframeError:
            after = [x.tobytes() for x in runner.state()[0].values()]
            assert after == before, "what was refused has changed something"
        load_parameters(file, runner.maml)

    return read


def _arrays(rng: random.Random, folder: Path) -> Callable[[], Any]:
    (folder / "c").write_bytes(_forged(rng, _written("arrays", folder.parent)))
    return lambda: load_arrays(folder / "c")


def _config(rng: random.Random, folder: Path) -> Callable[[], Any]:
    values = mutated_value(rng, RunConfig(dataset="folder", data="/x").as_dict())
    lines = [f"{name} = {json.dumps(value)}" for name, value in values.items()] if values else []
    text = "\n".join(lines).encode()
    (folder / "c").write_bytes(mutated_bytes(rng, text) if rng.random() < 0.5 else text)
    return lambda: resolve({"backend": "torch"}, None, read_toml(folder / "c"))


def _metrics(rng: random.Random, folder: Path) -> Callable[[], Any]:
    line = json.dumps(RECORD).encode()
    lines = [_mutated(rng, line, RECORD), line, _mutated(rng, line, RECORD)]
    (folder / "metrics.jsonl").write_bytes(b"\n".join(lines))
    return lambda: read_metrics(folder)


def _result(rng: random.Random, folder: Path) -> Callable[[], Any]:
    data = json.dumps(RESULT).encode()
    (folder / "result.json").write_bytes(_mutated(rng, data, RESULT))
    return lambda: read_result(folder)


def _classes(rng: random.Random, folder: Path) -> Callable[[], Any]:
    names = {"train": ["a", "b"], "test": ["c"]}
    (folder / CLASSES).write_bytes(_mutated(rng, json.dumps(names).encode(), names))
    return lambda: check_classes(RunConfig(), folder)


def _omniglot(rng: random.Random, folder: Path) -> Callable[[], Any]:
    (folder / f"{STEM}.zip").write_bytes(_archived(rng, drawings()))
    return lambda: load_omniglot(folder, size=rng.choice((1, 28, 105)))


def _runs(rng: random.Random, folder: Path) -> Callable[[], Any]:
    (folder / "all_runs.zip").write_bytes(_archived(rng, runs()))
    return lambda: one_shot_runs(folder, size=1)


def _mini(rng: random.Random, folder: Path) -> Callable[[], Any]:
    members = {name: pictures()[form][0] for name, form in LISTED.items()}
    listed = mutated_bytes(rng, LIST) if rng.random() < 0.3 else LIST
    (folder / "train.csv").write_bytes(listed)
    if rng.random() < 0.2:
        (folder / "SHA256SUMS").write_bytes(mutated_bytes(rng, b"0" * 64 + b"  a.jpg\n"))
    (folder / "images.zip").write_bytes(_archived(rng, members, rng.choice(("JPEG", "PNG"))))
    return lambda: load_mini_imagenet(folder, size=rng.choice((1, 84)))


def _tiered(rng: random.Random, folder: Path) -> Callable[[], Any]:
    parts = {}
    shapes = {"images": np.zeros((2, 8, 8, 3), np.uint8), "labels": np.zeros(2, np.int64)}
    for key, array in shapes.items():
        buffer = io.BytesIO()
        np.save(buffer, array)
        data = buffer.getvalue()
        if rng.random() < 0.6:
            data = mutated_bytes(rng, data[:128]) + data[128:]
        parts[key] = archive({f"{key}.npy": data})
    key = rng.choice(sorted(parts))
    parts[key] = mutated_bytes(rng, parts[key]) if rng.random() < 0.4 else parts[key]
    for name, data in parts.items():
        (folder / f"train_{name}.npz").write_bytes(data)
    return lambda: load_tiered_imagenet(folder, size=8)


def _pictures(form: str) -> Callable[[random.Random, Path], Callable[[], Any]]:
    def make(rng: random.Random, folder: Path) -> Callable[[], Any]:
        (folder / "cat").mkdir(exist_ok=True)
        file = folder / "cat" / f"1{FORMATS[form][0]}"
        file.write_bytes(_picture(rng, form))
        return lambda: np.asarray(load_image_folder(folder, size=8, workers=1).images)

    return make


KINDS: dict[str, Callable[[random.Random, Path], Callable[[], Any]]] = {
    "checkpoint": _checkpoint,
    "arrays": _arrays,
    "config": _config,
    "metrics": _metrics,
    "result": _result,
    "classes": _classes,
    "omniglot": _omniglot,
    "runs": _runs,
    "mini": _mini,
    "tiered": _tiered,
    **{form.lower(): _pictures(form) for form in FORMATS},
}
COSTLY = {"runs": 10}
"""Kinds of which there are so many times fewer inputs: one has 400 drawings."""


# -- the limits ------------------------------------------------------------------------------------


class TooSlow(BaseException):
    """No reader may turn it into an error of its own."""


def _stop(signum: int, frame: FrameType | None) -> None:
    raise TooSlow


@contextmanager
def alarm() -> Iterator[None]:
    before = signal.signal(signal.SIGALRM, _stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def memory(name: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most since `forget_peak`."""
    with open("/proc/self/status", encoding="ascii") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def forget_peak() -> None:
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


@dataclass
class Found:
    """The outcomes of the inputs of one kind."""

    read: int = 0
    refused: int = 0
    wrong: tuple[str, ...] = ()


def make(kind: str, seed: int, number: int, folder: Path) -> Callable[[], Any]:
    """Write input `number` of a kind into a folder; the reader of it."""
    folder.mkdir(exist_ok=True)
    return KINDS[kind](random.Random(f"{kind} {seed} {number}"), folder)


def fuzz(kind: str, seed: int, count: int, folder: Path) -> Found:
    found = Found()
    for number in range(count):
        here = folder / f"{number % 50}"  # a name of its own, because readers keep what they read
        read = make(kind, seed, number, here)
        forget_peak()
        before, started = memory("VmRSS"), time.perf_counter()
        problem = ""
        try:
            with alarm():
                read()
            found.read += 1
        except MetaframeError as error:
            found.refused += 1
            if len(str(error)) > 20_000:
                problem = "an error of over 20,000 characters"
        except TooSlow:
            problem = f"over {SECONDS} s"
        except Exception as error:  # noqa: BLE001 - it is what is looked for
            problem = f"{type(error).__name__}: {str(error)[:200]}"
        if (grown := memory("VmHWM") - before) > MEMORY:
            problem = f"{problem} {grown / 1e6:.0f} MB"
        if problem:
            took = time.perf_counter() - started
            found.wrong += (f"{kind}, seed {seed}, number {number}: {problem} ({took:.1f} s)",)
    return found


@pytest.mark.filterwarnings("ignore")  # of Pillow and zipfile, about damage
@pytest.mark.parametrize(
    "count",
    [pytest.param(BY_DEFAULT, id="some"), pytest.param(SLOW, id="many", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("kind", KINDS)
def test_mutated_files(kind: str, count: int, tmp_path: Path) -> None:
    require("torch")
    with use_backend("torch", dtype="float64"):
        found = fuzz(kind, SEED, max(5, count // COSTLY.get(kind, 1)), tmp_path)
    assert found.wrong == ()
    assert found.refused > 0, "the mutations are refused somewhere"


def test_there_are_enough_inputs() -> None:
    assert sum(SLOW // COSTLY.get(kind, 1) for kind in KINDS) >= 20_000


def test_the_limits_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that needs too much memory or time, or raises what it likes, is found."""

    def greedy() -> None:
        assert np.ones(30_000_000).sum() > 0

    def late() -> None:
        time.sleep(5)

    def raw() -> None:
        raise KeyError("metaframe")

    monkeypatch.setitem(globals(), "SECONDS", 0.05)
    for reader, says in ((greedy, "240 MB"), (late, "over 0.05 s"), (raw, "KeyError")):
        monkeypatch.setitem(KINDS, "it", lambda rng, folder, reader=reader: reader)
        (problem,) = fuzz("it", 0, 1, tmp_path).wrong
        assert says in problem
