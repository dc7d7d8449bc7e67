"""Recurrent layers, cells and packed sequences in a form that can be mapped over tasks.

torch's kernels add in place to what they compute from the state, which fails where the state is the
same for all tasks and the inputs or weights are not; and they look at the sizes of packed sequences
in memory, which tensors of a transform have none of.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from metaframe.errors import InputError
from metaframe_torch import _private, _tape

Function = Callable[..., Any]
States = tuple[Tensor, ...]


def mapped_as(x: Tensor, others: Sequence[Tensor]) -> Tensor:
    """The values of `x`, mapped by `vmap` wherever one of `others` is."""
    zero = sum(torch.zeros_like(t, dtype=torch.float32).sum() for t in others)
    return torch.where(zero == 0, x, x)  # type: ignore[arg-type]


def of_a_cell(func: Function, written_out: Function) -> Function:
    """A recurrent cell, written out where a transform is active."""

    def run(*args: Any) -> Any:
        return written_out(*args) if _tape.transforming() else func(*args)

    return run


def gru_cell(
    x: Tensor,
    h: Tensor,
    w_x: Tensor,
    w_h: Tensor,
    b_x: Tensor | None = None,
    b_h: Tensor | None = None,
) -> Tensor:
    """`torch.gru_cell`."""
    reset, update, new = F.linear(x, w_x, b_x).chunk(3, -1)
    h_reset, h_update, h_new = F.linear(h, w_h, b_h).chunk(3, -1)
    update = torch.sigmoid(update + h_update)
    new = torch.tanh(new + torch.sigmoid(reset + h_reset) * h_new)
    return (h - new) * update + new


def lstm_cell(
    x: Tensor,
    state: States,
    w_x: Tensor,
    w_h: Tensor,
    b_x: Tensor | None = None,
    b_h: Tensor | None = None,
) -> States:
    """`torch.lstm_cell`."""
    h, c = state
    gates = F.linear(x, w_x, b_x) + F.linear(h, w_h, b_h)
    write, forget, cell, read = gates.chunk(4, -1)
    c = torch.sigmoid(forget) * c + torch.sigmoid(write) * torch.tanh(cell)
    return torch.sigmoid(read) * torch.tanh(c), c


def rnn_cell(activation: Function) -> Function:
    """`torch.rnn_tanh_cell` and `torch.rnn_relu_cell`."""

    def run(
        x: Tensor,
        h: Tensor,
        w_x: Tensor,
        w_h: Tensor,
        b_x: Tensor | None = None,
        b_h: Tensor | None = None,
    ) -> Any:
        return activation(F.linear(x, w_x, b_x) + F.linear(h, w_h, b_h))

    return run


def of_a_layer(func: Function) -> Function:
    """A recurrent layer, over sequences or packed ones, whose state is mapped where an input is."""

    def run(x: Tensor, *args: Any) -> Any:
        if not _tape.transforming():
            return func(x, *args)
        packed = not isinstance(args[1], list)
        sizes, (state, weights, *options) = (args[0], args[1:]) if packed else (None, args)
        states: States = (state,) if isinstance(state, Tensor) else tuple(state)
        states = tuple(mapped_as(h, [x, *states, *weights]) for h in states)
        if sizes is not None:
            return _Packed(func, _values(sizes), *options).run(x, states, weights)
        return _in_parts(func, x, states, weights, *options)

    return run


def _in_parts(
    func: Function, x: Tensor, states: States, weights: list[Tensor], *options: Any
) -> Any:
    """`func`, which has no batching rule and consists of operations that have one."""
    state = states if len(states) > 1 else states[0]
    if _tape.inside_a_gradient():
        return func(x, state, weights, *options)
    return torch.func.vjp(lambda x: func(x, state, weights, *options), x)[0]


@dataclass(frozen=True)
class _Packed:
    """A recurrent layer over packed sequences.

    They hold all first steps, then all second ones, which fewer sequences may have, and so on. Each
    run of steps that equally many sequences have is one call of torch's function.
    """

    func: Function
    sizes: list[int]
    biases: bool
    layers: int
    dropout: float
    training: bool
    bidirectional: bool

    def run(self, x: Tensor, states: States, weights: list[Tensor]) -> tuple[Tensor, ...]:
        """The outputs, packed as `x`, and the last states."""
        directions = 2 if self.bidirectional else 1
        each = len(weights) // (self.layers * directions)
        finals: list[States] = []
        for layer in range(self.layers):
            if layer and self.training and self.dropout:
                x = F.dropout(x, self.dropout)
            found = []
            for backwards in range(directions):
                i = layer * directions + backwards
                of_this = tuple(h[i : i + 1] for h in states), weights[i * each : (i + 1) * each]
                output, final = (self._backwards if backwards else self._forwards)(x, *of_this)
                found.append(output)
                finals.append(final)
            x = torch.cat(found, -1)
        return x, *(torch.cat(column) for column in zip(*finals, strict=True))

    def _forwards(self, x: Tensor, states: States, weights: list[Tensor]) -> tuple[Tensor, States]:
        outputs, ended = [], list[States]()
        for steps in self._segments(x):
            ended.append(tuple(h[:, steps.shape[1] :] for h in states))
            states = tuple(h[:, : steps.shape[1]] for h in states)
            output, states = self._steps(steps, states, weights)
            outputs.append(output)
        columns = zip(states, *reversed(ended), strict=True)
        return _joined(outputs), tuple(torch.cat(column, 1) for column in columns)

    def _backwards(self, x: Tensor, states: States, weights: list[Tensor]) -> tuple[Tensor, States]:
        outputs, current = [], tuple(h[:, :0] for h in states)
        for steps in reversed(self._segments(x)):
            known, size = current[0].shape[1], steps.shape[1]
            pairs = zip(current, states, strict=True)
            current = tuple(torch.cat([h, first[:, known:size]], 1) for h, first in pairs)
            output, current = self._steps(steps.flip(0), current, weights)
            outputs.append(output.flip(0))
        return _joined(reversed(outputs)), current

    def _segments(self, x: Tensor) -> list[Tensor]:
        """(steps, sequences, features) for each run of steps with equally many sequences."""
        runs = [(size, len(list(steps))) for size, steps in itertools.groupby(self.sizes)]
        parts = x.split([size * steps for size, steps in runs])
        return [p.unflatten(0, (steps, size)) for p, (size, steps) in zip(parts, runs, strict=True)]

    def _steps(self, x: Tensor, states: States, weights: list[Tensor]) -> tuple[Tensor, States]:
        # One layer in one direction, without dropout, its batch second.
        options = self.biases, 1, 0.0, self.training, False, False
        output, *after = _in_parts(self.func, x, states, weights, *options)
        return output, tuple(after)


def _joined(outputs: Any) -> Tensor:
    return torch.cat([output.flatten(0, 1) for output in outputs])


def pack(x: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
    """`pack_padded_sequence` for sequences in the order of their lengths."""
    if not _tape.transforming():
        packed: tuple[Tensor, Tensor] = _private.PACK_PADDED.required(x, lengths, batch_first)
        return packed
    counts, steps = _values(lengths), x.transpose(0, 1) if batch_first else x
    if len(counts) != steps.shape[1] or counts[-1] < 1 or counts != sorted(counts, reverse=True):
        raise InputError(
            f"the lengths of {steps.shape[1]} packed sequences are as many numbers, at least 1, "
            f"with enforce_sorted=True in decreasing order; received {counts}."
        )
    sizes = [sum(count > t for count in counts) for t in range(counts[0])]
    return torch.cat([steps[t, :size] for t, size in enumerate(sizes)]), torch.tensor(sizes)


def pad(
    x: Tensor, sizes: Tensor, batch_first: bool, value: float, total: int
) -> tuple[Tensor, Tensor]:
    """`pad_packed_sequence` in operations that have second derivatives."""
    if not _tape.transforming():
        padded: tuple[Tensor, Tensor] = _private.PAD_PACKED.required(
            x, sizes, batch_first, value, total
        )
        return padded
    counts = _values(sizes)
    empty = torch.full_like(x[:1], value).expand(counts[0], *x.shape[1:])
    steps = [torch.cat([step, empty[len(step) :]]) for step in x.split(counts)]
    result = torch.stack([*steps, *[empty] * (total - len(steps))])
    lengths = torch.tensor([sum(count > i for count in counts) for i in range(counts[0])])
    return result.transpose(0, 1) if batch_first else result, lengths


def _values(lengths: Tensor) -> list[int]:
    try:
        return [int(n) for n in lengths.tolist()]
    except RuntimeError as error:
        raise InputError(
            "the lengths of packed sequences decide which operations there are, and so cannot "
            "differ between tasks that are vectorised. Run the tasks one after the other, "
            'task_map="loop".'
        ) from error
