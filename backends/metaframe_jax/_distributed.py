"""jax.distributed and meshes: one worker a device, over all processes.

Each device runs its tasks by `shard_map`, in which nothing is exchanged but by the one `psum`.
JAX's check of what varies over devices has to be off: with it on, JAX sums the gradient of
replicated parameters over devices by itself, within every inner step, and the result is silently
wrong (compare JAX issue 36886).
"""

from __future__ import annotations

import itertools
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from metaframe.backend.types import Array, Arrays, ArraysFn
from metaframe.backend.workers import ALONE, Part, Place, Workers
from metaframe.errors import BackendError, InputError
from metaframe_jax import _private

SHUTDOWN = 10
"""Seconds that a process which ends waits for the others, at the most."""
WATCH = 2.0
"""Seconds from one look for another process's last word to the next."""
LAST_WORD = "metaframe/last_word"
WITHIN = (
    "a distributed step within a gradient or vmap: the sum over devices would be transformed too, "
    "and be wrong. Transform the cost, and leave the step outside."
)


class JaxWorkers(Workers):
    """The devices of a mesh with one axis.

    A step closes over arrays, in the user's functions too, which `shard_map` does not take on an
    axis of type Explicit.
    """

    def __init__(self, mesh: Any) -> None:
        if mesh.axis_types != (jax.sharding.AxisType.Auto,):
            raise InputError(
                f"the active mesh has the axes {mesh.axis_names} of types {mesh.axis_types}; a "
                "distributed step needs one, of type Auto: jax.make_mesh((devices,), "
                '("tasks",), axis_types=(jax.sharding.AxisType.Auto,)). Or leave the mesh out: all '
                "devices of all processes are then used."
            )
        super().__init__(mesh.size, jax.process_index(), jax.process_count())
        self._mesh = mesh

    def share(self, num_tasks: int) -> list[int]:
        concrete: Any = None if _private.transforming() else _mesh()
        owners = [] if concrete is None else [d.process_index for d in concrete.devices.flat]
        if owners != sorted(owners):
            raise InputError(
                "the devices of the active mesh are not in the order of their processes, whose "
                "shares are therefore scattered. Make it of jax.devices() as they come."
            )
        return super().share(num_tasks)

    def each(self, part: Part, tasks: Arrays, *, shared: bool) -> Arrays:
        (axis,) = self._mesh.axis_names
        parts = self.count // self.processes if shared else self.count

        def on_device(*tasks: Array) -> Arrays:
            index = jax.lax.axis_index(axis)

            def mine(x: Array) -> Array:
                length = x.shape[0] // parts
                return jax.lax.dynamic_slice_in_dim(x, index % parts * length, length)

            return part(tuple(map(mine, tasks)), index, lambda x: _all_sum(x, axis))

        # Each device gets all tasks of its process and takes its own. Were they divided at the
        # door, XLA would divide what comes before too, such as padding, and exchange its pieces.
        mapped: Any = jax.shard_map(
            on_device, mesh=self._mesh, in_specs=_spec(), out_specs=_spec(), check_vma=False
        )
        if not _private.transforming():
            return compiled(lambda xs: mapped(*xs), tasks)(tasks)
        if not _private.recorded_by_jit():
            raise InputError(WITHIN)
        _spanning.append(self.processes > 1)
        out: Arrays = mapped(*tasks)
        return out

    def tell(self, text: str) -> list[str]:
        client = _private.client()
        if client is None:
            return [text]
        prefix = f"metaframe/told/{next(_told)}"
        client.key_value_set(f"{prefix}/{self.process}", text)
        limit = 1000 * round(_timeout[-1])
        client.wait_at_barrier(f"{prefix}/all", limit)
        return [
            client.blocking_key_value_get(f"{prefix}/{process}", limit)
            for process in range(self.processes)
        ]

    def leave_word(self, text: str) -> None:
        _left.set()
        client = _private.client()
        if client is None:
            return
        with suppress(jax.errors.JaxRuntimeError):  # the first one may be gone, or was faster
            client.key_value_set(LAST_WORD, text)


_told = itertools.count()
"""Numbers what is told, whichever mesh is active: the processes' store takes every key once."""
_left = threading.Event()
"""Has this process left the run, or is it about to?"""
_spanning: list[bool] = []
"""For every sharded step traced since this was last emptied: does it span processes?"""
_timeout = [300.0]
_known: dict[Any, JaxWorkers] = {}


