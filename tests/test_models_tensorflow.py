"""What a `tf.Module` does with its variables that adaptation has to refuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import zoo
from frameworks import require
from metaframe import MAML, nn
from metaframe.errors import InputError


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

    for how in ({"compiled": False, "task_map": "loop"}, {}):
        with pytest.raises(InputError, match=f"Net calls {method} of a variable"):
            MAML(Net()).meta_value_and_grad(nn.mse, zoo.tasks(1), **how)
