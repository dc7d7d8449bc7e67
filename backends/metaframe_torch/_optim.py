"""torch's own optimizers behind the neutral interface."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from metaframe.errors import InputError

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
                    arrays[name] = value.detach().cpu().numpy()
                else:
                    plain[name] = value
        return arrays, {"values": plain, "groups": held["param_groups"]}

    def restore(self, arrays: Arrays, plain: Any) -> None:
        state: dict[int, dict[str, Any]] = {}
        values = {name: torch.from_numpy(x.copy()) for name, x in arrays.items()}
        for name, value in {**values, **plain["values"]}.items():
            index, _, key = name.partition("/")
            state.setdefault(int(index), {})[key] = value
        groups = plain["groups"]
        for group in groups:  # JSON has no tuples, and Adam's betas are one
            group.update({k: tuple(v) for k, v in group.items() if k != "params" and _list(v)})
        self._optimizer.load_state_dict({"state": state, "param_groups": groups})


def _list(value: Any) -> bool:
    return isinstance(value, list)
