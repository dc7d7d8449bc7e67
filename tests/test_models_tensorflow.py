"""A `tf.Module` is what it is, and what it does that adaptation has to refuse is refused."""

from __future__ import annotations

import gc
import logging
import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import zoo
import zoo_tensorflow
from frameworks import require, slow
from metaframe import MAML, inner_loop, nn
from metaframe.backend import Inputs
from metaframe.errors import InputError
from metaframe.models.lookup import adapter_of

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning",  # of Keras variables, to NumPy
)
HOWS: tuple[dict[str, Any], ...] = ({"compiled": False, "task_map": "loop"}, {})


EAGERLY = HOWS[0]
QUICK = ("two_ways_to_a_module", "containers", "slots_and_properties", "moving_statistics")


@pytest.fixture(autouse=True)
def _tensorflow() -> None:
    require("tensorflow")
    pytest.importorskip("keras")


def snapshot(adapter: Any) -> Any:
    variables = {**adapter.params(), **adapter.state()}
    return {n: (id(v), v.trainable, v.numpy().tobytes()) for n, v in variables.items()}


def attributes(module: Any) -> Any:
    import tensorflow as tf

    every = (module, *module.submodules)
    assert all(isinstance(x, tf.Module) for x in every)
    return [
        {n: (id(x), list(x) if isinstance(x, list) else None) for n, x in vars(m).items()}
        for m in every
    ]


@pytest.mark.parametrize("name", zoo_tensorflow.MODULES)
def test_the_output_is_the_modules_own_and_nothing_changes(name: str) -> None:
    import tensorflow as tf

    module, x = zoo_tensorflow.build(name), tf.constant(zoo.tasks(1)[0].support_x)
    adapter = adapter_of(module)
    before, held = snapshot(adapter), attributes(module)
    found, after = adapter.call(adapter.params(), adapter.state(), Inputs((x,)))
    maml = MAML(module)
    np.testing.assert_array_equal(maml(x), found)
    maml.clone().adapt_on(nn.mse, x, tf.zeros_like(found))(x)
    assert (snapshot(adapter), attributes(module)) == (before, held)
    np.testing.assert_array_equal(found, module(x))
    for key, value in adapter.state().items():
        np.testing.assert_array_equal(after[key], value, err_msg=key)
    gone = weakref.ref(module)
    del module, adapter, maml, held
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("name", [n if n in QUICK else slow(n) for n in zoo_tensorflow.MODULES])
def test_meta_gradient(name: str) -> None:
    maml = MAML(zoo_tensorflow.build(name), 0.1, 1)
    zoo.check_along_a_line(maml, nn.mse, zoo.tasks(1), [EAGERLY], step=5e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo_tensorflow.MODULES)
def test_meta_gradient_every_way(name: str) -> None:
    maml = MAML(zoo_tensorflow.build(name), 0.1, 2)
    before = snapshot(maml._adapter)
    hows: list[dict[str, Any]] = [{"task_map": how} for how in ("scan", "vmap")]
    hows += [EAGERLY, {"task_map": "scan", "mode": "remat"}]
    if name in ("keras_layers", "moving_statistics"):  # these assign, and would do so again
        hows.pop()
    zoo.check_along_a_line(maml, nn.mse, zoo.tasks(2), hows, step=5e-5)
    # The values were assigned; the variables are the same.
    assert {n: x[:2] for n, x in snapshot(maml._adapter).items()} == {
        n: x[:2] for n, x in before.items()
    }


def test_names_of_tied_variables() -> None:
    adapter = adapter_of(zoo_tensorflow.build("used_twice_and_tied"))
    assert list(adapter.params()) == ["first/b", "first/w", "head/0/b", "head/0/w", "second/b"]
    assert adapter.aliases()["second/w"] == "first/w"


