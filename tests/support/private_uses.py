"""For every private name of a framework, a call that needs it.

`USES[package][constant]` returns arrays or plain values, the same ones with and without the name
unless that is an error.
"""

from __future__ import annotations

import contextlib
import os
import socket
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np

import metaframe
from metaframe import MAML, nn, ops
from metaframe.backend import load_backend, use_backend
from metaframe.backend.workers import Place
from metaframe.models import functional
from metaframe.tasks import Task

X, Y = np.linspace(-1.0, 1.0, 6).reshape(3, 2), np.linspace(0.0, 2.0, 3).reshape(3, 1)


def squared(batch: Any, v: Any) -> Any:
    return ops.mean(ops.square(ops.matmul(batch["x"], v["w"]) - batch["y"]))


def meta_step(name: str, *, compiled: bool = False, **settings: Any) -> Any:
    """The meta-gradient of two inner steps on two tasks."""
    with use_backend(name, dtype="float64") as backend:

        def task_cost(v: Any, task: Any) -> Any:
            adapted = metaframe.inner_loop(squared, v, task, steps=2, lr=0.1, **settings)
            return squared(task, adapted)

        def step(v: Any, tasks: Any) -> Any:
            return metaframe.meta_value_and_grad(task_cost)(v, tasks)[1]["w"]

        v = {"w": backend.asarray(np.array([[0.5], [-0.3]]))}
        tasks = {
            "x": backend.asarray(np.stack([X, 2 * X])),
            "y": backend.asarray(np.stack([Y, Y - 1])),
        }
        run = metaframe.compile(step) if compiled else step
        return backend.to_numpy(run(v, tasks))


def adapted(model: Any, name: str) -> list[Any]:
    """The meta-gradient of a model."""
    backend = load_backend(name)
    with use_backend(name, dtype="float64"):
        x, y = backend.asarray(X), backend.asarray(Y)
        maml = MAML(model, inner_lr=0.1, inner_steps=2)
        found = maml.meta_value_and_grad(nn.mse, [Task(x, y, x, y)]).grads
        return [backend.to_numpy(found[key]) for key in sorted(found)]


# PyTorch


def plain_torch() -> Any:
    return meta_step("torch")


def under_transforms() -> list[Any]:
    """Of our vmap of a gradient: gradients by the tape and by torch.func, and its own vmap."""
    import torch

    backend = load_backend("torch")

    def cost(w: Any) -> Any:
        return backend.value_and_grad(lambda xs: ((xs[0] ** 4).sum(), ()))((w,))[2][0].sum()

    def over_rows(w: Any) -> Any:
        return backend.vmap(lambda xs: (cost(xs[0]),))((w,))[0].sum()

    w = torch.linspace(0.5, 1.5, 6, dtype=torch.float64).reshape(3, 2)
    on_tape = w.clone().requires_grad_()
    (by_tape,) = torch.autograd.grad(over_rows(on_tape), on_tape)
    taken = [by_tape, torch.func.grad(over_rows)(w), torch.func.vmap(torch.func.grad(cost))(w)]
    return [over_rows(w), *taken, meta_step("torch")]


def normalised() -> list[Any]:
    """Second and third derivative of a batch normalisation, by torch.func and by the tape."""
    import torch

    x = torch.tensor(X, dtype=torch.float64)
    scale, shift = torch.tensor([0.5, 2.0]).double(), torch.tensor([1.0, -1.0]).double()

    def cost(x: Any) -> Any:
        return (nn.batch_norm(x, scale, shift, eps=1e-3) ** 3).sum()

    def slope(cost: Any) -> Any:
        return lambda x: torch.func.grad(cost)(x)[0, 0]

    found, on_tape = [], x.clone().requires_grad_()
    taped = nn.batch_norm(on_tape, scale, shift, eps=1e-3).pow(3).sum()
    for _ in range(2):
        (gradient,) = torch.autograd.grad(taped, on_tape, create_graph=True)
        taped = gradient[0, 0]
        found.append(gradient.detach())
    return [*found, torch.func.grad(slope(cost))(x)]


def told_apart() -> list[bool]:
    """Tensors of a transform and others."""
    import torch

    backend, found = load_backend("torch"), []

    def look(x: Any) -> Any:
        found.append(backend.is_traced(x))
        return x.sum()

    look(torch.ones(2))
    torch.func.vmap(look)(torch.ones(2, 2))
    torch.func.grad(look)(torch.ones(2))
    return found


def compiled_torch() -> Any:
    """The smallest program there is: each takes torch's compiler a while."""
    import torch

    x = torch.tensor([1.0, 2.0])
    return load_backend("torch").compile(lambda xs: (xs[0].sum() * xs[0],), (x,))((x,))


