"""torch's own optimizers behind the neutral interface."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from metaframe.errors import CheckpointError, InputError
from metaframe.files.read import shown
from metaframe.files.schema import LARGEST, anything, integer, many, record, refused, table

Arrays = dict[str, np.ndarray[Any, Any]]


class TorchOptimizer:
    """A `torch.optim` optimizer over (some of) the parameters it is asked to update."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer

    def step(self, variables: dict[str, Any], grads: dict[str, Tensor]) -> None:
        held = {id(p) for group in self._optimizer.param_groups for p in group["params"]}
        if not any(id(p) in held for p in variables.values()):
            raise InputError(
                "the optimizer holds none of the meta-parameters. Make it over them: "
                "torch.optim.Adam(maml.parameters())."
            )
        self._optimizer.zero_grad()
        for name, parameter in variables.items():
            parameter.grad = grads[name].detach()
        self._optimizer.step()

    def state(self) -> tuple[Arrays, Any]:
        arrays: Arrays = {}
        held = self._optimizer.state_dict()
        plain: dict[str, Any] = {}
        for index, entries in held["state"].items():
            for key, value in entries.items():
                name = f"{index}/{key}"
                if isinstance(value, Tensor):
                    arrays[name] = _to_numpy(value)
                else:
                    plain[name] = value
        groups = [{k: _plain(v) for k, v in group.items()} for group in held["param_groups"]]
        return arrays, {"class": self._name(), "values": plain, "groups": groups}

    def restore(self, arrays: Arrays, plain: Any) -> None:
        if "groups" not in plain or plain.get("class", self._name()) != self._name():
            found = plain.get("class", "no optimizer of torch's own")
            raise CheckpointError(
                f"the checkpoint is of another optimizer: of {found}, and this one is a "
                f"{self._name()}."
            )
        self._check(arrays, plain)
        state: dict[int, dict[str, Any]] = {}
        values = {name: torch.from_numpy(x.copy()) for name, x in arrays.items()}
        for name, value in {**values, **plain["values"]}.items():
            index, _, key = name.partition("/")
            state.setdefault(int(index), {})[key] = value
        own = self._optimizer.param_groups
        groups = [
            {k: _as(own[i].get(k) if i < len(own) else None, v) for k, v in group.items()}
            for i, group in enumerate(plain["groups"])
        ]
        try:
            self._optimizer.load_state_dict({"state": state, "param_groups": groups})
        except ValueError as error:  # other groups than its own, before it changed anything
            raise CheckpointError(f"the checkpoint is of another optimizer: {error}.") from error

    def _check(self, arrays: Arrays, plain: Any) -> None:
        """Refuse what `state` does not return; torch looks at it in the next step, if at all."""
        try:
            _PLAIN(plain, "what it says of the optimizer")
            own = self._optimizer.state_dict()["param_groups"]
            for mine, group in zip(own, plain["groups"], strict=False):  # torch counts them
                for option in (set(mine) & set(group)) - {"params"}:
                    if not _fits(mine[option], value := group[option]):
                        raise refused(value, f"the option {option!r}", f"as {shown(mine[option])}")
            for name in (*arrays, *plain["values"]):
                self._check_entry(name, arrays.get(name))
        except ValueError as error:
            raise CheckpointError(f"the checkpoint cannot be used: {error}.") from None

    def _check_entry(self, name: str, x: np.ndarray[Any, Any] | None) -> None:
        held = [p for group in self._optimizer.param_groups for p in group["params"]]
        index, _, key = name.partition("/")
        if index not in map(str, range(len(held))) or not key:
            raise refused(name, "a name of its state", "a parameter's number, / and a name")
        if x is not None and type(self._optimizer).__module__.startswith("torch.optim."):
            _check_array(x, held[int(index)], name)

    def _name(self) -> str:
        return type(self._optimizer).__name__


_PLAIN = record({"values": table(anything), "groups": many(record({"params": many(integer)}))})


def _fits(own: Any, value: Any) -> bool:
    """True if a group's option may have `value`, where the optimizer has `own`."""
    own = _plain(own)
    if isinstance(own, list) and isinstance(value, list):
        return len(own) == len(value) and all(map(_fits, own, value))
    if own is None or value is None:  # a default that decides by itself
        return not isinstance(value, (list, dict))
    return _kind(own) is _kind(value) and (type(value) is not int or abs(value) <= LARGEST)


def _kind(value: Any) -> type:
    """Booleans, numbers and texts are no substitute for each other; numbers are."""
    return float if type(value) is int else type(value)


def _check_array(x: np.ndarray[Any, Any], parameter: Tensor, name: str) -> None:
    """Torch's own optimizers keep numbers, and arrays of their parameter's shape or of its sums."""
    whole = tuple(parameter.shape)
    pairs = zip(x.shape, whole, strict=False)
    if x.shape and not (len(x.shape) == len(whole) and all(n in (1, m) for n, m in pairs)):
        raise refused(x.shape, f"the shape of {name}", f"{whole}")
    dtypes = {_to_numpy(torch.zeros((), dtype=parameter.dtype)).dtype.name}
    if not x.shape:
        dtypes |= {"float32", "float64"}
    if x.dtype.name not in dtypes:
        raise refused(x.dtype.name, f"the dtype of {name}", " or ".join(sorted(dtypes)))


def _to_numpy(x: Tensor) -> np.ndarray[Any, Any]:
    """Bfloat16, which NumPy lacks, as float32; torch makes it again what its parameter is."""
    x = x.detach().cpu()
    return (x.float() if x.dtype == torch.bfloat16 else x).numpy()


def _plain(value: Any) -> Any:
    """An option of a group for JSON, which has neither tensors nor tuples."""
    if isinstance(value, Tensor):
        return value.tolist()
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _as(own: Any, value: Any) -> Any:
    """The value from `_plain` in the form of `own`, the optimizer's own value of that option."""
    if isinstance(own, Tensor):
        return torch.as_tensor(value, dtype=own.dtype, device=own.device)
    if isinstance(own, tuple) and isinstance(value, list) and len(own) == len(value):
        return tuple(_as(o, v) for o, v in zip(own, value, strict=True))
    return value
