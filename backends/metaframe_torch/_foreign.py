"""A call of another library's model that computes with torch, such as one of Keras.

What in it would not survive a second derivative, or `vmap`, is caught on its way into torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from metaframe_torch import _tape

T = TypeVar("T")
RECURRENCES = frozenset({"lstm", "gru", "rnn_tanh", "rnn_relu"})


def run_foreign(run: Callable[[], T], *, twice: bool) -> tuple[T, Sequence[Tensor]]:
    """See the contract."""
    calls = _Calls(twice)
    # Attention by the kernel that has a second derivative.
    with sdpa_kernel(SDPBackend.MATH) if twice else contextlib.nullcontext(), calls:
        result = run()
    return result, list(calls.read.values())


class _Calls(TorchFunctionMode):
    """The calls into torch; `read` are the parameters among their arguments, by `id`."""

    def __init__(self, twice: bool) -> None:
        super().__init__()
        self.read: dict[int, Tensor] = {}
        self._twice = twice
        self._mapped = _tape.transforming()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        for x in (*args, *kwargs.values()):
            for y in x if isinstance(x, (list, tuple)) else (x,):
                if isinstance(y, nn.Parameter) and y.requires_grad:
                    self.read[id(y)] = y
        if self._mapped and kwargs.get("generator") is not None:
            return _apart(func, args, kwargs)
        if self._mapped and kwargs.get("memory_format") is not None:
            # An order in memory and no values; vmap does not know those of whole batches.
            kwargs = {**kwargs, "memory_format": torch.contiguous_format}
        if self._twice and getattr(func, "__name__", "") in RECURRENCES:
            with torch.backends.cudnn.flags(enabled=False):
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def _apart(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Numbers of a generator, the same for every task, as they are for every task alone.

    `vmap` would have the generator draw for all tasks at once. Transforms belong to a thread.
    """
    with ThreadPoolExecutor(1) as other:
        return other.submit(func, *args, **kwargs).result()
