"""Batch normalisation with values of its own for every inner step (MAML++, arXiv 1810.09502).

An adaptation visits theta_0 .. theta_K, and what a layer sees differs from one to the next. A table
has one row for each of these points; a forward pass takes the row of the point it is at, which the
state says. Steps beyond the last row take the last.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from metaframe import ops
from metaframe.backend.model import Inputs, ModelAdapter, NamedParameters, Params
from metaframe.backend.selection import backend_of
from metaframe.backend.types import Array
from metaframe.core.inner_loop import first_index
from metaframe.errors import InputError
from metaframe.models.learned_values import kept, live
from metaframe.models.wrapped import Around

STEP = "inner step"
"""The point an adaptation is at, among the state of a model that looks at it."""


def at_step(state: Params, step: Any) -> Params:
    """`state` at the point after `step` inner steps, a number or an integer array."""
    if STEP not in state:
        return state
    return {**state, STEP: 0 * state[STEP] + step}  # like the array there, wherever that is


def row(table: Array, step: Array) -> Array:
    """Row `step` of `table`, or the last if there is none, as a sum.

    torch's indexing asks a scalar index for its value, which traced code does not have, and the
    gradient of its `index_select` under `vmap` comes out of inductor multiplied.
    """
    return ops.sum(_chosen(table, step) * table, axis=0)


def placed(value: Array, step: Array, rows: int) -> Array:
    """A table of zeros with `value` in row `step`."""
    table = ops.broadcast_to(value[None], (rows, *value.shape))
    return _chosen(table, step) * table


def _chosen(table: Array, step: Array) -> Array:
    """One for the row, zero for the others, in the shape (rows, 1, ...)."""
    rows = table.shape[0]
    index = ops.astype(ops.minimum(step, rows - 1), "int32")
    chosen = ops.one_hot(index, rows, backend_of(table).dtype_name(table))
    return ops.reshape(chosen, (rows, *[1] * (len(table.shape) - 1)))


def _repeated(value: Array, rows: int) -> Array:
    return ops.broadcast_to(value[None], (rows, *value.shape)) + 0  # memory of its own


class _PerStep(Around):
    """The common part of both kinds: the state says where an adaptation is."""

    def __init__(self, inner: ModelAdapter, rows: int, what: str) -> None:
        super().__init__(inner)
        self.norms = inner.batch_norms()
        self.rows = rows
        if not self.norms:
            raise InputError(
                f"{what} needs batch normalisation that says where its values are: that of a "
                "torch or Flax module, or of a model of metaframe.nn. "
                f"{type(inner.model).__qualname__} has none."
            )

    def state(self) -> Params:
        """The model's, and the point an adaptation starts at."""
        like = next(iter(self.inner.params().values()))
        return {**self.inner.state(), STEP: first_index(like)}

    def _inner_state(self, state: Params) -> Params:
        return {name: state[name] for name in self.inner.state()}

    def _rows_of(self, tables: Params, names: Iterable[str], step: Array) -> Params:
        return {name: row(tables[name], step) for name in names}


class StepStatistics(_PerStep):
    """Running statistics for every point. They are state, and change only in `assign_statistics`.

    Args:
        inner: the model.
        steps: K, for K + 1 rows; every row starts as the model's own running statistics.
    """

    def __init__(self, inner: ModelAdapter, steps: int) -> None:
        super().__init__(inner, steps + 1, "norm='per-step'")
        state = inner.state()
        names = [name for norm in self.norms for name in (norm.mean, norm.var)]
        tables = {name: _repeated(state[name], self.rows) for name in names}
        self.tables: NamedParameters = kept(tables, self.backend)

    @property
    def statistics(self) -> Params:
        """The tables."""
        return self.tables.params()

    def state(self) -> Params:
        """The model's, with tables in the places of its running statistics."""
        return {**super().state(), **self.statistics}

    def call(self, params: Params, state: Params, inputs: Inputs) -> tuple[Any, Params]:
        """The output with the rows of the point; recording returns one point's statistics."""
        rows = self._rows_of(state, self.statistics, state[STEP])
        output, after = self.inner.call(params, {**self._inner_state(state), **rows}, inputs)
        if inputs.forward.norm != "record":
            return output, state
        return output, {**state, **{name: after[name] for name in rows}}


class StepAffine(_PerStep):
    """A scale and a shift for every point, learned and not adapted: tables as parameters.

    Args:
        inner: the model.
        steps: K, for K + 1 rows; every row starts as the model's own.
    """

    def __init__(self, inner: ModelAdapter, steps: int) -> None:
        super().__init__(inner, steps + 1, "a scale and a shift for every step")
        params = inner.params()
        names = [n for norm in self.norms for n in (norm.scale, norm.shift) if n is not None]
        tables = {name: _repeated(params[name], self.rows) for name in names}
        self.tables: NamedParameters = live(tables, self.backend)

    def params(self) -> Params:
        """The model's, with tables in the places of scales and shifts."""
        return {**self.inner.params(), **self.tables.params()}

    def trainable(self) -> tuple[str, ...]:
        """The model's, without tables that were frozen."""
        frozen = {*self.tables.params()}.difference(self.tables.trainable())
        return tuple(name for name in self.inner.trainable() if name not in frozen)

    def adaptable(self) -> tuple[str, ...]:
        """The model's, without scales and shifts."""
        tables = self.tables.params()
        return tuple(name for name in self.inner.adaptable() if name not in tables)

    def variables(self) -> dict[str, Any]:
        """The model's, and the tables."""
        return {**self.inner.variables(), **self.tables.variables()}

    def call(self, params: Params, state: Params, inputs: Inputs) -> tuple[Any, Params]:
        """The output with the rows of the point."""
        rows = self._rows_of(params, self.tables.params(), state[STEP])
        output, after = self.inner.call({**params, **rows}, self._inner_state(state), inputs)
        return output, {**state, **after}

    def write(self, params: Params) -> None:
        """Into the tables, and the rest into the model, whose own scales and shifts stay."""
        tables = self.tables.params()
        self.tables.write({name: params[name] for name in tables})
        own = self.inner.params()
        self.inner.write({n: own[n] if n in tables else x for n, x in params.items()})
