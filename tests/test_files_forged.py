"""Checkpoints whose checksum is right and whose content nobody wrote: refused before any change."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from frameworks import hardly_depends_on_the_backend, require
from metaframe import MAML, load_arrays, nn, optim, save_arrays
from metaframe.backend import Backend, use_backend
from metaframe.errors import CheckpointError, InputError, MetaframeError
from metaframe.tasks import SinusoidTaskSampler
from metaframe.training import (
    Checkpoints,
    MetaTrainer,
    load_checkpoint,
    load_parameters,
    read_checkpoint,
    save_checkpoint,
)
from metaframe.training._keras import KerasOptimizer
from metaframe.training.array_file import decoded
from mutations import nested, signed

Content = dict[str, Any]
Arrays = dict[str, np.ndarray[Any, Any]]
HUGE, DEEP, DEEPER = 10**400, nested(150), nested(900)


def trainer(seed: int = 0) -> MetaTrainer:
    model = nn.mlp([1, 3, 1])
    maml = MAML((model, model.init(seed)), 0.01)
    return MetaTrainer(maml, optim.adam(1e-2), nn.mse, SinusoidTaskSampler(seed=0))


def set_in(*path: str | int, to: Any) -> Callable[[Content, Arrays], None]:
    def change(content: Content, arrays: Arrays) -> None:
        del arrays
        node: Any = content
        for name in path[:-1]:
            node = node[name]
        node[path[-1]] = to

    return change


def without(*path: str) -> Callable[[Content, Arrays], None]:
    def change(content: Content, arrays: Arrays) -> None:
        del arrays
        node: Any = content
        for name in path[:-1]:
            node = node[name]
        del node[path[-1]]

    return change


def first(arrays: Arrays, prefix: str) -> str:
    return sorted(name for name in arrays if name.startswith(prefix))[0]


def array(
    prefix: str, change: Callable[[Any], Any], *, told: bool = True
) -> Callable[[Content, Arrays], None]:
    """Change one array, and with `told` what the content says of it."""

    def changed(content: Content, arrays: Arrays) -> None:
        name = first(arrays, prefix)
        arrays[name] = np.asarray(change(arrays[name]))
        if told:
            content["arrays"][name] = [str(arrays[name].dtype), *arrays[name].shape]

    return changed


def renamed(prefix: str, to: str) -> Callable[[Content, Arrays], None]:
    def changed(content: Content, arrays: Arrays) -> None:
        name = first(arrays, prefix)
        arrays[to] = arrays.pop(name)
        content["arrays"][to] = content["arrays"].pop(name)

    return changed


ODD = (None, True, -1, 0.5, HUGE, 2**63, "x", [], {}, [1], DEEP, DEEPER)
FORMS: dict[str, Callable[[Content, Arrays], None]] = {
    **{f"no {'.'.join(p)}": without(*p) for p in (("plain",), ("config",), ("arrays",))},
    **{f"no plain.{n}": without("plain", n) for n in ("step", "dtypes", "optimizer", "sampler")},
    **{f"step {i}": set_in("plain", "step", to=x) for i, x in enumerate(ODD)},
    **{
        f"dtypes {i}": set_in("plain", "dtypes", to=x)
        for i, x in enumerate((*ODD, {"a": 1}, {"a": None}))
    },
    **{
        f"optimizer {i}": set_in("plain", "optimizer", to=x)
        for i, x in enumerate(ODD)
        if not isinstance(x, dict)
    },
    **{
        f"sampler {i}": set_in("plain", "sampler", to=x) for i, x in enumerate(ODD) if x is not None
    },
    **{
        f"position {i}": set_in("plain", "sampler", "position", to=x)
        for i, x in enumerate(ODD)
        if x != 2**63
    },  # below 2**64
    **{f"seed {i}": set_in("plain", "sampler", "seed", to=x) for i, x in enumerate(ODD)},
    **{
        f"merits {i}": set_in("plain", "merits", to=x)
        for i, x in enumerate((*ODD, ["x"], [HUGE]))
        if x not in ([], [1])
    },
    **{
        f"owes {i}": set_in("plain", "owes_validation", to=x)
        for i, x in enumerate(ODD)
        if x is not True
    },
    **{f"format {i}": set_in("format", to=x) for i, x in enumerate(ODD)},
    **{f"backend {i}": set_in("backend", to=x) for i, x in enumerate(ODD) if x != "x"},
    **{f"plain {i}": set_in("plain", to=x) for i, x in enumerate(ODD)},
    **{f"config {i}": set_in("config", to=x) for i, x in enumerate(ODD) if x != {}},
    **{f"arrays {i}": set_in("arrays", to=x) for i, x in enumerate(ODD)},
    "a deep setting": set_in("config", "x", to=DEEPER),
    "another rule": set_in("plain", "optimizer", "rule", to=DEEP),
    **{
        f"{prefix} {what}": array(prefix, change, told=told)
        for prefix in ("params/", "optimizer/")
        for told in (True, False)
        for what, change in {
            f"int8 {told}": lambda x: x.astype(np.int8),
            f"float32 {told}": lambda x: x.astype(np.float32),
            f"booleans {told}": lambda x: x.astype(bool),
            f"flat {told}": lambda x: np.zeros(x.size + 1, x.dtype),
            f"empty {told}": lambda x: np.zeros((0, *x.shape), x.dtype),
        }.items()
    },
    "a parameter under another name": renamed("params/", "params/other"),
    "a moment under another name": renamed("optimizer/", "optimizer/other"),
}


def state_of(runner: MetaTrainer) -> dict[str, Any]:
    arrays, plain = runner.state()
    return {**{n: (x.dtype, x.shape, x.tobytes()) for n, x in arrays.items()}, "plain": str(plain)}


def forged(path: Path, change: Callable[[Content, Arrays], None]) -> bytes:
    content, arrays = decoded(path.read_bytes(), str(path))
    content, arrays = copy.deepcopy(content), dict(arrays)
    change(content, arrays)
    return signed(arrays, content)


@hardly_depends_on_the_backend
def test_forged_checkpoints_are_refused_and_change_nothing(
    backend: Backend, tmp_path: Path
) -> None:
    del backend
    path, forgery = tmp_path / "right", tmp_path / "forged"
    one, other = trainer(), trainer(seed=1)
    one.fit(2, 2)
    save_checkpoint(path, one)
    before, wrong = state_of(other), []
    for name, change in FORMS.items():
        forgery.write_bytes(forged(path, change))
        try:
            load_checkpoint(forgery, other)
        except MetaframeError:
            pass
        except Exception as error:  # noqa: BLE001 - it is what is looked for
            wrong.append(f"{name}: {error!r}")
        else:
            wrong.append(f"{name}: was taken")
        if state_of(other) != before:
            wrong.append(f"{name}: changed something")
            before = state_of(other := trainer(seed=1))
    assert wrong == []
    load_checkpoint(path, other)
    assert state_of(other) == state_of(one)


def test_parameters_alone_are_checked_too(backend: Backend, tmp_path: Path) -> None:
    del backend
    path, forgery, one = tmp_path / "right", tmp_path / "forged", trainer()
    save_checkpoint(path, one)
    for name in ("no plain.dtypes", "params/ int8 True", "params/ flat True", "dtypes 4"):
        forgery.write_bytes(forged(path, FORMS[name]))
        before = state_of(one)
        with pytest.raises(CheckpointError):
            load_parameters(forgery, one.maml)
        assert state_of(one) == before


@pytest.mark.parametrize("merit", [None, "x", HUGE, [], DEEP])
def test_a_forged_merit(merit: Any, tmp_path: Path) -> None:
    require("torch")
    with use_backend("torch", dtype="float64"):
        runner = trainer()
        save_checkpoint(tmp_path / "step-00000000.safetensors", runner)
        save_checkpoint(tmp_path / "best.safetensors", runner, {"merit": merit})
        with pytest.raises(CheckpointError, match=r"best.* no checkpoint of a trainer: .*merit is"):
            runner.fit(1, 2, callbacks=[Checkpoints(tmp_path, every=1)])
        assert runner.step == 0


def test_a_random_state_of_another_form(tmp_path: Path) -> None:
    require("torch")
    with use_backend("torch", dtype="float64"):
        runner = trainer()
        arrays, plain = runner.state()
        state = arrays["rng.torch/cpu"]
        for forgery in (state[:-1], state.astype(np.int16), np.zeros_like(state)):
            with pytest.raises(CheckpointError, match="random st"):
                runner.restore({**arrays, "rng.torch/cpu": forgery}, {**plain, "step": 7})
            assert runner.step == 0
            np.testing.assert_array_equal(runner.state()[0]["rng.torch/cpu"], state)
        runner.restore({**arrays, "rng.torch/cuda:7": state[:3]}, plain)  # a device not here


OF_TORCH: dict[str, Callable[[Content, Arrays], None]] = {
    "int8": array("optimizer/0/exp_avg", lambda x: x.astype(np.int8)),
    "another shape": array("optimizer/0/exp_avg", lambda x: np.zeros(7, x.dtype)),
    "a count of many": array("optimizer/0/step", lambda x: np.zeros((3, 3), x.dtype)),
    "no parameter": renamed("optimizer/0/exp_avg", "optimizer/99/exp_avg"),
    "no number": renamed("optimizer/0/exp_avg", "optimizer/x/exp_avg"),
    "no name": renamed("optimizer/0/exp_avg", "optimizer/0"),
    **{
        f"values {i}": set_in("plain", "optimizer", "values", to=x)
        for i, x in enumerate(ODD)
        if x != {}
    },
    **{f"groups {i}": set_in("plain", "optimizer", "groups", to=x) for i, x in enumerate(ODD)},
    **{
        f"{option} {i}": set_in("plain", "optimizer", "groups", 0, option, to=x)
        for option in ("lr", "betas", "params", "amsgrad")
        for i, x in enumerate(ODD)
        if (option, x) not in (("lr", -1), ("lr", 0.5), ("amsgrad", True)) and x is not None
    },
}


def test_forged_states_of_an_optimizer_of_torch(tmp_path: Path) -> None:
    require("torch")
    import torch

    def build() -> MetaTrainer:
        maml = MAML(torch.nn.Linear(1, 1).double(), 0.01)
        optimizer = torch.optim.Adam(maml.parameters(), lr=0.1)
        return MetaTrainer(maml, optimizer, nn.mse, SinusoidTaskSampler(seed=0))

    path, forgery, wrong = tmp_path / "right", tmp_path / "forged", []
    with use_backend("torch", dtype="float64"):
        one, other = build(), build()
        one.fit(1, 2)
        save_checkpoint(path, one)
        before = state_of(other)
        for name, change in OF_TORCH.items():
            forgery.write_bytes(forged(path, change))
            try:
                load_checkpoint(forgery, other)
                wrong.append(f"{name}: was taken")
            except MetaframeError:
                pass
            except Exception as error:  # noqa: BLE001 - it is what is looked for
                wrong.append(f"{name}: {error!r}")
            if state_of(other) != before:
                wrong.append(f"{name}: changed something")
                before = state_of(other := build())
        assert wrong == []
        load_checkpoint(path, other)
        other.fit(1, 2)


def test_a_silent_cast_into_a_keras_optimizer() -> None:
    require("tensorflow")
    keras = pytest.importorskip("keras")
    variables = {"w": keras.Variable(np.ones(2, "float32"))}
    one = KerasOptimizer(keras.optimizers.Adam(0.1), variables)
    arrays, plain = one.state()
    name = next(n for n, x in arrays.items() if x.shape == (2,))
    with pytest.raises(CheckpointError, match=r"dtype float32, the checkpoint .* int8"):
        one.restore({**arrays, name: arrays[name].astype("int8")}, plain)


@pytest.mark.parametrize("name", ["format", "plain", "leaves", "tree"])
def test_forged_files_of_arrays(name: str, tmp_path: Path) -> None:
    path, forgery, wrong = tmp_path / "right", tmp_path / "forged", []
    save_arrays(path, {"a": np.ones(2), "b": [1, "x", np.zeros((), "int32")]})
    content, arrays = decoded(path.read_bytes(), "it")
    entry = content["leaves"][0]
    forms: list[Any] = [
        *ODD,
        [entry],
        [entry] * 9,
        [{**entry, "dtype": "int8"}, *content["leaves"]],
    ]
    forms += [{"list": x} for x in ODD] + [{"dict": {"a": x}} for x in ODD] + [{"a": 0, "b": 1}]
    for i, form in enumerate(forms):
        if name == "plain" and form is not DEEPER:
            continue  # it may be anything
        forgery.write_bytes(signed(arrays, {**content, name: form}))
        try:
            load_arrays(forgery)
            wrong.append(f"{i}: was taken")
        except CheckpointError:
            pass
        except Exception as error:  # noqa: BLE001 - it is what is looked for
            wrong.append(f"{i}: {error!r}")
    assert wrong == []


@pytest.mark.parametrize("special", ["pipe", "folder", "device"])
def test_what_is_no_regular_file_is_not_read(special: str, tmp_path: Path) -> None:
    """A pipe would be waited for, and a device may never end."""
    path = tmp_path / "c"
    if special == "pipe":
        os.mkfifo(path)
    elif special == "folder":
        path.mkdir()
    else:
        path = Path("/dev/zero")
    with pytest.raises(CheckpointError, match=r"Not a regular file|Is a directory"):
        read_checkpoint(path)


def test_what_could_not_be_read_is_not_written(tmp_path: Path) -> None:
    for plain, says in ((nested(300), "nested more than 200"), ({"x": {1: 0, "1": 0}}, "")):
        with pytest.raises(InputError, match=f"could not be read again: .*{says}"):
            save_arrays(tmp_path / "c", {"w": np.ones(1)}, plain)
    with pytest.raises(InputError, match="recursion"):
        save_arrays(tmp_path / "c", {"w": np.ones(1)}, nested(5000))
    assert list(tmp_path.iterdir()) == []


def test_a_plain_value_of_another_kind_than_in_like(tmp_path: Path) -> None:
    for saved, like in (("x", 1), (1, "x"), (True, 1.0), (1, True)):
        save_arrays(tmp_path / "c", {"k": saved})
        with pytest.raises(CheckpointError, match=f"the leaf 'k' is {saved!r} in .* {like!r} in"):
            load_arrays(tmp_path / "c", like={"k": like})
    save_arrays(tmp_path / "c", {"k": 1})
    assert load_arrays(tmp_path / "c", like={"k": 0.5})[0] == {"k": 1}
