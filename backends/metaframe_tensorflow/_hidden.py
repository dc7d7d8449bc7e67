"""The random numbers and changes of a step besides its arguments, read off its graph.

TensorFlow's random operations keep their state in the kernels, where nobody can compare it.
"""

from __future__ import annotations

from metaframe.backend.types import Arrays, ArraysFn
from metaframe_tensorflow._graph import RANDOM, operations
from metaframe_tensorflow._rule import traced

_ASSIGNING = ("Assign", "ResourceScatter")


def hidden_effect(fn: ArraysFn, xs: Arrays) -> str:
    """The effect of `fn` that would differ if it were run again; empty if there is none.

    Traces `fn`, so that it has to be one that can be traced.
    """
    found = operations(traced(fn, xs))
    if found & RANDOM:
        return "draws random numbers, of which there would be others"
    if any(name.startswith(_ASSIGNING) for name in found):
        # Keras' layers count their random numbers in a variable.
        return "changes a tf.Variable, such as the seed of a Keras layer, and would do so again"
    return ""
