"""Other values in the places of a module's parameters and buffers, for the time of one call.

A place is one entry of one module. Each is filled once, whichever paths lead to its module, with
the value that stands for the tensor in it, which other places may share. Afterwards everything that
is registered is what it was. (`torch.func.functional_call` swaps a place twice that it reaches by
two paths, and what it puts back the second time is the value that it had put in.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Self

from torch import Tensor, nn

from metaframe.errors import InputError
from metaframe_torch import _private

Entries = dict[str, Any]


class Place(NamedTuple):
    """An entry of a module, and the name that its tensor has in the whole model."""

    entries: Entries
    key: str
    name: str
    own: Tensor


class Substitution:
    """A block in which a model has other values. Not for two threads at once.

    Args:
        model: the module.
        params: values by the names of `named_parameters`; the model's own for those left out.
        state: values by the names of `named_buffers`, likewise.

    Attributes:
        modules: the model and all that is below it.
        params: what was given.
        own: the model's own parameters for which others stand in: identities and names.
        state: after the block, the buffers that the model left, by name.
    """

    def __init__(
        self, model: nn.Module, params: Mapping[str, Tensor], state: Mapping[str, Tensor]
    ) -> None:
        prefixes, self.modules = [], []
        for path, module in model.named_modules():
            prefixes.append(f"{path}." if path else "")
            self.modules.append(module)
        entries = _private.entries(self.modules)
        self._before = [(each, each.copy()) for kinds in entries for each in kinds]
        names: dict[int, str] = {}
        self._parameters = list(_places(prefixes, [kinds[0] for kinds in entries], names))
        parameters = frozenset(names)
        self._buffers = []
        for place in _places(prefixes, [kinds[1] for kinds in entries], names):
            # A buffer of one module may be the parameter of another.
            shared = id(place.own) in parameters
            (self._parameters if shared else self._buffers).append(place)
        self._attributes = [
            kept
            for module, (registered, *_) in zip(self.modules, entries, strict=True)
            for kept in _computed(module, registered)
        ]
        self.params, self.state = params, dict(state)
        placed = ((name, own) for *_, name, own in self._parameters)
        self.own = {id(own): name for name, own in placed if params.get(name, own) is not own}

    def __enter__(self) -> Self:
        for places, values in ((self._parameters, self.params), (self._buffers, self.state)):
            for entries, key, name, own in places:
                entries[key] = values.get(name, own)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        lost = None if kind else self._lost()
        for entries, before in self._before:
            if entries or before:
                entries.clear()
                entries.update(before)
        for attributes, name, value in self._attributes:
            attributes[name] = value
        if lost:
            raise InputError(lost)

    def _lost(self) -> str:
        """What the model did to itself that would be lost, if anything; and its buffers."""
        for entries, before in self._before:
            changed = entries.keys() ^ before.keys() or {
                key
                for key, module in before.items()
                if isinstance(module, nn.Module) and entries[key] is not module
            }
            if changed:
                return (
                    f"the model registers or removes {sorted(changed)} in its forward pass. Call "
                    "it once on data before, so that what it consists of is known."
                )
        for entries, key, name, own in self._parameters:
            if entries[key] is not self.params.get(name, own):
                return f"the model replaces its parameter {name!r} in its forward pass. {WRITES}"
        for entries, key, name, _ in self._buffers:
            if isinstance(entries[key], Tensor):
                self.state[name] = entries[key]
        return ""


WRITES = (
    "An adaptation has other values there, which are not the model's to change. Compute with the "
    "changed weight and leave the parameter as it is, as torch.nn.utils.parametrize does."
)


def _places(prefixes: list[str], entries: list[Entries], names: dict[int, str]) -> Iterator[Place]:
    """The places in `entries`; `names` gets the first name of each tensor."""
    for prefix, each in zip(prefixes, entries, strict=True):
        for key, own in each.items():
            if own is not None:
                yield Place(each, key, names.setdefault(id(own), prefix + key), own)


def _computed(module: nn.Module, registered: Entries) -> Iterator[tuple[Entries, str, Any]]:
    """Attributes of `module` that its hooks, or torch's own code, compute from its parameters.

    Such as the `weight` of the old `weight_norm` and of a pruned layer, and the list of all weights
    that recurrent layers keep.
    """
    attributes = vars(module)
    if isinstance(module, nn.RNNBase):
        kept = [name for name, value in attributes.items() if type(value) is list]
    else:
        kept = [
            name.removesuffix(suffix)
            for name in registered
            for suffix in ("_orig", "_g")
            if name.endswith(suffix)
        ]
    for name in kept:
        if name in attributes:
            yield attributes, name, attributes[name]