def torch_model(*layers: str) -> Any:
    import torch

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), *(eval(x, vars(torch)) for x in layers))
    return model.append(torch.nn.Linear(3, 1)).double()


def with_weight_norm() -> Any:
    return adapted(torch_model("nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))"), "torch")


def with_batch_norm() -> Any:
    return adapted(torch_model("nn.BatchNorm1d(3)"), "torch")


def recomputed_in_torch() -> Any:
    return meta_step("torch", mode="remat")


def recomputed_over_a_batch() -> Any:
    """A loop that runs again and closes over a row of a batch, mapped within a gradient."""
    import torch

    x, y = torch.tensor(X), torch.tensor(Y)

    def cost(w: Any) -> Any:
        def row(scale: Any) -> Any:
            def inner(batch: Any, v: Any) -> Any:
                return squared(batch, {"w": scale * v["w"]})

            batch = {"x": x, "y": y}
            v = metaframe.inner_loop(inner, {"w": w}, batch, steps=2, lr=0.1, mode="remat")
            return squared(batch, v)

        return torch.func.vmap(row)(torch.tensor([0.5, 2.0], dtype=torch.float64)).sum()

    with use_backend("torch"):
        return torch.func.grad(cost)(torch.tensor([[0.5], [-0.3]], dtype=torch.float64))


def compiled_under_a_default_device() -> Any:
    import torch

    with torch.device("cpu"):
        return compiled_torch()


def packed_under_vmap() -> Any:
    """A packed sequence of which every row of a batch takes a multiple."""
    import torch

    def row(x: Any) -> Any:
        lengths = torch.tensor([3, 2])
        packed = torch.nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
        return packed.data

    return _in_forms(torch.func.vmap(row), torch.arange(24.0).reshape(2, 2, 3, 2))


def padded_under_vmap() -> Any:
    import torch

    def row(x: Any) -> Any:
        packed = torch.nn.utils.rnn.PackedSequence(x, torch.tensor([2, 2, 1]))
        return torch.nn.utils.rnn.pad_packed_sequence(packed)[0]

    return _in_forms(torch.func.vmap(row), torch.arange(20.0).reshape(2, 5, 2))


def masked_under_vmap() -> Any:
    """A transformer in eval mode with a padding mask."""
    import torch

    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    encoder = torch.nn.TransformerEncoder(layer, 1).double().eval().requires_grad_(False)
    mask = torch.tensor([[False, False, True], [False, False, False]])

    def row(x: Any) -> Any:
        return encoder(x, src_key_padding_mask=mask)[0, :2]

    return _in_forms(torch.func.vmap(row), torch.linspace(-1, 1, 48).double().reshape(2, 2, 3, 4))


def _in_forms(fn: Callable[[Any], Any], x: Any) -> Any:
    """`fn`, with what stands in for torch's functions when a model is called."""
    from metaframe_torch._calls import InExactForms

    with warnings.catch_warnings():  # torch says that it maps an operation row by row
        warnings.simplefilter("ignore", UserWarning)
        return InExactForms(fn)(x)


def with_rows_of_statistics() -> Any:
    """The output of a model, and its statistics, which are a row of a buffer."""
    import torch

    class Rows(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(2, 2).double())
            self.register_buffer("var", torch.ones(2, 2).double())
            self.scale = torch.nn.Parameter(torch.ones(2).double())

        def forward(self, x: Any) -> Any:
            rows = self.mean[1], self.var[1]
            return torch.nn.functional.batch_norm(x, *rows, self.scale, training=True)

    apply, params, state = functional(Rows())
    output, state = apply(params, state, torch.tensor(X))
    return [output.detach(), state["mean"]]


def plain_model() -> Any:
    return adapted(torch_model(), "torch")


def within_cached_parametrizations() -> Any:
    import torch

    model = torch_model("nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))")
    with torch.nn.utils.parametrize.cached():
        return adapted(model, "torch")


