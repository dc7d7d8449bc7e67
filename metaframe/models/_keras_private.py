"""The private names of Keras that are used, and what happens where one is missing."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

from metaframe.private import PrivateName

SEEN = ("3.10.0", "3.15.1")

LAYERS = PrivateName(
    "keras:layers.Layer._flatten_layers", "the quick list of a model's layers", SEEN, "slower"
)


def is_layer(x: object) -> bool:
    """Is `x` a layer or model of Keras? Imports nothing."""
    # Half imported while Keras itself is being imported.
    layer = getattr(getattr(sys.modules.get("keras"), "layers", None), "Layer", None)
    return layer is not None and isinstance(x, layer)


def layers_in(layer: Any) -> list[Any]:
    """`layer` and all layers inside of it."""
    if LAYERS.found is not None:
        return list(layer._flatten_layers())
    found: dict[int, Any] = {}
    _collect(layer, found)
    return list(found.values())


def _collect(x: object, found: dict[int, Any]) -> None:
    """The layers in attributes, lists, tuples, sets and mappings."""
    inside: Iterable[Any] = ()
    if is_layer(x) and id(x) not in found:
        found[id(x)] = x
        inside = vars(x).values()
    elif isinstance(x, Mapping):
        inside = x.values()
    elif isinstance(x, (list, tuple, set)):
        inside = x
    for y in inside:
        _collect(y, found)
