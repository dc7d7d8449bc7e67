"""Outer steps whose optimizer is a pair of pure functions: values in, values out.

Such a step changes nothing until its result is assigned to the learner. So several of them can be
started before anyone looks at the first one's loss, as many calls of one compiled program or as one
program that loops over batches, and whoever wants to stop in the middle goes back to the start and
takes fewer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from metaframe import optim, tree
from metaframe.backend.contract import Backend
from metaframe.backend.model import Params
from metaframe.backend.types import Array, Arrays
from metaframe.core.chain import rule
from metaframe.core.compile import compile
from metaframe.errors import CheckpointError
from metaframe.learners.meta_learner import MetaLearner
from metaframe.learners.objective import Meta, as_batch
from metaframe.learners.programs import MetaGradient
from metaframe.tasks import Task
from metaframe.training.parameters import check_array
from metaframe.training.report import Gradient, Outcome, StepReport, on_host, refuse_rate


class At(NamedTuple):
    """The state of training: all that an outer step changes."""

    params: Params
    optimizer: Any


class Found(NamedTuple):
    """The results of one step, or stacked those of several, as arrays of the framework."""

    cost: Array
    aux: dict[str, Array]
    norm: Array

    def on_host(self, backend: Backend) -> Found:
        """The same in NumPy."""
        return Found(*tree.map(backend.to_numpy, tuple(self)))

    def report(self, row: Any = ()) -> StepReport:
        """Of NumPy arrays, as plain numbers; `row` picks a step of several."""
        scores = self.aux.get("scores")
        return StepReport(
            float(self.cost[row]),
            self.aux["costs"][row],
            None if scores is None else scores[row],
            float(self.norm[row]),
        )


class Steps(NamedTuple):
    """Several steps that were started."""

    end: At
    reports: Callable[[], list[StepReport]]
    """Waits for them."""


class PureStep:
    """Gradient and update as one pure function.

    Args:
        maml: as for `outer_step`.
        optimizer: as for `outer_step`.
        gradient: as for `outer_step`.
        compiled: whole steps are compiled.
        looped: several steps are one program, and one step is that program's loop run once.
    """

    def __init__(
        self,
        maml: MetaLearner,
        optimizer: Any,
        gradient: Gradient,
        *,
        compiled: bool,
        looped: bool,
    ) -> None:
        self._maml = maml
        self._gradient = gradient
        self._state = optimizer.init(maml.meta_arrays())
        self._ours = ours = isinstance(optimizer, optim.Optimizer)
        self._rule = rule(optimizer) if ours else None
        self._rate: tuple[float, Array] | None = None
        self._numbers: dict[int, Array] = {}
        self.looped = looped

        def step(
            gradient: MetaGradient, at: At, constants: Meta, batch: Task, rate: Array | None
        ) -> tuple[At, Found]:
            cost, grads, aux = gradient(at.params, constants, batch)
            rates = [rate] if ours else []
            updates, state = optimizer.update(grads, at.optimizer, at.params, *rates)
            after = optim.apply_updates(at.params, updates)
            return At(after, state), Found(cost, aux, optim.global_norm(grads))

        self._step: Callable[..., tuple[At, Found]] = step
        self._prepared: Callable[..., Callable[[Arrays], Arrays] | None] | None = None
        if looped:
            several = _looped(step, maml.backend)
            self._several, one = compile(several), compile(_one(several))
            self._step = lambda *args: one(*args, *self._only())
            self._prepared = lambda *args: one.prepared(*args, *self._only())
        elif compiled:
            whole = compile(step)
            self._step, self._prepared = whole, whole.prepared

    def __call__(self, batch: Task, rate: float | None, num_tasks: int | None) -> Outcome:
        """The next step."""
        at, backend = self.at(), self._maml.backend
        batch = as_batch(batch, at.params, backend)
        constants, gradient = self._maml.constants(), self._gradient(num_tasks)
        after, found = self._step(gradient, at, constants, batch, self._rate_of(rate, at))
        return Outcome(found.on_host(backend).report(), lambda: self.assign(after))

    def at(self) -> At:
        """The state of training."""
        return At(self._maml.meta_arrays(), self._state)

    def assign(self, at: At) -> None:
        """Put training there."""
        self._maml.assign(at.params)
        self._state = at.optimizer

    def several(
        self, at: At, batches: Task, rates: Sequence[float | None], first: int, count: int
    ) -> Steps:
        """Start `count` steps from `at`, on as many of these stacked batches from the `first` on.

        In one program, whichever they are; it depends on how many batches there are.
        """
        maml, backend = self._maml, self._maml.backend
        rows = as_batch(batches, at.params, backend)
        after, table = self._several(
            self._gradient(None),
            at,
            maml.constants(),
            rows,
            self._rates_of(rates, at),
            self._number(first),
            self._number(count),
        )

        def reports() -> list[StepReport]:
            found = table.on_host(backend)
            return [found.report(i) for i in range(first, first + count)]

        return Steps(after, reports)

    def in_calls(self, at: At, batches: Task, rates: Sequence[float | None], count: int) -> Steps:
        """Start `count` steps from `at` on the first of these batches, one call after the other.

        After the first the arguments are not looked at any more.
        """
        backend = self._maml.backend
        gradient, constants = self._gradient(None), self._maml.constants()
        rows_of = as_batch(batches, at.params, backend)
        leaves, spec = tree.flatten((rows_of, self._rates_of(rates, at)))
        rows = list(zip(*map(list, leaves), strict=True))[:count]
        at, first = self._step(gradient, at, constants, *tree.unflatten(spec, rows[0]))
        found = [first]
        carry, form = tree.Packed(at, backend.owns), tree.structure(first)
        program = None
        if self._prepared and count > 1 and len(carry.arrays) == len(tree.leaves(at)):
            program = self._prepared(gradient, at, constants, *tree.unflatten(spec, rows[1]))
        if program is None:
            for row in rows[1:]:
                at, one = self._step(gradient, at, constants, *tree.unflatten(spec, row))
                found.append(one)
            return Steps(at, lambda: [one.on_host(backend).report() for one in found])
        state, held, size = carry.arrays, tree.leaves(constants), len(carry.arrays)
        last = self._only() if self.looped else ()
        for row in rows[1:]:
            results = program((*state, *held, *row, *last))
            state = results[:size]
            found.append(tree.unflatten(form, results[size:]))
        end = carry.unpack(state)
        return Steps(end, lambda: [one.on_host(backend).report() for one in found])

    def _rates_of(self, rates: Sequence[float | None], at: At) -> Array | None:
        if not self._ours:
            refuse_rate(rates[0])
        if rates[0] is None:
            return None
        return _like(rates, at.params, self._maml)

    def _rate_of(self, rate: float | None, at: At) -> Array | None:
        if not self._ours:
            refuse_rate(rate)
        if rate is None:
            return None
        if self._rate is None or self._rate[0] != rate:
            self._rate = rate, _like(rate, at.params, self._maml)
        return self._rate[1]

    def _only(self) -> tuple[Array, Array]:
        return self._number(0), self._number(1)

    def _number(self, count: int) -> Array:
        """A number as an array, on which no program depends."""
        if count not in self._numbers:
            self._numbers[count] = self._maml.backend.asarray(np.asarray(count, np.int32))
        return self._numbers[count]

    def state(self) -> tuple[dict[str, np.ndarray[Any, Any]], Any]:
        """The optimizer's state for a checkpoint."""
        names, leaves = tree.key_chains(self._state), tree.leaves(self._state)
        backend = self._maml.backend
        arrays = {n: on_host(x, backend) for n, x in zip(names, leaves, strict=True)}
        return arrays, {} if self._rule is None else {"rule": self._rule}

    def restore(self, arrays: dict[str, np.ndarray[Any, Any]], plain: Any) -> None:
        """Go on from what `state` returned."""
        names = tree.key_chains(self._state)
        if set(names) != set(arrays):
            raise CheckpointError(
                "the checkpoint is of another optimizer: "
                f"missing {sorted(set(names) - set(arrays))}, "
                f"unexpected {sorted(set(arrays) - set(names))}."
            )
        for name, own in zip(names, tree.leaves(self._state), strict=True):
            check_array(arrays[name], own, f"the optimizer's {name!r}", self._maml.backend)
        written = plain.get("rule")  # checkpoints from before it was kept have none
        if None not in (written, self._rule) and written != self._rule:
            raise CheckpointError(
                f"the checkpoint is of another optimizer: of {written}, and this one is "
                f"{self._rule}."
            )
        backend = self._maml.backend
        leaves = [
            backend.asarray(arrays[name], backend.dtype_name(old), backend.device_of(old))
            for name, old in zip(names, tree.leaves(self._state), strict=True)
        ]
        self._state = tree.unflatten(tree.structure(self._state), leaves)