def with_a_function_of_autograd() -> Any:
    import torch

    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            return 3 * ctx.saved_tensors[0] ** 2 * grad

    class Cubic(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return Cube.apply(x)

    learner = MAML(torch_model().append(Cubic())).clone()
    x, y = torch.tensor(X), torch.tensor(Y)
    return [p.detach() for p in learner.adapt_on(nn.mse, x, y).parameters()]


def container_in_torch() -> Any:
    import torch

    class Fresh(metaframe.Container):
        """A class that no framework was told of."""

    with use_backend("torch"):
        node = Fresh(w=torch.ones(2))
        return torch.func.grad(lambda v: (v["w"] ** 2).sum())(node)["w"]


@contextlib.contextmanager
def alone(name: str) -> Iterator[Any]:
    """A group of one process."""
    backend = load_backend(name)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    with (
        mock.patch.dict(os.environ, {"MASTER_ADDR": "localhost", "MASTER_PORT": port}),
        backend.join(Place(0, 1, 0, address=f"localhost:{port}", peers=(), timeout=60.0)),
    ):
        yield backend.workers()


def last_words() -> list[Any]:
    with alone("torch") as workers:
        workers.leave_word("gone")
        return [workers.tell("hello")]


def summed_in_a_graph() -> Any:
    import torch

    with alone("torch") as workers:

        def step(xs: Any) -> Any:
            return workers.each(lambda xs, _, total: (total(xs[0] * 2),), xs, shared=False)

        return load_backend("torch").compile(step, (torch.ones(2),))((torch.ones(2),))


# JAX


def plain_jax() -> Any:
    return meta_step("jax")


def compiled_jax() -> Any:
    return meta_step("jax", compiled=True)


def over_a_tracer() -> Any:
    """A compiled function that closes over an array of an outer gradient."""
    import jax

    def cost(scale: Any) -> Any:
        return metaframe.compile(lambda x: scale * ops.sum(ops.square(x)))(jax.numpy.arange(3.0))

    with use_backend("jax"):
        return [jax.grad(cost)(2.0), cost(3.0)]


def tracers() -> list[bool]:
    import jax

    backend, found = load_backend("jax"), []

    def look(x: Any) -> Any:
        found.extend((backend.is_traced(x), backend.on_cpu(x)))
        return x.sum()

    x = jax.numpy.ones(2)
    look(x)
    for transform in (jax.jit, jax.grad, lambda fn: jax.vmap(fn)):
        transform(look)(jax.numpy.ones((2, 2)) if len(found) == 6 else x)
    return found


def disconnected() -> list[Any]:
    """Which of these costs depend on what they are differentiated by."""
    import jax

    backend, found = load_backend("jax"), []
    x, y = jax.numpy.ones(2), jax.numpy.arange(2.0)
    costs = (
        lambda xs: ((xs[0] * y).sum(), ()),
        lambda xs: (y.sum(), ()),
        lambda xs: (jax.lax.stop_gradient(xs[0]).sum(), ()),
        lambda xs: (jax.jit(jax.numpy.sum)(xs[0]), ()),
    )
    for cost in costs:
        for transform in (lambda fn: fn, jax.jit):
            missing: list[bool] = []
            run = backend.value_and_grad(cost, lambda missing=missing: missing.append(True))
            transform(lambda x, run=run: run((x,))[2])(x)
            found.append(missing)
    return found


def on_a_mesh() -> Any:
    """A compiled step on the devices of a mesh, which is one device here."""
    import jax

    from metaframe_jax._distributed import JaxWorkers

    workers = JaxWorkers(jax.sharding.Mesh(np.array(jax.devices()[:1]), ("tasks",)))

    def step(xs: Any) -> Any:
        return workers.each(lambda xs, _, total: (total(xs[0] * 2),), xs, shared=False)

    with jax.sharding.set_mesh(workers._mesh):
        return jax.jit(step)((jax.numpy.ones(2),))


def said_by_jax() -> Any:
    import jax

    from metaframe_jax._distributed import JaxWorkers

    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("tasks",))
    return JaxWorkers(mesh).tell("hello")


def released() -> Any:
    import torch

    from metaframe_torch._release import leaving_nothing

    with leaving_nothing():
        graph = torch.fx.symbolic_trace(lambda x: 2 * x)
    return graph(torch.ones(2))


# TensorFlow


def plain_tensorflow() -> Any:
    return meta_step("tensorflow")


def compiled_tensorflow() -> Any:
    return meta_step("tensorflow", compiled=True)


def implicit_beside_a_tape() -> Any:
    """A minimum whose cost closes over what a tape watches."""
    import tensorflow as tf

    batch = {"x": tf.constant(X), "y": tf.constant(Y)}
    scale = tf.constant(2.0, tf.float64)

    def cost(batch: Any, v: Any) -> Any:
        return scale * squared(batch, v)

    with use_backend("tensorflow"), tf.GradientTape() as tape:
        tape.watch(scale)
        w = tf.constant([[0.5], [-0.3]], tf.float64)
        return metaframe.implicit_loop(cost, {"w": w}, batch, steps=2, lr=0.1)["w"]


def within_a_function() -> Any:
    """A step in a `tf.function`, after AutoGraph was told about our code anew."""
    import tensorflow as tf
    from tensorflow.python.autograph.core import config

    from metaframe_tensorflow import _private

    rules = config.CONVERSION_RULES
    ours = ("metaframe", "metaframe_tensorflow")
    config.CONVERSION_RULES = tuple(x for x in rules if getattr(x, "_prefix", None) not in ours)
    try:
        _private.leave_alone(*ours)
        with use_backend("tensorflow", dtype="float64"):
            x, y = tf.constant(X), tf.constant(Y)

            @tf.function
            def step(w: Any) -> Any:
                v = metaframe.inner_loop(squared, {"w": w}, {"x": x, "y": y}, steps=2, lr=0.1)
                return v["w"]

            return step(tf.constant([[0.5], [-0.3]], tf.float64))
    finally:
        config.CONVERSION_RULES = rules