def test_another_method_than_call() -> None:
    import tensorflow as tf

    class Net(tf.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.dense = zoo_tensorflow.dense()(3, 2)

        def forward(self, x: Any, by: float = 1.0) -> Any:
            return by * self.dense(x)

    adapter, x = adapter_of(Net()), tf.constant(np.ones((4, 3)))
    with pytest.raises(InputError, match=r"Net has no __call__.*module\.forward\(x\)"):
        adapter.call(adapter.params(), {}, Inputs((x,)))
    doubled = {name: 2 * value for name, value in adapter.params().items()}
    inputs = Inputs((x,), {"by": 2.0}, call=lambda module, x, by: module.forward(x, by=by))
    found = adapter.call(doubled, {}, inputs)[0]
    np.testing.assert_array_equal(found, 2 * adapter.model.forward(x, by=2.0))
    kernel = Inputs((), call=lambda module: module.dense.w)
    np.testing.assert_array_equal(adapter.call(doubled, {}, kernel)[0], doubled["dense/w"])


def test_nothing_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Every call traces the functions of a copy anew, which TensorFlow warns of otherwise."""
    import tensorflow as tf

    module, x = zoo_tensorflow.build("graph_functions"), tf.constant(np.ones((2, 3)))
    adapter = adapter_of(module)
    logger = tf.get_logger()
    logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.WARNING):
            for _ in range(8):
                adapter.call(adapter.params(), {}, Inputs((x,)))
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.records


# -- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize("some", [False, True])
@pytest.mark.parametrize("how", HOWS, ids=str)
def test_variables_that_are_made_when_a_module_is_called(how: Any, some: bool) -> None:
    import tensorflow as tf

    class Net(tf.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.b, self.w = zoo_tensorflow.variable(2) if some else 0.0, None

        def __call__(self, x: Any) -> Any:
            if self.w is None:
                self.w = tf.Variable(np.ones((3, 2)), name="kernel")
            return x @ self.w + self.b

    net = Net()
    known = "makes the variable 'kernel'.*Call it once" if some else "no variables.*call it once"
    with pytest.raises(InputError, match=known):
        MAML(net).meta_value_and_grad(nn.mse, zoo.tasks(1), **how)
    assert net.w is None
    net(np.ones((1, 3)))
    MAML(net).meta_value_and_grad(nn.mse, zoo.tasks(1), **how)


def test_an_assignment_out_of_reach_is_refused() -> None:
    import tensorflow as tf

    class Net(tf.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.w, self.seen = zoo_tensorflow.variable(3, 2), tf.Variable(0, trainable=False)

        @tf.function(autograph=False)  # type: ignore[untyped-decorator]
        def __call__(self, x: Any) -> Any:
            self.seen.assign_add(1)
            return x @ self.w

    with pytest.raises(InputError, match=r"assigned within a tf\.function or a loop"):
        MAML(Net())(np.ones((1, 3)))
    wrong = Net()
    adapter = adapter_of(wrong)
    inputs = Inputs((), call=lambda module: module.seen.assign([1, 2]))
    with pytest.raises(ValueError, match=r"shape \(\), assigned was \(2,\)"):
        adapter.call(adapter.params(), adapter.state(), inputs)


@pytest.mark.parametrize("method", ["read_value", "value", "assign_add"])
def test_methods_of_a_variable_are_refused(method: str) -> None:
    """Tensors are in the places of the variables, and have no such methods."""
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


@pytest.mark.parametrize("holder", ["object", "closure", "method"])
def test_variables_that_a_module_does_not_know_of_are_refused(holder: str) -> None:
    """They used to be left out of the adaptation, without a word."""
    import tensorflow as tf

    class Net(tf.Module):  # type: ignore[misc]
        def __init__(self, trainable: bool) -> None:
            super().__init__()
            kernel = tf.Variable(np.ones((4, 2)), name="kernel", trainable=trainable)
            self.w, self.object = tf.Variable(np.ones((3, 4))), SimpleNamespace(kernel=kernel)
            self.closure = lambda x: x @ kernel
            self.method = kernel.__rmatmul__

        def __call__(self, x: Any) -> Any:
            hidden = tf.tanh(x @ self.w)
            if holder == "object":
                return hidden @ self.object.kernel
            return getattr(self, holder)(hidden)

    for how in HOWS:
        with pytest.raises(InputError, match=r"trainable variables \['.*kernel:0'.*not among its"):
            MAML(Net(trainable=True)).meta_value_and_grad(nn.mse, zoo.tasks(1), **how)
        maml = MAML(Net(trainable=False))
        assert set(maml.meta_value_and_grad(nn.mse, zoo.tasks(1), **how).grads) == {"w"}


def test_own_variables_read_in_a_closure_are_refused() -> None:
    import tensorflow as tf

    net = tf.Module()
    net.w = tf.Variable(np.ones((3, 2)), name="kernel")
    net.run = lambda x: x @ net.w
    adapter = adapter_of(net)
    inputs = Inputs((np.ones((1, 3)),), call=lambda module, x: module.run(x))
    with pytest.raises(InputError, match=r"reads the variables \['kernel:0'\] from somewhere else"):
        adapter.call(adapter.params(), {}, inputs)


def test_frozen_keras_layers_in_a_closure_are_constants() -> None:
    import keras
    import tensorflow as tf

    frozen = keras.layers.Dense(2, dtype="float64", trainable=False)
    frozen.build((None, 4))

    class Net(tf.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.dense, self.end = zoo_tensorflow.dense()(3, 4), lambda x: frozen(x)
            self.learned = keras.layers.Dense(2, dtype="float64")
            self.learned.build((None, 2))

        def __call__(self, x: Any) -> Any:
            return self.learned(self.end(self.dense(x)))

    net = Net()
    np.testing.assert_array_equal(MAML(net)(np.ones((2, 3))), net(np.ones((2, 3))))
    frozen.trainable = True
    with pytest.raises(InputError, match=r"trainable variables \['dense.*not among its own"):
        MAML(net)(np.ones((2, 3)))


def test_a_keras_layer_without_weights_is_named() -> None:
    import keras
    import tensorflow as tf

    class Net(tf.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.dense, self.head = zoo_tensorflow.dense()(3, 4), keras.layers.Dense(2)

        def __call__(self, x: Any) -> Any:
            return self.head(self.dense(x))

    with pytest.raises(InputError, match=r"tf\.Module .*Net is not complete.*\['dense"):
        MAML(Net())(np.ones((2, 3)))


def _ruled(tf: Any, how: str, w: Any) -> Any:
    """`x -> tanh(x @ w)` by a rule of its own."""

    def hidden(x: Any) -> Any:
        return tf.tanh(x @ w())

    @tf.custom_gradient  # type: ignore[untyped-decorator]
    def closing(x: Any) -> Any:
        y = hidden(x)
        return y, lambda c, variables=(): (c, [c for _ in variables])

    @tf.custom_gradient  # type: ignore[untyped-decorator]
    def given(x: Any, w: Any) -> Any:
        y = tf.tanh(x @ w)

        def pull_back(c: Any) -> Any:
            c = c * (1 - y * y)
            return c @ tf.transpose(w), tf.transpose(x) @ c

        return y, pull_back

    if how == "given":
        return lambda x: given(x, tf.convert_to_tensor(w()))
    return tf.recompute_grad(hidden) if how == "recomputed" else closing


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("rule", ["recomputed", "closing", "given"])
def test_a_rule_that_loses_a_gradient_is_refused(rule: str, how: Any) -> None:
    """TensorFlow looks for variables in it, and finds tensors in their places."""
    import tensorflow as tf

    class Net(tf.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            values = zoo.weights()
            self.w1, self.w2 = tf.Variable(values["w1"]), tf.Variable(values["w2"])

        def __call__(self, x: Any) -> Any:
            return _ruled(tf, rule, lambda: self.w1)(x) @ self.w2

    def cost(batch: Any, v: Any) -> Any:
        return nn.mse(_ruled(tf, rule, lambda: v["w1"])(batch[0]) @ v["w2"], batch[1])

    module, (task,) = Net(), zoo.tasks(1)
    maml, start = MAML(module, 0.1, 2), {"w1": module.w1 + 0.0, "w2": module.w2 + 0.0}
    batch = tuple(map(tf.constant, (task.support_x, task.support_y)))
    if rule == "given":
        zoo.check_along_a_line(maml, nn.mse, [task], [how])
        inner_loop(cost, start, batch, steps=1, lr=0.1)
        return
    with pytest.raises(InputError, match="loses the gradient of what the function closes over"):
        maml.meta_value_and_grad(nn.mse, [task], **how)
    with pytest.raises(InputError, match="loses the gradient of what the function closes over"):
        inner_loop(cost, start, batch, steps=1, lr=0.1)
    predicted = _ruled(tf, rule, lambda: module.w1)(batch[0]) @ module.w2
    np.testing.assert_array_equal(maml(batch[0]), predicted)  # nothing is recorded here


@pytest.mark.parametrize("how", HOWS)
def test_layers_that_keras_recomputes_are_refused(how: Any) -> None:
    import keras

    with keras.RematScope(mode="full"):
        layers = [keras.layers.Dense(n, activation="tanh", dtype="float64") for n in (4, 2)]
        model = keras.Sequential([keras.Input((3,), dtype="float64"), *layers])
    with pytest.raises(InputError, match=r"recompute_grad \(also as keras.remat and keras.Remat"):
        MAML(model).meta_value_and_grad(nn.mse, zoo.tasks(1), **how)
