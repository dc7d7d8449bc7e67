"""Keras models are what they are: called as their users call them, and left as they were.

On TensorFlow here; on torch and JAX in a process of its own, as Keras has one framework.
"""

from __future__ import annotations

import copy
import inspect
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import zoo
import zoo_keras
from contract_keras import check_meta_gradient, check_own_call, snapshot, to_np
from frameworks import require, slow
from metaframe import MAML, nn
from metaframe.backend import Forward, Inputs
from metaframe.errors import InputError
from metaframe.models import functional
from metaframe.models.lookup import adapter_of
from metaframe.tasks import Task
from zoo_keras import ROUNDED, ROWS, layer, made

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning",  # of Keras variables, to NumPy
)
ROOT = Path(__file__).resolve().parent.parent
SMOOTH = [name for name in zoo_keras.MODELS if name not in ROUNDED]
QUICK = ("plain", "tied", "own_weights", "partly_frozen")
LOOPS = ("masked_lstm", "recurrent")
"""Their loops are no loops that `vectorized_map` knows the derivatives of."""


@pytest.fixture(autouse=True)
def _keras() -> None:
    require("tensorflow")
    pytest.importorskip("keras")


@pytest.mark.parametrize("name", zoo_keras.MODELS)
def test_the_output_is_the_models_own_and_nothing_changes(name: str) -> None:
    check_own_call(name)


@pytest.mark.parametrize("name", [n if n in QUICK else slow(n) for n in SMOOTH])
def test_meta_gradient(name: str) -> None:
    check_meta_gradient(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMOOTH)
def test_meta_gradient_every_way(name: str) -> None:
    every = ("scan",) if name in LOOPS else ("scan", "vmap")
    hows = [{"compiled": False, "task_map": "loop"}, *({"task_map": how} for how in every)]
    check_meta_gradient(name, hows, count=2)


