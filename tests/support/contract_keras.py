"""The contract of the Keras adapter, for a model of the zoo, on the framework Keras computes with.

Run as a program it checks the models that are named, in a process with another KERAS_BACKEND.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

import zoo
import zoo_keras
from metaframe import MAML, nn
from metaframe.backend import Forward, Inputs
from metaframe.models.lookup import adapter_of
from metaframe.tasks import Task

EAGERLY = {"compiled": False, "task_map": "loop"}
POLICIES: dict[Any, dict[str, bool]] = {
    None: {},
    "batch": {"training": True},
    "frozen": {"training": False},
    "record": {"training": True},
}


def to_np(x: Any) -> Any:
    import keras

    return np.array(keras.ops.convert_to_numpy(x))


def variables(model: Any) -> list[Any]:
    return [*model.variables, *model.metrics_variables]


def snapshot(model: Any) -> Any:
    """Identities, bits and flags: of variables, losses, layers."""
    import keras

    layers = [model, *(x for x in vars(model).values() if isinstance(x, keras.layers.Layer))]
    return (
        [(id(v), id(v.value), v.trainable, v.dtype, to_np(v).tobytes()) for v in variables(model)],
        [to_np(loss).tobytes() for loss in model.losses],
        [(id(x), x.trainable, x.built, x.name) for x in layers],
    )


def arrays(inputs: Any, seed: int) -> Any:
    import keras

    return keras.tree.map_structure(keras.ops.convert_to_tensor, zoo_keras.example(inputs, seed))


def own_call(model: Any, x: Any, how: dict[str, bool]) -> Any:
    """The model's own output, after which it is as it was before."""
    before = [to_np(v) for v in variables(model)]
    output = model(x, **how)
    for variable, value in zip(variables(model), before, strict=True):
        variable.assign(value)
    return output


def check_own_call(name: str) -> None:
    """Under every policy the output is the model's own, bit for bit, and nothing changes."""
    import keras

    with zoo_keras.double():
        model, inputs = zoo_keras.build(name)
        x, adapter = arrays(inputs, 5), adapter_of(model)
        model(x, training=False)  # so that there are losses
        before = snapshot(model)
        for policy, how in POLICIES.items():
            if name == "explicit" and policy is None:
                continue  # it cannot be called without
            given = adapter.state()
            found, after = adapter.call(
                adapter.params(), given, Inputs((x,), forward=Forward(policy))
            )
            assert snapshot(model) == before, policy
            assert set(after) == set(given)
            expected = own_call(model, x, how)
            for one, other in zip(
                keras.tree.flatten(found), keras.tree.flatten(expected), strict=True
            ):
                np.testing.assert_array_equal(to_np(one), to_np(other), err_msg=str(policy))
            model(x, training=False)
            before = snapshot(model)


def loss(predicted: Any, target: Any) -> Any:
    import keras

    return sum(nn.mse(x, target) for x in keras.tree.flatten(predicted))


def tasks(inputs: Any, count: int) -> list[Task]:
    rng = np.random.default_rng(1)

    def targets() -> Any:
        return rng.normal(size=(zoo_keras.EXAMPLES, 2))

    return [
        Task(
            zoo_keras.example(inputs, 10 * i + 1),
            targets(),
            zoo_keras.example(inputs, 10 * i + 2),
            targets(),
        )
        for i in range(count)
    ]


def check_meta_gradient(name: str, hows: Any = (EAGERLY,), count: int = 1) -> None:
    """Finite differences, and a learner comes to the same loss; nothing else changes."""
    with zoo_keras.double():
        model, inputs = zoo_keras.build(name)
        maml, batch = MAML(model, 0.1, 1), tasks(inputs, count)
        before = snapshot(model)
        results = [maml.meta_value_and_grad(loss, batch, **how) for how in hows]
        task = batch[0]
        arrays = [maml.backend.asarray(x) for x in (task.support_y, task.query_y)]
        x, query = (_asarrays(x, maml.backend) for x in (task.support_x, task.query_x))
        learner = maml.clone().adapt_on(loss, x, arrays[0])
        found = maml.backend.to_numpy(loss(learner(query), arrays[1]))
        assert snapshot(model) == before
        costs = maml.backend.to_numpy(results[0].aux["costs"])
        np.testing.assert_allclose(found, costs[0], rtol=1e-12)
        zoo.check_along_a_line(maml, loss, batch, hows, step=5e-5)


def _asarrays(x: Any, backend: Any) -> Any:
    import keras

    return keras.tree.map_structure(backend.asarray, x)


if __name__ == "__main__":
    hows = [EAGERLY, *({"task_map": how} for how in sys.argv[1].split(",") if how)]
    for model_name in sys.argv[2:]:
        try:
            check_own_call(model_name)
            if model_name not in zoo_keras.ROUNDED:
                check_meta_gradient(model_name, hows, count=2 if len(hows) > 1 else 1)
        except Exception as error:
            error.add_note(model_name)
            raise
