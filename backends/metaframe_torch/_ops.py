"""The array functions in torch calls that also work under `torch.func` and when traced."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from metaframe.backend.tables import Axis, OpsTable


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _dims(x: Tensor, axis: Axis) -> tuple[int, ...]:
    # torch reads an empty tuple as "all axes", which under vmap could take in the mapped one.
    if axis is None:
        return tuple(range(x.ndim))
    return (axis,) if isinstance(axis, int) else tuple(axis)


def _like(value: Tensor | float, x: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value
    return torch.full((), value, dtype=x.dtype, device=x.device)


class TorchOps(OpsTable):
    """See `metaframe.ops` for what each function does."""

    def zeros(self, shape: Sequence[int], dtype: str, like: Tensor) -> Tensor:
        return torch.zeros(tuple(shape), dtype=_dtype(dtype), device=like.device)

    def ones_like(self, x: Tensor) -> Tensor:
        return torch.ones_like(x)

    def zeros_like(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    def arange(self, stop: int, dtype: str, like: Tensor) -> Tensor:
        return torch.arange(stop, dtype=_dtype(dtype), device=like.device)

    def one_hot(self, labels: Tensor, classes: int, dtype: str) -> Tensor:
        # F.one_hot looks at the labels' values, which a traced tensor does not have.
        columns = torch.arange(classes, dtype=labels.dtype, device=labels.device)
        return (labels.unsqueeze(-1) == columns).to(_dtype(dtype))

    def astype(self, x: Tensor, dtype: str) -> Tensor:
        return x.to(_dtype(dtype))

    def exp(self, x: Tensor) -> Tensor:
        return torch.exp(x)

    def expm1(self, x: Tensor) -> Tensor:
        return torch.expm1(x)

    def log(self, x: Tensor) -> Tensor:
        return torch.log(x)

    def log1p(self, x: Tensor) -> Tensor:
        return torch.log1p(x)

    def sqrt(self, x: Tensor) -> Tensor:
        return torch.sqrt(x)

    def square(self, x: Tensor) -> Tensor:
        return torch.square(x)

    def abs(self, x: Tensor) -> Tensor:
        # The second derivative of torch.abs is a tensor without memory, which cannot become a
        # NumPy array nor be written to.
        return x * torch.sign(x)

    def sign(self, x: Tensor) -> Tensor:
        # torch.sign of NaN is 0.
        found = torch.sign(x)
        return torch.where(torch.isnan(x), math.nan, found) if x.is_floating_point() else found

    def sin(self, x: Tensor) -> Tensor:
        return torch.sin(x)

    def cos(self, x: Tensor) -> Tensor:
        return torch.cos(x)

    def tanh(self, x: Tensor) -> Tensor:
        return torch.tanh(x)

    def sigmoid(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x)

    def maximum(self, x: Tensor, y: Tensor | float) -> Tensor:
        return torch.maximum(x, _like(y, x))

    def minimum(self, x: Tensor, y: Tensor | float) -> Tensor:
        return torch.minimum(x, _like(y, x))

    def where(self, condition: Tensor, x: Tensor | float, y: Tensor | float) -> Tensor:
        return torch.where(condition, x, y)

    def sum(self, x: Tensor, axis: Axis = None, keepdims: bool = False) -> Tensor:
        return torch.sum(x, _dims(x, axis), keepdim=keepdims)

    def mean(self, x: Tensor, axis: Axis = None, keepdims: bool = False) -> Tensor:
        return torch.mean(x, _dims(x, axis), keepdim=keepdims)

    def max(self, x: Tensor, axis: Axis = None, keepdims: bool = False) -> Tensor:
        # amax shares the gradient among ties; torch.max gives it to one of them.
        return torch.amax(x, _dims(x, axis), keepdim=keepdims)

    def min(self, x: Tensor, axis: Axis = None, keepdims: bool = False) -> Tensor:
        return torch.amin(x, _dims(x, axis), keepdim=keepdims)

    def argmax(self, x: Tensor, axis: int) -> Tensor:
        return torch.argmax(x, axis)

    def logsumexp(self, x: Tensor, axis: Axis = None, keepdims: bool = False) -> Tensor:
        return torch.logsumexp(x, _dims(x, axis), keepdim=keepdims)

    def reshape(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        return torch.reshape(x, tuple(shape))

    def transpose(self, x: Tensor, axes: Sequence[int]) -> Tensor:
        return torch.permute(x, tuple(axes))

    def broadcast_to(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        return torch.broadcast_to(x, tuple(shape))

    def expand_dims(self, x: Tensor, axis: int) -> Tensor:
        return torch.unsqueeze(x, axis)

    def squeeze(self, x: Tensor, axis: int) -> Tensor:
        return torch.squeeze(x, axis)

    def concat(self, xs: Sequence[Tensor], axis: int = 0) -> Tensor:
        return torch.cat(tuple(xs), axis)

    def stack(self, xs: Sequence[Tensor], axis: int = 0) -> Tensor:
        return torch.stack(tuple(xs), axis)

    def take(self, x: Tensor, indices: Tensor, axis: int = 0) -> Tensor:
        index: list[slice | Tensor] = [slice(None)] * (axis % x.ndim)
        return x[(*index, indices)]

    def pad(self, x: Tensor, widths: Sequence[tuple[int, int]]) -> Tensor:
        # torch counts the axes from the last one.
        flat = [width for pair in reversed(tuple(widths)) for width in pair]
        return torch.nn.functional.pad(x, flat)

    def matmul(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.matmul(x, y)

    def einsum(self, equation: str, *xs: Tensor) -> Tensor:
        return torch.einsum(equation, *xs)
