"""tf.distribute: one worker a replica of the active strategy."""

from __future__ import annotations

import contextvars
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import tensorflow as tf

from metaframe.backend.types import Array, Arrays
from metaframe.backend.workers import Part, Place, Workers
from metaframe.errors import BackendError, InputError
from metaframe_tensorflow import _private


class TensorFlowWorkers(Workers):
    """The replicas of a strategy."""

    def __init__(self, strategy: Any) -> None:
        resolver = strategy.cluster_resolver
        process = resolver.task_id if resolver is not None and resolver.task_id is not None else 0
        count = int(strategy.num_replicas_in_sync)
        own = count if resolver is None else _local(strategy)
        super().__init__(count, process, count // own)
        self._strategy = strategy
        self._own = own

    def each(self, part: Part, tasks: Arrays, *, shared: bool) -> Arrays:
        parts = self._own if shared else self.count
        if tf.executing_eagerly():
            graph = tf.function(lambda: list(self._each(part, tasks, parts)), autograph=False)
            return tuple(graph.get_concrete_function()())
        return self._each(part, tasks, parts)

    def _each(self, part: Part, tasks: Arrays, parts: int) -> Arrays:
        length = tasks[0].shape[0] // parts
        # Replicas run in threads of their own, which would not see what is selected here.
        contexts = iter([contextvars.copy_context() for _ in range(self.count)])

        def replica() -> list[Array]:
            here = tf.distribute.get_replica_context()
            index = here.replica_id_in_sync_group

            def mine(x: Array) -> Array:
                start = tf.concat(
                    [[index % parts * length], tf.zeros(x.shape.rank - 1, tf.int32)], 0
                )
                return tf.slice(x, start, [length, *x.shape[1:]])

            run = next(contexts).run
            return list(run(part, tuple(map(mine, tasks)), index, lambda x: _all_sum(here, x)))

        return tuple(self._first(x) for x in self._strategy.run(replica))

    def _first(self, x: Any) -> Array:
        return self._strategy.experimental_local_results(x)[0]

    def tell(self, text: str) -> list[str]:
        data = text.encode()
        with tf.init_scope():
            sizes = self._gathered([len(data)])
            rows = self._gathered([*data, *[0] * (max(row[0] for row in sizes) - len(data))])
        return [bytes(row[: size[0]]).decode() for row, size in zip(rows, sizes, strict=True)]

    def leave_word(self, text: str) -> None:
        _private.tell_cluster(text)

    def _gathered(self, numbers: list[int]) -> list[list[int]]:
        row = tf.one_hot([self.process], self.processes, axis=0, dtype=tf.int32) * [numbers]

        def replica() -> Array:
            here = tf.distribute.get_replica_context()
            first = tf.cast(here.replica_id_in_sync_group % self._own == 0, tf.int32)
            return here.all_reduce(tf.distribute.ReduceOp.SUM, row * first)

        run = tf.function(lambda: self._strategy.run(replica), autograph=False)
        found = run.get_concrete_function()()
        return [list(map(int, row)) for row in self._first(found).numpy()]


def _all_sum(here: Any, x: Array) -> Array:
    @tf.custom_gradient  # type: ignore[untyped-decorator]
    def summed(x: Array) -> tuple[Array, Any]:
        def refused(*_: Array) -> Array:
            raise InputError(
                "a distributed step within a gradient: the sum over replicas would be "
                "differentiated too. Differentiate the cost, and leave the step outside."
            )

        return here.all_reduce(tf.distribute.ReduceOp.SUM, x), refused

    return summed(x)


def _local(strategy: Any) -> int:
    return len(strategy.extended.worker_devices)


_known: list[TensorFlowWorkers] = []
"""The workers of the current strategy; they remember what was agreed on."""


def workers() -> Workers:
    """The replicas of the strategy whose scope is active.

    Raises:
        InputError: within a replica.
    """
    if not tf.distribute.in_cross_replica_context():
        raise InputError(
            "a distributed step within strategy.run: it divides the tasks itself. Call it within "
            "strategy.scope(), and not within run."
        )
    strategy = tf.distribute.get_strategy()
    if not _known or _known[0]._strategy is not strategy:
        _known[:] = [TensorFlowWorkers(strategy)]
    return _known[0]


@contextmanager
def join(place: Place) -> Iterator[None]:
    """A MultiWorkerMirroredStrategy for a block of code.

    Raises:
        BackendError: without the addresses, or too late for it.
    """
    if place.peers:
        task = {"type": "worker", "index": place.process}
        os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": place.peers}, "task": task})
    elif "TF_CONFIG" not in os.environ:
        raise BackendError(
            "TensorFlow needs the address of every process: set METAFRAME_PEERS to "
            '"host:port,host:port,...", or TF_CONFIG. `metaframe launch` does.'
        )
    options = tf.distribute.experimental.CommunicationOptions(timeout_seconds=place.timeout)
    try:
        strategy = tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)
    except RuntimeError as error:
        if "program startup" not in str(error):
            raise
        raise BackendError(
            "session() was entered after TensorFlow had made a tensor or looked for its devices, "
            "and then TensorFlow joins no run any more. Enter it first; select a device or dtype "
            "inside of it."
        ) from error
    with strategy.scope():
        try:
            yield
        finally:
            _known.clear()


def lost_others(error: Exception) -> bool:
    """True if a collective failed because of another process."""
    kinds = ("Unavailable", "Aborted", "Cancelled", "DeadlineExceeded")
    return isinstance(error, tuple(getattr(tf.errors, f"{kind}Error") for kind in kinds))
