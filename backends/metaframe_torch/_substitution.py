"""Other values in the places of a module's parameters and buffers, for the time of one call.

A place is one entry of one module. Each is filled once, whichever paths lead to its module, with
the value that stands for the tensor in it, which other places may share. Afterwards everything that
is registered is what it was. (`torch.func.functional_call` swaps a place twice that it reaches by
two paths, and what it puts back the second time is the value that it had put in.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Self

from torch import Tensor, nn

from metaframe.errors import InputError
from metaframe_torch import _left, _private

Entries = dict[str, Any]


Place = tuple[Entries, str, str, Tensor]
"""An entry of a module, and the name of its tensor in the whole model."""
Attribute = tuple[Entries, str, Any]
"""A plain attribute of a module."""


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
        unregistered: tensors in plain attributes, by identity.
        state: after the block, the buffers that the model left, by name.
    """

    def __init__(
        self, model: nn.Module, params: Mapping[str, Tensor], state: Mapping[str, Tensor]
    ) -> None:
        self.modules: list[nn.Module] = []
        self.params, self.state = params, dict(state)
        self.unregistered: dict[int, Attribute] = {}
        self._parameters: list[Place] = []
        self._buffers: list[Place] = []
        self._computed: list[Attribute] = []
        self._registered: list[tuple[Entries, Entries]] = []
        self._layers: list[tuple[Entries, Entries]] = []
        names: dict[int, str] = {}
        with_buffers = []
        for path, module in model.named_modules():
            parameters, buffers, modules = registered = _private.registered(module)
            prefix = f"{path}." if path else ""
            self.modules.append(module)
            self._registered += [(entries, entries.copy()) for entries in registered]
            if modules:
                self._layers.append(self._registered[-1])
            _add(self._parameters, prefix, parameters, names)
            if buffers:
                with_buffers.append((prefix, buffers))
            self._note_attributes(module, parameters)
        # A buffer of one module may be the parameter of another.
        shared = frozenset(names)
        for prefix, buffers in with_buffers:
            _add(self._buffers, prefix, buffers, names)
        self._parameters += [place for place in self._buffers if id(place[3]) in shared]
        self._buffers = [place for place in self._buffers if id(place[3]) not in shared]
        self._places = _left.places(self.modules)
        placed = [(name, own) for *_, name, own in self._parameters]
        self.own = {id(own): name for name, own in placed if params.get(name, own) is not own}

    def _note_attributes(self, module: nn.Module, parameters: Entries) -> None:
        """Tensors among the plain attributes of `module`."""
        attributes = vars(module)
        if isinstance(module, nn.RNNBase):  # which keeps lists of its weights
            lists = [name for name, value in attributes.items() if type(value) is list]
            self._computed += [(attributes, name, attributes[name]) for name in lists]
        for key in parameters:
            # By the hooks of weight_norm, spectral_norm and prune.
            name = key.removesuffix("_orig").removesuffix("_g")
            if name != key and name in attributes:
                self._computed.append((attributes, name, attributes[name]))
        if not type(module).__module__.startswith("torch.nn."):  # whose layers have none
            for name, value in attributes.items():
                if isinstance(value, Tensor):
                    self.unregistered[id(value)] = attributes, name, value

    def refuse_carried(self, read: Iterable[int]) -> None:
        """Raise an error if a tensor in a plain attribute was `read` and replaced."""
        for attributes, name, value in map(self.unregistered.__getitem__, read):
            if attributes.get(name) is not value:
                attributes[name] = value
                raise InputError(carried(name))

    def replace_buffer(self, name: str, value: Tensor) -> None:
        """Have the model read `value` where its buffer of this name is."""
        for entries, key, place, _ in self._buffers:
            if place == name:
                entries[key] = value

    def __enter__(self) -> Self:
        for places, values in ((self._parameters, self.params), (self._buffers, self.state)):
            for entries, key, name, own in places:
                entries[key] = values.get(name, own)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        lost = self._lost()
        _left.note(self._places)
        for entries, key, _, own in (*self._parameters, *self._buffers):  # type: ignore[assignment]
            entries[key] = own
        if lost:
            for entries, before in self._registered:
                entries.clear()
                entries.update(before)
        unfinished = self.unregistered.values() if kind else ()
        for attributes, name, value in (*self._computed, *unfinished):
            attributes[name] = value
        if lost and kind is None:
            raise InputError(lost)

    def _lost(self) -> str:
        """The changes that the model made to itself and that would be lost, and its buffers."""
        for entries, before in self._registered:
            if entries.keys() != before.keys():
                return (
                    f"the model registers or removes {sorted(entries.keys() ^ before.keys())} in "
                    "its forward pass. Call it once on data before, so that what it consists of "
                    "is known."
                )
        for entries, before in self._layers:
            if entries != before:
                return (
                    f"the model replaces layers among {list(before)} in its forward pass. {WRITES}"
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


def carried(name: str) -> str:
    """The fault of a plain attribute that a model reads and changes."""
    return (
        f"the model keeps a tensor from one call to the next in the attribute {name!r}, so that "
        "tasks and inner steps would depend on those before them. Keep it as a buffer "
        "(register_buffer), which every call starts from."
    )


def _add(places: list[Place], prefix: str, entries: Entries, names: dict[int, str]) -> None:
    """Add the places in `entries` to `places`, and the first name of each tensor to `names`."""
    for key, own in entries.items():
        if own is not None:
            places.append((entries, key, names.setdefault(id(own), prefix + key), own))