def _all_sum(x: Array, axis: str) -> Array:
    @jax.custom_jvp
    def summed(x: Array) -> Array:
        add_up: Any = jax.lax.psum
        return add_up(x, axis)

    @summed.defjvp
    def refused(*_: Any) -> Any:
        raise InputError(WITHIN)

    del refused
    total: Array = summed(x)
    return total


def _spec(*axes: str) -> Any:
    make: Any = PartitionSpec
    return make(*axes)


def workers() -> Workers:
    """The devices of the active mesh, and without one all devices of all processes."""
    mesh = _mesh()
    if mesh.size == 1:
        return ALONE
    if mesh not in _known:
        _known[mesh] = JaxWorkers(mesh)
    return _known[mesh]


def _mesh() -> Any:
    active = jax.sharding.get_abstract_mesh()
    if active.empty:
        return Mesh(np.array(jax.devices()), ("tasks",))
    return active if _private.transforming() else jax.sharding.get_mesh()


def compiled(fn: ArraysFn, examples: Arrays) -> ArraysFn:
    """`jax.jit`, also for a function that runs on the devices of several processes.

    Such a program takes and returns arrays that lie on all those devices. Outside of it everyone
    goes on with arrays of its own process.
    """
    jitted = jax.jit(lambda xs: fn(xs))  # a function of its own, with which its trace goes
    _spanning.clear()
    # Traced now, so that errors come now; called through jit, whose dispatch in C++ is faster
    # than that of a compiled stage and finds the trace again.
    if _private.captures_tracers(jitted.trace(examples)):
        return _once_each(fn, jitted)
    return _across(jitted) if any(_spanning) else jitted


def _once_each(fn: ArraysFn, first: ArraysFn) -> ArraysFn:
    """`fn`, which closes over arrays of an outer transform, traced anew for each call.

    Those of one call would be an error in the next, and the trace of the first is not kept.
    """
    traced = [first]

    def call(xs: Arrays) -> Arrays:
        out: Arrays = (traced.pop() if traced else jax.jit(lambda xs: fn(xs)))(xs)
        return out

    return call


def _across(jitted: Callable[..., Arrays]) -> ArraysFn:
    everywhere = NamedSharding(_mesh(), _spec())
    devices: Any = everywhere.addressable_devices
    mine = sorted(devices, key=lambda device: device.id)

    def spread(x: Array) -> Array:
        copies = [jax.device_put(x, device) for device in mine]
        return jax.make_array_from_single_device_arrays(x.shape, everywhere, copies)

    def call(xs: Arrays) -> Arrays:
        return tuple(y.addressable_data(0) for y in jitted(tuple(map(spread, xs))))

    return call


@contextmanager
def join(place: Place) -> Iterator[None]:
    """jax.distributed for a block of code.

    Raises:
        BackendError: too late for it.
    """
    try:
        jax.distributed.initialize(
            place.address,
            place.processes,
            place.process,
            heartbeat_timeout_seconds=round(place.timeout),
            shutdown_timeout_seconds=SHUTDOWN,
            initialization_timeout=round(place.timeout),
        )
    except RuntimeError as error:
        if "must be called before any JAX calls" not in str(error):
            raise
        raise BackendError(
            "session() was entered after JAX had made an array or looked for its devices, and then "
            "JAX joins no run any more. Enter it first; select a device or dtype inside of it."
        ) from error
    _timeout.append(place.timeout)
    _left.clear()
    threading.Thread(target=_watch, name="metaframe-watch", daemon=True).start()
    try:
        yield
    finally:
        _left.set()
        _timeout.pop()
        _known.clear()
    # Not after a failure: it waits for the others, and when they do not come it aborts this process
    # before Python could say what happened.
    leave: Any = jax.distributed.shutdown
    leave()


def _watch() -> None:
    """End this process when another one left its last word.

    JAX itself would end it a while later from C++ and could not say why; the main thread waits
    in a collective, where no exception reaches it.
    """
    client = _private.client()
    while client is not None and not _left.wait(WATCH):
        try:
            word = client.key_value_try_get(LAST_WORD)
        except jax.errors.JaxRuntimeError:  # there is none
            continue
        if not _left.is_set():
            sys.stderr.write(f"metaframe: {word}\n")
            sys.stderr.flush()
            os._exit(1)


def lost_others(error: Exception) -> bool:
    """True if a collective or the coordination service failed because of another process."""
    words = ("Gloo", "UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "CANCELLED", "coordination")
    return isinstance(error, jax.errors.JaxRuntimeError) and any(w in str(error) for w in words)
