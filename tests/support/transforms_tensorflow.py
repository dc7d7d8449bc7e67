"""The transforms of TensorFlow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import keras
import tensorflow as tf

from metaframe.errors import InputError
from transform_tables import Fn, Refused, Row

NOTHING_RECORDED = Refused(
    InputError, "within `tf.recompute_grad` nothing is recorded, so no gradient can be taken"
)


def two(w: Any) -> Any:
    return tf.stack([w, 2 * w])


def graph(f: Fn, **settings: Any) -> Fn:
    made: Fn = tf.function(f, **settings)
    return made


def gradient(f: Fn, w: Any) -> Any:
    with tf.GradientTape() as tape:
        tape.watch(w)
        y = f(w)
    return tape.gradient(y, w)


def nested(f: Fn, w: Any) -> Any:
    with tf.GradientTape() as tape:
        tape.watch(w)
        first = gradient(f, w)
    return tape.gradient(first, w)


def persistent(f: Fn, w: Any) -> Any:
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(w)
        y = f(w)
        z = y * y
    return tf.stack([tape.gradient(y, w), tape.gradient(z, w)])


def hessian(f: Fn, w: Any, **settings: Any) -> Any:
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(w)
        first = gradient(f, w)
    return tape.jacobian(first, w, **settings)


def batch_jacobian(f: Fn, w: Any) -> Any:
    rows = two(w)
    with tf.GradientTape() as tape:
        tape.watch(rows)
        y = tf.stack([f(rows[0]), f(rows[1])])[:, None]
    return tape.batch_jacobian(y, rows)


def forward(f: Fn, w: Any) -> Any:
    with tf.autodiff.ForwardAccumulator(w, tf.ones_like(w)) as accumulator:
        y = f(w)
    return accumulator.jvp(y)


def of_variable(f: Fn, w: Any) -> Any:
    variable = tf.Variable(w)
    with tf.GradientTape() as tape:
        y = f(variable)
    return tape.gradient(y, variable)


def custom_gradient(f: Fn, w: Any) -> Any:
    @tf.custom_gradient  # type: ignore[untyped-decorator]
    def g(w: Any) -> Any:
        return f(w), lambda c: c * gradient(f, w)

    return gradient(g, w)


def repeated(f: Fn, w: Any) -> Any:
    def body(i: Any, value: Any) -> tuple[Any, Any]:
        return i + 1, value + f(w * value)

    return tf.while_loop(lambda i, _: i < 3, body, (0, tf.constant(0.1, w.dtype)))[1]


def chosen(f: Fn, w: Any) -> Any:
    return tf.cond(w[0] > 0, lambda: f(w), lambda: w[0])


def within(scope: AbstractContextManager[Any], f: Fn, w: Any) -> Any:
    with scope:
        return f(w)


@contextmanager
def policy(name: str) -> Iterator[None]:
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


@contextmanager
def floatx(name: str) -> Iterator[None]:
    before = keras.config.floatx()
    keras.config.set_floatx(name)
    try:
        yield
    finally:
        keras.config.set_floatx(before)


@contextmanager
def functions_run_eagerly() -> Iterator[None]:
    tf.config.run_functions_eagerly(True)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(False)


def mapped_dataset(f: Fn, w: Any) -> Any:
    return next(iter(tf.data.Dataset.from_tensors(w).map(f)))


ROWS = {
    "tf.function": Row(lambda f, w: graph(f)(w)),
    "tf.function, autograph=False": Row(lambda f, w: graph(f, autograph=False)(w)),
    "tf.function, jit_compile=True": Row(lambda f, w: graph(f, jit_compile=True)(w)),
    "GradientTape": Row(gradient),
    "nested tapes": Row(nested),
    "a persistent tape": Row(persistent),
    "tape.jacobian": Row(hessian),
    "tape.jacobian, no pfor": Row(lambda f, w: hessian(f, w, experimental_use_pfor=False)),
    "tape.batch_jacobian": Row(batch_jacobian),
    "a tape on a tf.Variable": Row(of_variable),
    "ForwardAccumulator": Row(forward),
    "ForwardAccumulator over a tape": Row(lambda f, w: forward(lambda w: gradient(f, w), w)),
    "in a tf.custom_gradient": Row(custom_gradient),
    "tf.recompute_grad": Row(
        lambda f, w: gradient(tf.recompute_grad(f), w),
        dict.fromkeys(
            (
                "maml_step",
                "maml_step, scan",
                "fomaml_step",
                "reptile_step",
                "inner_loop",
                "meta_value_and_grad",
                "map_tasks",
            ),
            NOTHING_RECORDED,
        ),
    ),
    "tf.function of a tape": Row(lambda f, w: graph(lambda w: gradient(f, w))(w)),
    "tape of a tf.function": Row(lambda f, w: gradient(graph(f), w)),
    "tf.function of nested tapes": Row(lambda f, w: graph(lambda w: nested(f, w))(w), slow=True),
    "nested tapes of a tf.function": Row(lambda f, w: nested(graph(f), w), slow=True),
    "tf.function of jacobian": Row(lambda f, w: graph(lambda w: hessian(f, w))(w), slow=True),
    "tf.function of ForwardAccumulator": Row(
        lambda f, w: graph(lambda w: forward(f, w))(w), slow=True
    ),
    "tf.map_fn": Row(lambda f, w: tf.map_fn(f, two(w))),
    "tf.function of map_fn": Row(lambda f, w: graph(lambda w: tf.map_fn(f, two(w)))(w)),
    "tape of map_fn": Row(lambda f, w: gradient(lambda w: tf.reduce_sum(tf.map_fn(f, two(w))), w)),
    "tf.vectorized_map": Row(lambda f, w: tf.vectorized_map(f, two(w))),
    "tf.vectorized_map of a tape": Row(
        lambda f, w: tf.vectorized_map(lambda w: gradient(f, w), two(w))
    ),
    "tape of vectorized_map": Row(
        lambda f, w: gradient(lambda w: tf.reduce_sum(tf.vectorized_map(f, two(w))), w)
    ),
    "tf.while_loop": Row(repeated),
    "tf.function of while_loop": Row(lambda f, w: graph(lambda w: repeated(f, w))(w)),
    "tape of while_loop": Row(
        lambda f, w: graph(lambda w: gradient(lambda w: repeated(f, w), w))(w), slow=True
    ),
    "tf.cond": Row(lambda f, w: graph(lambda w: chosen(f, w))(w)),
    "tf.scan": Row(lambda f, w: tf.scan(lambda a, x: a + f(x), two(w), w[0])),
    "Dataset.map": Row(mapped_dataset),
    "tf.py_function": Row(lambda f, w: tf.py_function(f, [w], w.dtype)),
    "mixed_bfloat16 policy": Row(lambda f, w: within(policy("mixed_bfloat16"), f, w)),
    'floatx "float16"': Row(lambda f, w: within(floatx("float16"), f, w)),
    "run_functions_eagerly": Row(lambda f, w: within(functions_run_eagerly(), graph(f), w)),
    "tf.device": Row(lambda f, w: within(tf.device("CPU:0"), f, w)),
}
