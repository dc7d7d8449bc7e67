"""What a step draws or changes besides its arguments, read off its graph.

TensorFlow's random operations keep their state in the kernels, where nobody can compare it.
"""

from __future__ import annotations

import tensorflow as tf

from metaframe.backend.types import Arrays, ArraysFn
from metaframe_tensorflow._graph import RANDOM, operations

_ASSIGNING = ("Assign", "ResourceScatter")


def hidden_effect(fn: ArraysFn, xs: Arrays) -> str:
    """What `fn` would do once more, and differently, if it were run again; empty if nothing.

    Traces `fn`, so that it has to be one that can be traced.
    """
    specs = [tf.TensorSpec(x.shape, x.dtype) for x in xs]
    traced = tf.function(lambda *xs: list(fn(xs)), autograph=False).get_concrete_function(*specs)
    found = operations(traced)
    if found & RANDOM:
        return "draws random numbers, of which there would be others"
    if any(name.startswith(_ASSIGNING) for name in found):
        # Keras' layers count their random numbers in a variable.
        return "changes a tf.Variable, such as the seed of a Keras layer, and would do so again"
    return ""