@pytest.mark.parametrize(
    ("framework", "names", "ways"),
    [
        ("torch", ("implicit", "attention"), "vmap"),
        ("jax", ("plain",), ""),
        slow("torch", tuple(zoo_keras.MODELS), "vmap,scan", id="torch-every model"),
        slow("jax", tuple(n for n in zoo_keras.MODELS if n not in LOOPS), "vmap", id="jax-every"),
    ],
)
def test_other_frameworks(framework: str, names: tuple[str, ...], ways: str) -> None:
    require(framework)
    path = os.pathsep.join(map(str, (ROOT, ROOT / "backends", ROOT / "tests" / "support")))
    environment = {**os.environ, "KERAS_BACKEND": framework, "JAX_ENABLE_X64": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", ROOT / "tests/support/contract_keras.py", ways, *names],
        env={**environment, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


# -- what is refused ---------------------------------------------------------------------------


def called(*parts: Any) -> Any:
    """A model of these layers that has been called."""
    whole = made("Implicit", *parts)
    whole(np.ones((2, *ROWS), "float32"))
    return whole


def run(model: Any, norm: Any = "batch", **how: Any) -> Any:
    adapter = adapter_of(model)
    inputs = Inputs(how.pop("args", (np.ones((2, *ROWS), "float32"),)), **how)
    inputs = Inputs(inputs.args, inputs.kwargs, Forward(norm), inputs.call)
    return adapter.call(adapter.params(), adapter.state(), inputs)[0]


def unknown_layer(of: Callable[[Any], Any]) -> Any:
    """A model with a layer around `of`, whose variables it does not know of."""
    return called(layer("Dense", 2), layer("Lambda", of))


def _closure() -> Any:
    dense = layer("Dense", 2)
    return unknown_layer(lambda x: dense(x))


def _framework_variable() -> Any:
    import tensorflow as tf

    variable = tf.Variable(np.ones(2, "float32"), name="kernel")
    return unknown_layer(lambda x: x * variable)


def _inner_variable() -> Any:
    dense = layer("Dense", 2)
    dense.build((None, *ROWS))
    bias = dense.bias.value  # what is inside is TensorFlow's own
    return called(dense, layer("Lambda", lambda x: x * bias))


def _module() -> Any:
    import tensorflow as tf

    module = tf.Module()
    module.w = tf.Variable(np.ones(2, "float32"), name="kernel")
    return unknown_layer(lambda x: x * module.w)


def _keras_variable() -> Any:
    import keras

    variable = keras.Variable(np.ones(2, "float32"), name="kernel")
    return unknown_layer(lambda x: x * variable)


@pytest.mark.parametrize(
    "build", [_closure, _framework_variable, _inner_variable, _module, _keras_variable]
)
def test_trainable_variables_from_elsewhere_are_refused(build: Any) -> None:
    model = build()
    with pytest.raises(
        InputError, match=r"trainable variables \['.*(kernel|bias).*outside its own"
    ):
        run(model)


def test_frozen_variables_from_elsewhere_are_constants() -> None:
    import keras

    dense = layer("Dense", 2, trainable=False)
    variable = keras.Variable(2.0, trainable=False)
    model = unknown_layer(lambda x: dense(x) * variable)
    x = np.ones((2, *ROWS), "float32")
    np.testing.assert_array_equal(run(model), model(x, training=True))


def _global_seed() -> Any:
    import keras

    return lambda x: keras.random.normal(x.shape)


def _counter() -> Any:
    import keras

    count = keras.Variable(0.0, trainable=False, name="count")
    return lambda x: x + count.assign(count + 1.0)


@pytest.mark.parametrize(
    ("make", "name"), [(_global_seed, "seed_generator_state"), (_counter, "count")]
)
def test_variables_of_others_are_not_changed(make: Callable[[], Any], name: str) -> None:
    model = unknown_layer(make())
    with pytest.raises(InputError, match=rf"changes the variables \['.*{name}.*SeedGenerator"):
        run(model)


def test_torch_modules_in_keras_are_refused() -> None:
    import keras

    class Wrapper(keras.layers.TorchModuleWrapper):  # type: ignore[misc]
        def __init__(self) -> None:
            keras.layers.Layer.__init__(self)
            self.module = object()

    model = made("Implicit", layer("Dense", 2), Wrapper())
    model.parts[0].build((None, 3))
    model.parts[1].built = model.built = True
    with pytest.raises(InputError, match=r"torch module object.*Write the whole in torch"):
        MAML(model)


# -- building ----------------------------------------------------------------------------------


def _half_built() -> Any:
    import keras

    class Half(keras.Model):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = layer("Dense", 3), layer("Dense", 2)

        def build(self, shape: Any) -> None:
            self.body.build(shape)

        def call(self, x: Any, training: bool = False) -> Any:
            return self.head(x) if training else self.body(x)

    model = Half()
    model.build((None, *ROWS))
    return model


@pytest.mark.parametrize("how", [{"compiled": False, "task_map": "loop"}, {}, {"task_map": "scan"}])
def test_a_layer_that_a_call_would_build_is_named(how: dict[str, Any]) -> None:
    """Where no call reaches it, the model is as good as any."""
    model, rows = _half_built(), np.ones((2, 3), "float32")
    before, make = snapshot(model), model.head.build
    tasks = [Task(rows, rows, rows, rows)]
    with pytest.raises(InputError, match=r"Keras model 'half.*layers \['dense.*are not built"):
        MAML(model).meta_value_and_grad(nn.mse, tasks, **how)
    assert snapshot(model) == before
    assert not model.head.built
    assert model.head.build is make
    if not how.get("compiled", True):
        MAML(model, norm="frozen").meta_value_and_grad(nn.mse, tasks, **how)
        model(rows, training=True)
        MAML(model).meta_value_and_grad(nn.mse, [Task(rows, rows[:, :2], rows, rows[:, :2])], **how)


def test_what_is_built_and_what_is_not() -> None:
    import keras

    dense, activation = layer("Dense", 2), layer("Lambda", lambda x: x)
    for model, names in (
        (made("Plain", dense), dense.name),
        (keras.Sequential([dense]), dense.name),
        (layer("Dense", 2, name="alone"), "alone"),
    ):
        with pytest.raises(InputError, match=rf"\['{names}'\] are not built.*Call it once"):
            MAML(model)
    dense.build((None, *ROWS))
    x = np.ones((2, *ROWS), "float32")
    # Not called yet, and nothing is missing.
    np.testing.assert_array_equal(run(made("Plain", dense)), dense(x))
    # Nothing to learn, and nothing missing either.
    flat = keras.Sequential([keras.Input(ROWS), activation])
    np.testing.assert_array_equal(functional(flat).apply({}, {}, x)[0], x)
    with pytest.raises(InputError, match="no parameters to adapt"):
        MAML(flat)


def test_an_error_in_a_call_leaves_everything_as_it_was() -> None:
    import keras

    class Failing(keras.Model):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.drop, self.fails = (
                layer("BatchNormalization"),
                layer("Dropout", 0.5),
                False,
            )

        def call(self, x: Any) -> Any:
            x = self.drop(self.norm(x))
            self.add_loss(keras.ops.sum(x))
            if self.fails:
                raise ValueError("of the model")
            return x

    model = Failing()
    x = np.ones((2, *ROWS), "float32")
    model(x)
    before, model.fails = snapshot(model), True
    with pytest.raises(ValueError, match="of the model"):
        run(model)
    assert snapshot(model) == before
    model.fails = False
    np.testing.assert_array_equal(run(model, "frozen"), model(x))


def test_values_of_another_shape_are_refused() -> None:
    model = called(layer("Dense", 2))
    apply, params, state = functional(model)
    wrong = {name: np.ones((7,)) for name in params}
    with pytest.raises(InputError, match=r"kernel' has shape \(3, 2\), received .* shape \(7,\)"):
        apply(wrong, state, np.ones((2, *ROWS), "float32"))


# -- how a model is called ---------------------------------------------------------------------


def test_training_as_the_caller_says() -> None:
    import keras

    model = called(layer("BatchNormalization"), layer("Dense", 2))
    x = np.arange(6, dtype="float32").reshape(2, 3)
    for training in (True, False):
        policy, expected = "frozen" if training else "batch", own(model, x, training)
        args = (keras.ops.array(x),)
        found = run(model, policy, args=args, kwargs={"training": training})
        np.testing.assert_array_equal(found, expected)
        found = run(model, policy, args=args, call=lambda m, x, t=training: m(x, training=t))
        np.testing.assert_array_equal(found, expected)


def own(model: Any, x: Any, training: bool) -> Any:
    before = [to_np(v) for v in model.variables]
    output = model(x, training=training)
    for variable, value in zip(model.variables, before, strict=True):
        variable.assign(value)
    return output


def test_a_call_of_ones_own() -> None:
    """It takes `training` from the policy, and returns values of variables and losses."""
    import keras

    dense = layer("Dense", 2, kernel_regularizer="l2", activity_regularizer="l1")
    model = called(layer("BatchNormalization"), dense)
    x = keras.ops.array(np.arange(6, dtype="float32").reshape(2, 3))
    before, adapter = snapshot(model), adapter_of(model)
    doubled = {name: 2 * value for name, value in adapter.params().items()}

    def parts(model: Any, x: Any) -> Any:
        y = model.parts[1](model.parts[0](x))
        return y, model.parts[1].kernel, model.losses

    inputs = Inputs((x,), forward=Forward("batch"), call=parts)
    output, kernel, losses = adapter.call(doubled, adapter.state(), inputs)[0]
    assert snapshot(model) == before
    for name, variable in adapter.variables().items():
        variable.assign(doubled[name])
    np.testing.assert_array_equal(kernel, dense.kernel)
    np.testing.assert_array_equal(output, own(model, x, True))
    own(model, x, True)
    np.testing.assert_allclose(losses, model.losses, rtol=1e-6)
    again = adapter.call(adapter.params(), adapter.state(), inputs)[0]
    np.testing.assert_array_equal(again[2], losses)


def test_inside_other_programs() -> None:
    """A user's tf.function, a layer's call, a scope of Keras: the same as outside."""
    import keras
    import tensorflow as tf

    model = called(layer("BatchNormalization"), layer("Dense", 2))
    maml = MAML(model, 0.1)
    x, y = np.arange(6, dtype="float32").reshape(2, 3), np.ones((2, 2), "float32")

    def adapted(x: Any) -> Any:
        return maml.clone().adapt_on(nn.mse, x, tf.constant(y))(x)

    class Outer(keras.layers.Layer):  # type: ignore[misc]
        def call(self, x: Any, training: bool | None = None) -> Any:
            del training
            return adapted(x)

    x = tf.constant(x)
    expected = adapted(x)
    compiled = tf.function(adapted, autograph=False)
    np.testing.assert_allclose(compiled(x), expected, rtol=1e-6)
    np.testing.assert_array_equal(Outer()(x, training=False), expected)
    with keras.StatelessScope():
        np.testing.assert_array_equal(adapted(x), expected)


# -- batch normalisation -----------------------------------------------------------------------


def test_statistics_of_a_batch() -> None:
    """Recorded are those of the last use; a frozen layer's stay, and are used."""
    with zoo_keras.double():
        norm, frozen = layer("BatchNormalization"), layer("BatchNormalization", trainable=False)
        twice = layer("Lambda", lambda x: 3 * x + 1)
        model = made("Plain", norm, twice, frozen, norm)
        x = np.random.default_rng(0).normal(size=(5, *ROWS))
        model(x)
        frozen.moving_mean.assign([1.0, 2.0, 3.0])
        apply, params, state = functional(model, norm="record")
        output, after = apply(params, state, x)
        first = (x - x.mean(0)) / np.sqrt(x.var(0) + norm.epsilon)
        second = (3 * first + 1 - [1.0, 2.0, 3.0]) / np.sqrt(1 + frozen.epsilon)
        moments = {"mean": second.mean(0), "variance": second.var(0)}
        for name, value in after.items():
            expected = state[name] if frozen.name in name else moments[name.rpartition("_")[2]]
            np.testing.assert_allclose(value, expected, rtol=0, atol=1e-13)
        expected = (second - second.mean(0)) / np.sqrt(second.var(0) + norm.epsilon)
        np.testing.assert_allclose(output, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("how", [{"momentum": 1.0}, {"renorm": True}])
def test_statistics_that_a_layer_does_not_say(how: dict[str, Any]) -> None:
    require("tensorflow")
    import keras

    known = inspect.signature(keras.layers.BatchNormalization.__init__).parameters
    if not how.keys() <= known.keys():
        pytest.skip(f"this version of Keras has no {[*how]}")
    model = called(layer("BatchNormalization", name="norm", **how), layer("Dense", 2))
    run(model)
    with pytest.raises(InputError, match=r"norm='support'.*'norm' does not tell"):
        run(model, "record")


def test_a_layer_frozen_after_a_program_was_compiled() -> None:
    """Without a scale and a shift nothing else tells that it is."""
    model = called(layer("BatchNormalization", center=False, scale=False), layer("Dense", 2))
    x, y = np.arange(6, dtype="float32").reshape(2, 3), np.ones((2, 2), "float32")
    maml, task = MAML(model, 0.1), Task(x, y, x, y)
    costs = []
    for trainable in (True, False):
        model.parts[0].trainable = trainable
        costs.append(float(maml.meta_value_and_grad(nn.mse, [task]).cost))
        eagerly = MAML(model, 0.1).meta_value_and_grad(
            nn.mse, [task], compiled=False, task_map="loop"
        )
        assert costs[-1] == pytest.approx(float(eagerly.cost), rel=1e-5)
    assert costs[0] != pytest.approx(costs[1], rel=0.1)


def test_a_seed_that_is_listed_twice() -> None:
    """A model and a layer in it that share a generator."""
    import keras

    model = made("Plain", made("Noisy"), layer("Dense", 2))
    model.seeds = model.parts[0].seeds
    x = np.ones((2, *ROWS), "float32")
    model(x)
    assert len({id(v) for v in model.variables}) < len(model.variables)
    np.testing.assert_array_equal(run(model), own(model, keras.ops.array(x), True))


def test_a_compiled_program_drops_what_the_model_drops() -> None:
    """The numbers of a seed are other ones in a program of XLA."""
    model = called(layer("Dropout", 0.5, seed=1), layer("Dense", 2))
    rng = np.random.default_rng(0)
    task = Task(*(rng.normal(size=(8, n)).astype("float32") for n in (3, 2, 3, 2)))
    expected = np.mean((to_np(own(model, task.query_x, True)) - task.query_y) ** 2)
    for how in ({}, {"task_map": "scan"}, {"compiled": False}):
        cost = MAML(model).meta_value_and_grad(nn.mse, [task], steps=0, **how).cost
        assert float(cost) == pytest.approx(expected, rel=1e-5)


# -- names -------------------------------------------------------------------------------------


def test_layers_frozen_after_wrapping_do_not_adapt() -> None:
    library = next(library for library in zoo.LIBRARIES if library.id == "keras")
    model, task = library.build(zoo.weights()), zoo.tasks(1)[0]
    maml = MAML(model, 0.1)
    model.layers[0].trainable = False
    learner = maml.clone().adapt_on(
        nn.mse, *map(maml.backend.asarray, (task.support_x, task.support_y))
    )
    loss = nn.mse(learner(task.query_x), maml.backend.asarray(task.query_y))
    cost = maml.meta_value_and_grad(nn.mse, [task], compiled=False, task_map="loop").cost
    fresh = MAML(model, 0.1)
    expected = fresh.meta_value_and_grad(nn.mse, [task], compiled=False, task_map="loop").cost
    assert float(loss) == pytest.approx(float(expected), rel=1e-12)
    assert float(cost) == pytest.approx(float(expected), rel=1e-12)


def test_a_copy_keeps_its_names() -> None:
    library = next(library for library in zoo.LIBRARIES if library.id == "keras")
    maml = MAML(library.build(zoo.weights()), 0.1)
    copied = copy.deepcopy(maml)
    assert list(copied.meta_parameters()) == list(maml.meta_parameters())
    how: dict[str, Any] = {"compiled": False, "task_map": "loop"}
    costs = [m.meta_value_and_grad(nn.mse, zoo.tasks(1), **how).cost for m in (maml, copied)]
    assert float(costs[0]) == float(costs[1])


def _as_functions(kind: str) -> Any:
    """A network whose call goes through a `tf.function`."""
    import keras
    import tensorflow as tf

    class Net(keras.Model):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.first = keras.layers.Dense(4, activation="tanh")
            self.head = keras.layers.Dense(2)
            self.attribute = tf.function(self.whole)
            self.closure = tf.function(lambda x: self.whole(x))

        def whole(self, x: Any) -> Any:
            return self.head(self.first(x))

        @tf.function  # type: ignore[untyped-decorator]
        def method(self, x: Any) -> Any:
            return self.whole(x)

        def call(self, x: Any) -> Any:
            return getattr(self, kind)(x)

    return Net()


@pytest.mark.parametrize("kind", ["method", "attribute", "closure", "method of a layer"])
def test_graphs_that_a_model_keeps_hold_none_of_our_values(kind: str) -> None:
    import keras
    import tensorflow as tf

    with zoo_keras.double():
        net = _as_functions(kind.partition(" ")[0])
        net(keras.ops.ones((1, 3)))  # traced for another shape than an adaptation has
        model = net

        class Around(tf.Module):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self.net, self.scale = net, tf.Variable(tf.ones((), tf.float64))

            def __call__(self, x: Any) -> Any:
                return self.scale * self.net(x)

        if kind == "method of a layer":
            model = Around()
        batch, how = zoo.tasks(1), {"compiled": False, "task_map": "loop"}
        zoo.check_along_a_line(MAML(model, 0.1, 2), nn.mse, batch, [how], step=5e-5)
        assert not tf.config.functions_run_eagerly()
        x = keras.ops.convert_to_tensor(batch[0].support_x)
        before = to_np(model(x))
        for variable in net.head.trainable_variables:
            variable.assign(2 * variable)
        np.testing.assert_allclose(to_np(model(x)), 2 * before, rtol=1e-12)


def test_a_call_in_one_thread_leaves_programs_of_others_compiled() -> None:
    import tensorflow as tf

    from metaframe.backend.registry import load_backend

    backend, inside = load_backend("tensorflow"), threading.Barrier(2, timeout=60)
    found = []

    def run() -> None:
        found.append(backend.runs_inline([]))
        inside.wait()
        inside.wait()

    thread = threading.Thread(target=lambda: backend.run_foreign(run, twice=False))
    thread.start()
    inside.wait()
    assert tf.config.functions_run_eagerly()
    found.append(backend.runs_inline([]))
    inside.wait()
    thread.join()
    assert found == [True, False]
    assert not tf.config.functions_run_eagerly()