def branched() -> Any:
    """A branch on a tensor in a cost, within a `tf.function`."""
    import tensorflow as tf

    def cost(batch: Any, v: Any) -> Any:
        if ops.sum(v["w"]) > 0:
            return squared(batch, v)
        return 2 * squared(batch, v)

    @tf.function
    def step(w: Any) -> Any:
        batch = {"x": tf.constant(X), "y": tf.constant(Y)}
        return metaframe.inner_loop(cost, {"w": w}, batch, steps=1, lr=0.1)["w"]

    with use_backend("tensorflow"):
        return step(tf.constant([[0.5], [-0.3]], tf.float64))


def last_words_of_tensorflow() -> Any:
    import tensorflow as tf

    from metaframe_tensorflow._distributed import TensorFlowWorkers

    workers = TensorFlowWorkers(tf.distribute.OneDeviceStrategy("cpu"))
    workers.leave_word("gone")
    return workers.tell("hello")


Use = Callable[[], Any]
PLAIN: dict[str, Use] = {
    "metaframe_torch": plain_torch,
    "metaframe_jax": plain_jax,
    "metaframe_tensorflow": plain_tensorflow,
}
USES: dict[str, dict[str, Use]] = {
    "metaframe_torch": {
        "PEEK": under_transforms,
        "INTERPRETERS": normalised,
        "TRANSFORM_TYPE": under_transforms,
        "IS_WRAPPED": told_apart,
        "UNWRAPPED": under_transforms,
        "PROXY_MODE": compiled_torch,
        "MAKE_FX": compiled_torch,
        "INDUCTOR": compiled_torch,
        "INDUCTOR_CONFIG": compiled_torch,
        "FAKE_TENSORS": compiled_torch,
        "SHAPES": compiled_torch,
        "TRACING": compiled_torch,
        "TRACING_CONTEXT": compiled_torch,
        "GRAPH_SOURCES": released,
        "PROGRAM_MODULES": released,
        "SHARED_MODULES": released,
        "WEIGHT_NORM": with_weight_norm,
        "BATCH_NORM_BASE": with_batch_norm,
        "BATCH_NORM": normalised,
        "BATCH_NORM_BACKWARD": normalised,
        "REGISTER_NODE": container_in_torch,
        "DEFAULT_STORE": last_words,
        "COLLECTIVES": summed_in_a_graph,
        "NORM_EXCEPT_DIM": with_weight_norm,
        "IS_BATCHED": recomputed_in_torch,
        "BATCH_AXIS": recomputed_in_torch,
        "DISPATCH_MODE": recomputed_in_torch,
        "SAVED_HOOKS": plain_torch,
        "FUNCTORCH_CONFIG": compiled_torch,
        "STORAGE": compiled_torch,
        "FUNCTION_OF": with_a_function_of_autograd,
        "PARAMETERS": plain_model,
        "BUFFERS": plain_model,
        "MODULES": plain_model,
        "BACKWARD_HOOKS": plain_model,
        "BACKWARD_PRE_HOOKS": plain_model,
        "CACHED_PARAMETRIZATIONS": within_cached_parametrizations,
        "DISPATCH_MODES": compiled_torch,
        "FUNCTION_MODES": compiled_torch,
        "DEFAULT_DEVICE": compiled_under_a_default_device,
        "LEVEL": recomputed_over_a_batch,
        "PACK_PADDED": packed_under_vmap,
        "PAD_PACKED": padded_under_vmap,
        "LEFT_ALIGNED": masked_under_vmap,
        "IS_VIEW": with_rows_of_statistics,
    },
    "metaframe_jax": {
        "TRACER": tracers,
        "TRACE": disconnected,
        "CURRENT_TRACE": on_a_mesh,
        "JIT_TRACE": on_a_mesh,
        "PROCESSES": said_by_jax,
        "SETTINGS": compiled_jax,
        "CAPTURED": over_a_tracer,
    },
    "metaframe_tensorflow": {
        "MAY_RECORD": compiled_tensorflow,
        "INFERENCE": compiled_tensorflow,
        "CONTEXT": last_words_of_tensorflow,
        "EAGER": plain_tensorflow,
        "FORWARD": plain_tensorflow,
        "DEVICE_SCOPE": compiled_tensorflow,
        "RECORDS": implicit_beside_a_tape,
        "RULED": plain_tensorflow,
        "NOT_CONVERTED": within_a_function,
        "RULES": within_a_function,
        "CONVERT": branched,
        "CONVERSION": branched,
    },
}
