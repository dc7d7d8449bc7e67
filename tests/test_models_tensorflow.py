"""What a `tf.Module` does with its variables that adaptation has to refuse."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import zoo
from frameworks import require
from metaframe import MAML, nn
from metaframe.errors import InputError

HOWS: tuple[dict[str, Any], ...] = ({"compiled": False, "task_map": "loop"}, {})


@pytest.mark.parametrize("method", ["read_value", "value", "assign_add"])
def test_methods_of_a_variable_are_refused(method: str) -> None:
    """Tensors are in the places of the variables, and have no such methods."""
    require("tensorflow")
    import tensorflow as tf

    class Net(tf.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.w = tf.Variable(np.ones((3, 2)))

        def __call__(self, x: Any) -> Any:
            arguments = (self.w,) if method == "assign_add" else ()
            return x @ getattr(self.w, method)(*arguments)

    for how in HOWS:
        with pytest.raises(InputError, match=f"Net calls {method} of a variable"):
            MAML(Net()).meta_value_and_grad(nn.mse, zoo.tasks(1), **how)


@pytest.mark.parametrize("holder", ["keras", "object", "closure"])
def test_variables_that_a_module_does_not_know_of_are_refused(holder: str) -> None:
    """They used to be left out of the adaptation, without a word."""
    require("tensorflow")
    import tensorflow as tf

    def head(trainable: bool) -> Any:
        if holder == "keras":
            layers = pytest.importorskip("keras").layers
            dense = layers.Dense(2, dtype="float64", use_bias=False, trainable=trainable)
            dense.build((None, 4))
            return dense
        variable = tf.Variable(np.ones((4, 2)), name="kernel", trainable=trainable)
        if holder == "closure":
            return lambda x: x @ variable
        return SimpleNamespace(kernel=variable)

    class Net(tf.Module):  # type: ignore[misc]
        def __init__(self, trainable: bool) -> None:
            super().__init__()
            self.w, self.head = tf.Variable(np.ones((3, 4))), head(trainable)

        def __call__(self, x: Any) -> Any:
            hidden = tf.tanh(x @ self.w)
            return hidden @ self.head.kernel if holder == "object" else self.head(hidden)

    for how in HOWS:
        with pytest.raises(InputError, match=r"trainable variables \['.*kernel:0'.*Keras model"):
            MAML(Net(trainable=True)).meta_value_and_grad(nn.mse, zoo.tasks(1), **how)
        maml = MAML(Net(trainable=False))
        assert set(maml.meta_value_and_grad(nn.mse, zoo.tasks(1), **how).grads) == {"w"}