def _looped(step: Callable[..., tuple[At, Found]], backend: Backend) -> Callable[..., Any]:
    """`(..., batches, rates, count)`: `count` steps, on as many rows of the batches."""

    def steps(
        gradient: MetaGradient,
        at: At,
        constants: Meta,
        batches: Task,
        rates: Array | None,
        first: Array,
        count: Array,
    ) -> tuple[At, Found]:
        start = tree.Packed(at, backend.owns)
        rows = tree.Flat(*tree.flatten((batches, rates)))
        found_of = tree.Returned()

        def body(carry: Arrays, row: Arrays) -> tuple[Arrays, Arrays]:
            batch, rate = rows.build(row)
            after, found = step(gradient, start.unpack(carry), constants, batch, rate)
            return tree.Packed(after, backend.owns).arrays, found_of.flatten(found)

        carry, table = backend.scan_rows(body, start.arrays, rows.arrays, first, count)
        return start.unpack(carry), found_of.build(table)

    return steps


def _one(several: Callable[..., tuple[At, Found]]) -> Callable[..., tuple[At, Found]]:
    """One step as the loop takes it, so that one by one they are the same to the last bit."""

    def one(
        gradient: MetaGradient,
        at: At,
        constants: Meta,
        batch: Task,
        rate: Array | None,
        first: Array,
        count: Array,
    ) -> tuple[At, Found]:
        rows, rates = tree.map(lambda x: x[None], (batch, rate))
        after, table = several(gradient, at, constants, rows, rates, first, count)
        return after, Found(*tree.map(lambda x: x[0], tuple(table)))

    return one


def _like(rates: Any, params: Params, maml: MetaLearner) -> Array:
    first = next(x for x in params.values() if maml.backend.is_floating(x))
    values = np.asarray(rates, np.float64)
    return maml.backend.asarray(values, maml.backend.dtype_name(first))
