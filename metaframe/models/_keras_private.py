"""The private name of Keras that is used, and what happens where it is missing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def forget_losses(layers: Sequence[Any], losses: Sequence[Any]) -> None:
    """Let `layers` forget losses that were added in a scope, and are nobody's any more.

    A layer knows them by `id`, in `_loss_ids` (Keras 3.0 to 3.15). Left there, the numbers could be
    those of later losses; a Keras without the attribute has nothing to clear.
    """
    gone = set(map(id, losses))
    for layer in layers if gone else ():
        getattr(layer, "_loss_ids", set()).difference_update(gone)
