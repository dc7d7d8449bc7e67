"""Parameters by the names that others have in a model, as one module.

`nn.ParameterDict` takes no name with a dot. Here the parts of a name are submodules, so that
`state_dict` and `named_parameters` have the names of the model under one prefix.
"""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, KeysView, Mapping, ValuesView

from torch import Tensor, nn


class ParameterMapping(nn.Module):
    """A mapping from names, which may have dots, to live parameters.

    >>> import torch
    >>> rates = ParameterMapping({"0.weight": torch.ones(2)})
    >>> list(rates), list(rates.state_dict()), rates["0.weight"].requires_grad
    (['0.weight'], ['0.weight'], True)
    """

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._holders: dict[str, tuple[tuple[str, ...], str]] = {}
        for name, value in values.items():
            *path, last = name.split(".")
            holder = self._holder(path)
            while hasattr(holder, last):  # a parameter may not be called as a method of a module
                last += "_"
            setattr(holder, last, nn.Parameter(value))
            self._holders[name] = tuple(path), last

    def _holder(self, path: list[str] | tuple[str, ...]) -> nn.Module:
        """The submodule at `path`, made if it is not there."""
        holder: nn.Module = self
        for part in path:
            inside = dict(holder.named_children())
            if part not in inside:
                inside[part] = nn.Module()
                setattr(holder, part, inside[part])
            holder = inside[part]
        return holder

    def __getitem__(self, name: str) -> Tensor:
        path, last = self._holders[name]
        parameter: Tensor = getattr(self._holder(path), last)
        return parameter

    def __iter__(self) -> Iterator[str]:
        return iter(self._holders)

    def __len__(self) -> int:
        return len(self._holders)

    def __contains__(self, name: object) -> bool:
        return name in self._holders

    def keys(self) -> KeysView[str]:
        """The names."""
        return KeysView(self)

    def values(self) -> ValuesView[Tensor]:
        """The parameters."""
        return ValuesView(self)

    def items(self) -> ItemsView[str, Tensor]:
        """Names and parameters."""
        return ItemsView(self)


Mapping.register(ParameterMapping)
