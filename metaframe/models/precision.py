"""Mixed precision: a model that computes in fewer digits than its parameters have."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from metaframe import arguments, tree
from metaframe.backend.contract import Backend
from metaframe.backend.model import Inputs, ModelAdapter, Params
from metaframe.backend.types import Array
from metaframe.models.lookup import adapter_of
from metaframe.models.wrapped import Around

DTYPES = ("bfloat16", "float16")


def mixed_precision(model: Any, dtype: str = "bfloat16") -> ModelAdapter:
    """`model`, computing in `dtype`: `MAML(mixed_precision(model))`.

    Parameters and inputs are rounded on their way into the model and its output is widened on the
    way out. So the loss, the inner gradients and updates, the adapted parameters, the
    meta-gradients and the outer optimizer stay in the parameters' own precision (Micikevicius et
    al. 2018, arXiv 1710.03740, with master weights in both loops). bfloat16 has the range of
    float32, so losses need no scaling; with float16 small gradients are lost.

    Args:
        model: see `metaframe.models`; its layers have to accept `dtype`.
        dtype: "bfloat16" or "float16".

    >>> import torch
    >>> from metaframe.learners import MAML
    >>> maml = MAML(mixed_precision(torch.nn.Linear(3, 1)))
    >>> maml(torch.ones(2, 3)).dtype, maml.meta_parameters()["weight"].dtype
    (torch.float32, torch.float32)
    """
    arguments.choice(dtype, "dtype", DTYPES)
    return _Narrow(adapter_of(model), dtype)


class _Narrow(Around):
    def __init__(self, inner: ModelAdapter, dtype: str) -> None:
        super().__init__(inner)
        self._dtype = dtype

    def call(self, params: Params, state: Params, inputs: Inputs) -> tuple[Any, Params]:
        wide = next(
            self.backend.dtype_name(x) for x in params.values() if self.backend.is_floating(x)
        )
        everything = (params, state, inputs.args, dict(inputs.kwargs))
        params, narrow, args, kwargs = (_cast(x, self._dtype, self.backend) for x in everything)
        output, after = self.inner.call(params, narrow, replace(inputs, args=args, kwargs=kwargs))
        restored = {n: _like(x, state[n], self.backend) for n, x in after.items()}
        return _cast(output, wide, self.backend), restored


def _cast(values: Any, dtype: str, backend: Backend) -> Any:
    def cast(x: Any) -> Any:
        floating = backend.owns(x) and backend.is_floating(x)
        return backend.ops.astype(x, dtype) if floating else x

    return tree.map(cast, values)


def _like(x: Array, like: Array, backend: Backend) -> Array:
    # A random key has no dtype to go back to.
    return backend.ops.astype(x, backend.dtype_name(like)) if backend.is_floating(x) else x
